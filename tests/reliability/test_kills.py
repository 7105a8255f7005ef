"""SIGKILL before any change that a run makes to its folder: what is left then is resumed and ends as the whole run did.

A killed process leaves its files as they are at that moment. So no process has to be killed: a run is made once, its
folder is copied before changes of it (an audit hook sees Python open, rename, create and remove files; changes wait
while a copy is made), and copies are put in the place of the folder and resumed. tests/end_to_end/test_kill.py and
scripts/torture.py kill processes.
"""

import contextlib
import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import facts

from jaxrlhf.checkpoint import TEMPORARY

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
_watching: list[tuple[str, Callable[[str, str], None]]] = []
_lock = threading.RLock()


class Killed(BaseException):
    """Ends a run whose folder has been copied."""


def _hook(event: str, arguments: tuple) -> None:
    if not _watching or event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    folder, seen = _watching[0]
    path = os.fspath(arguments[0])
    if path.startswith(folder):
        with _lock:
            seen(event, re.sub(r"[0-9a-f]{16,}|\d+", "N", path.removeprefix(folder)))


sys.addaudithook(_hook)  # there is no way to remove one


@contextlib.contextmanager
def watched(folder: Path, seen: Callable[[str, str], None]) -> Iterator[None]:
    _watching.append((str(folder), seen))
    try:
        yield
    finally:
        _watching.clear()


def copied(run: Path, target: Path) -> None:
    """Copy a folder whose files may go while it is copied: Orbax removes some of its temporary files in C++."""

    def copy(source: str, destination: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(source, destination)

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if run.exists():
        shutil.copytree(run, target, copy_function=copy, dirs_exist_ok=True)


def put_back(copy: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(copy, run)


@pytest.mark.parametrize(
    ("method", "lora", "kills"),
    [
        *[("sft", False, 3), ("reward", False, 2), ("dpo", False, 2), ("ppo", False, 12), ("grpo", False, 2)],
        *[("dpo", True, 2), ("ppo", True, 2)],
    ],
)
def test_whatever_a_kill_leaves_is_resumed(method, lora, kills, start, tmp_path):
    """About 50 kinds of change (the same file of another step is the same kind), copied at a random one of its kind;
    from the last of them, the export's name, and from others at random the run goes on."""
    run, chance, seen = tmp_path / "run", random.Random(method), {}

    def before(event, place):
        kind = f"{event} {place}"
        seen[kind] = seen.get(kind, 0) + 1
        if chance.random() < 1 / seen[kind]:
            copied(run, tmp_path / "copies" / str(list(seen).index(kind)))

    with watched(run, before):
        start(method, lora=lora)
    whole, kinds = facts(run), list(seen)
    assert list(whole[-1]) == ["adapter_model.safetensors" if lora else "model.safetensors"]
    for part in (
        "/metrics.jsonl",
        "/.run.json.part",
        "/checkpoints/N",
        f"/checkpoints/N{TEMPORARY}",
        "/.export.partial",
    ):
        assert any(kind.endswith(part) for kind in kinds), part
    for kind in [*chance.sample(kinds[:-1], kills - 1), kinds[-1]]:
        put_back(tmp_path / "copies" / str(kinds.index(kind)), run)
        start(method, lora=lora)
        assert facts(run) == whole, kind


def test_kills_of_one_start_after_the_other(start, tmp_path):
    """A run is killed while it saves its second step, then five times while it resumes from its first."""
    run, chance = tmp_path / "run", random.Random(0)
    start("sft")
    whole = facts(run)
    shutil.rmtree(run)
    saves, changes = [], []

    def at_the_second_save(event, place):
        saves.extend([place] if event == "os.rename" and place == f"/checkpoints/N{TEMPORARY}" else [])
        if len(saves) == 2:
            copied(run, tmp_path / "copy")
            saves.append("")
            raise Killed

    def while_it_starts(event, place):
        changes.append(place)
        if len(changes) == wanted:
            copied(run, tmp_path / "copy")
            raise Killed

    with watched(run, at_the_second_save), contextlib.suppress(Killed):
        start("sft")
    assert len(saves) == 3, "it was killed"
    for _ in range(5):
        put_back(tmp_path / "copy", run)
        changes, wanted = [], chance.randint(1, 8)
        with watched(run, while_it_starts), pytest.raises(Killed):
            start("sft")
        assert [path.name for path in (tmp_path / "copy" / "checkpoints").glob("*[0-9]")] == ["1"]
    put_back(tmp_path / "copy", run)
    start("sft")
    assert facts(run) == whole
