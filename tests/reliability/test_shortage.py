"""A process that may not have more memory ends with a message and exit code 8, and its run goes on bit for bit."""

import shutil
import subprocess
import sys

import pytest
from support.runs import facts

from jaxrlhf.errors import StorageError, is_shortage

LIMITED = """
import resource, sys
from jaxrlhf import cli
from jaxrlhf.training.session import Session

step, more = int(sys.argv[2]), int(sys.argv[3])
save_if_due = Session.save_if_due

def limited(session, done, evaluation):
    save_if_due(session, done, evaluation)
    if done == step:
        session._checkpoints.wait()
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))

Session.save_if_due = limited
sys.exit(cli.main(["sft", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and read as on Linux")
@pytest.mark.parametrize(("step", "more"), [(3, 2_000_000), (4, 4_000_000)])
def test_a_run_whose_memory_is_limited_in_its_middle(step, more, start, tmp_path):
    """Saves need threads, whose stacks take 8 MB each. By then every program is compiled: LLVM ends the process (signal
    6) if it has no memory for one."""
    start("sft", max_steps=6)
    whole = facts(tmp_path / "run")
    (tmp_path / "sft.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    shutil.rmtree(tmp_path / "run")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "sft.yaml"), str(step), str(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 8 and "jaxrlhf: error: " in done.stderr, (done.returncode, done.stderr[-2000:])
    assert "can't start new thread" in done.stderr and "Use less memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == step
    start("sft", max_steps=6)
    assert facts(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (StorageError("checkpoint 2 was not saved: process 1: can't start new thread"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 5 bytes to file 3: No space left on device"), False),
        (ValueError("RESOURCE_EXHAUSTED: Failed to open: Too many open files"), False),
        (OSError(5, "Input/output error"), False),
    ],
)
def test_lack_of_memory_is_told_from_lack_of_room(error, short):
    assert is_shortage(error) == short
