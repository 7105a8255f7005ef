"""Signals and full disks at moments that are hard to meet from outside: the run ends as the undisturbed one did."""

import os
import resource
import shutil
import signal

import jax
import pytest
from support.runs import facts

from jaxrlhf import PPOTrainer, checkpoint, config
from jaxrlhf.checkpoint import storage
from jaxrlhf.errors import Preempted, StorageError

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@pytest.fixture
def sft(start, tmp_path):
    """Make the run, or go on with it."""
    return lambda: start("sft")


@pytest.fixture
def whole(sft, tmp_path):
    """What the undisturbed run leaves."""
    sft()
    found = facts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    return found


@pytest.fixture
def at_save(monkeypatch):
    """Call a function with the number of each checkpoint (1, 2, ...) before it is written."""
    write, calls = storage.write_checkpoint, []

    def watch(function):
        def watched(*given):
            calls.append(1)
            function(len(calls))
            return write(*given)

        monkeypatch.setattr(storage, "write_checkpoint", watched)

    return watch


@pytest.fixture
def room():
    """Limit the bytes that a file can have (None: no limit), as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (old[0] if size is None else size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def saved(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def test_a_signal_while_a_step_is_compiled(sft, tmp_path):
    """What it interrupts is the first step of all; then the first of a run that is resumed."""
    jax.clear_caches()
    signals = []

    def listen(event, _seconds, **about):
        if event == LOWERED and "update" in about["fun_name"]:  # the compiler comes next
            signals.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in (1, 2):
            with pytest.raises(Preempted, match=f"stopped after step {step} of 3") as caught:
                sft()
            assert caught.value.exit_code == 75 and len(signals) == step and saved(tmp_path / "run") == [step]
            jax.clear_caches()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    sft()
    disturbed = facts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    sft()
    assert disturbed == facts(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_written(number, sft, whole, at_save, tmp_path):
    at_save(lambda count: os.kill(os.getpid(), number) if count == 1 else None)
    with pytest.raises(Preempted, match="stopped after step 1 of 3"):
        sft()
    assert saved(tmp_path / "run") == [1]
    sft()
    assert facts(tmp_path / "run") == whole


def test_a_run_goes_on_when_a_full_disk_has_room_again(sft, whole, at_save, room, tmp_path, caplog):
    at_save(lambda count: room(20_000 if count == 2 else None))
    sft()
    assert "checkpoint 2 was not saved" in caplog.text
    assert facts(tmp_path / "run") == whole and saved(tmp_path / "run") == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_a_disk_without_room_for_all_checkpoints_is_warned_of_at_the_start(ppo, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.room, "free", lambda folder: 2_500_000)  # for one, of three with the next one
    ppo = config.replace(ppo, **{"logging.quiet": False, "logging.report": False})
    PPOTrainer(ppo, lambda prompts, completions: [len(set(text)) / 9 for text in completions]).train()
    printed = capsys.readouterr().out
    assert "warning: 3 checkpoints of" in printed and printed.count("checkpoint.keep") == 1
    assert printed.index("warning: 3 checkpoints") < printed.index(" ppo step 1/2 ")


def test_a_disk_that_stays_full_ends_a_run_which_goes_on_later(sft, whole, at_save, room, tmp_path, caplog):
    at_save(lambda count: room(20_000 if count > 1 else None))
    with pytest.raises(StorageError, match="checkpoint 3 was not saved") as caught:
        sft()
    assert caught.value.exit_code == 7 and saved(tmp_path / "run") == [1]
    room(None)
    at_save(lambda count: None)
    sft()
    assert facts(tmp_path / "run") == whole
