"""`--restarts N`: a training command that is started again when its process ends before its run has."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf import stopping
from jaxrlhf.errors import PeerLost, Preempted, counted

CRASH_LOOP = 3
"""Ends in a row without a new checkpoint after which the command is not started again."""
_TEMPORARY = (1, PeerLost.exit_code, Preempted.exit_code)
"""Exit codes of what may be over the next time, besides signals: an error that nobody foresaw, a lost process, a signal
to the process alone."""
_LONGEST_PAUSE = 60.0  # seconds


def supervise(command: Sequence[str], run: Path, restarts: int) -> int:
    """Run `command`, whose run directory is `run`, until it has finished; returns its exit code.

    It is started again after an end by a signal (the kernel's when memory is short, among others) and after the exit
    codes 1, 9 and 75, up to `restarts` times, with growing pauses, but not after CRASH_LOOP ends in a row without a new
    checkpoint. SIGTERM and Ctrl-C are passed on, and then it is not started again; the second of them kills it.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: Any) -> None:
        asked.append(number)
        if process is not None and process.poll() is None:
            process.send_signal(stopping.FORWARDED if len(asked) == 1 else signal.SIGKILL)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        command, newest, stuck, starts = list(command), _newest(run), 0, 0
        while True:
            process = subprocess.Popen(command, env=os.environ | {stopping.SUPERVISED: "1"})
            if asked:  # between two starts
                process.send_signal(stopping.FORWARDED)
            code = process.wait()
            if asked:
                return code if code >= 0 and len(asked) == 1 else 128 + asked[0]
            if code >= 0 and code not in _TEMPORARY and not (code > 128 and code != 130):  # 130: Ctrl-C
                return code
            before, newest = newest, _newest(run)
            stuck, starts = 0 if newest > before else stuck + 1, starts + 1
            ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            where = f"checkpoint {newest}" if newest >= 0 else "no checkpoint"
            if stuck == CRASH_LOOP:
                _say(f"{ending}, {stuck} times in a row without progress from {where}: not started again")
                return code if code > 0 else 128 - code
            if starts > restarts:
                _say(f"{ending} after {counted(restarts, 'restart')}, with {where}: not started again")
                return code if code > 0 else 128 - code
            pause = min(2.0**stuck, _LONGEST_PAUSE)
            _say(f"{ending}, with {where}; restart {starts} of {restarts} in {pause:g} s")
            _sleep(pause, asked)
            if asked:
                return Preempted.exit_code
            command = [word for word in command if word != "--fresh"]  # which has been done
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def without_option(words: Sequence[str]) -> list[str]:
    """The words of a command without `--restarts N`."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] != "--restarts":
            kept.append(word)
        skip = not skip and word == "--restarts"
    return kept


def _newest(run: Path) -> int:
    """The step of the newest checkpoint, -1 if there is none."""
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=-1) if folder.is_dir() else -1


def _sleep(seconds: float, asked: Sequence[int]) -> None:
    until = time.monotonic() + seconds
    while not asked and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _say(text: str) -> None:
    print(f"jaxrlhf --restarts: {text}", file=sys.stderr, flush=True)
