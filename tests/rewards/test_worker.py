"""A function in its own process: it cannot harm the run, and it does not outlive it."""

import datetime
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.worker import Worker

LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes in /proc")
ASKED = ScoreRequest(["p", "q"], ["one", "two two"], {"answer": [1, 2]}, step=3)


@pytest.fixture
def write(tmp_path):
    def file(text: str) -> str:
        (tmp_path / "mine.py").write_text(textwrap.dedent(text))
        return str(tmp_path / "mine.py")

    return file


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within some seconds; a zombie counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_arguments_and_values_arrive_as_they_are(write):
    path = write(
        """
        def f(prompts, completions, answer, extra=None, low=0):
            assert prompts == ["p", "\\ud800 \\n\\u2028"], prompts
            assert extra == [{"a": [1, None, 2.5]}, "x"] and answer == [[0, 1], [2, 3]]
            return [low + 0.1, None]
        """
    )
    worker = Worker(f"{path}:f", options={"low": 3}, timeout=20)
    columns = {"extra": [{"a": [1, None, 2.5]}, "x"], "answer": [range(2), range(2, 4)], "other": [object(), object()]}
    answer = worker(ScoreRequest(["p", "\ud800 \n\u2028"], ["a", "b"], columns))
    assert answer.values == [pytest.approx(3.1, rel=1e-7), None], (
        "float32, and a column nobody asked for did not matter"
    )
    assert answer.failed == []


@LINUX
def test_one_process_serves_all_calls_until_one_fails(write):
    path = write(
        """
        import os
        def f(completions, answer):
            return [os.getpid() if a else 1 / a for a in answer]
        """
    )
    worker = Worker(f"{path}:f", timeout=20)
    first = worker.pid
    assert first != os.getpid()
    for _ in range(2):
        assert worker(ASKED).values == [first, first]
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        worker(ASKED._replace(columns={"answer": [0, 1]}))
    assert worker(ASKED).values == [first, first], "a raise is no reason to start again"
    os.kill(first, signal.SIGKILL)  # between calls: nobody's fault, and nobody needs to know
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # a zombie whose threads still end cannot be waited for yet
    assert worker(ASKED).values == [worker.pid] * 2 != [first] * 2
    worker.close()
    assert gone(worker.pid)


@LINUX
@pytest.mark.parametrize("way", ["time.sleep(60)", "re.match(r'(a+)+$', 'a' * 50 + 'b')"], ids=["asleep", "in C"])
def test_a_function_that_times_out_is_killed_with_its_children(write, way, tmp_path):
    path = write(
        f"""
        import re, subprocess, sys, time
        def f(completions):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with open({str(tmp_path / "child")!r}, "w") as file:
                file.write(str(child.pid))
            {way}
        """
    )
    worker = Worker(f"{path}:f", timeout=1)
    pid, started = worker.pid, time.monotonic()
    with pytest.raises(RewardError, match=r"f \(step 3\) did not answer 2 completions within 1 s and was killed"):
        worker(ASKED)
    assert 0.9 < time.monotonic() - started < 3
    assert gone(pid)
    assert gone(int((tmp_path / "child").read_text()))


@LINUX
@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_its_parent(write, busy):
    """Though the parent is killed outright, and though C code holds Python's lock."""
    path = write(
        """
        import re
        def f(completions):
            re.match(r'(a+)+$', 'a' * 50 + 'b')
        """
    )
    code = f"""
from jaxrlhf.rewards.sources.worker import Worker
from jaxrlhf.rewards.sources.protocol import ScoreRequest
worker = Worker({path + ":f"!r}, timeout=60)
print(worker.pid, flush=True)
if {busy}:
    worker(ScoreRequest(["p"], ["c"], {{}}))
input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    if busy:
        time.sleep(0.3)
    assert not gone(pid, 0.2)
    parent.kill()
    parent.communicate()
    assert gone(pid)


def test_what_the_function_prints_goes_to_standard_error(write, capfd):
    path = write(
        """
        import os, subprocess, sys
        print("loaded")
        def f(completions):
            print('{"values": [9, 9]}')
            os.write(1, b"raw\\n")
            subprocess.run(["echo", "from a child"])
            print("to stderr", file=sys.stderr)
            return [len(sys.stdin.read()), 2]
        """
    )
    worker = Worker(f"{path}:f", timeout=20)
    assert worker(ASKED).values == [0, 2]
    worker.close()
    worker._process._listener.join(5)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["loaded", '{"values": [9, 9]}', "raw", "from a child", "to stderr"]


def test_the_process_imports_nothing_heavy_and_sees_no_accelerator(write):
    path = write(
        """
        import os, sys
        def f(completions):
            heavy = {"jax", "numpy", "transformers", "pydantic"} & set(sys.modules)
            assert not heavy, heavy
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["JAX_PLATFORMS"] == "cpu"
            return [1, 1]
        """
    )
    assert Worker(f"{path}:f", timeout=20)(ASKED).values == [1, 1]


def test_an_async_function_is_awaited(write):
    path = write(
        """
        import asyncio
        async def one(text):
            await asyncio.sleep(0.05)
            return len(text)
        async def f(completions):
            return await asyncio.gather(*map(one, completions))
        """
    )
    assert Worker(f"{path}:f", timeout=20)(ASKED).values == [3, 7]


def test_messages_larger_than_a_pipe_pass_both_ways(write):
    path = write("def f(completions):\n    return [[float(len(c))] * 1 for c in completions]\n")
    worker = Worker(f"{path}:f", timeout=20)
    count = 20_000
    texts = ["x" * (i % 50) for i in range(count)]
    answer = worker(ScoreRequest(["p"] * count, texts, {}, tokens=[["t"]] * count))
    assert answer.values == [[float(len(text))] for text in texts]


@pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), b"png", {1, 2}, {"a": {(1, 2): 3}}])
def test_a_column_that_is_not_json_is_named(write, value):
    worker = Worker(f"{write('def f(completions, **columns): return [1, 1]')}:f", timeout=20)
    with pytest.raises(
        RewardError, match=r"\(step 3\) is to get column 'when', whose value 1 cannot be written as JSON"
    ):
        worker(ASKED._replace(columns={"when": [1, value]}))
    assert worker(ASKED).values == [1, 1]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import nothing_here", RewardError, r"ModuleNotFoundError: No module .* at .*mine.py:1"),
        ("import os\nos._exit(4)", RewardError, r"mine.py:f': loading it ended its process with exit code 4"),
        ("from jaxrlhf.errors import *\nraise ConfigError('no lexicon')", ConfigError, r"mine.py:f': no lexicon$"),
        ("def g(completions): pass", RewardError, r"mine.py has no 'f'"),
        ("def f(completions, high=3): pass", ConfigError, r"has no option 'hihg'; did you mean 'high'"),
    ],
)
def test_errors_of_loading_name_file_and_cause(write, text, error, message):
    with pytest.raises(error, match=message):
        Worker(f"{write(text)}:f", options={"hihg": 1}, timeout=20)


def test_a_module_is_found_as_it_is_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards" / "inner.py").write_text("def f(completions): return [5, 5]")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Worker("my_rewards.inner:f", timeout=20)(ASKED).values == [5, 5]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise RuntimeError('the standard library comes first')")
    (tmp_path / "here.py").write_text("def f(completions): return [6, 6]")
    assert Worker("here:f", timeout=20)(ASKED).values == [6, 6]
    assert Worker("here.py:f", timeout=20)(ASKED).values == [6, 6]
