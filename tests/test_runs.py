"""Run directories: locking, the record, resuming only with an equal config, stopping by signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from jaxrlhf import runs, runtime
from jaxrlhf.config import Logging, Mesh, Optim, PPOConfig, SFTConfig, Train, replace
from jaxrlhf.errors import Preempted, StorageError
from jaxrlhf.runs import open_run


@pytest.fixture
def config(tmp_path):
    return SFTConfig(run_dir=str(tmp_path / "run"), train=Train(batch_size=8), optim=Optim(schedule="constant"))


def trained(config, method="sft"):
    """A run that has a checkpoint."""
    with open_run(config, method, fresh=False) as run:
        (run.directory / "checkpoints" / "5").mkdir(parents=True)
    return run.directory


def test_files_of_a_run_directory(config):
    with open_run(config, "sft", fresh=False) as run:
        assert not run.resumed and not run.stopping and run.notes == ()
        assert run.directory == Path(config.run_dir)
    settings = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert (
        settings["optim"]["learning_rate"] == config.optim.learning_rate
        and settings["sampling"]["stop_token_ids"] == []
    )
    record = json.loads((run.directory / "run.json").read_text())
    assert record["method"] == "sft" and record["mesh"] == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert record["versions"]["jax"] and record["starts"][0]["command"] == sys.argv
    assert record["starts"][0]["processor"] == str(runtime.processor())
    assert record["starts"][0]["outcome"] == "done" and len(record["starts"][0]["config_sha256"]) == 64
    assert record["starts"][0]["peak_memory"].keys() == {"host", "device"}


def test_same_config_resumes_and_starts_are_counted(config):
    trained(config)
    with pytest.raises(Preempted), open_run(config, "sft", fresh=False) as run:
        assert run.resumed and run.notes == ()
        raise Preempted("saved")
    starts = json.loads((run.directory / "run.json").read_text())["starts"]
    assert [start["outcome"] for start in starts] == ["done", "preempted"]


def test_changes_of_the_result_are_refused_and_all_listed(config):
    directory = trained(config)
    before = (directory / "config.yaml").read_text()
    changed = replace(config, **{"optim.learning_rate": 0.5, "seed": 3, "logging": Logging(quiet=True)})
    with pytest.raises(StorageError) as caught, open_run(changed, "sft", fresh=False):
        pass
    message = str(caught.value)
    assert "optim.learning_rate: 1.0e-05 -> 0.5" in message or "optim.learning_rate: 1e-05 -> 0.5" in message
    assert "seed: 0 -> 3" in message and "--fresh" in message and "logging" not in message
    assert caught.value.exit_code == 7
    assert (directory / "config.yaml").read_text() == before


def test_check_run_directory_refuses_what_open_run_would_refuse(config):
    runs.check_run_directory(config, "sft", fresh=False)  # nothing there yet
    directory = trained(config)
    before = sorted(path.name for path in directory.iterdir())
    runs.check_run_directory(config, "sft", fresh=False)
    runs.check_run_directory(replace(config, seed=3), "sft", fresh=True)
    with pytest.raises(StorageError, match="seed: 0 -> 3"):
        runs.check_run_directory(replace(config, seed=3), "sft", fresh=False)
    with open_run(config, "sft", fresh=False), pytest.raises(StorageError, match="is in use by host"):
        runs.check_run_directory(config, "sft", fresh=False)
    assert sorted(path.name for path in directory.iterdir()) == before
    assert runs.method_and_last_start(directory)[1]["directory"] == os.getcwd()


def test_harmless_changes_are_allowed_and_rounding_is_noted(config):
    trained(config)
    changes = {"logging.quiet": True, "checkpoint.keep": 7, "train.num_train_epochs": 3.0}
    with open_run(replace(config, **changes), "sft", fresh=False) as run:
        assert run.resumed and run.notes == ()
    changes |= {"mesh": Mesh(data=2), "train.micro_batch_size": 4, "model.remat": "full"}
    with open_run(replace(config, **changes), "sft", fresh=False) as run:
        assert len(run.notes) == 3 and all("not bit for bit" in note for note in run.notes)


def test_a_longer_run_is_refused_unless_the_schedule_is_constant(config):
    config = replace(config, **{"optim.schedule": "linear"})
    trained(config)
    longer = replace(config, **{"train.max_steps": 9})
    with pytest.raises(StorageError, match="max_steps: None -> 9"), open_run(longer, "sft", fresh=False):
        pass


def test_any_change_is_allowed_before_the_first_checkpoint(config):
    with pytest.raises(ZeroDivisionError), open_run(config, "sft", fresh=False):
        _ = 1 / 0
    mended = replace(config, seed=4)
    with open_run(mended, "sft", fresh=False) as run:
        assert not run.resumed
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["seed"] == 4


def test_another_method_or_other_versions(config, monkeypatch):
    directory = trained(config)
    with pytest.raises(StorageError, match="of 'sft' and not of 'ppo'"):
        open_run(PPOConfig(run_dir=config.run_dir), "ppo", fresh=False).__enter__()
    record = json.loads((directory / "run.json").read_text())
    record["versions"]["jaxlib"] = "0.0.1"
    (directory / "run.json").write_text(json.dumps(record))
    with open_run(config, "sft", fresh=False) as run:
        assert len(run.notes) == 1 and "jaxlib was 0.0.1" in run.notes[0]


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize("content", [None, "", "[1", "[]"])
def test_a_missing_record_is_refused(config, name, content):
    directory = trained(config)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(StorageError, match="cannot be read"), open_run(config, "sft", fresh=False):
        pass


def test_fresh_moves_the_old_run_aside(config, tmp_path):
    for number in (0, 1, 2):
        with open_run(config, "sft", fresh=True) as run:
            assert not run.resumed and not (run.directory / "checkpoints").exists()
            (run.directory / "checkpoints" / str(number + 1)).mkdir(parents=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    assert (tmp_path / "run.old-2" / "checkpoints" / "2").exists()


def test_fresh_refuses_a_directory_that_is_not_a_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="not a run directory"), open_run(config, "sft", fresh=True):
        pass
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_path_that_cannot_be_a_directory(config, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="cannot be used"), open_run(config, "sft", fresh=False):
        pass


def test_signals_only_in_the_main_thread(config):
    seen = []

    def work():
        with open_run(config, "sft", fresh=False) as run:
            seen.append(run.stopping)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_stopping_and_handlers_are_restored(config, number, capfd):
    before = signal.getsignal(number)
    with open_run(config, "sft", fresh=False) as run:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not run.stopping and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.stopping
    assert signal.getsignal(number) is before
    assert "state is saved" in capfd.readouterr().err


HOLDER = """
import sys, time
from jaxrlhf.config import SFTConfig
from jaxrlhf.runs import open_run
with open_run(SFTConfig(run_dir=sys.argv[1]), "sft", fresh=False):
    print("open", flush=True)
    while True:
        time.sleep(0.1)  # a signal just before a long sleep would be handled after it
