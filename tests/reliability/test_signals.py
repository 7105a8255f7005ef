"""A signal stops what waits, at once and without a loss: exit code 75, and the run goes on bit for bit."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.runs import facts, records

from jaxrlhf import config, distributed, metrics, stopping
from jaxrlhf.checkpoint import storage
from jaxrlhf.errors import Interrupted, Preempted
from jaxrlhf.rewards.sources.worker import Worker
from jaxrlhf.rollout import engine
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.on_policy.validation import Validator
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer
from jaxrlhf.weights import writer

GRACE = 10.0  # seconds


def score(text):
    return len(set(text)) - 0.1 * len(text)


HANGING = """
import os, pathlib, signal, time

def score(text):
    return len(set(text)) - 0.1 * len(text)

def reward(prompts, completions, wait_for=""):
    calls = pathlib.Path(wait_for)
    number = int(calls.read_text()) if calls.exists() else 0
    calls.write_text(str(number + 1))
    if number == 1:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    return [score(text) for text in completions]

"""


@pytest.fixture(autouse=True)
def ctrl_c():
    """Handle SIGINT as Python does, even if the tests run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {n} ", "completion": "x" * n}) + "\n" for n in range(1, 9)))
    return file


@pytest.fixture
def hang(tmp_path):
    """Called for each batch; in the second it makes a signal come, and waits for a minute."""
    calls = []

    def wait():
        calls.append(1)
        if len(calls) == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)

    return wait


def components(kind, tmp_path, serve, hang):
    """(reward components, the Python function) of a kind of source that hangs in its second batch."""
    if kind.startswith("function"):
        file = tmp_path / "r.py"
        file.write_text(HANGING)
        worker = config.Component(function=f"{file}:reward", options={"wait_for": str(tmp_path / "calls")})
        if kind == "function":
            return (worker,), None
        return (worker, config.Component(function="passed", weight=0.5)), lambda completions: [*map(score, completions)]

    def answer(body):
        hang()
        return 200, json.dumps({"scores": [score(text) for text in body["completions"]]})

    if kind == "url":
        return (config.Component(url=serve(answer)[0]),), None

    def function(prompts, completions):
        hang()
        return [score(text) for text in completions]

    if kind == "passed with a timeout":
        return (config.Component(function="passed", timeout=100.0),), function
    return (), function


def stop_and_resume(made, tmp_path):
    """Run until the signal, then to the end; returns the seconds from the request to the end of the first run."""
    run, asked = made(), []
    request = stopping._handle

    def handle(number, frame):
        asked.append(time.monotonic())
        request(number, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "_handle", handle)
        with pytest.raises(Preempted, match=r"stopped after step 1 of 2; run the same command again") as caught:
            run.train()
    assert caught.value.exit_code == 75 and len(asked) == 1
    seconds = time.monotonic() - asked[0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["outcome"] == "preempted"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()] == ["1"]
    made().train()
    return seconds


@pytest.mark.parametrize("kind", ["function", "function and another", "passed", "passed with a timeout", "url"])
def test_a_signal_during_a_reward_ends_it(kind, ppo, serve, hang, tmp_path):
    parts, function = components(kind, tmp_path, serve, hang)
    ppo = config.replace(ppo, reward=config.RewardSource(components=parts), **{"checkpoint.save_every": 50})
    assert stop_and_resume(lambda: PPOTrainer(ppo, reward=function), tmp_path) < GRACE
    undisturbed = config.replace(ppo, run_dir=str(tmp_path / "whole"))
    PPOTrainer(undisturbed, reward=function).train()  # has been asked twice and waits no more
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize("slots", [0, 8])
def test_a_signal_during_a_rollout_ends_it(slots, ppo, tmp_path, monkeypatch):
    """All at once, in programs of two tokens, or in slots."""
    monkeypatch.setattr(engine, "CHUNK", 2)
    options = {"rollout.slots": slots, "ppo.batch_size": 16, "ppo.total_episodes": 32, "sampling.response_length": 9}
    ppo = config.replace(ppo, **options)
    calls, advance = [], engine._advance

    def slow(*arguments):
        calls.append(1)
        if len(calls) == second:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(*arguments)

    def reward(prompts, completions):
        return [score(text) for text in completions]

    monkeypatch.setattr(engine, "_advance", slow)
    second = 0
    PPOTrainer(config.replace(ppo, run_dir=str(tmp_path / "whole")), reward=reward).train()
    second, _ = len(calls) // 2 + 1, calls.clear()
    assert stop_and_resume(lambda: PPOTrainer(ppo, reward=reward), tmp_path) < GRACE
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def metrics_of_checkpoints(run):
    folder = run / "checkpoints"
    return {step: storage.read_record(folder, int(step))["metric"] for step in os.listdir(folder) if step.isdigit()}


