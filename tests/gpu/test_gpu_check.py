"""scripts/gpu_check.py, rehearsed on a CPU: nothing here needs a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Part

SCRIPT = Path(gpu_check.__file__)


def checked(file, *arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, file, *arguments], capture_output=True, text=True, env=os.environ, check=False
    )
    return done, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.long
@pytest.mark.slow
def test_a_rehearsal_writes_what_it_found(tmp_path):
    done, found = checked(tmp_path / "out.json", "--device", "cpu", "--tiny", "--only", "parity", "generate-T")
    assert done.returncode == 0, done.stdout + json.dumps(found, indent=1)
    assert found["rehearsal"] and found["device"]["platform"] == "cpu" and found["versions"]["jax"]
    parity, generate = found["parts"]["parity"], found["parts"]["generate-T"]
    outcomes = list(parity["tests"].values())
    assert outcomes.count("passed") >= 9 and set(outcomes) == {"passed"}
    assert generate["record"]["contestants"]["ours"]["decode_percent"] > 0
    assert found["seconds"] < 480 and "parity: passed" in done.stdout


@pytest.mark.slow
@pytest.mark.bench
def test_a_rehearsal_of_all_parts(tmp_path):
    done, found = checked(tmp_path / "out.json", "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stdout
    assert list(found["parts"]) == ["parity", "generate-T", "ppo-T", "plan-T"]
    assert found["parts"]["plan-T"]["record"]["contestants"]["planned"]["phases"]["peak"] > 0


def test_without_a_gpu_every_part_fails_and_says_so(tmp_path):
    done, found = checked(tmp_path / "out.json")
    assert done.returncode == 1 and "jax has no gpu" in done.stderr and "nothing is run" in done.stderr
    names = ["parity", "generate-M", "generate-L", "ppo-M", "ppo-L", "plan-M"]
    assert list(found["parts"]) == names
    assert all("jax has no gpu" in part["error"] for part in found["parts"].values())
    assert checked(tmp_path / "no.json", "--only", "party")[0].stderr.endswith(
        f"there is no part party; the parts are {', '.join(names)}\n"
    )


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = gpu_check.run(Part([sys.executable, "-c", parent], 5), 5, dict(os.environ))
    assert found["status"] == "too long" and found["seconds"] < 15
    state = Path("/proc") / pid.read_text() / "stat"
    ended = (not state.exists() or state.read_text().split()[2] == "Z" or time.sleep(0.1) for _ in range(100))
    assert any(ended), "killed, and gone within ten seconds"


def test_failures_are_recorded(tmp_path):
    failed = gpu_check.run(Part([sys.executable, "-c", "raise SystemExit('no memory')"], 9), 9, dict(os.environ))
    assert failed["status"] == "failed" and "no memory" in failed["error"] and "record" not in failed
    tests = tmp_path / "junit.xml"
    tests.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure message='1 != 2'/></testcase>"
        "<testcase name='c'><skipped message='one device'/></testcase></testsuite></testsuites>"
    )
    assert gpu_check.outcomes(tests) == {"a": "passed", "b": "failure: 1 != 2", "c": "skipped: one device"}
    tests.write_text("<testsuite><testcase name='c'><skipped message='no GPU'/></testcase></testsuite>")
    skipped = gpu_check.run(Part([sys.executable, "-c", ""], 9, tests), 9, dict(os.environ))
    assert skipped["status"] == "failed", "a check in which all tests are skipped has checked nothing"
