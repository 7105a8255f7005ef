"""From a folder, a run directory or a hub id to `(ModelConfig, params)`."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import lora, models, sharding
from jaxrlhf.config import DType
from jaxrlhf.data import tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.models import ModelConfig
from jaxrlhf.runtime import resolve_dtype
from jaxrlhf.types import Params
from jaxrlhf.weights import families, mapping, peft, safetensors

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
Remat = Literal["none", "full", "dots"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_HUB_SCHEME = "hf://"
_abstract = ContextVar("abstract_weights", default=False)


@contextmanager
def abstract_weights() -> Iterator[None]:
    """While the block runs, `load` reads no weights and returns `(model, shapes)`.

    `shapes` are `jax.ShapeDtypeStruct`s with the shapes, dtypes and, if a mesh is given, shardings of the arrays that
    `load` would return. `dtype="auto"` reads the headers of the weight files, which hold the stored dtypes.
    """
    token = _abstract.set(True)
    try:
        yield
    finally:
        _abstract.reset(token)


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that `path` means: a model folder, the export/ of a run directory, or a download from the hub.

    A local path never touches the network. `hf://org/name` is always a hub id. With `weights` false a download leaves
    the weights out, and a folder needs no config.json (a tokenizer alone, for example).
    Raises DataError that says what was looked for.
    """
    text = str(path)
    folder = Path(text).expanduser()
    if text.startswith(_HUB_SCHEME):
        return _download(text.removeprefix(_HUB_SCHEME), revision, weights)
    if not text:
        raise DataError("the path of a model or tokenizer is empty; give a folder, a run directory or a hub id")
    if folder.is_dir():
        return _local(folder, weights)
    if folder.exists():
        raise DataError(f"{folder}: is a file; give the folder that holds {CONFIG} and the weights")
    if _looks_local(text):
        near = folder.parent if folder.parent.is_dir() else None
        around = f"; {near} holds: {_listing(near)}" if near else f"; nor is there a folder {folder.parent}"
        raise DataError(f"{folder}: no such folder{around}. For a model on the hub write {_HUB_SCHEME}ORG/NAME")
    return _download(text, revision, weights)


def described_by(folder: Path, *, weights: bool = False) -> tuple[Path, Path | None]:
    """(the folder with the config.json, the folder with adapters for it) of what `resolve` found. `weights`: what they
    are for is resolved with its weights."""
    if not peft.is_adapter(folder):
        return folder, None
    base, revision = peft.base_of(folder)
    try:
        whole = resolve(base, revision, weights=weights)
    except DataError as error:
        raise DataError(f"{folder} holds adapters for '{base}' (base_model_name_or_path): {error}") from error
    if peft.is_adapter(whole):
        raise DataError(f"{folder} holds adapters for {whole}, which holds adapters too; merge those first")
    return whole, folder


def tokenizer_folder(path: str | Path, revision: str | None = None) -> Path:
    """Where the tokenizer of a model is: with its adapters, if there is one, else with the model they are for."""
    folder = resolve(path, revision, weights=False)
    return folder if any((folder / name).is_file() for name in tokenizer.FILES) else described_by(folder)[0]