"""


@pytest.fixture
def holder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_in_use_is_refused_until_its_process_ends(holder, tmp_path):
    config = SFTConfig(run_dir=str(tmp_path / "run"))
    for fresh in (False, True):
        match = rf"in use by host \S+, process {holder.pid};"
        with pytest.raises(StorageError, match=match), open_run(config, "sft", fresh=fresh):
            pass
    holder.kill()
    holder.wait()
    with open_run(config, "sft", fresh=False) as run:
        assert not run.resumed


def test_the_second_signal_exits_at_once(holder):
    holder.send_signal(signal.SIGTERM)
    assert "stopping" in holder.stderr.readline() + holder.stderr.readline()
    assert holder.poll() is None
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=10) == 128 + signal.SIGTERM


def test_resuming_may_change_failure_options_of_a_reward_but_not_its_components(tmp_path):
    """After a timeout the message says to raise it; the run must go on with it raised."""
    part = {"function": "r.py:f", "timeout": 5.0, "options": {"low": 3}}

    def config(*parts):
        return PPOConfig(run_dir=str(tmp_path / "run"), reward={"components": parts})  # type: ignore[arg-type]

    trained(config(part), "ppo")
    mended = part | {"timeout": 50.0, "on_error": "value", "error_value": 0.0}
    with open_run(config(mended), "ppo", fresh=False) as run:
        assert run.resumed and run.notes == ()
    other = [part | {"options": {"low": 4}}, part | {"weight": 2.0}]
    for parts, said in [
        ((other[0],), "options.low: "),
        ((other[1],), "weight: "),
        ((part, {"url": "http://x"}), "list of 2"),
    ]:
        with (
            pytest.raises(StorageError, match=rf"reward\.components.*{said}"),
            open_run(config(*parts), "ppo", fresh=False),
        ):
            pass


def test_an_option_of_a_component_that_is_newer_than_the_run_had_its_default(tmp_path):
    config = PPOConfig(run_dir=str(tmp_path), reward={"components": [{"url": "http://x"}]})  # type: ignore[arg-type]
    directory = trained(config, "ppo")
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    del settings["reward"]["components"][0]["judge"], settings["reward"]["components"][0]["weight"]
    (directory / "config.yaml").write_text(yaml.dump(settings))
    with open_run(config, "ppo", fresh=False) as run:
        assert run.resumed
    other = PPOConfig(run_dir=str(tmp_path), reward={"components": [{"url": "http://x", "weight": 2.0}]})  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"reward.components.0.weight: 1.0 -> 2.0"), open_run(other, "ppo", False):
        pass
