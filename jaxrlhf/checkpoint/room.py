"""Room for checkpoints on a disk: the bytes they need, those that are free, and the speed of writing."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from jaxrlhf.errors import counted

BLOCK = 4_000_000  # bytes that are written at a time
MOST = 64_000_000  # bytes, and
LONGEST = 0.25  # seconds, after which a measurement ends with its block


def needed(size: int) -> int:
    """Bytes that the checkpoint of a state of `size` bytes takes at most: orbax compresses, but weights and moments
    hardly shrink."""
    return size + size // 20 + 2**20


def free(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist. Raises OSError."""
    return shutil.disk_usage(_existing(folder)).free


def shortage(folder: Path, size: int, number: int, there: int = 0) -> str:
    """The warning that the disk of `folder` has no room for `number` checkpoints of a state of `size` bytes, of which
    it has those `there`; "" if it has room for them and the next, or says nothing about it."""
    more = max(number - there, 1) * needed(size)
    try:
        room = free(folder)
    except OSError:
        return ""
    if room >= more:
        return ""
    return (
        f"warning: {counted(number, 'checkpoint')} of {size / 1e9:.2g} GB, the next one included while it is written, "
        f"need {more / 1e9:.2g} GB{' more' if there else ''}, and the disk of {folder} has {room / 1e9:.2g} GB free: "
        "saves will fail, and the third failure in a row ends the run. Make room, choose another run_dir, or lower "
        "checkpoint.keep"
    )


def write_speed(folder: Path) -> float:
    """Bytes per second at which a file is written to the disk of a folder, which need not exist, and synced: measured
    for a quarter of a second or so, with a file that no other process sees. Raises OSError."""
    block, written = os.urandom(BLOCK), 0  # nothing that a file system could compress
    with tempfile.TemporaryFile(dir=_existing(folder), buffering=0) as file:
        began = time.monotonic()
        while not written or (written < MOST and time.monotonic() - began < LONGEST):
            written += file.write(block)
            os.fsync(file.fileno())
        return written / max(time.monotonic() - began, 1e-9)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
