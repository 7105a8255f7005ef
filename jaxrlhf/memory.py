"""Free memory of the host and the device, in bytes."""

import contextlib
import ctypes
from pathlib import Path

import jax

WORTH_RELEASING = 2**26
"""Bytes from which on freed memory is returned to the system."""


def free_on_host(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Host memory still available to a process in the cgroup `group`; None where unknown (not Linux)."""
    free = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, KeyError, ValueError):  # ValueError: no limit ("max")
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the page cache of files can be reclaimed
        used = int((group / "memory.current").read_text()) - int(stats["inactive_file"])
        free += [int((group / "memory.max").read_text()) - used]
    return min(free, default=None)


def reset_peak_on_host() -> None:
    """Let `peak_on_host` count from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): the peak resident set size becomes the current one


def peak_on_host() -> int | None:
    """Largest resident memory of this process since `reset_peak_on_host`, or since its start where that has no effect;
    None where unknown (not Linux). Child processes are not counted."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    return None


def peak_on_devices() -> int | None:
    """Largest memory in use on any device of this process since its start; None where devices do not report it."""
    peaks = []
    with contextlib.suppress(RuntimeError):  # no device could be started: the run ends with that error
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def release_free_memory(freed: int = WORTH_RELEASING) -> None:
    """Return memory that this process has freed to the system, if `freed`, the bytes it has freed last, are worth it;
    they are by default.

    glibc keeps freed blocks below 32 MB, such as the layers of an inference copy, which would add to the memory of the
    following update. Looking for them takes milliseconds. Does nothing on other C libraries.
    """
    if freed < WORTH_RELEASING:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_on_device() -> int | None:
    """Free memory of the first device (on a CPU, of the host); None where the device does not report it."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return free_on_host()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None