def test_a_signal_during_the_export_leaves_no_part_of_one(ppo, tmp_path, monkeypatch):
    write, stopped = writer.write_file, []

    def slow(*arguments):
        if not stopped:
            stopped.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    def reward(prompts, completions):
        return [score(text) for text in completions]

    monkeypatch.setattr(writer, "write_file", slow)
    with pytest.raises(Preempted, match="before the export was complete; the last step is saved"):
        PPOTrainer(ppo, reward=reward).train()
    assert not list((tmp_path / "run").glob("*export*"))
    PPOTrainer(ppo, reward=reward).train()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_a_signal_during_an_evaluation_ends_it_and_it_is_made_up_for(method, keep_best, ppo, rows, tmp_path):
    """In the second evaluation after the start; the resumed run begins with it, and the checkpoint gets its result."""
    calls, stop_at = [], 0

    def stop(value):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            stopping.check()
        return value

    def reward(prompts, completions):
        return stop([score(text) for text in completions])

    def made(name):
        if method == "ppo":
            options = {"data.validation_fraction": 0.5, "validation.eval_steps": 1, "run_dir": str(tmp_path / name)}
            options |= {"checkpoint.save_every": 50, "validation.keep_best": keep_best}
            return PPOTrainer(config.replace(ppo, **options), reward=reward)
        train = config.Train(batch_size=4, num_train_epochs=2, eval_batch_size=2, eval_every=1, keep_best=keep_best)
        data = config.Data(path=str(rows), validation_fraction=0.5)
        sections = {name: getattr(ppo, name) for name in ("model", "logging")}
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / name), train=train, data=data, **sections))
        collate = trainer.eval_batches
        trainer.eval_batches = lambda rows: map(stop, collate(rows))
        return trainer

    made("whole").train()
    # rewards: before training, for sampled and greedy completions; then of each update and validation
    calls.clear()
    stop_at = 4 if method == "ppo" else 3
    with pytest.raises(Preempted, match=f"stopped after step {1 if method == 'ppo' else 2} of"):
        made("run").train()
    assert [r["step"] for r in records(tmp_path / "run")] == ([] if method == "ppo" else [1])
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    made("run").train()
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    if keep_best:
        assert metrics_of_checkpoints(tmp_path / "run") == metrics_of_checkpoints(tmp_path / "whole")
    if method == "sft":  # then killed between the record and the result in the checkpoint
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "stopped", tmp_path / "run")
        line = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1]
        with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
            file.write(line)
        made("run").train()
        assert facts(tmp_path / "run") == facts(tmp_path / "whole")
        found = [metrics_of_checkpoints(tmp_path / name) for name in ("run", "whole")]
        assert not keep_best or found[0] == found[1]


@pytest.fixture
def validated(ppo, tmp_path):
    """A function that makes a PPO run which validates and samples each of its two updates; a signal comes during the
    validation of the first if a file asks for it."""
    options = {"data.validation_fraction": 0.5, "validation.eval_steps": 1, "logging.sample_every": 1}
    options |= {"checkpoint.save_every": 50}
    asked, calls = tmp_path / "asked", []

    def reward(prompts, completions):
        calls.append(1)
        if asked.exists() and len(calls) == 4:  # before training sampled and greedy completions; then of the update
            asked.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            stopping.check()
        return [score(text) for text in completions]

    def train(name, stopped=False):
        calls.clear()
        if stopped:
            asked.touch()
        PPOTrainer(config.replace(ppo, **options, run_dir=str(tmp_path / name)), reward=reward).train()

    return train


def killed_after(number, patch):
    """End the run after `number` changes of its logs, the last of which is written."""
    changes = []

    def watched(method):
        def write(self, *arguments, **options):
            method(self, *arguments, **options)
            changes.append(1)
            if len(changes) == number:
                raise KeyboardInterrupt

        return write

    for name in ("log", "samples"):
        patch.setattr(metrics.Logger, name, watched(getattr(metrics.Logger, name)))


