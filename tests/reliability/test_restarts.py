"""`--restarts N` starts a run again, and knows when that is useless."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrlhf.cli import supervise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Supervise a program of Python, which knows the number of its start; returns the exit code and the starts."""
    monkeypatch.setattr(supervise, "_sleep", lambda seconds, asked: None)

    def start(program, restarts=10, *words):
        log = tmp_path / "starts"
        program = (
            "import os, pathlib, signal, sys, time\n"
            f"log, folder = pathlib.Path({str(log)!r}), pathlib.Path({str(tmp_path / 'run' / 'checkpoints')!r})\n"
            "n = len(log.read_text().splitlines()) if log.exists() else 0\n"
            "log.open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            "def save(step): (folder / str(step)).mkdir(parents=True)\n"
        ) + program
        code = supervise.supervise([sys.executable, "-c", program, *words], tmp_path / "run", restarts)
        return code, log.read_text().splitlines()

    return start


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("program", "code", "starts"),
    [
        ("sys.exit(0)", 0, 1),
        (f"save(n)\nif n < 5: {KILL}", 0, 6),
        ("save(n)\nsys.exit(75 if n < 5 else 0)", 0, 6),
        ("save(n)\nsys.exit([1, 9, 75, 137, 0][n])", 0, 5),
        (KILL, 137, 3),
        ("sys.exit(1)", 1, 3),
        (f"if n == 0: save(0)\n{KILL}", 137, 4),
        (f"if n in (0, 2, 4): save(n)\nif n < 7: {KILL}", 0, 8),
        (f"save(n)\n{KILL}", 137, 11),
        *[(f"save(n)\nsys.exit({code})", code, 1) for code in (2, 3, 4, 5, 6, 7, 8, 130)],
    ],
)
def test_what_is_started_again(run, program, code, starts, capfd):
    assert run(program)[0] == code
    said = capfd.readouterr().err
    assert said.count("; restart ") == starts - 1
    assert ("not started again" in said) is (code in (1, 137))
    if code in (1, 137):
        loop = "3 times in a row without progress from" in said
        assert loop or "after 10 restarts" in said


def test_only_the_first_start_is_fresh(run):
    _, starts = run(f"save(n)\nif n < 2: {KILL}", 10, "ppo", "c.yaml", "--fresh", "--x", "1")
    assert starts == ["ppo c.yaml --fresh --x 1", "ppo c.yaml --x 1", "ppo c.yaml --x 1"]


def test_the_option_is_not_passed_on():
    assert supervise.without_option(["ppo", "--restarts", "3", "c.yaml", "--restarts=4", "--x=1"]) == [
        "ppo",
        "c.yaml",
        "--x=1",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_it(run, tmp_path, number):
    """The run may have had the signal itself, as with Ctrl-C: that is one request."""
    program = f"""
sys.path.insert(0, {str(ROOT)!r})
from jaxrlhf import stopping
with stopping.handling():
    save(0)
    while not stopping.requested():
        time.sleep(0.01)
    time.sleep(0.5)
    sys.exit(75)
"""

    def stop():
        while not (tmp_path / "run" / "checkpoints" / "0").exists():
            time.sleep(0.01)
        *_, child = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()  # the last one started
        os.kill(int(child), number)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    code, starts = run(program)
    assert code == 75 and len(starts) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_second_signal_kills(run, tmp_path):
    def stop():
        while not (tmp_path / "run" / "checkpoints" / "0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    started = time.monotonic()
    code, _ = run("signal.signal(signal.SIGUSR1, lambda *_: None)\nsave(0)\ntime.sleep(60)")
    assert code == 143 and time.monotonic() - started < 30


def test_a_run_of_the_command_line_is_finished_in_spite_of_kills(ppo, tmp_path):
    """The reward kills the run in its second update, and again in its third."""
    (tmp_path / "r.py").write_text(
        "import os, pathlib, signal\n"
        "def reward(prompts, completions):\n"
        "    file = pathlib.Path(__file__).with_name('calls')\n"
        "    calls = file.read_text() + '.' if file.exists() else '.'\n"
        "    file.write_text(calls)\n"
        "    if len(calls) in (2, 4): os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    arguments = ["ppo", "--model.path", ppo.model.path, "--model.init", "random", "--data.path", ppo.data.path]
    arguments += ["--sampling.response_length", "4", "--ppo.batch_size", "8", "--ppo.total_episodes", "24"]
    arguments += ["--run_dir", ppo.run_dir, "--checkpoint.save_every", "1", "--checkpoint.synchronous", "always"]
    arguments += ["--reward.function", f"{tmp_path}/r.py:reward", "--restarts", "5", "--fresh"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf", *arguments], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ended by SIGKILL") == 2 and "restart 2 of 5" in done.stderr
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == ['{"step": 1', '{"step": 2', '{"step": 3'] and (tmp_path / "run" / "export").is_dir()
