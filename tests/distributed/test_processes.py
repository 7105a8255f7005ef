"""Two processes of four devices each, over loopback: together they do what one process with eight does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from support import runs

from jaxrlhf import PPOTrainer, SFTTrainer, config, distributed, sharding, weights
from jaxrlhf.checkpoint import TEMPORARY, Checkpoints
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.cli import launch, main
from jaxrlhf.config.file import load_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
DEADLINE = 400.0
"""Seconds: more than three times what the slowest test here takes on two busy cores."""


def environment(devices: int) -> dict[str, str]:
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_ppo(folder: pathlib.Path, model: pathlib.Path) -> pathlib.Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(4) for b in range(5)))
    settings = {
        "model": {"path": str(model), "init": "random"},
        "data": {"path": str(prompts), "validation_fraction": 0.2},
        "ppo": {"batch_size": 8, "num_mini_batches": 2, "total_episodes": 16},
        "reward": {"components": [{"function": "passed"}]},
        "validation": {"max_prompts": 3},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "optim": {"learning_rate": 1e-3},
        "sampling": {"response_length": 4},
        "checkpoint": {"save_every": 1},
        "logging": {"tensorboard": False, "report": False, "sample_every": 1, "token_samples": 1},
        "run_dir": str(folder / "run"),
    }
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def reward(prompts: Any, completions: Any) -> list[float]:
    return [0.1 * len(text) + 0.01 * (sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_model: pathlib.Path) -> tuple[pathlib.Path, list[Any], Any]:
    """The folder of two workers, what they found, and the parameters in FOLDER/weights."""
    folder = tmp_path_factory.mktemp("together")
    write_ppo(folder, tiny_model)
    lines = [json.dumps({"prompt": f"{a}+{b}=", "completion": f"{a + b}."}) for a in range(4) for b in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(3))
    weights.export(folder / "weights", model, params)
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=8))
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    Checkpoints(folder / "checkpoints-of-1", 3, True).save(4, placed, {"note": "one"}, block=True)
    address = f"127.0.0.1:{free_port()}"
    logs = [folder / f"{number}.log" for number in range(2)]
    workers = []
    for number, log in enumerate(logs):
        with log.open("wb") as file:
            command = [sys.executable, str(WORKER), str(number), address, str(folder)]
            workers.append(subprocess.Popen(command, env=environment(4), stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [worker.wait(timeout=DEADLINE) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder, [json.loads((folder / f"{number}.json").read_text()) for number in range(2)], params


@pytest.mark.slow
def test_processes_tell_each_other_values_errors_and_requests(together):
    _, found, _ = together
    expected = [[None, "ä", 0.1 + number, float("nan"), [1, {"b": number}]] for number in range(2)]
    assert [each["gather"] for each in found] == [json.dumps(expected)] * 2
    assert [each["on_primary"] for each in found] == [7, 7]
    assert all("cannot be read" in each["other_error"] for each in found)
    assert [each["request"] for each in found] == [[False, False, False, True, False, False]] * 2


@pytest.mark.slow
def test_a_process_holds_the_rows_of_its_own_devices(together):
    _, found, _ = together
    assert [each["own_rows"] for each in found] == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert all(each["fetched"] for each in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "difference"),
    [
        ("config", "seed: 0 in process 0, 1 in process 1"),
        ("data", "tokens of the rows (sha256)"),
        ("code", "source of jaxrlhf (sha256)"),
    ],
)
def test_processes_that_disagree_are_refused_with_the_difference(together, subject, difference):
    for each in together[1]:
        assert f"do not have the same {subject}" in each[subject] and difference in each[subject]


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_without_devices_is_refused(together):
    assert all("takes 4 of the 8 devices, and none of process 1" in each["mesh"] for each in together[1])


@pytest.mark.slow
def test_a_process_reads_only_the_bytes_of_its_own_shards(together):
    folder, found, params = together
    whole = digests(leaves_by_name(params))
    for name in ("fsdp", "tensor"):
        for each in found:
            read, total = each[f"bytes_{name}"]
            assert each[f"digest_{name}"] == whole
            assert total == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            assert read < 0.56 * total  # half, and the norms, which every process needs
        assert sum(each[f"bytes_{name}"][0] for each in found) >= total


@pytest.mark.slow
def test_an_export_gathers_tensor_by_tensor(together):
    folder, found, params = together
    _, exported = weights.load(folder / "exported")
    jax.tree.map(np.testing.assert_array_equal, exported, params)
    assert len(list((folder / "exported").glob("model-*.safetensors"))) > 1
    largest = max(leaf.nbytes for leaf in (params["embed"]["embedding"], params["layers"]["mlp"]["up"]["kernel"][0]))
    assert [each["gathered"][1] for each in found] == [largest] * 2


@pytest.mark.slow
def test_checkpoints_pass_between_one_process_and_two(together):
    folder, found, params = together
    whole = digests(leaves_by_name(params))
    assert all(each["restored"] == whole and each["steps"] == [5] for each in found)
    for shape in (config.Mesh(data=1), config.Mesh(data=1, fsdp=2, tensor=4), config.Mesh(data=2, fsdp=4)):
        mesh = sharding.make_mesh(shape)
        template = sharding.with_shardings(params, sharding.shardings(params, mesh))
        for of, step in (("1", 4), ("2", 5)):
            _, state, _ = Checkpoints(folder / f"checkpoints-of-{of}", 3, True).restore_step(step, template)
            assert digests(leaves_by_name(state)) == whole


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_is_full_for_all(together):
    """Orbax alone would let the other one wait for ten minutes."""
    for each in together[1]:
        for step, message in zip((6, 7, 8, 10), each["full"] + each["not_begun"], strict=True):
            assert f"checkpoint {step} was not saved" in message
        assert "the last 3 saves failed" in each["full"][2] and each["saved_later"] == [9]
        assert each["full_seconds"] < 120
    first = together[1][0]
    assert all(": process 1: " in error for error in first["full"] + first["not_begun"])


@pytest.mark.slow
def test_ppo_on_two_processes_is_ppo_on_one(together, monkeypatch):
    folder, found, _ = together
    alone = load_config("ppo", folder / "ppo.yaml", [("run_dir", str(folder / "alone"))])
    trainer = PPOTrainer(alone, reward)
    trainer.train()
    for name in ("samples.jsonl", "validation.json"):
        assert (folder / "run" / name).read_text() == (folder / "alone" / name).read_text()
    pairs = zip(*(_records(folder / run) for run in ("run", "alone")), strict=True)
    for here, there in pairs:
        assert here.keys() == there.keys()
        for key, value in here.items():
            assert value == pytest.approx(there[key], rel=1e-5, abs=1e-6), key
    assert found[0]["params"] == found[1]["params"]
    sizes = [found[number]["rows_scored"] for number in range(2)]
    assert all(a + b in (8, 3) for a, b in zip(*sizes, strict=True)) and sizes[0][-1] < 8


@pytest.mark.slow
def test_an_error_of_the_reward_in_one_process_stops_all(together):
    assert "no score today" in together[1][1]["reward_error"]
    assert "process 1: " in together[1][0]["reward_error"] and "no score today" in together[1][0]["reward_error"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_ppo_in_all_at_the_same_place(together):
    """During the validation that follows it, or the next rollout."""
    said = "stopped after step 1 of 2; run the same command again to resume"
    for found in together[1]:
        assert found["stopped"] == 2 * [[said, [1], True]]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_the_drawing_of_samples_in_all(together):
    """The others see it at the second look after it, and the resumed run draws the samples."""
    folder, found, _ = together
    said = "stopped after step 1 of 2; run the same command again to resume, 2 programs"
    assert [each["stopped_sampling"] for each in found] == [said, said]
    assert runs.facts(folder / "sft-stopped") == runs.facts(folder / "sft")
    samples = [json.loads(line) for line in (folder / "sft" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]


def _records(run: pathlib.Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


class Launched:
    """`jaxrlhf launch` of an SFT run in two processes, while it runs."""

    def __init__(self, settings: pathlib.Path, run: pathlib.Path, log: pathlib.Path) -> None:
        self.run, self.log = run, log
        command = [sys.executable, "-m", "jaxrlhf", "launch", "--procs", "2", "--devices-per-process", "4"]
        command += ["sft", str(settings), "--run_dir", str(run)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment(4), stdout=file, stderr=subprocess.STDOUT)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=DEADLINE)
        finally:
            self.process.kill()

    def steps(self) -> list[int]:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def child(self, number: int) -> int:
        """The process id of process `number`."""
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                status, command = (entry / "status").read_text(), (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if f"PPid:\t{self.process.pid}\n" in status and command[-3:-1] == ["--process-id", str(number)]:
                return int(entry.name)
        raise AssertionError(f"no process {number}")

    def unfinished(self) -> list[pathlib.Path]:
        """The folder of a checkpoint that is being written, or was when a process was killed."""
        return list((self.run / "checkpoints").glob(f"*{TEMPORARY}"))

    def halt_during_a_save(self, number: int) -> int:
        """Stop process `number` before it has written its part of a checkpoint; returns its process id."""
        child = self.child(number)
        while True:
            self.wait_until(self.unfinished)
            os.kill(child, signal.SIGSTOP)
            time.sleep(1)
            if self.unfinished():  # else the others needed nothing more from it
                return child
            os.kill(child, signal.SIGCONT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The config of an SFT run of 60 steps, and the folder of the run that two processes have made undisturbed."""
    folder = tmp_path_factory.mktemp("sft")
    rows = folder / "rows.jsonl"
    text = [json.dumps({"prompt": f"{a}+{b}=", "completion": f"{a + b}."}) for a in range(8) for b in range(4)]
    rows.write_text("\n".join(text) + "\n")
    settings = {
        "model": {"path": str(tiny_model), "init": "random"},
        "data": {"path": str(rows), "max_length": 16},
        "train": {"batch_size": 8, "max_steps": 60, "num_train_epochs": 100},
        "mesh": {"data": 4, "fsdp": 2},
        "checkpoint": {"save_every": 5, "keep": 20},
        "logging": {"tensorboard": False, "report": False, "sample_every": 0},
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    launched = Launched(path, folder / "whole", folder / "whole.log")
    trainer = SFTTrainer(load_config("sft", path, [("run_dir", str(folder / "alone"))]))
    losses = [float(runs.supervised_step(trainer, step)["loss"]) for step in range(8)]  # in one process
    assert launched.wait() == 0, launched.log.read_text()[-3000:]
    np.testing.assert_allclose([record["loss"] for record in _records(launched.run)[:8]], losses, rtol=1e-5)
    return path, launched.run


def same_bytes(run: pathlib.Path, whole: pathlib.Path) -> None:
    assert _records(run) == _records(whole)
    ends = [(folder / "export" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert ends[0] == ends[1]


finds_processes = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="finds processes in /proc")


@pytest.mark.slow
@finds_processes
def test_a_signal_to_one_stops_all_a_killed_one_ends_all_and_a_halted_one_delays_them_bit_for_bit(tmp_path, whole):
    path, run = whole[0], tmp_path / "run"

    first = Launched(path, run, tmp_path / "first.log")
    first.wait_until(lambda: max(first.steps(), default=0) >= 6)
    os.kill(first.child(1), signal.SIGTERM)
    assert first.wait() == 75, first.log.read_text()[-3000:]
    stopped = first.steps()[-1]
    saved = sorted(int(entry.name) for entry in (run / "checkpoints").iterdir() if entry.name.isdigit())
    assert saved[-1] == stopped < 60
    assert f"[0] jaxrlhf: stopped after step {stopped} of 60" in first.log.read_text()
    assert first.log.read_text().count("stopped after step") == 1  # process 0 alone says so

    for number in (1, 0):  # a worker, and the coordinator
        done = max(first.steps())
        killed = Launched(path, run, tmp_path / f"without {number}.log")
        killed.wait_until(lambda killed=killed, done=done: max(killed.steps(), default=0) >= done + 6)
        os.kill(killed.child(number), signal.SIGKILL)
        started = time.monotonic()
        assert killed.wait() == 128 + signal.SIGKILL
        assert time.monotonic() - started < 3 * distributed.HEARTBEAT_TIMEOUT
        output = killed.log.read_text()
        assert f"process {number} was ended by signal 9 (SIGKILL)" in output
        assert f"resuming at step {stopped} of 60" in output or number == 0
        said = "another process of this run is gone", f"process {1 - number} ends because", "detected fatal errors"
        assert any(words in output for words in said), output[-3000:]  # the last by jax
        assert "is killed" not in output

    last = Launched(path, run, tmp_path / "last.log")
    for number in (1, 0):  # as on a host that hangs for a while
        done = max(last.steps())
        last.wait_until(lambda done=done: max(last.steps()) >= done + 2)
        child = last.child(number)
        os.kill(child, signal.SIGSTOP)
        time.sleep(1)
        halted = max(last.steps())
        time.sleep(4)
        assert max(last.steps()) <= halted + 2  # what it had begun
        os.kill(child, signal.SIGCONT)
    assert last.wait() == 0, last.log.read_text()[-3000:]
    same_bytes(run, whole[1])


@pytest.mark.slow
@finds_processes
def test_one_that_is_killed_in_the_middle_of_a_save_ends_all_and_the_run_goes_on_bit_for_bit(tmp_path, whole):
    """A worker, then the coordinator: of the checkpoint that was being written nothing is used."""
    path, run = whole[0], tmp_path / "run"
    for number in (1, 0):
        killed = Launched(path, run, tmp_path / f"without {number}.log")
        if number == 1:
            killed.wait_until(lambda killed=killed: max(killed.steps(), default=0) > 6)  # there is a checkpoint
        else:
            killed.wait_until(lambda killed=killed: "resuming at step " in killed.log.read_text())
        os.kill(killed.halt_during_a_save(number), signal.SIGKILL)
        started = time.monotonic()
        assert killed.wait() == 128 + signal.SIGKILL
        assert time.monotonic() - started < 3 * distributed.HEARTBEAT_TIMEOUT
        output = killed.log.read_text()
        assert f"process {number} was ended by signal 9 (SIGKILL)" in output
        assert "is killed" not in output  # the other one ended by itself
        (part,) = killed.unfinished()
        assert not part.with_name(part.name.removesuffix(TEMPORARY)).exists()
    last = Launched(path, run, tmp_path / "last.log")
    assert last.wait() == 0, last.log.read_text()[-3000:]
    assert "resuming at step " in last.log.read_text()
    assert not last.unfinished()
    same_bytes(run, whole[1])


def start_alone(*arguments: str, code: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "jaxrlhf", *arguments]
    return subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=timeout)


def test_launch_waits_longer_than_the_heartbeat():
    assert launch.GRACE > 1.5 * distributed.HEARTBEAT_TIMEOUT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launch takes a training command"),
        (["evaluate", "x"], "not 'evaluate'"),
        (["sft", "x.yaml", "--distributed"], "launch itself gives --distributed"),
    ],
)
def test_launch_refuses_what_it_cannot_start(arguments, message, capsys):
    assert main(["launch", *arguments]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process-id", "1"], "--process-id has no use without --distributed"),
        (["--distributed", "--process-id", "1"], "--coordinator-address and --num-processes is missing"),
        (["--distributed", "--dry-run"], "leave --distributed out"),
        (
            ["--distributed", "--coordinator-address", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id is 2; with --num-processes 2 it is from 0 to 1",
        ),
        (
            ["--distributed", "--coordinator-address", "a", "--num-processes", "2", "--process-id", "1"],
            "expected HOST:PORT",
        ),
    ],
)
def test_incomplete_and_contradictory_arguments_are_refused(arguments, message, capsys):
    assert main(["sft", "--model.path", "x", *arguments]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_do_not_come_are_named_with_what_to_check(number):
    code = "from jaxrlhf import distributed; distributed.start('127.0.0.1:%d', 2, %d, start_timeout=2)"
    result = start_alone(code=code % (free_port(), number))
    assert result.returncode == 9
    for words in (f"process {number}", "not all 2 processes have connected to 127.0.0.1:", "in 2 s", "firewall"):
        assert words in result.stderr
    assert "Check failure stack trace" not in result.stderr


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_others():
    code = (
        "from jaxrlhf import distributed; distributed.start('127.0.0.1:%d', 2, %d)\n"
        "distributed.gather(1)\n"
        "if distributed.index(): raise ValueError('a mistake')\n"
        "import time; time.sleep(100)"
    )
    port = free_port()
    command = [sys.executable, "-c"]
    other = subprocess.Popen([*command, code % (port, 1)], env=environment(1), stderr=subprocess.DEVNULL)
    try:
        result = start_alone(code=code % (port, 0))
    finally:
        other.kill()
    assert result.returncode == 1
    assert "process 0 ends because process 1 has: a mistake" in result.stderr


@pytest.mark.slow
def test_distributed_outside_a_cluster_is_refused_with_the_remedy():
    result = start_alone("sft", "--model.path", "x", "--distributed")
    assert result.returncode == 3 and "jax finds no cluster here" in result.stderr
    assert "--coordinator-address" in result.stderr and "jaxrlhf launch" in result.stderr
