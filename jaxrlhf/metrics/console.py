"""Console output of a run: a status line and panels on a terminal, plain lines in a log file."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrlhf.config import Logging
from jaxrlhf.errors import visible
from jaxrlhf.secrets import redact

_ON_POLICY = {
    "objective/scores": "score",
    "objective/kl": "kl",
    "groups/flat": "flat",
    "tokens/mean_length": "len",
    "learning_rate": "lr",
}
SUMMARY: dict[str, dict[str, str]] = {
    "sft": {"loss": "loss", "learning_rate": "lr"},
    "reward": {"loss": "loss", "accuracy": "acc", "margin": "margin", "learning_rate": "lr"},
    "generate": _ON_POLICY,
    "dpo": {
        "loss": "loss",
        "rewards/accuracies": "acc",
        "rewards/margins": "margin",
        "learning_rate": "lr",
    },
    "ppo": _ON_POLICY,
    "grpo": _ON_POLICY,
    "distill": {"loss": "loss", "distill/reverse_kl": "kl", "distill/agreement": "agree", "learning_rate": "lr"},
}
"""Metrics on the progress line, if the record has them, by method: key -> label."""

SHOWN = 600
"""Maximum characters of a prompt or completion on the console; samples.jsonl has the full text."""


class Console:
    """Console of one run of `method` with `total` steps; without a terminal it prints a line every `log_every` steps.
    If `config.quiet`, it prints nothing. `metric`, which selects the best state, is shown by its key."""

    def __init__(self, method: str, total: int, config: Logging, metric: str = "") -> None:
        self._method, self._total, self._config = method, total, config
        self._labels = SUMMARY[method] | {metric: metric}
        self._first: int | None = None  # step of the first record
        self._held: list[str] | None = None  # what is printed while the console is paused
        self._clock: tuple[int, float] | None = None  # step and time of the first record after the last compilation
        self._bar = _progress_bar(method, total) if sys.stdout.isatty() and not config.quiet else None

    def progress(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Show the record of `step` if it is due: every `log_every` steps, the first, the last, and validations."""
        first = self._first = self._first or step
        since, started = self._clock = self._clock or (step, time.monotonic())
        facts = [f"{label}={_short(numbers[key])}" for key, label in self._labels.items() if key in numbers]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, facts=" ".join(facts))
        elif (
            step in (first, self._total)
            or step % self._config.log_every == 0
            or any(key.startswith("eval/") for key in numbers)
        ):
            if step > since:
                remaining = (time.monotonic() - started) / (step - since) * (self._total - step)
                facts.append(f"eta={duration(remaining)}")
            now = datetime.datetime.now().isoformat(timespec="seconds")
            self._print(f"{now} {self._method} step {step}/{self._total} {' '.join(facts)}")

    def sample(self, step: int, row: Mapping[str, Any]) -> None:
        """Show "prompt" and "completion" of `row`, and its numbers."""
        title = f"sample at step {step}" + "".join(
            f"  {key}={_short(value)}" for key, value in row.items() if isinstance(value, float | int)
        )
        body = [(part, _clip(visible(str(row[part])))) for part in ("prompt", "completion") if part in row]
        if self._bar is None:
            lines = [f"    {part}: " + text.replace("\n", "\n      ") for part, text in body]
            self._print("\n".join([f"  {title}", *lines]))
        else:
            from rich.panel import Panel
            from rich.text import Text

            text = Text("\n").join(Text(text, style="dim" if part == "prompt" else "") for part, text in body)
            self._bar.console.print(Panel(text, title=Text(title), title_align="left"))

    def note(self, text: str) -> None:
        """Print a message between the progress lines, without secrets."""
        self._print(redact(text))

    def compiled(self, text: str) -> None:
        """Print that a program was compiled, and leave the time until the next record out of the remaining time."""
        self._clock = None
        self.note(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is drawn, so that other code can use the terminal; what is printed meanwhile, also
        by other threads, comes after it."""
        if self._bar is not None:
            self._bar.stop()
        self._held = held = []
        try:
            yield
        finally:
            self._held = None
            if self._bar is not None:
                self._bar.start()
            for text in held:
                self._print(text)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
        elif self._bar is not None:
            self._bar.console.print(visible(text), markup=False, highlight=False)
        elif not self._config.quiet:
            encoding = sys.stdout.encoding or "utf-8"
            print(visible(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text) - SHOWN} more characters)"


def _progress_bar(method: str, total: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(method), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn()
    )
    bar.add_task(method, total=total, facts="")
    bar.start()
    return bar
