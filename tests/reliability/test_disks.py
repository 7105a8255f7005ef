"""Disks that may not be written, that report errors or that are slow. Full ones are in test_moments.py."""

import errno
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from support.runs import facts

from jaxrlhf.checkpoint import storage
from jaxrlhf.errors import StorageError
from jaxrlhf.metrics import Logger
from jaxrlhf.training.session import Session

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
_read_only: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    """Refuse Python's changes of a read-only folder, as the kernel does. Modes would not stop root."""
    if not _read_only or event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if os.fspath(arguments[0]).startswith(_read_only[0]):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(arguments[0]))


sys.addaudithook(_hook)  # there is no way to remove one


@pytest.fixture
def read_only():
    yield _read_only
    _read_only.clear()


@pytest.fixture
def whole(start, tmp_path):
    """What the undisturbed run leaves."""
    start("sft")
    found = facts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    return found


@pytest.fixture
def after_step(monkeypatch):
    """Call a function with the session and the number of each step that has ended."""
    save_if_due = Session.save_if_due

    def watch(function):
        def watched(session, step, evaluation):
            save_if_due(session, step, evaluation)
            function(session, step)

        monkeypatch.setattr(Session, "save_if_due", watched)

    return watch


def saved(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def test_a_folder_that_may_not_be_written_is_refused_at_once(start, tmp_path, read_only):
    read_only.append(str(tmp_path / "run"))
    with pytest.raises(StorageError, match=r"run_dir .*/run cannot be used: Read-only file system") as caught:
        start("sft")
    assert caught.value.exit_code == 7 and not (tmp_path / "run").exists()


def test_a_disk_that_becomes_read_only_ends_a_run_which_goes_on_later(start, whole, after_step, tmp_path, read_only):
    """As Linux mounts a file system whose disk reports errors."""

    def remount(session, step):
        if step == 1:
            session._checkpoints.wait()
            read_only.append(str(tmp_path / "run"))

    after_step(remount)
    with pytest.raises(StorageError, match=r"checkpoint 3 was not saved in .*Read-only file system") as caught:
        start("sft")
    assert caught.value.exit_code == 7 and saved(tmp_path / "run") == [1]
    read_only.clear()
    after_step(lambda session, step: None)
    start("sft")
    assert facts(tmp_path / "run") == whole


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the name of a descriptor in /proc")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", ".run.json.part"])
def test_a_disk_that_reports_an_error_ends_a_run_which_goes_on_later(name, start, whole, monkeypatch, tmp_path):
    fsync, calls = os.fsync, []

    def failing(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/run/{name}"):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(
        StorageError, match=rf"run/{name.strip('.').removesuffix('.part')} cannot be written: Input/output"
    ) as caught:
        start("sft")
    assert caught.value.exit_code == 7 and len(calls) >= 2
    start("sft")
    assert facts(tmp_path / "run") == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
@pytest.mark.parametrize("name", ["metrics", "samples"])
def test_a_line_that_cannot_be_written_ends_a_run_which_goes_on_later(name, start, whole, monkeypatch, tmp_path):
    def filled(write, number):
        def failing(logger, step, *rows, **options):
            if step == number:
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, getattr(logger, f"_{name}").fileno())
                os.close(full)
            return write(logger, step, *rows, **options)

        return failing

    with monkeypatch.context() as patch:
        method = "log" if name == "metrics" else "samples"
        patch.setattr(Logger, method, filled(getattr(Logger, method), 2))
        with pytest.raises(StorageError, match=rf"run/{name}.jsonl cannot be written: No space left") as caught:
            start("sft")
    assert caught.value.exit_code == 7
    start("sft")
    assert facts(tmp_path / "run") == whole


def test_a_slow_disk_delays_a_run_at_its_next_checkpoint_and_not_before(start, after_step, monkeypatch, tmp_path):
    """A save of step 2 of which the disk is not done before step 3 has ended; that of step 4 waits for it."""
    write, third, order = storage.write_checkpoint, threading.Event(), []

    class Slow:
        def __init__(self, step, response):
            self.step, self.response = step, response

        def result(self, *seconds):
            order.append(f"wait for {self.step}")
            assert self.step > 2 or third.wait(60), "the third step waits for the save of the second"
            return self.response.result(*seconds)

    def ended(session, step):
        order.append(f"end of {step}")
        if step == 3:
            third.set()

    monkeypatch.setattr(
        storage, "write_checkpoint", lambda at, leaves, record: Slow(record["step"], write(at, leaves, record))
    )
    after_step(ended)
    start("sft", save_every=2, max_steps=4)
    assert order == ["end of 1", "end of 2", "end of 3", "wait for 2", "wait for 4", "end of 4"]
    assert saved(tmp_path / "run") == [4]
