"""Load a transformers tokenizer and the stop tokens of its model: no remote code, no torch, and no
network for a folder."""

import os
import re
from pathlib import Path
from typing import Any

from jaxrlhf.errors import DataError, first_line
from jaxrlhf.files import check_links, kind_of, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
FILES += ("merges.txt", "tokenizer.model", "chat_template.jinja")
MORE_TEMPLATES = "additional_chat_templates"


def check_folder(folder: Path) -> None:
    """Raise DataError if a link in the folder of a model or tokenizer leads out of it."""
    check_links(folder)
    if (templates := folder / MORE_TEMPLATES).is_dir():
        check_links(templates)


def from_pretrained(name: str, revision: str | None) -> Any:
    """Load the fast tokenizer of a folder or hub id. Raises DataError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences the warning that torch is missing
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # silences the warning about forked processes
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not any((folder / file).exists() for file in FILES):
        raise DataError(f"tokenizer {name}: the folder has no tokenizer files ({', '.join(FILES[:2])}, ...)")
    for file in FILES if local else ():
        if kind := kind_of(folder / file):  # a named pipe would wait for a writer
            raise DataError(f"tokenizer {name}: {file} is {kind}, not a file")
    if not local and (folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise DataError(f"tokenizer {name}: no such folder")
    if local:
        check_folder(folder)
    try:
        hf = AutoTokenizer.from_pretrained(
            str(folder) if local else name, revision=revision, trust_remote_code=False, local_files_only=local
        )
    except Exception as error:  # each kind of broken file raises another class
        raise DataError(f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from error
    if not getattr(hf, "is_fast", False):
        raise DataError(
            f"tokenizer {name}: it has no tokenizer.json; save it once as a fast tokenizer with transformers"
        )
    return hf


def generation_stops(folder: Path, name: str, revision: str | None) -> list[int]:
    """Read the ids of `eos_token_id` (an id, a list, or absent) from generation_config.json. Raises DataError."""
    from transformers.utils.hub import cached_file

    file: str | Path | None = folder / "generation_config.json"
    if not folder.is_dir():
        file = cached_file(
            name, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    if file is None or not Path(file).exists():
        return []
    eos = read_json(Path(file)).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{file}: eos_token_id is {eos!r}; expected a token id or a list of token ids")
    return ids
