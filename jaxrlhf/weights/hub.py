"""Resolution of model paths: a folder, a run directory or a hub id."""

import re
from pathlib import Path

from jaxrlhf.data import hf_tokenizer, offline, tokenizer
from jaxrlhf.errors import DataError, first_line, quoted
from jaxrlhf.files import check_links, kind_of, path_problem
from jaxrlhf.weights import peft, safetensors

CARD = "README.md"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_HUB_SCHEME = "hf://"


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model: `path` itself, the export/ of a run directory, or a download from the hub.

    A local path never touches the network; `hf://org/name` is always a hub id. With `weights` false a download leaves
    out the weights, and a local folder needs no config.json (it may hold only a tokenizer). A link that leads out of
    the folder is refused.
    Raises DataError with what was looked for.
    """
    text = str(path)
    if problem := path_problem(text):
        raise DataError(f"model {quoted(text)} {problem}")
    folder = Path(text).expanduser()
    if text.startswith(_HUB_SCHEME):
        return _download(text.removeprefix(_HUB_SCHEME), revision, weights)
    if not text:
        raise DataError("the path of a model or tokenizer is empty; give a folder, a run directory or a hub id")
    if folder.is_dir():
        return _resolve_local(folder, weights)
    if folder.exists():
        raise DataError(f"{folder}: is a file; give the folder that holds {CONFIG} and the weights")
    if _looks_local(text):
        parent = folder.parent
        nearby = f"{parent} holds: {listing(parent)}" if parent.is_dir() else f"{parent} does not exist either"
        raise DataError(f"{folder}: no such folder; {nearby}. For a model on the hub write {_HUB_SCHEME}ORG/NAME")
    return _download(text, revision, weights)


def base_and_adapters(folder: Path, *, weights: bool = False) -> tuple[Path, Path | None]:
    """(folder of the base model, folder of its adapters or None) for a folder returned by `resolve`.

    `weights`: resolve the base model of adapters together with its weights. Raises DataError if it is not found or is
    an adapter folder itself.
    """
    if not peft.is_adapter(folder):
        return folder, None
    base, revision = peft.base_of(folder)
    try:
        base_folder = resolve(base, revision, weights=weights)
    except DataError as error:
        raise DataError(f"{folder} holds adapters for '{base}' (base_model_name_or_path): {error}") from error
    if peft.is_adapter(base_folder):
        raise DataError(f"{folder} holds adapters for {base_folder}, which holds adapters too; merge those first")
    return base_folder, folder


def tokenizer_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model's tokenizer: that of its adapters if they have one, else that of the base model."""
    folder = resolve(path, revision, weights=False)
    has_tokenizer = any((folder / name).is_file() for name in tokenizer.FILES)
    return folder if has_tokenizer else base_and_adapters(folder)[0]


def listing(folder: Path) -> str:
    """The files of a folder, for messages."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return (", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) or "nothing"


def _resolve_local(folder: Path, weights: bool) -> Path:
    for candidate in (folder, folder / "export"):
        for file in (candidate / CONFIG, candidate / peft.CONFIG):
            if kind := kind_of(file):  # a named pipe would wait for a writer
                raise DataError(f"{file}: is {kind}, not a file")
        if (candidate / CONFIG).is_file() or (candidate / peft.CONFIG).is_file():
            if candidate != folder and candidate.is_symlink():
                check_links(folder)
            return _checked(candidate)
    if (folder / "run.json").exists():
        raise DataError(
            f"{folder}: a run that has no export yet (looked for export/{CONFIG}); let it finish, "
            f"or write a checkpoint with `jaxrlhf export {folder} DIR`"
        )
    if weights:
        raise DataError(f"{folder}: no {CONFIG} and no export/{CONFIG}; the folder holds: {listing(folder)}")
    return _checked(folder)


def _checked(folder: Path) -> Path:
    hf_tokenizer.check_folder(folder)
    return folder


def _looks_local(text: str) -> bool:
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        return True
    return "/" in text and Path(text).parent.is_dir()


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """Download the files that jaxrlhf reads into the hub's cache."""
    import huggingface_hub
    from huggingface_hub import errors

    if not _HUB_ID.fullmatch(name):
        raise DataError(f"'{name}' is not a hub id; ids look like ORG/NAME")
    patterns = [CARD, CONFIG, GENERATION_CONFIG, peft.CONFIG, peft.WEIGHTS, *tokenizer.FILES]  # adapters are small
    if weights:
        patterns += [safetensors.SINGLE, safetensors.INDEX, "model-*.safetensors"]
    at = f" at revision '{revision}'" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise DataError(
            f"hub model '{name}': access requires consent to its terms; accept them on https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"'{name}': there is no such folder here and no such model on the hub; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"hub model '{name}': has no revision '{revision}' (branch, tag or commit)") from error
    except Exception as error:  # network and disk errors of several libraries
        missing = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
        if missing and (reason := offline.refusal("model", huggingface_hub.constants.HF_HUB_CACHE)):
            raise DataError(f"model '{name}'{at}: {reason}") from error
        raise DataError(
            f"'{name}': there is no such folder here, the hub's cache does not hold it{at}, and the hub could not be "
            f"asked ({type(error).__name__}: {first_line(error)}). "
            "Check the network, or give the path of a local folder"
        ) from error
    if peft.is_adapter(_checked(folder)):
        return folder
    if weights and not (folder / CONFIG).is_file():
        raise DataError(f"hub model '{name}'{at}: has no {CONFIG}; it is not a transformers model")
    if weights and not any((folder / file).exists() for file in (safetensors.SINGLE, safetensors.INDEX)):
        raise DataError(
            f"hub model '{name}'{at}: no {safetensors.SINGLE} and no {safetensors.INDEX} (or none in the cache, if the "
            "network is off). jaxrlhf reads safetensors only; look for a revision that has them, or convert the model "
            "with transformers: from_pretrained(...).save_pretrained(FOLDER)"
        )
    return folder
