"""Writer of the safetensors format: sharded, one tensor in memory at a time.

Of several processes, process 0 writes; the others read the same tensors in the same order, as the shards of a tensor
come from all of them.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.weights import safetensors

_DTYPE_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}


@dataclass(frozen=True)
class Source(safetensors.TensorInfo):
    """A tensor to write; `read` is called once, when the tensor is written."""

    read: Callable[[], np.ndarray]


def write(folder: Path, sources: Iterable[Source], max_shard_size: int) -> None:
    """Write `model.safetensors`, or an index and shards of at most `max_shard_size` bytes (or one larger tensor)."""
    shards: list[list[Source]] = [[]]
    for source in sources:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + source.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(source)
    if len(shards) == 1:
        write_file(folder / safetensors.SINGLE, shards[0])
        return
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    for name, shard in files.items():
        write_file(folder / name, shard)
    total = sum(source.nbytes for shard in shards for source in shard)
    weight_map = {source.name: name for name, shard in files.items() for source in shard}
    if not distributed.is_primary():
        return
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, sources: Sequence[Source]) -> None:
    """Write one file and sync it to disk. Tensors are ordered by decreasing item size, then by name."""
    ordered = sorted(sources, key=lambda s: (-s.dtype.itemsize, s.name))
    if not distributed.is_primary():
        for source in ordered:
            distributed.check_stop()
            source.read()
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for source in ordered:
        begin, end = end, end + source.nbytes
        dtype = _DTYPE_NAMES[source.dtype]
        header[source.name] = {"dtype": dtype, "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for source in ordered:
            distributed.check_stop()
            array = source.read()
            assert array.shape == source.shape and array.dtype == source.dtype, (source, array.shape, array.dtype)
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
