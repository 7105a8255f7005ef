"""Metrics of a run: one record per step, written to metrics.jsonl, TensorBoard, W&B, trackio and the console.

`keys` defines every metric, `console` prints, `sinks` are the loggers besides the run's own files, `tags` names metrics
there, `plots` draws, `tables` writes CSV.
"""

import contextlib
import gzip
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.config import Logging
from jaxrlhf.errors import DataError, StorageError, counted, first_line, quoted
from jaxrlhf.files import read_json, write_whole, writing
from jaxrlhf.metrics import sinks, tags
from jaxrlhf.metrics.console import Console, duration
from jaxrlhf.metrics.keys import EPOCHS, JUDGE, METRICS, REWARDS
from jaxrlhf.metrics.sinks import Sink

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
TRACKERS = "trackers.json"

TOKENS = "tokens"
"""The folder of token records in a run directory: one file `step-000012.jsonl.gz` for each step that has some."""


class Logger:
    """Write the records of one run. Files are flushed after every line, so a killed run loses no finished step.

    A failure to write metrics.jsonl or samples.jsonl is raised as StorageError. Any other sink that fails during the
    run is dropped, with a note. Raises ConfigError if a sink that `config` asks for is not installed, or cannot start
    when it is opened: by `rewind`, or else by the first record.

    Args:
        directory: the run directory.
        config: what to show and where to send it.
        method: the command of the run (sft, ppo, ...).
        total_steps: steps of the whole run, for progress and remaining time.
        metric: the one that selects the best state, shown on the console by its key.
    """

    def __init__(self, directory: Path, config: Logging, method: str, total_steps: int, metric: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._config, self._method = directory, config, method
        projects = {"wandb": config.wandb_project, "trackio": config.trackio_project}
        self._trackers = {kind: sinks.tracker_module(kind, project) for kind, project in projects.items() if project}
        self._sinks: list[Sink] | None = None
        self._new = {name for name in (METRICS_FILE, SAMPLES_FILE) if not (directory / name).exists()}
        self._console = Console(method, total_steps, config, metric)
        self.note, self.paused = self._console.note, self._console.paused
        self.compiled = self._console.compiled
        self._open()

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the record of `step` (1, 2, ...): numbers by their key in METRICS."""
        unknown = {key for key in record if not _is_metric(key)}
        assert not unknown, f"not in METRICS: {sorted(unknown)}"
        numbers = {key: _number(value) for key, value in record.items()}
        with writing(self._metrics.name):
            self._metrics.write(_line({"step": step, **numbers}))
            self._metrics.flush()
        tagged = tags.tagged(numbers, self._method, self._config.tags, self._config.tag_prefix)
        self._send(lambda sink: sink.scalars(step, tagged))
        self._console.progress(step, numbers)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, show: bool = True) -> None:
        """Write rows ("prompt", "completion", and "score" or any other JSON value) and `show` the first few."""
        with writing(self._samples.name):
            self._samples.writelines(_line({"step": step, **row}) for row in rows)
            self._samples.flush()
        if rows:  # of one step there may be several kinds, which must not replace each other
            kind = "held_out_samples" if rows[0].get("held_out") else "samples" if show else "fixed_prompts"
            self._send(lambda sink: sink.samples(step, kind, rows))
        for row in rows[: self._config.num_samples] if show else ():
            self._console.sample(step, row)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Send the distributions of arrays, by name, without their non-finite elements, to TensorBoard and the
        trackers; no file of the run has them."""
        finite = {name: array[np.isfinite(array)] for name, array in values.items()}
        finite = {name: array for name, array in finite.items() if array.size}
        if finite:
            self._send(lambda sink: sink.histograms(step, finite))

    def tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the token records of `step`, one row per sequence. Non-finite numbers are None in them."""
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_whole(
            self._directory / TOKENS / f"step-{step:06d}.jsonl.gz",
            gzip.compress(lines.encode("utf-8", "backslashreplace"), mtime=0),
        )
        names = {"kl": "kl_per_token", "advantage": "advantage"}
        values = {tag: [x for row in rows for x in row.get(name, ())] for name, tag in names.items()}
        self.histograms(step, {tag: np.array(numbers, float) for tag, numbers in values.items()})

    def sync(self) -> None:
        """Wait until all lines are on disk, as a checkpoint that follows counts on them."""
        for file in (self._metrics, self._samples):
            with writing(file.name):
                file.flush()
                os.fsync(file.fileno())

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Remove records after `step` before the run resumes from `step` (0: starts), and lines that cannot be read or
        repeat earlier ones. Says what was wrong, and what is missing. Returns the records after `step`."""
        for path in (self._directory / TOKENS).glob("step-*.jsonl.gz"):
            number = path.name.removeprefix("step-").removesuffix(".jsonl.gz")
            if number.isdecimal() and int(number) > step:  # other names are not ours
                path.unlink()
        for file in (self._metrics, self._samples):
            file.close()
        found, _ = (self._truncate(Path(file.name), step) for file in (self._metrics, self._samples))
        self._open()
        self._open_sinks(step, found.last)
        return found.later

    def _truncate(self, path: Path, step: int) -> "_Found":
        """Keep the lines of `path` up to `step` (0: none), in one atomic replacement, and note what is wrong with them;
        returns what was there."""
        every = path.name == METRICS_FILE
        kept, found = _lines_up_to(path, step, every=every)
        problems = []
        if found.unreadable:
            problems.append(f"{counted(found.unreadable, 'line')} could not be read")
        if found.repeated:
            problems.append(f"{counted(found.repeated, 'line')} repeated earlier ones")
        if step and path.name in self._new:
            problems.append("it was missing")
        elif every and (missing := step - len(kept)) > 0:
            problems.append(f"the records of {counted(missing, 'step')} are missing")
        if step and problems:
            self.note(f"{path.name}, up to step {step}: {'; '.join(problems)}. The run goes on with what is left")
        write_whole(path, b"".join(kept))
        return found

    def close(self) -> None:
        """Flush and close everything. Raises nothing: what could not be written has been raised when it was logged."""
        for file in (self._metrics, self._samples):
            with contextlib.suppress(OSError):  # lines are flushed when they are written
                file.close()
        self._close_sinks()
        self._console.close()

    def _open(self) -> None:
        for path in (self._directory / METRICS_FILE, self._directory / SAMPLES_FILE):
            if path.exists() and not path.is_file():  # a named pipe would wait for a reader
                raise StorageError(f"{path} is not a regular file; move it away, and run the same command again")
        # A lone surrogate, which UTF-8 cannot encode, is written as its JSON escape \udxxx.
        self._metrics, self._samples = (
            open(self._directory / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
            for name in (METRICS_FILE, SAMPLES_FILE)
        )

    def _open_sinks(self, step: int | None = None, sent: int = -1) -> None:
        """Open the sinks of a run that resumes from `step`, after it has logged the steps up to `sent` before.

        A resumed run repeats its steps exactly. So trackers, which cannot forget, are not sent those again that they
        have.
        """
        self._close_sinks()
        self._sinks = []
        if self._config.tensorboard:
            self._sinks.append(sinks.TensorBoard(self._directory / "tensorboard", None if step is None else step + 1))
        file = self._directory / TRACKERS
        known = read_json(file) if step and file.is_file() else {}
        run_id = known.get("id") or secrets.token_hex(4)
        for kind, module in self._trackers.items():
            option, at = f"{kind}_project", sent if kind in known.get("trackers", ()) else -1
            project = getattr(self._config, option)
            self._sinks.append(sinks.Tracker(module, project, self._directory, run_id, at, self.note))
        if self._trackers or known:
            write_whole(file, json.dumps({"id": run_id, "trackers": list(self._trackers)}) + "\n")

    def _close_sinks(self) -> None:
        for sink in self._sinks or []:
            try:
                sink.close()
            except Exception as error:
                self.note(f"{sink.name} could not be closed: {first_line(error)}; metrics.jsonl has all records")
        self._sinks = None

    def _send(self, send: Callable[[Sink], None]) -> None:
        if self._sinks is None:
            self._open_sinks()
        for sink in list(self._sinks or []):
            try:
                send(sink)
            except Exception as error:
                assert self._sinks is not None
                self._sinks.remove(sink)
                self.note(f"no more is logged to {sink.name}: {first_line(error)}; the run goes on with its own files")
                with contextlib.suppress(Exception):  # it has failed already
                    sink.close()


class Silence:
    """A logger that writes nothing: that of a process which leaves the log to process 0."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return contextlib.nullcontext if name == "paused" else lambda *_, **__: None


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl or the rows of a samples.jsonl, except an incomplete last line.

    "NaN", "Infinity" and "-Infinity" under a metric's key become floats. Raises DataError if the file is missing or a
    line is not a JSON object with a step, or has something other than a number under a metric's key.
    """
    path, records = Path(path), []
    if not path.is_file():
        raise DataError(f"{path.parent} has no {path.name}: is it a run directory?")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                records.append(_record(line, f"{path}:{number}"))
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record of a line. Records share the strings of their keys: a long run has many."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {quoted(record, 40)}")
    if type(record.get("step")) is not int:
        raise DataError(f"{where}: its step is {quoted(record.get('step'), 40)}, not a whole number")
    wrong = {key for key, value in record.items() if _is_metric(key) and type(value) not in (int, float)}
    try:
        return {sys.intern(key): float(value) if key in wrong else value for key, value in record.items()}
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: a metric is not a number ({first_line(error)})") from error


def _is_metric(key: str) -> bool:
    return key in METRICS or key.startswith((REWARDS, JUDGE, EPOCHS))


def _number(value: Any) -> float | int:
    """Convert a Python, NumPy or JAX scalar to a Python number, exactly (float32 as float64)."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(dict(record)), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace non-finite floats, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class _Found(NamedTuple):
    """Lines of a log: the last step among them (-1: none), those after the step that was asked for, and how many cannot
    be read or repeat earlier ones."""

    last: int
    later: list[dict[str, Any]]
    unreadable: int
    repeated: int


def _lines_up_to(path: Path, step: int, *, every: bool) -> tuple[list[bytes], _Found]:
    """The lines of a log up to `step`, in the order of their steps, and what was found. With `every` there is one line
    for each step, otherwise there may be several, one after the other."""
    kept: list[bytes] = []
    later: list[dict[str, Any]] = []
    last, done, unreadable, repeated = -1, -1, 0, 0

    def lost(line: bytes) -> bool:
        """True if an unreadable line seems to be of a step up to `step`: by what is left of it, or by its place."""
        begun = re.match(rb'{"step": (\d{1,15})[,}]', line)
        return int(begun[1]) <= step if begun else last < step

    *lines, torn = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            record = json.loads(line)
            number = record["step"]
            if type(number) is not int:
                raise TypeError("a step is a whole number")
            further = number > last or (number == last and not every)
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += lost(line)
            continue
        if not further:
            done = last
        if number <= done:
            repeated += number <= step
            continue
        last = number
        if step and number <= step:
            kept.append(line + b"\n")
        else:
            later.append(record)
    return kept, _Found(last, later, unreadable + bool(torn and lost(torn)), repeated)
