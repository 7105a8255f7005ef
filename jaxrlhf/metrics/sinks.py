"""Loggers besides the run's own files: TensorBoard, Weights & Biases and trackio.

A sink has `name`, and the methods `scalars`, `samples`, `histograms` and `close`. It raises whatever goes wrong; the
logger drops it then and goes on.
"""

import contextlib
import importlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxrlhf.config import yaml12
from jaxrlhf.errors import ConfigError, first_line
from jaxrlhf.secrets import redact_command

Row = Mapping[str, Any]
FLUSH_SECONDS = 10  # a flush waits for the disk


class Sink(Protocol):
    """A place that metrics, samples and histograms of a run are sent to."""

    name: str

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        ...

    def samples(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        """Log rows of text, as `Logger.samples` gets them, under the name `kind`."""
        ...

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Log the distributions of arrays of finite numbers, by tag."""
        ...

    def close(self) -> None:
        """Write everything that is left."""
        ...


class TensorBoard:
    """Event files in `directory`; none without an event. Viewers drop what was logged from `purge_step` on, if given.

    They are written in this thread: tensorboardX's SummaryWriter has a thread of its own, which dies on a full disk and
    then blocks the run for ever.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        self._directory, self._purge_step = directory, purge_step
        self._writer: Any = None
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # the run names such numbers itself
        self._flushed = 0.0

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX import summary

        for tag, value in numbers.items():
            self._write(step, summary.scalar(tag, value))

    def samples(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        from tensorboardX import summary

        self._write(step, summary.text(kind, "\n\n".join(map(_markdown, rows))))

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        from tensorboardX import summary

        for tag, array in values.items():
            self._write(step, summary.histogram(f"histograms/{tag}", array.ravel(), bins=30))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # no static names

        if self._writer is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            # the time in the name is in seconds: a run that is resumed within one must not write over its first file
            self._writer = EventsWriter(str(self._directory / "events"), f".{time.time_ns()}")
            if self._purge_step is not None:
                mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._writer.write_event(
                    event_pb2.Event(step=self._purge_step, session_log=mark, wall_time=time.time())
                )
        self._writer.write_event(event_pb2.Event(step=step, summary=summary, wall_time=time.time()))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()


class Tracker:
    """W&B or trackio, which has the same functions: `module` is the one or the other.

    Args:
        project, name, run_id: the run's names there; a run of this `run_id` is continued.
        directory: the run directory. Its config.yaml, if there, is the run's config there.
        sent: steps up to this one are not sent again.
        note: called with each line that the module prints.
    """

    def __init__(
        self,
        module: Any,
        project: str,
        directory: Path,
        run_id: str,
        sent: int,
        note: Callable[[str], None],
    ) -> None:
        self.name, self._module, self._sent, self._note = module.__name__, module, sent, note
        file = directory / "config.yaml"
        config = yaml12.load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kind: dict[str, Any] = {"name": f"{directory.name}-{run_id}", "embed": False}  # trackio finds a run by its name
        if self.name == "wandb":
            kind = {"name": directory.name, "id": run_id, "dir": str(directory)}
        try:
            with self._printing(), _without_secrets_in_arguments():
                module.init(project=project, config=config, resume="allow", **kind)
        except Exception as error:
            option = f"logging.{self.name}_project"
            remedy = "run `wandb login`, or set WANDB_MODE=offline, " if self.name == "wandb" else "mend that, "
            raise ConfigError(
                f"{option} is '{project}', and {self.name} could not start: {first_line(error)}. To go on, {remedy}"
                f"or leave {option} empty"
            ) from error

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        self._log(step, dict(numbers))

    def samples(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(key)) for key in columns] for row in rows]
        self._log(step, {kind: self._module.Table(columns=columns, data=data)})

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self._log(step, {f"histograms/{tag}": self._module.Histogram(array) for tag, array in values.items()})

    def close(self) -> None:
        with self._printing():
            self._module.finish()

    def _log(self, step: int, record: dict[str, Any]) -> None:
        if step > self._sent:
            self._module.log(record, step=step)

    @contextlib.contextmanager
    def _printing(self) -> Any:
        """Pass what the module prints on to the console of the run."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            yield
        for line in re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).splitlines():
            if line.strip():
                self._note(f"{self.name}: {line.strip(' *')}")


def tracker_module(kind: str, project: str) -> Any:
    """The module of a tracker, wandb or trackio. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ConfigError(
            f"logging.{kind}_project is '{project}' but {kind} cannot be imported ({first_line(error)}); "
            f"pip install 'jaxrlhf[{kind}]', or leave it empty"
        ) from error


@contextlib.contextmanager
def _without_secrets_in_arguments() -> Iterator[None]:
    """W&B records the arguments of the program."""
    arguments = sys.argv
    sys.argv = redact_command(arguments)
    try:
        yield
    finally:
        sys.argv = arguments


def _cell(value: Any) -> Any:
    """A value of a table: a number, text, or the JSON of anything else. A lone surrogate is written as its escape."""
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _markdown(row: Row) -> str:
    """A sample as Markdown: its numbers, then each text as an indented code block, in which nothing is interpreted."""
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if _is_number(value))
    parts = [f"**sample** {numbers}"]
    for key, value in row.items():
        if value is not None and not isinstance(value, bool | int | float):
            lines = str(_cell(value)).splitlines() or [""]
            parts.append(f"{key}:\n\n" + "\n".join(f"    {line}" for line in lines))
    return "\n\n".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
