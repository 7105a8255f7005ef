"""Worker processes: what they start ends with them, and what they print does not hold them up."""

import signal
import subprocess
import sys
import time

import pytest

from jaxrlhf.errors import RewardError
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.worker import Worker

REQUEST = ScoreRequest(["p"], ["c"], {})
STARTS_A_CHILD = """
import os, pathlib, subprocess, sys
def reward(prompts, completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
    {then}
    return [1.0]
"""
HOLDS_A_WORKER = """
import sys, time
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.worker import Worker
worker = Worker(sys.argv[1], timeout=60)
print(worker(ScoreRequest(["p"], ["c"], {})).values, flush=True)
time.sleep(600)
"""


def lives(pid: int) -> bool:
    """A process runs, and is not a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lives(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_reward_has_started_ends_with_the_run_even_if_that_is_killed(tmp_path):
    (tmp_path / "r.py").write_text(STARTS_A_CHILD.format(then=""))
    command = [sys.executable, "-c", HOLDS_A_WORKER, f"{tmp_path / 'r.py'}:reward"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stdout.readline() == "[1.0]\n"
        child = int((tmp_path / "child").read_text())
        assert lives(child)
        run.send_signal(signal.SIGKILL)
    assert ends(child)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("then", ["os._exit(3)", "os.kill(os.getpid(), 9)", "import time; time.sleep(600)"])
def test_what_a_reward_has_started_ends_with_its_process(tmp_path, then):
    (tmp_path / "r.py").write_text(STARTS_A_CHILD.format(then=then))
    worker = Worker(f"{tmp_path / 'r.py'}:reward", timeout=5)
    with pytest.raises(RewardError):
        worker(REQUEST)
    assert ends(int((tmp_path / "child").read_text()))


def test_a_reward_that_prints_ten_megabytes_is_not_held_up_and_its_last_lines_are_kept(tmp_path, capfd):
    lines = "sys.stdout.write('x' * 99 + '\\n')"
    (tmp_path / "r.py").write_text(
        f"import os, sys\ndef reward(prompts, completions):\n    for i in range(100_000):\n        {lines}\n"
        "    print('\\x1b[2Jlast'); sys.stdout.flush()\n    os._exit(3)\n"
    )
    worker = Worker(f"{tmp_path / 'r.py'}:reward", timeout=120)
    started = time.process_time()
    with pytest.raises(RewardError, match=r"exit code 3. Its last output: .*\\x1b\[2Jlast") as caught:
        worker(REQUEST)
    assert time.process_time() - started < 5, "CPU time of this process: reading byte by byte took it 40"
    assert len(str(caught.value)) < 6000
    assert "\x1b" not in capfd.readouterr().err


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, capfd):
    (tmp_path / "r.py").write_text(
        "import os, sys\ndef reward(prompts, completions):\n    sys.stderr.write('y' * 20_000_000)\n"
        "    sys.stderr.flush()\n    os._exit(3)\n"
    )
    with pytest.raises(RewardError, match=r"Its last output: y{500}(?!y)"):
        Worker(f"{tmp_path / 'r.py'}:reward", timeout=120)(REQUEST)
    capfd.readouterr()


def test_the_text_of_an_exception_is_shortened_and_spelt_out(tmp_path):
    (tmp_path / "r.py").write_text(
        "def reward(prompts, completions):\n    raise ValueError('\\x1b[31m' + 'z' * 3_000_000 + ' the end')\n"
    )
    with pytest.raises(RewardError, match=r"raised ValueError: \\x1b\[31mz+ \.\.\. z+ the end at ") as caught:
        Worker(f"{tmp_path / 'r.py'}:reward", timeout=60)(REQUEST)
    assert len(str(caught.value)) < 3000
