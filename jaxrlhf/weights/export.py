"""Atomic export of `(ModelConfig, params)` to a folder that transformers reads."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf import distributed, lora, sharding
from jaxrlhf.data.tokenizer import FILES as TOKENIZER_FILES
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, StorageError
from jaxrlhf.files import read_json
from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import card, families, mapping, peft, safetensors, sums, writer
from jaxrlhf.weights.hub import CARD, CONFIG, GENERATION_CONFIG

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


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
    """Write `model` to `directory` in Hugging Face layout and return its path.

    source: folder whose config.json and generation_config.json provide the other keys, and whose tokenizer files are
        copied unless `tokenizer` is given.
    tokenizer: saved with the model; determines the special token ids.
    stops: ids that end a response in addition to those of the tokenizer, for generation_config.json.
    facts: facts of the run for the model card (see `card.card`).
    base: (path or hub id, revision) of the base model: write only the adapters, in PEFT's layout. None: merge them.
    dtype: of the written tensors; None: that of the parameters.
    max_shard_size: bytes, or text such as "5GB".
    Everything is written to a hidden folder beside `directory`, which is renamed at the end; SHA256SUMS in it has a
    hash of every file. An existing directory is replaced if it is empty or an earlier export; otherwise, or if the disk
    is too small, StorageError is raised. Of several processes, process 0 writes.
    """
    directory = Path(directory).expanduser().absolute()
    adapters_of = base if "lora" in params else None
    sources = []
    if adapters_of is None:
        model, params = dataclasses.replace(model, adapters=None), lora.merge(params, model)
        sources = mapping.sources(model, params, dtype)
    else:
        params = {**params, **sharding.fetch({name: params[name] for name in ("lora", "score") if name in params})}
    partial, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "old"))
    source = None if source is None else Path(source)

    def prepare() -> None:
        """Write everything but the weights."""
        _check_replaceable(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        size, free = sum(s.nbytes for s in sources), shutil.disk_usage(directory.parent).free
        if size > free:
            raise StorageError(f"{directory}: the export takes {size:,} bytes and the disk has {free:,} free")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
        partial.mkdir()
        config = _write_configs(
            partial, model, source, tokenizer, stops, dtype or str(params["embed"]["embedding"].dtype)
        )
        inherited = {} if source is None else card.inherited(source / CARD)
        text = card.card(model, config, inherited | dict(facts or {}), adapters=adapters_of is not None)
        (partial / CARD).write_text(text, encoding="utf-8")
        if adapters_of is not None:
            (partial / CONFIG).unlink()  # adapters are described by the config.json of the base model
            multimodal = families.multimodal.is_multimodal(_read(source, CONFIG))
            peft.write(partial, model, params, *adapters_of, multimodal=multimodal)

    try:
        distributed.on_primary(prepare)
        if adapters_of is None:
            writer.write(partial, sources, _bytes(max_shard_size))
        distributed.on_primary(lambda: sums.write(partial))
        distributed.on_primary(lambda: _rename(partial, directory, old))
    finally:
        if distributed.is_primary():
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _write_configs(
    folder: Path,
    model: ModelConfig,
    source: Path | None,
    tokenizer: Tokenizer | None,
    extra_stops: Sequence[int],
    dtype: str,
) -> dict[str, Any]:
    """Write config.json, generation_config.json and the tokenizer; returns the content of config.json."""
    original, generation = (_read(source, name) for name in (CONFIG, GENERATION_CONFIG))
    config = families.render(model, original, dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config = _with_token_ids(config, ids)
        stops = sorted({tokenizer.eos_id, *tokenizer.stop_ids, *extra_stops})
        generation = _with_token_ids(generation, ids | {"eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id})
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


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    """The content of a JSON file; {} without one."""
    return read_json(folder / name) if folder is not None and (folder / name).is_file() else {}


def _with_token_ids(config: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """`config` with these special tokens; a value is kept if it is equal up to order or a list that contains them."""
    changed = {}
    for key, value in ids.items():
        old = config.get(key)
        old_ids, new_ids = (set(v) if isinstance(v, list) else {v} for v in (old, value))
        if value is not None and not (old_ids == new_ids or (isinstance(old, list) and new_ids <= old_ids)):
            changed[key] = value
    return config | changed


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_replaceable(directory: Path) -> None:
    """Raise StorageError if `directory` exists and is neither empty nor an export of jaxrlhf."""
    if not directory.exists():
        return
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else [""]
    known = {CONFIG, GENERATION_CONFIG, CARD, sums.SUMS, peft.CONFIG, peft.WEIGHTS, safetensors.INDEX, *TOKENIZER_FILES}
    foreign = sorted(name for name in names if name not in known and not _WEIGHTS.fullmatch(name))
    readme = directory / CARD
    has_card = readme.is_file() and card.is_ours(readme.read_text(encoding="utf-8", errors="replace"))
    if foreign or (names and not has_card):
        reason = f"it also holds {', '.join(foreign[:5])}" if any(foreign) else "it is not an export of jaxrlhf"
        raise StorageError(f"{directory}: exists and is not replaced, because {reason}; give another folder")


def _rename(partial: Path, directory: Path, old: Path) -> None:
    """Rename the finished folder; an existing one is moved aside first and removed at the end."""
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
    """Number of bytes of 5_000_000_000, "5GB" or "4GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)?", str(size).upper())
    count = int(float(match[1]) * _UNITS.get(match[2] or "", 0)) if match else 0
    if count <= 0:
        raise ConfigError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    return count
