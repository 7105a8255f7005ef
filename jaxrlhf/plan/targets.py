"""Accelerators for which runs can be planned: their published figures, and names such as `h100:8` and `v5e:4x4`.

Imports no jax. Sources of the figures (dense, without sparsity; "per link" counts one direction):

- h100, h200: nvidia.com/en-us/data-center/h100 and /h200 (SXM); hosts of 8 with one 400 Gb/s port per GPU (DGX H100)
- a100: nvidia.com/en-us/data-center/a100 (SXM); hosts of 8 with one 200 Gb/s port per GPU (DGX A100)
- b200: DGX B200 datasheet (1,440 GB and 64 TB/s in 8 GPUs); 400 Gb/s per GPU
- rtx4090: "NVIDIA Ada GPU Architecture" whitepaper; l40s: L40S datasheet; both without NVLink: PCIe 4.0 x16
- v4, v5e, v5p, v6e: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (interconnect and data center network per chip; for
  v4 the latter is not published, and that of v5p is taken). Memory is what the TPU compiler allows a program.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Figures of a GPU that XLA's compiler asks for (CUDA Programming Guide, "Compute Capabilities")."""

    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes of a processor
    l2_cache: int  # bytes
    clock: float  # GHz


@dataclass(frozen=True)
class Accelerator:
    """Figures of one device. FLOP/s are by the dtype of the operands, as JAX multiplies them: float32 at the precision
    `highest`, which a TPU computes in six bfloat16 passes."""

    name: str
    title: str
    platform: Literal["gpu", "tpu"]
    memory: int  # bytes that a run can use
    bandwidth: float  # bytes/s of its memory
    flops: dict[str, float]  # by dtype: bfloat16, float32, int8
    link: float  # bytes/s that it sends to its neighbours: NVLink or PCIe in a host, ICI in a TPU slice
    network: float  # bytes/s that it sends to other hosts (GPUs) or slices (TPUs)
    host: int  # devices of a host
    sizes: Sizes | None = None  # GPUs
    axes: int = 0  # TPUs: dimensions of a slice
    clock: float = 0.0  # TPUs: cycles per second


def _gpu(name: str, title: str, memory: float, *figures: float, host: int = 8, sizes: Sizes) -> Accelerator:
    bandwidth, bfloat16, float32, int8, link, network = figures
    # the part of the memory that `runtime.defaults` lets jax use
    usable = int(0.9 * memory * 1e9)
    flops = {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12, "int8": int8 * 1e12}
    return Accelerator(name, title, "gpu", usable, bandwidth * 1e9, flops, link * 1e9, network * 1e9, host, sizes)


def _tpu(name: str, title: str, memory: float, *figures: float, host: int = 4, axes: int, units: int) -> Accelerator:
    bandwidth, bfloat16, int8, link, network = figures
    flops = {"bfloat16": bfloat16 * 1e12, "float32": bfloat16 / 6 * 1e12, "int8": int8 * 1e12}
    usable = int(memory * GIB)
    # `units` are 128 x 128 multipliers, each with two FLOPs per cell and cycle, in a chip
    clock = bfloat16 * 1e12 / (units * 2 * 128**2)
    near, far = link * 1e9, network * 1e9
    return Accelerator(name, title, "tpu", usable, bandwidth * 1e9, flops, near, far, host, axes=axes, clock=clock)


_HOPPER = Sizes((9, 0), 132, 228 * 1024, 50 * 2**20, 1.98)
_AMPERE = Sizes((8, 0), 108, 164 * 1024, 40 * 2**20, 1.41)

ACCELERATORS: dict[str, Accelerator] = {
    one.name: one
    for one in (
        # GB of memory, GB/s of it; TFLOP/s of bfloat16, float32, int8; GB/s between devices of a host, between hosts
        _gpu("h100", "NVIDIA H100 80GB HBM3", 80, 3350, 989, 67, 1979, 450, 50, sizes=_HOPPER),
        _gpu("h200", "NVIDIA H200", 141, 4800, 989, 67, 1979, 450, 50, sizes=_HOPPER),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 80, 2039, 312, 19.5, 624, 300, 25, sizes=_AMPERE),
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, 1555, 312, 19.5, 624, 300, 25, sizes=_AMPERE),
        _gpu(
            *("b200", "NVIDIA B200", 180, 8000, 2250, 80, 4500, 900, 50),
            sizes=Sizes((10, 0), 148, 228 * 1024, 126 * 2**20, 1.965),
        ),
        _gpu(
            *("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1008, 165, 82.6, 661, 32, 3),
            sizes=Sizes((8, 9), 128, 100 * 1024, 72 * 2**20, 2.52),
        ),
        _gpu(
            *("l40s", "NVIDIA L40S", 48, 864, 362, 91.6, 733, 32, 25),
            sizes=Sizes((8, 9), 142, 100 * 1024, 96 * 2**20, 2.52),
        ),
        # GiB of memory, GB/s of it; TFLOP/s of bfloat16, int8; GB/s between chips of a slice, between slices
        _tpu("v4", "TPU v4", 30.75, 1200, 275, 275, 300, 6.25, axes=3, units=8),
        _tpu("v5e", "TPU v5e", 15.75, 819, 197, 393, 200, 3.125, axes=2, units=4),
        _tpu("v5p", "TPU v5p", 95.73, 2765, 459, 918, 600, 6.25, axes=3, units=8),
        _tpu("v6e", "TPU v6e", 31.24, 1600, 918, 1836, 400, 12.5, axes=2, units=16),
    )
}


