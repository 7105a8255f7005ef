"""The safetensors format: a writer in shards, one tensor in memory at a time."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.weights import safetensors

_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A tensor to write; `read` is called once, when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(folder: Path, sources: Iterable[Source], max_shard_size: int) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_size` bytes (or one tensor) with their index."""
    shards: list[list[Source]] = [[]]
    for source in sources:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + source.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(source)
    if len(shards) == 1:
        write_file(folder / safetensors.SINGLE, shards[0])
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    total = sum(s.nbytes for shard in shards for s in shard)
    weight_map = {s.name: name for name, shard in zip(names, shards, strict=True) for s in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, sources: Sequence[Source]) -> None:
    """Write one file and see it onto the disk. The data are ordered by falling item size, then name."""
    ordered = sorted(sources, key=lambda s: (-s.dtype.itemsize, s.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks which framework the layout is of
    end = 0
    for s in ordered:
        header[s.name] = {"dtype": _NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [end, end + s.nbytes]}
        end += s.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for s in ordered:
            array = s.read()
            assert array.shape == s.shape and array.dtype == s.dtype, (s.name, array.shape, array.dtype)
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
