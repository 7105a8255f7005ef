"""Loading of models and tokenizers from a folder in Hugging Face layout, a run directory or the hub."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
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
from jaxrlhf.config import DType, ModelSource, TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.files import read_json
from jaxrlhf.models import ModelConfig
from jaxrlhf.runtime import resolve_dtype, resolve_remat
from jaxrlhf.types import Params
from jaxrlhf.weights import families, mapping, peft, safetensors
from jaxrlhf.weights.hub import CONFIG, base_and_adapters, listing, resolve, tokenizer_folder

Remat = Literal["auto", "none", "full", "dots"]
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


def abstract_weights_wanted() -> bool:
    """Return True in a block of `abstract_weights`."""
    return _abstract.get()


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
    """Load `(model, params)` from a folder in Hugging Face layout, a run directory or a hub id.

    dtype: of the parameters; "auto": as stored ("float32" for float16 files and for `init="random"`).
    head: "lm", "linear" or "mlp"; None: as stored. A language model loaded with a scalar head gets a new one, drawn
        with `key`; a sequence classification folder is a reward model already.
    compute_dtype: operands of matrix products; "auto": float32 on a CPU, else bfloat16.
    init: "random" reads only config.json and draws the parameters with `key`.
    mesh: places the parameters by the rules of sharding.py; None: the default device.
    A folder with adapters in PEFT's layout gives its base model with the adapters merged.
    On a CPU, peak memory is below the size of the parameters plus the largest tensor.
    Raises DataError for a folder that cannot be used, ConfigError for invalid or inconsistent arguments.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    read_files = init == "pretrained" and (dtype == "auto" or not _abstract.get())
    folder = resolve(path, revision, weights=read_files)
    model, new_head = _read_config(folder, head, compute_dtype, remat, sharding.platform(mesh))
    if mesh is not None and mesh.size > 1:
        model = dataclasses.replace(model, mesh=mesh)
    folder, adapters = base_and_adapters(folder, weights=read_files)
    if adapters:
        if init == "random":
            raise ConfigError(f"{adapters}: adapters need the weights of {folder}; init cannot be 'random'")
        return model, _load_merged(folder, adapters, model, dtype=dtype, key=key, mesh=mesh)
    if (init == "random" or new_head) and key is None:
        need = "random parameters need" if init == "random" else f"it has no '{head}' head, and a new one needs"
        raise ConfigError(f"{folder}: {need} a key: load(..., key=jax.random.key(seed))")
    draw = partial(models.init, model, dtype="float32" if dtype == "auto" else dtype)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    shardings = None if mesh is None else sharding.shardings(shapes, mesh)
    entries = {}
    if read_files:
        entries = mapping.match(model, shapes, tensors_of(folder), new_head=new_head, where=str(folder))
    if _abstract.get():
        shapes = mapping.with_stored_dtypes(model, shapes, entries)
        return model, shapes if shardings is None else sharding.with_shardings(shapes, shardings)
    if init == "random":
        return model, jax.jit(draw, out_shardings=shardings)(key)
    params = mapping.fill(model, shapes, entries, dtype=dtype, shardings=shardings)
    if new_head:  # under jit the rest of the model is not computed
        score_shardings = None if shardings is None else shardings["score"]
        params["score"] = jax.jit(lambda k: draw(k)["score"], out_shardings=score_shardings)(key)
    return model, params


def _load_merged(
    folder: Path, adapters: Path, model: ModelConfig, *, dtype: DType, key: Array | None, mesh: jax.sharding.Mesh | None
) -> Params:
    """The parameters of the base model in `folder` with the adapters merged."""
    head_in_adapters = peft.num_labels(adapters) > 0
    if head_in_adapters:
        key = jax.random.key(0)  # the head drawn for the base model is replaced
    load_base = partial(load, folder, dtype=dtype, head=model.head, key=key)
    if _abstract.get():
        shapes = load_base(mesh=mesh)[1]
        if head_in_adapters:  # float32 for every `dtype`
            shape, place = (model.hidden_size, model.num_labels), shapes["score"]["kernel"].sharding
            shapes["score"] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}
        return shapes
    static, arrays = peft.read(adapters, model)
    # Merge on one device, so that the sums are the same on every mesh
    with jax.default_device(None if mesh is None else _merge_device(mesh)):
        params = lora.merge({**load_base()[1], **arrays}, dataclasses.replace(model, adapters=static))
    return params if mesh is None else sharding.place(jax.device_get(params), sharding.shardings(params, mesh))