@pytest.mark.parametrize("number", [1, 2, 3], ids=["held-out samples", "record", "samples"])
def test_a_kill_while_an_evaluation_is_made_up_for_neither_loses_nor_doubles_a_line(number, validated, tmp_path):
    validated("whole")
    with pytest.raises(Preempted, match="stopped after step 1 of 2"):
        validated("run", stopped=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(number, patch)
        validated("run")
    assert [record["step"] for record in records(tmp_path / "run")] == [1][: number - 1]
    validated("run")
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_a_signal_before_an_evaluation_is_made_up_for_loses_nothing(validated, tmp_path, monkeypatch):
    validated("whole")
    with pytest.raises(Preempted):
        validated("run", stopped=True)

    def start(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.check()

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped after step 1 of 2"):
        patch.setattr(Validator, "start", start)
        validated("run")
    validated("run")
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_an_evaluation_that_was_made_up_for_is_not_repeated(validated, tmp_path):
    """A kill once the next update is logged, and no checkpoint since: its step alone is repeated."""
    validated("whole")
    with pytest.raises(Preempted):
        validated("run", stopped=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(4, patch)
        validated("run")
    extra = storage.read_record(tmp_path / "run" / "checkpoints", 1)["extra"]
    assert "evaluation to come" not in extra and "prompts" in extra
    validated("run")
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_the_evaluation_of_a_step_that_is_not_finite_is_interrupted_and_made_up_for(ppo, rows, tmp_path, monkeypatch):
    train = config.Train(batch_size=4, num_train_epochs=1, eval_batch_size=2, eval_every=1)
    data = config.Data(path=str(rows), validation_fraction=0.5)
    sections = {name: getattr(ppo, name) for name in ("model", "logging")}
    end_step = SFTTrainer._end_step
    strange = {"grad_norm": math.nan, "loss": math.inf, "learning_rate": 0.1}
    monkeypatch.setattr(SFTTrainer, "_end_step", lambda self, s, at, found: end_step(self, s, at, found | strange))

    def made(name):
        return SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / name), train=train, data=data, **sections))

    def stop(value):
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.check()
        return value

    made("whole").train()
    trainer = made("run")
    collate = trainer.eval_batches
    trainer.eval_batches = lambda rows: map(stop, collate(rows))
    with pytest.raises(Preempted, match="stopped after step 1 of"):
        trainer.train()
    assert records(tmp_path / "run") == []
    monkeypatch.setattr(SFTTrainer, "_end_step", end_step)  # the record is that of the checkpoint
    monkeypatch.setattr(SFTTrainer, "batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        made("run").train()
    assert records(tmp_path / "run") == records(tmp_path / "whole")[:1]


@pytest.fixture
def signal_at(monkeypatch):
    """Draw two tokens in a program; a signal comes before the program with the number that the test gives (0: none).
    Returns the list of programs that have run."""
    advance, calls = engine._advance, []

    def watch(number):
        calls.clear()

        def counted(*arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return advance(*arguments)

        monkeypatch.setattr(engine, "CHUNK", 2)
        monkeypatch.setattr(engine, "_advance", counted)
        return calls

    return watch


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_signal_while_samples_are_drawn_ends_it_and_the_resumed_run_draws_them(
    method, start, signal_at, tmp_path, monkeypatch
):
    """In runs that keep their best state: the checkpoint has the result of the evaluation before. Then the same, and a
    kill once the samples are drawn."""
    run, moved = tmp_path / "run", tmp_path / "stopped"
    programs = signal_at(0)
    start(method)
    each = len(programs) // 2  # for the samples of step 1, and those of step 2
    assert each > 1
    whole = facts(run)
    shutil.rmtree(run)
    programs = signal_at(each + 1)
    with pytest.raises(Preempted, match="stopped after step 2 of 3; run the same command again"):
        start(method)
    assert len(programs) == each + 1  # the others of step 2 did not run
    assert [record["step"] for record in records(run)] == [1, 2]
    shutil.copytree(run, moved)
    signal_at(0)
    start(method)
    assert facts(run) == whole

    shutil.rmtree(run)
    shutil.copytree(moved, run)
    trainer = {"sft": SFTTrainer, "dpo": DPOTrainer}[method]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        start(method)
    start(method)
    assert facts(run) == whole


def test_a_signal_while_the_first_prompts_are_completed_again_ends_it(ppo, signal_at, tmp_path):
    """The samples of the update are logged before, and are not logged twice."""

    def train(name):
        options = {"logging.sample_every": 1, "checkpoint.save_every": 50, "run_dir": str(tmp_path / name)}
        reward = lambda prompts, completions: [score(text) for text in completions]  # noqa: E731
        PPOTrainer(config.replace(ppo, **options), reward).train()
        return facts(tmp_path / name)

    programs = signal_at(0)
    whole = train("whole")
    assert len(programs) == 8  # a rollout and the first prompts again, in each of two updates
    programs = signal_at(3)
    with pytest.raises(Preempted, match="stopped after step 1 of 2"):
        train("run")
    assert len(programs) == 3
    signal_at(0)
    assert train("run") == whole


def test_before_the_first_step_there_is_nothing_to_save(ppo, tmp_path):
    """The first of all signals comes while held-out prompts are scored."""
    held_out = config.replace(ppo, **{"data.validation_fraction": 0.5})

    def reward(prompts, completions):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(Preempted, match="stopped before the first step"):
        PPOTrainer(held_out, reward=reward).train()
    assert not [p for p in (tmp_path / "run" / "checkpoints").glob("*") if p.name.isdigit()]
    PPOTrainer(held_out, reward=lambda prompts, completions: [score(text) for text in completions]).train()


def test_a_worker_that_gets_the_signal_itself_is_no_failure_of_the_reward(tmp_path):
    """Clusters send it to all processes of a job, in any order."""
    file = tmp_path / "r.py"
    file.write_text("import time\ndef reward(prompts, completions):\n    time.sleep(60)\n")
    worker = Worker(f"{file}:reward", timeout=50)

    def stop():
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    from jaxrlhf.rewards.sources.protocol import ScoreRequest

    threading.Timer(0.2, stop).start()
    with stopping.handling(), pytest.raises(Interrupted), stopping.armed():
        worker(ScoreRequest(["a"], ["b"], {}))


def test_requests_are_seen_where_they_are_looked_for():
    with stopping.handling():
        stopping.check()
        with stopping.armed(), stopping.interruptible():
            pass
        with pytest.raises(Interrupted), stopping.armed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert stopping.requested()
            stopping.check()
        stopping.check()  # not armed
        with pytest.raises(Interrupted), distributed.stoppable():
            raise AssertionError("it was asked for before")
    with stopping.handling(), stopping.armed():  # another run, which nobody has asked
        assert not stopping.requested()
        with pytest.raises(Interrupted), stopping.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    with pytest.raises(Interrupted), stopping.handling(immediate=True):
        with stopping.handling():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), stopping.handling(immediate=True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.handling(immediate=True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_request_during_garbage_collection_is_not_lost(number, error):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the exception is raised here, and Python ignores it

    with pytest.raises(error), stopping.handling(immediate=True):
        Finalized()
        with stopping.handling():
            raise AssertionError("it was asked for before")
    with pytest.raises(error), stopping.handling(immediate=True):
        Finalized()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_request_that_other_code_makes_another_error_of_is_one(number, error):
    with pytest.raises(error), stopping.handling(immediate=True):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except BaseException as caught:
            raise ImportError("Encountered an error while initializing the extension.") from caught
    with pytest.raises(ValueError, match="no such folder"), stopping.handling(immediate=True):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except error:
            raise ValueError("no such folder") from None


def test_a_long_step_is_warned_of(ppo, tmp_path, capsys):
    ppo = config.replace(ppo, **{"checkpoint.grace": 1e-4, "logging.quiet": False, "ppo.total_episodes": 24})
    PPOTrainer(ppo, reward=lambda prompts, completions: [score(text) for text in completions]).train()
    printed = capsys.readouterr().out
    assert printed.count("warning: a step takes") == 1 and "checkpoint.grace is 0.0001" in printed
    assert "s besides its rollouts and rewards, and a signal" in printed


@pytest.fixture
def command(ppo, tmp_path):
    """Start `jaxrlhf ppo` with a reward module that says when it is imported, and then sleeps."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('imported').touch()\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    arguments = ["ppo", "--model.path", ppo.model.path, "--model.init", "random", "--data.path", ppo.data.path]
    arguments += [
        "--sampling.response_length",
        "4",
        "--run_dir",
        ppo.run_dir,
        "--reward.function",
        f"{tmp_path}/slow.py:reward",
    ]
    processes = []

    def start():
        # Python leaves a Ctrl-C alone if this process was started in the background, where it is ignored
        run = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
        run += "runpy.run_module('jaxrlhf', run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-c", run, *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        deadline = time.monotonic() + 120
        while not (tmp_path / "imported").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_run_directory_is_open(command, number, code, tmp_path):
    process = command()
    started = time.monotonic()
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - started < GRACE
    assert "Traceback" not in printed
    assert printed.strip().endswith("run the same command again" if code == 75 else "interrupted")
