"""From `(ModelConfig, params)` to a folder that transformers reads, whole or not at all."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf import lora
from jaxrlhf.data.tokenizer import FILES as TOKENIZER_FILES
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, StorageError
from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import card, families, mapping, peft, safetensors, writer
from jaxrlhf.weights.hub import CONFIG, GENERATION_CONFIG

CARD = "README.md"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export(
    directory: str | Path,
    model: ModelConfig,
    params: Params,
    *,
    source: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    stops: Sequence[int] = (),
    facts: Mapping[str, Any] | None = None,
    base: tuple[str, str | None] | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write `model` to `directory` in Hugging Face layout and return that path.

    source: a folder whose config.json and generation_config.json keep their keys, and whose tokenizer files are copied
        unless a `tokenizer` is given, which then also decides the special token ids.
    stops: ids that end a response besides those of the tokenizer; they go into generation_config.json with them.
    facts: what the model card says about the run (see `card.card`).
    base: of parameters with adapters, the model that they are for and its revision on the hub: what is written are the
        adapters, in PEFT's layout. Without it they are merged.
    dtype: of the written tensors; None: that of the parameters.
    Everything is written to a hidden folder beside `directory` that takes its name at the end. A directory that is
    there already is replaced if it is empty or an earlier export; else StorageError is raised, as when the disk is
    full.
    """
    directory = Path(directory).expanduser().absolute()
    _check_target(directory)
    apart = base if "lora" in params else None
    if apart is None:
        model, params = dataclasses.replace(model, adapters=None), lora.merge(params, model)
    found = mapping.sources(model, params, dtype) if apart is None else []
    partial, old = (directory.with_name(f".{directory.name}.{what}") for what in ("partial", "old"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        need, free = sum(s.nbytes for s in found), shutil.disk_usage(directory.parent).free
        if need > free:
            raise StorageError(f"{directory}: the export takes {need:,} bytes and the disk has {free:,} free")
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir()
        config = _write_configs(
            partial, model, params, None if source is None else Path(source), tokenizer, stops, dtype
        )
        (partial / CARD).write_text(card.card(model, config, facts or {}, adapters=apart is not None), encoding="utf-8")
        if apart is None:
            writer.write(partial, found, _bytes(max_shard_size))
        else:
            (partial / CONFIG).unlink()  # a folder of adapters is described by the model they are for
            peft.write(partial, model, params, *apart)
        _swap(partial, directory, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_configs(
    folder: Path,
    model: ModelConfig,
    params: Params,
    source: Path | None,
    tokenizer: Tokenizer | None,
    more_stops: Sequence[int],
    dtype: str | None,
) -> dict[str, Any]:
    """Everything but weights and card; returns what config.json says."""
    original, generation = (
        safetensors.read_json(source / name) if source is not None and (source / name).is_file() else {}
        for name in (CONFIG, GENERATION_CONFIG)
    )
    config = families.render(model, original, dtype or str(params["embed"]["embedding"].dtype))
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config = _with_ids(config, ids)
        stops = sorted({tokenizer.eos_id, *tokenizer.stop_ids, *more_stops})
        generation = _with_ids(generation, ids | {"eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id})
    elif source is not None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if model.head != "lm" and config.get("pad_token_id") is None and generation.get("pad_token_id") is not None:
        config["pad_token_id"] = generation["pad_token_id"]
    _write_json(folder / CONFIG, config)
    if generation and model.head == "lm":
        _write_json(folder / GENERATION_CONFIG, generation)
    return config


def _with_ids(config: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """`config` with these special tokens; one that already means the same (in a list, in another order) stays."""
    changed = {}
    for key, value in ids.items():
        old = config.get(key)
        listed, wanted = (set(v) if isinstance(v, list) else {v} for v in (old, value))
        if value is not None and not (listed == wanted or (isinstance(old, list) and wanted <= listed)):
            changed[key] = value
    return config | changed


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(directory: Path) -> None:
    if not directory.exists():
        return
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else [""]
    allowed = {CONFIG, GENERATION_CONFIG, CARD, peft.CONFIG, peft.WEIGHTS, safetensors.INDEX, *TOKENIZER_FILES}
    strange = sorted(n for n in names if n not in allowed and not _OURS.fullmatch(n))
    if strange or (names and not _has_our_card(directory)):
        why = f"it also holds {', '.join(strange[:5])}" if any(strange) else "it is not an export of jaxrlhf"
        raise StorageError(f"{directory}: exists and is not replaced, because {why}; give another folder")


def _has_our_card(directory: Path) -> bool:
    file = directory / CARD
    return file.is_file() and card.is_ours(file.read_text(encoding="utf-8", errors="replace"))


def _swap(partial: Path, directory: Path, old: Path) -> None:
    """Give the finished folder its name. What had it is moved aside first, and removed once the new one is in place."""
    _sync(partial)
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(size: int | str) -> int:
    """A number of bytes from 5_000_000_000, "5GB" or "4GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)?", str(size).upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match and (match[2] or "") in _UNITS else 0
    if count <= 0:
        raise ConfigError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    return count