def _merge_device(mesh: jax.sharding.Mesh) -> Any:
    """The host, because the whole model may not fit into one device of the mesh."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return mesh.local_devices[0]


def tensors_of(folder: Path) -> dict[str, safetensors.Entry]:
    """The tensors of a model folder by name; of a multimodal one those of its text model, by their names in a folder of
    that. Those of other parts are left out with a warning."""
    entries, config = safetensors.scan_folder(folder), read_json(folder / CONFIG)
    model = families.parse(config, str(folder / CONFIG))
    others = families.multimodal.left_out(entries, config["model_type"])
    if others:
        size = sum(entries[name].nbytes for name in others) / 1e6
        parts = ", ".join(f"{part} ({count})" for part, count in Counter(others.values()).items())
        warnings.warn(
            f"{folder}: {len(others)} tensors ({size:,.1f} MB) are left out: {parts}. The text model ({model.family}) "
            "is used alone, and exported alone",
            stacklevel=1,  # shown once, wherever the model is loaded
        )
    entries = {name: entry for name, entry in entries.items() if name not in others}
    if not families.multimodal.is_multimodal(config):
        return entries
    decoder, named = families.tensor_names(model).decoder, {}
    for name, entry in entries.items():
        text_name = families.multimodal.text_name(name, decoder)
        if text_name in named:
            raise DataError(f"{folder}: {name} and {named[text_name].name} are the same tensor of the text model")
        named[text_name] = entry
    return named


def load_config(
    path: str | Path,
    *,
    revision: str | None = None,
    head: str | None = None,
    compute_dtype: DType = "auto",
    remat: Remat = "none",
    platform: sharding.Platform | None = None,
) -> ModelConfig:
    """The `ModelConfig` that `load` returns, from config.json alone; arguments and errors as in `load`. `platform` is
    that of the devices that will compute it (None: jax's default)."""
    folder = resolve(path, revision, weights=False)
    return _read_config(folder, head, compute_dtype, remat, platform or sharding.platform())[0]


def _read_config(
    folder: Path, head: str | None, compute_dtype: DType, remat: Remat, platform: sharding.Platform
) -> tuple[ModelConfig, bool]:
    """(the model, whether it needs a new score head)."""
    folder, adapters = base_and_adapters(folder)
    labels = 0 if adapters is None else peft.num_labels(adapters)
    if labels:  # the score head is stored with the adapters
        if head not in (None, "linear"):
            raise DataError(f"{adapters}: adapters with a trained linear score head, and '{head}' was asked for")
        model, _ = _read_config(folder, "linear", compute_dtype, remat, platform)
        return dataclasses.replace(model, num_labels=labels), False
    file = folder / CONFIG
    if not file.is_file():
        raise DataError(f"{folder}: no {CONFIG}; the folder holds: {listing(folder)}")
    config = read_json(file)
    model = families.parse(config, str(file))
    if head not in (None, "lm", "linear", "mlp"):
        raise ConfigError(f"head must be 'lm', 'linear' or 'mlp', got {head!r}")
    new_head = head is not None and head != model.head
    if new_head and model.head != "lm":
        stored = (
            f"{file}: describes a {'/'.join(config.get('architectures') or ())} with a trained {model.head} score head"
        )
        if head == "lm":
            raise DataError(f"{stored} and no language-model head: it can score text, not write it")
        raise DataError(f"{stored}, not '{head}' as asked; ask for '{model.head}', or start from a language model")
    if new_head:
        model = dataclasses.replace(model, head=head, num_labels=1)
    model = dataclasses.replace(
        model,
        platform=platform,
        dtype=resolve_dtype(compute_dtype, platform),
        remat=resolve_remat(remat, platform),
    )
    return model, new_head


def resize_embeddings(model: ModelConfig, params: Params, vocab_size: int) -> tuple[ModelConfig, Params]:
    """Grow the vocabulary to `vocab_size`; new rows of the embedding and of an untied head are the mean of the others.

    The logit of a new token is then the mean of the others' logits. The new arrays are on the default device or where
    jax places them; a mesh needs another `device_put`. Raises ConfigError for a smaller vocabulary.
    """
    added = vocab_size - model.vocab_size
    if added < 0:
        raise ConfigError(f"cannot shrink a vocabulary of {model.vocab_size} to {vocab_size} tokens")
    if added == 0:
        return model, params

    def grow(table: Array, axis: int) -> Array:
        # On the host: the rounding of a sum over devices would depend on the sharding
        mean = np.mean(sharding.fetch(table).astype(np.float32), axis=axis, keepdims=True).astype(table.dtype)
        return jnp.concatenate([table, jnp.repeat(mean, added, axis=axis)], axis=axis)

    params = {**params, "embed": {"embedding": grow(params["embed"]["embedding"], 0)}}
    if "lm_head" in params:
        params["lm_head"] = {"kernel": grow(params["lm_head"]["kernel"], 1)}
    return dataclasses.replace(model, vocab_size=vocab_size), params


def open_tokenizer(source: TokenizerSource, model: ModelSource) -> Tokenizer:
    """Load the tokenizer of a run: from its own path if given, else the model's. The model's stop tokens always count.

    Raises ConfigError if the model has no path, DataError if a folder does not exist, holds an unsupported model or has
    no tokenizer.
    """
    if not model.path:
        raise ConfigError("model.path is empty: give a folder in Hugging Face layout, a run directory or a hub id")
    load_config(model.path, revision=model.revision)  # for a clearer error than transformers' on an unsupported model
    folder = tokenizer_folder(model.path, model.revision)
    own_folder = str(resolve(source.path, weights=False)) if source.path else ""
    return load_tokenizer(folder, dataclasses.replace(source, path=own_folder))
