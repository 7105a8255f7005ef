"""Contestants of bench.py as processes. Imports only the standard library, because peers have their own environments.

A contestant writes a line of JSON when it is ready, another after every "go" on its standard input, and a last one with
its peak memory. The output of libraries goes to standard error and into a file, which is shown if the process dies.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

MKL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
ENVIRONMENT = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION")


@dataclasses.dataclass(frozen=True)
class Job:
    """A contestant's task: the options of bench.py and two folders."""

    case: str
    quick: bool  # case limits: only what the floors need
    model: str  # folder with config.json and tokenizer
    work: str  # folder for other files
    shape: str
    dtype: Literal["float32", "bfloat16", "int8"]
    batch: int
    prompt: int
    response: int
    slots: int
    samples: int
    epochs: int
    lora_rank: int | None
    quantize: Literal["none", "int8", "nf4"]
    micro_batch: int | None
    remat: Literal["auto", "none", "full", "dots"]
    rollout_dtype: Literal["auto", "float32", "bfloat16", "int8"]
    frozen_dtype: Literal["auto", "float32", "bfloat16"]
    checkpointing: bool
    device: str
    rounds: int
    profile: bool


class Contestant:
    """The parent's side of the protocol."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], job: Job, knobs: str, work: Path
    ) -> None:
        self.name, self.job, self.knobs = name, job, knobs
        self.about: dict[str, Any] = {}
        self.peak_bytes = 0
        self._command = [*command, json.dumps(dataclasses.asdict(job))]
        self._environment = os.environ | environment
        self._log = work / f"{name}-{job.case}.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it has loaded and warmed up."""
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
            )
        self.about = self._read()

    def repeat(self) -> dict[str, Any]:
        """Run one more repetition. `waiting` is the share of the time in which its threads could have run and did not,
        because the processors were busy with others (Linux)."""
        before = self._scheduled()
        self._write("go")
        result = self._read()
        ran, waited = 0, 0
        for thread, (running, waiting) in self._scheduled().items():
            ran_before, waited_before = before.get(thread, (0, 0))
            ran, waited = ran + running - ran_before, waited + waiting - waited_before
        return result | {"waiting": waited / max(ran + waited, 1)}

    def finish(self) -> None:
        """Read the peak memory and end the process."""
        self._write("end")
        self.peak_bytes = max(self.peak_bytes, self._read()["peak_bytes"])
        self.kill()

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _scheduled(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds for which each thread that is alive has run, and has waited for a processor."""
        assert self._process
        found: dict[str, tuple[int, int]] = {}
        for file in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread has ended
                running, waiting, *_ = map(int, file.read_text().split())
                found[file.parent.name] = running, waiting
        return found

    def _write(self, text: str) -> None:
        assert self._process and self._process.stdin
        try:
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _read(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._died()
        return json.loads(line)

    def _died(self) -> None:
        assert self._process
        code = self._process.wait()
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        killed = " (killed: short of memory? --apart keeps one contestant in memory at a time)" if code == -9 else ""
        sys.exit(f"{tail}\nbench: {self.name} ended with status {code}{killed}; the end of its output is above")


class Turns:
    """The contestant's side of the protocol."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # the output of libraries
        self._started = time.perf_counter()

    def ready(self, *packages: str, **about: Any) -> None:
        environment = {name: Path(os.environ[name]).name for name in ENVIRONMENT if os.environ.get(name)}
        self.say(
            ready_seconds=round(time.perf_counter() - self._started, 2),
            versions={name: metadata.version(name) for name in packages},
            environment=environment,
            **about,
        )

    def go(self) -> bool:
        """Wait for the parent; True if there is another repetition."""
        return sys.stdin.readline().strip() == "go"

    def say(self, **record: Any) -> None:
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()

    def serve(self, repeat: Callable[[], dict[str, Any]], peak_bytes: Callable[[], int]) -> None:
        """Run a repetition for every "go"."""
        while self.go():
            self.say(**repeat())
        self.say(peak_bytes=peak_bytes())


def characters(completions: list[str], **columns: Any) -> list[float]:
    """Reward of case grpo: the number of characters of each completion."""
    return [float(len(text)) for text in completions]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Call a function and return (seconds, result)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_resident() -> int:
    """Peak resident memory of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def strong_knobs(work: Path) -> dict[str, str]:
    """Environment variables for torch at its fastest on this machine: MKL's AVX512 code on AMD processors too, and huge
    pages for large blocks of memory."""
    source, library = work / "mkl.c", work / "libmkl_fast.so"
    source.write_text(MKL)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("bench: --strong needs a C compiler called cc; on Debian and Ubuntu: sudo apt install gcc")
    except subprocess.CalledProcessError as error:
        sys.exit(f"bench: cc failed on a one-line function:\n{error.stderr}")
    return {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
