"""Limits of a call that reads what a stranger has written."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf import memory

SECONDS = 2.0  # of processor time, which other processes do not change
MEMORY = 200e6  # bytes


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Block that takes at most SECONDS of this process's time and at no moment MEMORY more than it began with."""
    memory.reset_peak_on_host()
    before, started = memory.peak_on_host(), time.process_time()
    try:
        yield
    finally:
        assert time.process_time() - started < SECONDS
        assert before is None or (memory.peak_on_host() or 0) - before < MEMORY


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where unknown (not Linux)."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
