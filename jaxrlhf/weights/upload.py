"""Upload of an export to the hub."""

import shlex
from pathlib import Path

from jaxrlhf.data import tokenizer
from jaxrlhf.errors import ConfigError, StorageError, first_line
from jaxrlhf.weights import peft, safetensors, sums
from jaxrlhf.weights.hub import CARD, CONFIG, GENERATION_CONFIG, resolve

MORE_TEMPLATES = "additional_chat_templates/*"
FILES = (
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    peft.CONFIG,
    "*.safetensors",
    safetensors.INDEX,
    *tokenizer.FILES,
    MORE_TEMPLATES,
    sums.SUMS,
)
"""Files of a folder that are uploaded, by name or pattern."""


def push_to_hub(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Upload a model folder, or the export of a run directory, to the hub and return the address of the repository.

    name: of the repository, ORG/NAME, or NAME under the user who is logged in. It is created if it does not exist,
        `private` unless that is False; an existing one keeps its visibility.
    Only the files of an export are uploaded: model card, config, weights and tokenizer.
    Raises ConfigError for a name that no repository can have; StorageError if nobody is logged in, the hub cannot be
    reached or refuses, or an existing repository is public and `private` is not False.
    """
    import huggingface_hub

    name = check_name(name)
    folder = resolve(Path(folder).expanduser().absolute())
    api = huggingface_hub.HfApi()
    try:
        name = api.create_repo(name, private=private, exist_ok=True, repo_type="model").repo_id
        is_private = api.repo_info(name).private
        if private and is_private is False:
            raise StorageError(
                f"hub repository {name} exists and is public; nothing was uploaded. Choose another name, or allow it "
                "with --public (private=False)"
            )
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload model with jaxrlhf"
        )
    except StorageError:
        raise
    except Exception as error:  # network and disk errors of several libraries
        later = f"hf upload {name} {shlex.quote(str(folder))} .{' --private' if private else ''}"
        raise StorageError(
            f"{_problem(error, name)}. The model stays in {folder}; `{later}` uploads it later"
        ) from error
    return f"https://huggingface.co/{name}"


def check_name(name: str) -> str:
    """The name of a repository without the scheme hf://. Raises ConfigError if no repository can have it."""
    from huggingface_hub import errors, utils

    name = name.removeprefix("hf://")
    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ConfigError(f"'{name}' cannot be the name of a hub repository, ORG/NAME: {first_line(error)}") from error
    return name


def notes(folder: Path) -> list[str]:
    """Warning if others may be unable to load the upload of a folder."""
    if not peft.is_adapter(folder):
        return []
    base, _ = peft.base_of(folder)
    if not Path(base).expanduser().exists():
        return []
    return [
        f"these are adapters for {base}, a folder of this machine (base_model_name_or_path in {peft.CONFIG}): others "
        "need that model too; --merge-lora exports the whole model"
    ]


def _problem(error: Exception, name: str) -> str:
    """Message for a failed upload: cause and remedy."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "nobody is logged in to the hub; run `hf auth login` with a token that may write"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub was not asked because HF_HUB_OFFLINE is set; unset it to upload"
    if status in (403, 404):
        return (
            f"the hub refuses to write to {name} ({first_line(error)}); use a name under your own account or "
            "organisation, and a token that may write (`hf auth login`)"
        )
    return f"{name} could not be uploaded to the hub ({type(error).__name__}: {first_line(error)})"
