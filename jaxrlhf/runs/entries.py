"""Checks of the files and folders of a run directory before a run starts, and removal of unfinished ones."""

import os
import shutil
from pathlib import Path

from jaxrlhf import checkpoint
from jaxrlhf.errors import StorageError
from jaxrlhf.files import kind_of
from jaxrlhf.metrics import METRICS_FILE, SAMPLES_FILE, TOKENS, TRACKERS
from jaxrlhf.runs.record import read_record

LOCK = ".lock"
FILES = ("config.yaml", "run.json", "report.html", "validation.json", "human.jsonl")
FILES += (METRICS_FILE, SAMPLES_FILE, TRACKERS)
FOLDERS = ("checkpoints", "export", "logs", "tensorboard", TOKENS)
"""Names in a run directory."""


def check(directory: Path) -> None:
    """Raise StorageError for what would fail when it is written, perhaps hours later: something else with the name of a
    file or folder of a run, or a link that leads nowhere. And if the checkpoints of the run are gone: it would begin
    again, and replace its log and its export."""
    for name in (*FILES, *FOLDERS):
        check_kind(directory / name, "folder" if name in FOLDERS else "file")
    checkpoints = directory / "checkpoints"
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if checkpoint.is_step(path.name):
            check_kind(path, "folder")
    if not checkpoint.exists(checkpoints) and _has_saved(directory):
        raise StorageError(
            f"{checkpoints} has no checkpoint, but the run in {directory} has written some: its checkpoints are gone; "
            "put them back, or start over with --fresh (what is left of the run is kept beside it)"
        )


def check_kind(path: Path, wanted: str) -> None:
    """Raise StorageError if `path`, which is to be a "file" or "folder", is something else or a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise StorageError(
            f"{path} is a link to {os.readlink(path)}, which is not there; put that back (is its disk mounted?), or "
            "remove the link, and run the same command again"
        )
    found = "a file" if path.is_file() else kind_of(path)
    if found and found != f"a {wanted}":
        raise StorageError(
            f"{path} is {found}, and a run has a {wanted} of that name; move it away, and run the same command again"
        )


def _has_saved(directory: Path) -> bool:
    """True if the run is known to have written a checkpoint: there is an export, or one of its starts has seen a
    checkpoint or begun with one."""
    if (directory / "export").is_dir():
        return True
    if not (directory / "run.json").exists():
        return False
    try:
        starts = read_record(directory)["starts"]
    except StorageError as error:
        raise StorageError(f"{error}; put the file back, or start over with --fresh") from error
    return any("saved" in start or start.get("step", 0) > 0 for start in starts)


def remove_unfinished(directory: Path) -> None:
    """Remove files and exports that a killed process was writing."""
    for path in (*directory.glob(".*.part"), *directory.glob("*/.*.part"), directory / ".export.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
