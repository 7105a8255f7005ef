"""Metrics of a run: one record per step, written to metrics.jsonl, TensorBoard, W&B, trackio and the console.

`keys` defines every metric, `lines` writes and reads those of the run's files, `console` prints, `sinks` are the other
loggers, `tags` names metrics there, `plots` draws, `tables` writes CSV.
"""

import contextlib
import gzip
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config import Logging
from jaxrlhf.errors import StorageError, counted, first_line
from jaxrlhf.files import kind_of, read_json, write_whole, writing
from jaxrlhf.metrics import lines, sinks, tags
from jaxrlhf.metrics.console import Console, duration
from jaxrlhf.metrics.keys import METRICS
from jaxrlhf.metrics.lines import read_records
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
        unknown = {key for key in record if not lines.is_metric(key)}
        assert not unknown, f"not in METRICS: {sorted(unknown)}"
        numbers = {key: lines.number(value) for key, value in record.items()}
        with writing(self._metrics.name):
            self._metrics.write(lines.written({"step": step, **numbers}))
            self._metrics.flush()
        tagged = tags.tagged(numbers, self._method, self._config.tags, self._config.tag_prefix)
        self._send(lambda sink: sink.scalars(step, tagged))
        self._console.progress(step, numbers)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, show: bool = True) -> None:
        """Write rows ("prompt", "completion", and "score" or any other JSON value) and `show` the first few."""
        with writing(self._samples.name):
            self._samples.writelines(lines.written({"step": step, **row}) for row in rows)
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
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_whole(
            self._directory / TOKENS / f"step-{step:06d}.jsonl.gz",
            gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0),
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

    def rewind(self, step: int, *, repeated: bool = False, samples: int | None = None) -> list[dict[str, Any]]:
        """Remove records after `step` before the run resumes from `step` (0: starts), and lines that cannot be read or
        repeat earlier ones. Says what was wrong, and what is missing. Returns the records that were removed.

        repeated: the record and samples of `step` are written again: they are removed, too.
        samples: the number of samples of `step` to keep if others of it are written again.
        """
        for path in (self._directory / TOKENS).glob("step-*.jsonl.gz"):
            number = path.name.removeprefix("step-").removesuffix(".jsonl.gz")
            if number.isdecimal() and int(number) > step:  # other names are not ours
                path.unlink()
        for file in (self._metrics, self._samples):
            file.close()
        end = -1 if step == 0 else step - 1 if repeated else step
        found, _ = (self._truncate(Path(file.name), end, samples) for file in (self._metrics, self._samples))
        self._open()
        self._open_sinks(end, found.last)
        return found.later

    def _truncate(self, path: Path, end: int, samples: int | None) -> lines.Found:
        """Keep the lines of `path` up to step `end` (-1: none), of its `samples` so many, in one atomic replacement,
        and note what is wrong with them; returns what was there."""
        every = path.name == METRICS_FILE
        kept, found = lines.up_to(path, end, every=every, of_end=None if every else samples)
        problems = []
        if found.unreadable:
            problems.append(f"{counted(found.unreadable, 'line')} could not be read")
        if found.misplaced:
            problems.append(f"{counted(found.misplaced, 'line')} had a step that does not fit its place")
        if found.repeated:
            problems.append(f"{counted(found.repeated, 'line')} repeated earlier ones")
        if path.name in self._new:
            problems.append("it was missing")
        elif every and (missing := end - len(kept)) > 0:
            problems.append(f"the records of {counted(missing, 'step')} are missing")
        if end > 0 and problems:
            self.note(f"{path.name}, up to step {end}: {'; '.join(problems)}. The run goes on with what is left")
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
            if kind := kind_of(path):  # a named pipe would wait for a reader
                raise StorageError(f"{path} is {kind}, not a file; move it away, and run the same command again")
        # A lone surrogate, which UTF-8 cannot encode, is written as its JSON escape \udxxx.
        self._metrics, self._samples = (
            open(self._directory / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
            for name in (METRICS_FILE, SAMPLES_FILE)
        )

    def _open_sinks(self, end: int | None = None, sent: int = -1) -> None:
        """Open the sinks of a run that goes on after step `end` (-1: starts), and has logged the steps up to `sent`.

        A resumed run repeats its steps exactly. So trackers, which cannot forget, are not sent those again that they
        have.
        """
        self._close_sinks()
        self._sinks = []
        if self._config.tensorboard:
            self._sinks.append(
                sinks.TensorBoard(self._directory / "tensorboard", None if end is None else max(end, 0) + 1)
            )
        file = self._directory / TRACKERS
        known = read_json(file) if end is not None and end >= 0 and file.is_file() else {}
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
