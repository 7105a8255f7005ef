"""Devices that need not exist, for which XLA's compilers for GPUs and TPUs compile programs on any Linux machine.

    with topology.on("h100:8"):
        ...  # meshes are made of these devices; programs traced for them can be compiled but not run

Needs the extra `plan-gpu` or `plan-tpu`: the compiler of the installed version of jax, no driver and no accelerator.
"""

import contextlib
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrlhf import runtime, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan.targets import Accelerator, Target, parse

GPU_WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cudnn-cu13")
"""Wheels of CUDA 13 that the GPU compiler needs beside jax's plugin (extra `plan-gpu`); of cuDNN the version alone is
asked for, when attention is traced."""

_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it guards a TPU from a second process, and there is none
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask for this machine's TPUs
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class MissingCompiler(ConfigError):
    """The compiler of a target is not installed, or is not that of the installed jax."""


@contextlib.contextmanager
def on(target: str | Target) -> Iterator[None]:
    """While the block runs, meshes are made of the devices of a target. Raises as `devices` does."""
    target = parse(target) if isinstance(target, str) else target
    with sharding.on_devices(devices(target), target.accelerator.memory):
        yield


def devices(target: str | Target) -> list[Any]:
    """The devices of a target, in the order of its hosts or slices.

    Raises ConfigError for an unknown target or a slice that does not exist, MissingCompiler without the compiler.
    """
    target = parse(target) if isinstance(target, str) else target
    check_compiler(target.accelerator)
    _prepare(target.accelerator)
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if target.accelerator.platform == "gpu":
        hosts, each = target.shape
        name, platform = "", "cuda"
        options = {"target_config": gpu_config(target.accelerator), "topology": f"1x{hosts}x{each}"}
    else:
        # "megacore": the two cores of a chip are one device, as jax has them on a real TPU v4
        options = {"chip_config_name": "megacore"} if target.accelerator.name == "v4" else {}
        options |= {"num_slices": target.slices} if target.slices > 1 else {}
        name, platform = str(target).removesuffix(f":{target.slices}" if target.slices > 1 else ""), "tpu"
        if target.devices == 1:  # by default a host has four chips
            options["chips_per_host_bounds"] = (1, 1, 1)
    written = _KeptStderr()
    try:
        with written:
            return list(topologies.get_topology_desc(topology_name=name, platform=platform, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "divisible" in text or "topology" in text.lower():
            raise ConfigError(f"{target}: the compiler knows no such slice: {text}") from error
        raise MissingCompiler(
            f"{target}: the compiler could not be started: {text}\n{written.text}".rstrip()
        ) from error


@dataclass(frozen=True)
class StandIn:
    """A device for which programs can be traced, but not compiled."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    core_on_chip: int = 0


def stand_ins(target: Target) -> list[StandIn]:
    """Devices that have the places of those of a target, without its compiler."""
    one = target.accelerator
    each = one.host if one.platform == "tpu" else target.shape[-1]
    places = list(itertools.product(*(range(size) for size in reversed(target.shape))))
    coords = [(*reversed(place), 0)[:3] for place in places]  # x first; of two dimensions the third is 0
    return [
        StandIn(i, one.platform, one.title, i // each, i // len(places), coords[i % len(places)])
        for i in range(target.devices)
    ]


def island(device: Any) -> int:
    """The host of a GPU or the slice of a TPU: devices of one island are joined by fast connections."""
    return device.process_index if device.platform != "tpu" else getattr(device, "slice_index", None) or 0


def check_compiler(accelerator: Accelerator) -> None:
    """Raise MissingCompiler unless the compiler for this accelerator is installed, in the version of jax."""
    jax_version = runtime.version("jax")
    if accelerator.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise MissingCompiler(
                f"{accelerator.title} is compiled for by libtpu, which is not installed: "
                f"pip install 'jaxrlhf[plan-tpu]' (or 'jax[tpu]=={jax_version}')"
            )
        return
    remedy = f"pip install 'jaxrlhf[plan-gpu]' (or 'jax[cuda13-local]=={jax_version}' {' '.join(GPU_WHEELS)})"
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"):
        version = runtime.version(package)
        if version is None:
            raise MissingCompiler(f"{accelerator.title} is compiled for by {package}, which is not installed: {remedy}")
        if package.startswith("jax-") and version != jax_version:
            raise MissingCompiler(f"{package} {version} does not match jax {jax_version}: {remedy}")
    if _cuda_binaries() is None:
        raise MissingCompiler(f"{accelerator.title} needs ptxas of CUDA 13, which is not installed: {remedy}")


def _cuda_binaries() -> Path | None:
    """Folder of ptxas in the wheel nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    folders = (Path(place) / "cu13" / "bin" for place in (spec.submodule_search_locations if spec else None) or ())
    return next((folder for folder in folders if (folder / "ptxas").exists()), None)


def _prepare(accelerator: Accelerator) -> None:
    """Set what the compiler reads from the environment. jax itself computes on the CPU unless it has started."""
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if accelerator.platform == "gpu":
        binaries, path = str(_cuda_binaries()), os.environ.get("PATH", "")
        if binaries not in path.split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join((binaries, path))
        return
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    # libtpu ends the process at a flag that it does not know; flags of jax's own backends mean nothing to it
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if not flag.startswith(("--xla_cpu", "--xla_gpu")))


def gpu_config(gpu: Accelerator) -> str:
    """Description of a GPU for XLA's compiler: a GpuTargetConfigProto as text."""
    sizes = gpu.sizes
    assert sizes is not None
    major, minor = sizes.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {1536 if (major, minor) == (8, 9) else 2048}
  shared_memory_per_block: 49152 shared_memory_per_core: {sizes.shared_memory}
  shared_memory_per_block_optin: {sizes.shared_memory - 1024}
  core_count: {sizes.processors} fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {sizes.l2_cache} clock_rate_ghz: {sizes.clock}
  device_memory_size: {int(gpu.memory / 0.9)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{gpu.title}"
"""


class _KeptStderr:
    """Keeps as `text` what native code writes to the standard error stream while the block runs."""

    text = ""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._terminal, self._file = os.dup(2), tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        with self._file as file:
            file.seek(0)
            self.text = file.read().decode(errors="replace")