def _local(folder: Path, weights: bool) -> Path:
    for place in (folder, folder / "export"):
        if (place / CONFIG).is_file() or (place / peft.CONFIG).is_file():
            return place
    if (folder / "run.json").exists():
        raise DataError(
            f"{folder}: a run that has no export yet (looked for export/{CONFIG}); let it finish, "
            f"or write a checkpoint with `jaxrlhf export {folder} DIR`"
        )
    if weights:
        raise DataError(f"{folder}: no {CONFIG} and no export/{CONFIG}; the folder holds: {_listing(folder)}")
    return folder


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return (", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) or "nothing"


def _looks_local(text: str) -> bool:
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        return True
    return "/" in text and Path(text).parent.is_dir()


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """A snapshot in the hub's cache; only what we read is fetched, with the hub's own progress bars."""
    import huggingface_hub
    from huggingface_hub import errors

    if not _HUB_ID.fullmatch(name):
        raise DataError(f"'{name}' is not a hub id; ids look like ORG/NAME")
    patterns = [CONFIG, GENERATION_CONFIG, peft.CONFIG, peft.WEIGHTS, *tokenizer.FILES]  # adapters are small
    if weights:
        patterns += [safetensors.SINGLE, safetensors.INDEX, "model-*.safetensors"]
    at = f" at revision '{revision}'" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise DataError(
            f"hub model '{name}': its owner asks for consent; accept the terms on https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"'{name}': there is no such folder here and no such model on the hub; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"hub model '{name}': has no revision '{revision}' (branch, tag or commit)") from error
    except Exception as error:  # two HTTP libraries and a disk stand behind this call
        raise DataError(
            f"'{name}': there is no such folder here, the hub's cache does not hold it{at}, and the hub could not be "
            f"asked ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
            "Check the network (and HF_HUB_OFFLINE), or give the path of a local folder"
        ) from error
    if peft.is_adapter(folder):
        return folder
    if weights and not (folder / CONFIG).is_file():
        raise DataError(f"hub model '{name}'{at}: has no {CONFIG}; it is not a transformers model")
    if weights and not any((folder / n).exists() for n in (safetensors.SINGLE, safetensors.INDEX)):
        raise DataError(
            f"hub model '{name}'{at}: no {safetensors.SINGLE} and no {safetensors.INDEX} (or none in the cache, if the "
            "network is off). jaxrlhf reads safetensors only; look for a revision that has them, or convert the model "
            "with transformers: from_pretrained(...).save_pretrained(FOLDER)"
        )
    return folder


def load_config(
    path: str | Path,
    *,
    revision: str | None = None,
    head: str | None = None,
    compute_dtype: DType = "auto",
    remat: Remat = "none",
) -> ModelConfig:
    """The description of a model from its config.json; arguments and errors as in `load`."""
    folder = resolve(path, revision, weights=False)
    return _describe(folder, head, compute_dtype, remat)[0]


def _describe(folder: Path, head: str | None, compute_dtype: DType, remat: Remat) -> tuple[ModelConfig, bool]:
    """(the model, whether its head is to be made afresh)."""
    folder, adapters = described_by(folder)
    labels = 0 if adapters is None else peft.labels(adapters)
    if labels:  # the head comes with the adapters
        model = _describe(folder, "linear", compute_dtype, remat)[0]
        if head not in (None, "linear"):
            raise DataError(f"{adapters}: adapters with a trained linear score head, and '{head}' was asked for")
        return dataclasses.replace(model, num_labels=labels), False
    file = folder / CONFIG
    if not file.is_file():
        raise DataError(f"{folder}: no {CONFIG}; the folder holds: {_listing(folder)}")
    raw = safetensors.read_json(file)
    model = families.parse(raw, str(file))
    if head not in (None, "lm", "linear", "mlp"):
        raise ConfigError(f"head must be 'lm', 'linear' or 'mlp', got {head!r}")
    fresh = head is not None and head != model.head
    if fresh and model.head != "lm":
        have = f"{file}: describes a {'/'.join(raw.get('architectures') or ())} with a trained {model.head} score head"
        if head == "lm":
            raise DataError(f"{have} and no language-model head: it can score text, not write it")
        raise DataError(f"{have}, not '{head}' as asked; ask for '{model.head}', or start from a language model")
    if fresh:
        model = dataclasses.replace(model, head=head, num_labels=1)
    return dataclasses.replace(model, dtype=resolve_dtype(compute_dtype, jax.default_backend()), remat=remat), fresh


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DType = "auto",
    head: str | None = None,
    compute_dtype: DType = "auto",
    remat: Remat = "none",
    init: Literal["pretrained", "random"] = "pretrained",
    key: Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, Params]:
    """A model from a folder in Hugging Face layout, a run directory or a hub id: `(model, params)`.

    dtype: of the parameters; "auto": as stored ("float32" for float16 files and for `init="random"`).
    head: "lm", "linear" or "mlp"; None: what the folder holds. A language model asked for with a scalar head gets a
        fresh one, drawn with `key`; a sequence classification folder is a reward model as it stands.
    compute_dtype: operands of matrix products; "auto": float32 on a CPU, else bfloat16.
    init: "random" reads config.json alone and draws the parameters with `key`.
    A folder with adapters in PEFT's layout is the model that they are for with them merged in.
    mesh: where to place the parameters, by the rule table of sharding.py; None: the default device.
    On a CPU, memory stays under the size of the parameters and of the largest tensor together.
    Raises DataError for a folder that cannot be used, ConfigError for arguments that do not go together.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    abstract_only = _abstract.get()
    needs_weights = init == "pretrained" and (dtype == "auto" or not abstract_only)
    folder = resolve(path, revision, weights=needs_weights)
    model, fresh = _describe(folder, head, compute_dtype, remat)
    folder, beside = described_by(folder, weights=needs_weights)
    if beside:
        if init == "random":
            raise ConfigError(f"{beside}: adapters belong to the weights of {folder}; random ones cannot be had")
        if abstract_only:
            key = jax.random.key(0) if peft.labels(beside) else key
            _, shapes = load(folder, dtype=dtype, head=model.head, key=key, mesh=mesh)
            if peft.labels(beside):  # the score head of the adapters is float32 whatever `dtype` is
                kernel = shapes["score"]["kernel"]
                shape = (model.hidden_size, model.num_labels)
                shapes["score"] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=kernel.sharding)}
            return model, shapes
        found, added = peft.read(beside, model)
        key = jax.random.key(0) if "score" in added else key  # the head of the base gives way to theirs
        with jax.default_device(None if mesh is None else _one_device(mesh)):  # to the same bits on any mesh
            base = load(folder, dtype=dtype, head=model.head, compute_dtype=compute_dtype, remat=remat, key=key)
            params = lora.merge({**base[1], **added}, dataclasses.replace(model, adapters=found))
        if mesh is not None:
            params = jax.device_put(jax.device_get(params), sharding.shardings(params, mesh))
        return model, params
    made = "params" if init == "random" else "score" if fresh else ""
    if made and key is None:
        what = "random parameters need" if init == "random" else f"it has no '{head}' head, and a fresh one needs"
        raise ConfigError(f"{folder}: {what} a key: load(..., key=jax.random.key(seed))")
    draw = partial(models.init, model, dtype="float32" if dtype == "auto" else dtype)
    abstract = jax.eval_shape(draw, jax.random.key(0))
    placed = None if mesh is None else sharding.shardings(abstract, mesh)
    if abstract_only:
        if needs_weights:
            found = mapping.match(model, abstract, safetensors.scan_folder(folder), without=made, where=str(folder))
            abstract = mapping.with_stored_dtypes(model, abstract, found, without=made)
        return model, abstract if placed is None else sharding.with_shardings(abstract, placed)
    if init == "random":
        return model, jax.jit(draw, out_shardings=placed)(key)
    entries = safetensors.scan_folder(folder)
    found = mapping.match(model, abstract, entries, without=made, where=str(folder))
    params = mapping.fill(model, abstract, found, without=made, dtype=dtype, shardings=placed)
    if fresh:
        params["score"] = _draw_score(draw, key, None if placed is None else placed["score"])
    return model, params


def _one_device(mesh: jax.sharding.Mesh) -> Any:
    """The host, which has room for a whole model where one device of the mesh may not."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return mesh.local_devices[0]


