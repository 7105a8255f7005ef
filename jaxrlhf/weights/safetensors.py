"""Reader of the safetensors format for untrusted files; the writer is writer.py.

A file consists of the length N of its header (8 bytes, little endian), N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and the data (https://huggingface.co/docs/safetensors).
Every number of a header is checked against the file before any data is read. Tensors are read one at a time into
allocated memory: pages of a memory-mapped file would count as resident memory.
"""

import math
import re
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import DataError
from jaxrlhf.files import MAX_JSON, kind_of, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_DIMENSIONS = 8
CHUNK = 1 << 24  # bytes compared at a time
ALIGNMENT = 64  # bytes; on a CPU jax uses host memory with this alignment in place instead of copying it
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
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(TensorInfo):
    """A tensor in a file."""

    file: Path
    offset: int  # of its first byte in the file


def scan(file: Path) -> dict[str, Entry]:
    """Read the tensor descriptions of one file from its header.

    Raises DataError if the header is longer than MAX_JSON or the file, is not JSON, names a tensor twice, has a dtype
    outside DTYPES, or if the byte ranges overlap, leave a hole, or do not end at the end of the file.
    """
    try:
        if kind := kind_of(file):  # a named pipe would wait for a writer
            _refuse(file, f"it is {kind}")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                _refuse(file, f"its header claims {length:,} bytes and the file has {size:,}; it may be cut short")
            if length > MAX_JSON:
                _refuse(file, f"its header claims {length:,} bytes, more than the {MAX_JSON:,} allowed")
            text = stream.read(length)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    header = parse_json(text, f"header of {file}")
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(file, name, fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            _refuse(
                file, f"the data of '{entry.name}' begins at byte {entry.offset:,}, expected {end:,} (overlap or hole)"
            )
        end += entry.nbytes
    if end != size:
        _refuse(file, f"its tensors end at byte {end:,} and the file has {size:,} bytes; it may be cut short")
    return entries


def _parse_entry(file: Path, name: str, fields: Any, data_start: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"the header entry of '{name}' must have exactly dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_naturals(shape, MAX_DIMENSIONS) or not _are_naturals(offsets, 2) or len(offsets) != 2:
        _refuse(file, f"'{name}': shape and data_offsets must be short lists of whole numbers >= 0")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        _refuse(
            file,
            f"'{name}' is stored as {fields['dtype']!r}, which is not one of {', '.join(DTYPES)}; "
            "quantised models are not supported, use the model's float version",
        )
    begin, end = offsets
    entry = Entry(name, DTYPES[fields["dtype"]], tuple(shape), file, data_start + begin)
    if end - begin != entry.nbytes:
        _refuse(
            file, f"'{name}' {fields['dtype']} {shape} takes {entry.nbytes:,} bytes, data_offsets span {end - begin:,}"
        )
    return entry


def scan_folder(folder: Path) -> dict[str, Entry]:
    """Read the tensor descriptions of a model folder: `model.safetensors`, or the shards named by its index.

    A shard must be a plain file name in the folder (the file may be a link, as in the hub's cache). Files of other
    formats are never opened. Raises DataError.
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
        if not _SHARD_NAME.fullmatch(shard):
            raise DataError(f"{file}: shard {shard!r} is not a plain *.safetensors file name; no shard was read")
    if missing := sorted(shard for shard in shards if not (folder / shard).exists()):
        raise DataError(f"{folder}: the index names missing shards: {', '.join(missing)}; complete the folder")
    by_shard = {shard: scan(folder / shard) for shard in sorted(shards)}
    stored = {(name, shard) for shard, entries in by_shard.items() for name in entries}
    indexed = set(weight_map.items())
    problems = [f"{name}: not in {shard}, where the index puts it" for name, shard in sorted(indexed - stored)]
    problems += [f"{name}: in {shard}, which is not in the index" for name, shard in sorted(stored - indexed)]
    if problems:
        raise DataError(f"{file}: index and shards disagree:\n  " + "\n  ".join(problems))
    return {name: by_shard[shard][name] for name, shard in weight_map.items()}


def _refuse_folder(folder: Path) -> NoReturn:
    names = sorted(p.name for p in folder.iterdir())
    missing = f"{folder}: no {SINGLE} and no {INDEX}"
    if "adapter_model.safetensors" in names:
        raise DataError(f"{missing}, only a LoRA adapter; merge it into its base model first")
    if others := [name for name in names if name.lower().endswith(_OTHER_FORMATS)]:
        raise DataError(
            f"{missing}, only {', '.join(others)}, which jaxrlhf never opens: reading such files can run code. "
            "Convert them where that is safe: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
            "in transformers writes safetensors"
        )
    raise DataError(f"{missing}; the folder holds: {', '.join(names) or 'nothing'}")


def allocate(size: int) -> np.ndarray:
    """A read buffer of `size` bytes, aligned so that jax can use it in place on a CPU."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def read(entry: Entry, buffer: np.ndarray | None = None) -> np.ndarray:
    """Read a tensor in its stored dtype and shape, into `buffer` (from `allocate`) if given.

    Raises DataError if the file has become shorter since it was scanned.
    """
    raw = (allocate(entry.nbytes) if buffer is None else buffer)[: entry.nbytes]
    _read_bytes(entry, 0, raw)
    return raw.view(entry.dtype).reshape(entry.shape)


def read_part(entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
    """Read the part `tensor[index]` of a tensor, of slices without steps, and no other bytes of the file.

    Raises DataError if the file has become shorter since it was scanned.
    """
    bounds = [part.indices(size)[:2] for part, size in zip(index, entry.shape, strict=True)]
    shape = [stop - start for start, stop in bounds]
    whole = len(shape)  # the trailing axes that are read whole make one run of bytes with the one before them
    while whole > 0 and shape[whole - 1] == entry.shape[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    strides = [math.prod(entry.shape[axis + 1 :]) * entry.dtype.itemsize for axis in range(len(shape))]
    run = math.prod(shape[outer:]) * entry.dtype.itemsize
    raw = allocate(math.prod(shape) * entry.dtype.itemsize)
    starts = [start * stride for (start, _), stride in zip(bounds, strides, strict=True)]
    with entry.file.open("rb", buffering=0) as stream:
        for number, position in enumerate(np.ndindex(*shape[:outer])):
            begin = sum(starts) + sum(i * stride for i, stride in zip(position, strides, strict=False))
            _read_from(stream, entry, begin, raw[number * run : (number + 1) * run])
    return raw.view(entry.dtype).reshape(shape)


def same(a: Entry, b: Entry) -> bool:
    """Return True if two tensors are equal bit for bit, compared chunk by chunk."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    for begin in range(0, a.nbytes, CHUNK):
        chunk_a, chunk_b = np.empty((2, min(CHUNK, a.nbytes - begin)), np.uint8)
        _read_bytes(a, begin, chunk_a)
        _read_bytes(b, begin, chunk_b)
        if not np.array_equal(chunk_a, chunk_b):
            return False
    return True


def _read_bytes(entry: Entry, begin: int, raw: np.ndarray) -> None:
    """Fill `raw` with the bytes of a tensor from `begin` on."""
    with entry.file.open("rb", buffering=0) as stream:
        _read_from(stream, entry, begin, raw)


def _read_from(stream: FileIO, entry: Entry, begin: int, raw: np.ndarray) -> None:
    view, done = raw.data, 0
    stream.seek(entry.offset + begin)
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise DataError(f"{entry.file}: ended inside '{entry.name}'; it changed while it was read")
        done += count


def _are_naturals(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _refuse(file: Path, reason: str) -> NoReturn:
    raise DataError(f"{file}: not a valid safetensors file: {reason}")
