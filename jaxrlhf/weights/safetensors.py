"""The safetensors format: a reader that trusts nothing. (writer.py writes.)

A file is the length N of its header (8 bytes, little endian), N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and the data (https://huggingface.co/docs/safetensors).
Files come from strangers, so every number in a header is checked against the file before a byte of data is read.
Tensors are read one at a time into memory of their own: a mapped file would count as resident memory page by page.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import DataError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 25_000_000  # bytes; a header of 100,000 tensors has about 15 MB
MAX_FILES = 10_000
MAX_DIMENSIONS = 8
CHUNK = 1 << 24  # bytes compared at a time
ALIGNMENT = 64  # bytes; from here on jax uses host memory in place on a CPU instead of copying it
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is and where its bytes lie."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(file: Path, *, limit: int = MAX_HEADER) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, duplicate keys refused. Raises DataError."""
    try:
        if file.stat().st_size > limit:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes is more than the {limit:,} allowed for this file")
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    return _parse_json(text, str(file))


def scan(file: Path) -> dict[str, Entry]:
    """The tensors of one file, from its header alone.

    Raises DataError if the header is longer than MAX_HEADER or the file, is not JSON, names a tensor twice, has a dtype
    outside DTYPES, or if the byte ranges overlap, leave a hole, or do not end where the file ends.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                _refuse(file, f"its header claims {length:,} bytes and the file has {size:,}; it may be cut short")
            if length > MAX_HEADER:
                _refuse(file, f"its header claims {length:,} bytes, more than the {MAX_HEADER:,} allowed")
            text = stream.read(length)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    header = _parse_json(text, f"header of {file}")
    header.pop("__metadata__", None)
    ranges = [_range(file, name, fields) for name, fields in header.items()]
    end = 0
    for begin, stop, entry in sorted(ranges, key=lambda item: item[:2]):
        if begin != end:
            _refuse(
                file, f"the data of '{entry.name}' begins at byte {begin:,} where {end:,} was due (overlap or hole)"
            )
        end = stop
    if end != size - 8 - length:
        _refuse(file, f"its tensors take {end:,} bytes and the file holds {size - 8 - length:,}; it may be cut short")
    start = 8 + length
    return {e.name: Entry(e.name, file, e.dtype, e.shape, start + begin) for begin, _, e in ranges}


def _range(file: Path, name: str, fields: Any) -> tuple[int, int, Entry]:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"the header entry of '{name}' must have exactly dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _naturals(shape, MAX_DIMENSIONS) or not _naturals(offsets, 2) or len(offsets) != 2:
        _refuse(file, f"'{name}': shape and data_offsets must be short lists of whole numbers >= 0")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        _refuse(
            file,
            f"'{name}' is stored as {fields['dtype']!r}, which is not one of {', '.join(DTYPES)}; "
            "quantised models are not supported, use the model's float version",
        )
    entry = Entry(name, file, DTYPES[fields["dtype"]], tuple(shape), 0)
    begin, stop = offsets
    if stop - begin != entry.nbytes:
        _refuse(
            file, f"'{name}' {fields['dtype']} {shape} takes {entry.nbytes:,} bytes, data_offsets say {stop - begin:,}"
        )
    return begin, stop, entry


def scan_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names.

    A shard must be a plain file name inside the folder (it may be a link, as in the hub's cache). Nothing but
    safetensors is ever opened. Raises DataError.
    """
    if (folder / SINGLE).exists():
        return scan(folder / SINGLE)
    if not (folder / INDEX).exists():
        _refuse_folder(folder)
    file = folder / INDEX
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{file}: has no weight_map; it must map tensor names to shard files")
    shards = set(weight_map.values()) if all(isinstance(v, str) for v in weight_map.values()) else {""}
    for shard in sorted(shards):
        if not _PLAIN.fullmatch(shard):
            raise DataError(f"{file}: shard {shard!r} is not a plain *.safetensors file name; nothing was read")
    if len(shards) > MAX_FILES:
        raise DataError(f"{file}: names {len(shards):,} shards, more than the {MAX_FILES:,} allowed")
    if absent := sorted(s for s in shards if not (folder / s).is_file()):
        raise DataError(
            f"{folder}: the index names shards that are not there: {', '.join(absent)}; complete the folder"
        )
    found = {shard: scan(folder / shard) for shard in sorted(shards)}
    wrong = [
        f"{name}: not in {shard}, where the index puts it"
        for name, shard in weight_map.items()
        if name not in found[shard]
    ]
    wrong += [
        f"{name}: in {shard}, which the index does not say"
        for shard, entries in found.items()
        for name in entries
        if weight_map.get(name) != shard
    ]
    if wrong:
        raise DataError(f"{file}: index and shards disagree:\n  " + "\n  ".join(wrong))
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _refuse_folder(folder: Path) -> NoReturn:
    names = sorted(p.name for p in folder.iterdir())
    looked = f"{folder}: no {SINGLE} and no {INDEX}"
    if "adapter_model.safetensors" in names:
        raise DataError(f"{looked}, only a LoRA adapter; merge it into its base model first")
    if foreign := [n for n in names if n.lower().endswith(_FOREIGN)]:
        raise DataError(
            f"{looked}, only {', '.join(foreign)}, which jaxrlhf never opens: reading such files can run code. "
            "Convert them where that is safe: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
            "in transformers writes safetensors"
        )
    raise DataError(f"{looked}; the folder holds: {', '.join(names) or 'nothing'}")


def allocate(size: int) -> np.ndarray:
    """Memory of `size` bytes to read into, aligned so that jax can use it in place on a CPU."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size]


def read(entry: Entry, memory: np.ndarray | None = None) -> np.ndarray:
    """A tensor in its stored dtype and shape, in `memory` (of `allocate`) if given.

    Raises DataError if the file has become shorter since it was scanned.
    """
    raw = (allocate(entry.nbytes) if memory is None else memory)[: entry.nbytes]
    _read_bytes(entry, 0, raw)
    return raw.view(entry.dtype).reshape(entry.shape)


def same(a: Entry, b: Entry) -> bool:
    """Whether two tensors are equal bit for bit, with little memory."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    for begin in range(0, a.nbytes, CHUNK):
        mine, other = np.empty((2, min(CHUNK, a.nbytes - begin)), np.uint8)
        _read_bytes(a, begin, mine)
        _read_bytes(b, begin, other)
        if not np.array_equal(mine, other):
            return False
    return True


def _read_bytes(entry: Entry, begin: int, raw: np.ndarray) -> None:
    view, done = raw.data, 0
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset + begin)
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise DataError(f"{entry.file}: ended inside '{entry.name}'; it changed while it was read")
            done += count


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise DataError(f"{where}: key {twice!r} stands twice")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurdly long numbers, absurdly deep nesting
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{where}: must be a JSON object, is a {type(parsed).__name__}")
    return parsed


def _naturals(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _refuse(file: Path, why: str) -> NoReturn:
    raise DataError(f"{file}: not a sound safetensors file: {why}")
