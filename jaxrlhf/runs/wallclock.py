"""Wall-clock time of a run by what it was spent on, over all of its starts.

A `Clock` divides the time of a process; every record of metrics.jsonl has its share since the record before it
(`perf/time/...`), and run.json the sums of the whole run. A process that was killed has left its records, so its time
is known up to the last of them.
"""

import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxrlhf.errors import counted

Part = Literal["training", "reward", "evaluation", "compile", "save", "restore", "lost", "other"]
NAMES: dict[Part, str] = {
    "training": "training",
    "reward": "waiting for rewards",
    "evaluation": "evaluating",
    "compile": "compiling",
    "save": "saving",
    "restore": "restoring",
    "lost": "lost in unfinished steps",
    "other": "other",
}
PREFIX = "perf/time/"
REPEATED: tuple[Part, ...] = ("training", "reward", "evaluation", "compile")
"""Parts of an unfinished step that are lost when it is repeated."""
COSTLY = 0.1
"""Time of checkpoints in that of training from which they are warned of."""
RECENT = 20  # steps from which the time of a step is estimated
Times = dict[str, float]  # seconds by Part
_command_began: float | None = None


@contextlib.contextmanager
def command(began: float) -> Iterator[None]:
    """Block that runs a command, which began then (of `time.monotonic()`): the clock of its run counts from there."""
    global _command_began
    _command_began = began
    try:
        yield
    finally:
        _command_began = None


class Clock:
    """The time since the command began, or without one since now, divided into parts: each moment belongs to one."""

    def __init__(self) -> None:
        self._since = time.monotonic() if _command_began is None else _command_began
        self._parts: list[Part] = ["other"]
        self._thread = threading.get_ident()
        self._times: Times = {}

    @contextlib.contextmanager
    def spent(self, part: Part) -> Iterator[None]:
        """Block whose time is that of `part`, but for what it spends on others."""
        self._account()
        self._parts.append(part)
        try:
            yield
        finally:
            self._account()
            self._parts.pop()

    def begin(self, part: Part) -> None:
        """Count the time outside of `spent` blocks as that of `part`, from now on."""
        self._account()
        self._parts[0] = part

    def compiled(self, seconds: float) -> None:
        """The last `seconds` of this thread were spent on compiling; those of other threads, which nobody may have
        waited for, do not count."""
        if threading.get_ident() == self._thread:
            self._account()
            part = self._parts[-1]
            seconds = min(seconds, self._times[part])
            self._times[part] -= seconds
            self._times["compile"] = self._times.get("compile", 0.0) + seconds

    def take(self) -> Times:
        """The seconds of each part since this was last called."""
        self._account()
        taken, self._times = self._times, {}
        return {part: seconds for part, seconds in taken.items() if seconds > 0}

    def since_taken(self, part: Part) -> float:
        """The seconds of a part since `take` was last called."""
        self._account()
        return self._times.get(part, 0.0)

    def _account(self) -> None:
        now, part = time.monotonic(), self._parts[-1]
        self._times[part] = self._times.get(part, 0.0) + now - self._since
        self._since = now


def of_record(record: Mapping[str, Any]) -> Times:
    """The seconds of each part in a record of metrics.jsonl; empty if it is of a version that did not log them."""
    return {part: float(record[key]) for part in NAMES if (key := PREFIX + part) in record}


def add(times: Times, more: Times) -> None:
    """Add `more` to `times`."""
    for part, seconds in more.items():
        times[part] = times.get(part, 0.0) + seconds


def repeated(times: Times, parts: Sequence[str] = REPEATED) -> Times:
    """The times of an unfinished step, of which these `parts` will be repeated: they are lost."""
    lost = sum(seconds for part, seconds in times.items() if part in parts)
    return {part: seconds for part, seconds in times.items() if part not in parts} | ({"lost": lost} if lost else {})


def before(
    starts: Sequence[Mapping[str, Any]],
    known: Times,
    kept: Iterable[Mapping[str, Any]],
    removed: Iterable[Mapping[str, Any]],
) -> Times:
    """The time of the earlier `starts` of a run.

    Args:
        starts: those of run.json.
        known: their time as run.json has it, which lacks the steps of a last one that was killed.
        kept, removed: the records up to the step from which the run resumes, and those after it, whose steps are
            repeated.
    """
    total, removed = dict(known), list(removed)
    if not starts:  # nothing was saved: the run begins again
        return {"lost": total} if (total := sum(sum(of_record(r).values()) for r in removed)) else {}
    if "end" not in starts[-1] and "step" in starts[-1]:
        for record in itertools.chain(kept, removed):
            if record["step"] > starts[-1]["step"]:
                add(total, of_record(record))
    for record in removed:
        times = of_record(record)
        add(total, {part: -seconds for part, seconds in times.items()})
        add(total, {"lost": sum(times.values())})
    return {part: seconds for part, seconds in total.items() if seconds > 0}


def line(times: Mapping[str, float], starts: int, duration: str) -> str:
    """The sentence that ends a run."""
    total = sum(times.values())
    shares = [f"{name} {share} %" for part, name in NAMES.items() if (share := round(100 * times.get(part, 0) / total))]
    return f"time: {duration}{f' in {starts} starts' if starts > 1 else ''}; {', '.join(shares)}"


def step_seconds(
    records: Sequence[Mapping[str, Any]], parts: Sequence[Part], apart: Sequence[str] = ()
) -> float | None:
    """Median seconds of these parts of the last RECENT steps, without those under the keys `apart`; None if no record
    has its time."""
    timed = [record for record in records if of_record(record)][-RECENT:]
    seconds = [
        sum(of_record(record).get(part, 0.0) for part in parts) - sum(float(record.get(key, 0.0)) for key in apart)
        for record in timed
    ]
    return statistics.median(seconds) if seconds else None


def costly_saves(save: float, step: float, interval: int, left: int) -> str:
    """The warning about checkpoints of `save` seconds, after every `interval` steps of `step` seconds with `left` steps
    to go; "" if they take less than COSTLY of the time of training, or less than a minute in all."""
    share = save / (interval * step)
    if share < COSTLY or save * left / interval < 60:
        return ""
    enough = math.ceil(save / (COSTLY * step))
    return (
        f"warning: training waits {save:.3g} s for a checkpoint, and there is one after every "
        f"{counted(interval, 'step')} of {step:.3g} s: {share:.0%} on top. Save less often (checkpoint.save_every "
        f"{enough} or more, or checkpoint.save_minutes), or to a faster disk"
    )