def _draw_score(draw: Callable[[Array], Params], key: Array | None, placed: Params | None) -> Params:
    # Under jit the rest of the model is never computed
    return jax.jit(lambda k: draw(k)["score"], out_shardings=placed)(key)


def resize_embeddings(model: ModelConfig, params: Params, vocab_size: int) -> tuple[ModelConfig, Params]:
    """The model with `vocab_size` >= V tokens; new rows of the embedding and of an untied head are the mean of the old.

    So the logit of a new token is the mean of the others'. The arrays lie where jax puts them; place them again if they
    are to lie on a mesh. Raises ConfigError if V is larger.
    """
    more = vocab_size - model.vocab_size
    if more < 0:
        raise ConfigError(f"cannot shrink a vocabulary of {model.vocab_size} to {vocab_size} tokens")
    if more == 0:
        return model, params

    def grow(table: Array, axis: int) -> Array:
        # on the host: a sum over devices would round by how they cut the table
        mean = np.mean(jax.device_get(table).astype(np.float32), axis=axis, keepdims=True).astype(table.dtype)
        return jnp.concatenate([table, jnp.repeat(mean, more, axis=axis)], axis=axis)

    params = {**params, "embed": {"embedding": grow(params["embed"]["embedding"], 0)}}
    if "lm_head" in params:
        params["lm_head"] = {"kernel": grow(params["lm_head"]["kernel"], 1)}
    return dataclasses.replace(model, vocab_size=vocab_size), params
