"""How much memory is free, on the host and on the device."""

import contextlib
import ctypes
from pathlib import Path

import jax


def free_on_host(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a process in the container `group` could still take; None where that is not known (not Linux)."""
    free = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, KeyError, ValueError):  # a container's limit, or "max"
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        held = int((group / "memory.current").read_text()) - int(pages["inactive_file"])  # files read are given back
        free += [int((group / "memory.max").read_text()) - held]
    return min(free, default=None)


def give_back() -> None:
    """Hand what this process has freed back to the system. glibc keeps what lay in pieces of less than 32 MB, as the
    layers of a copy for decoding do: without this, an update has them beside it although nobody can reach them."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def free_on_device() -> int | None:
    """Bytes free on the first device: the host's on a CPU; None where the device does not say."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return free_on_host()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None