@dataclass(frozen=True)
class Target:
    """Accelerators of one kind: a slice of TPUs, or GPUs in hosts; several slices are joined by the network."""

    accelerator: Accelerator
    shape: tuple[int, ...]  # GPUs: hosts and devices of each; TPUs: chips along each dimension of a slice
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def near(self) -> int:
        """Devices joined by the fast interconnect: those of a host (GPUs) or of a slice (TPUs)."""
        return self.shape[-1] if self.accelerator.platform == "gpu" else math.prod(self.shape)

    def __str__(self) -> str:
        if self.accelerator.platform == "gpu":
            return f"{self.accelerator.name}:{self.devices}"
        several = f":{self.slices}" if self.slices > 1 else ""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.shape))}{several}"


def parse(name: str) -> Target:
    """Parse a target: `h100` is one GPU, `h100:16` two hosts of eight; `v5e:4x4` is a slice of 16 chips, `v5e:4x4:2`
    two slices.

    Raises ConfigError for an unknown accelerator, and for numbers that make no hosts or slices.
    """
    kind, *rest = name.strip().lower().replace("_", "-").split(":")
    accelerator = ACCELERATORS.get(kind)
    if accelerator is None:
        known = ", ".join(ACCELERATORS)
        hint = did_you_mean(kind, list(ACCELERATORS), 1)
        raise ConfigError(f"unknown accelerator '{kind}' in '{name}'{hint}; known ones: {known}")
    return _gpus(name, accelerator, rest) if accelerator.platform == "gpu" else _tpus(name, accelerator, rest)


def _gpus(name: str, gpu: Accelerator, rest: list[str]) -> Target:
    count = rest[0] if rest else "1"
    if len(rest) > 1 or not re.fullmatch(r"[1-9]\d*", count):
        raise ConfigError(f"'{name}': give a number of GPUs, such as {gpu.name}:{gpu.host}")
    hosts, left = divmod(int(count), gpu.host)
    if hosts and left:
        raise ConfigError(
            f"'{name}': {count} GPUs are not whole hosts of {gpu.host}; give fewer than {gpu.host}, or a multiple of "
            f"it, such as {gpu.name}:{hosts * gpu.host}"
        )
    return Target(gpu, (hosts, gpu.host) if hosts else (1, left))


def _tpus(name: str, tpu: Accelerator, rest: list[str]) -> Target:
    shape = rest[0] if rest else "x".join("1" * tpu.axes) if tpu.axes == 2 else "2x2x1"
    slices = rest[1] if len(rest) > 1 else "1"
    example = "2x2x1" if tpu.axes == 3 else "4x4"
    if re.fullmatch(r"[1-9]\d*", shape) and int(shape) > 1:
        example = "x".join(map(str, _nearly_cubic(int(shape), tpu.axes)))
    digits = "x".join([r"[1-9]\d*"] * tpu.axes)
    if len(rest) > 2 or not re.fullmatch(digits, shape) or not re.fullmatch(r"[1-9]\d*", slices):
        raise ConfigError(
            f"'{name}': give the chips of a slice along its {tpu.axes} dimensions, such as {tpu.name}:{example}; a "
            f"second number is that of slices, as in {tpu.name}:{example}:2"
        )
    return Target(tpu, tuple(map(int, shape.split("x"))), int(slices))


def _nearly_cubic(count: int, axes: int) -> list[int]:
    """Factors of a number of chips, as equal as can be."""
    if axes == 1:
        return [count]
    goal = round(count ** (1 / axes))
    first = max(d for d in range(1, goal + 1) if count % d == 0)
    return [first, *_nearly_cubic(count // first, axes - 1)]
