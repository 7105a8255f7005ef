"""What a run shows while it goes on: on a terminal a status line and panels, in a log file plain lines."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

SUMMARY: dict[str, dict[str, str]] = {
    "sft": {"loss": "loss", "eval/loss": "eval", "learning_rate": "lr"},
    "reward": {"loss": "loss", "accuracy": "acc", "margin": "margin", "eval/accuracy": "eval", "learning_rate": "lr"},
    "generate": {"objective/scores": "score"},
    "dpo": {
        "loss": "loss",
        "rewards/accuracies": "acc",
        "rewards/margins": "margin",
        "eval/rewards/accuracies": "eval",
        "learning_rate": "lr",
    },
    "ppo": {"objective/scores": "score", "objective/kl": "kl", "tokens/mean_length": "len", "learning_rate": "lr"},
    "grpo": {
        "objective/scores": "score",
        "objective/kl": "kl",
        "groups/flat": "flat",
        "tokens/mean_length": "len",
        "learning_rate": "lr",
    },
}
"""What the console shows of a record, by method: key -> label."""

SHOWN = 600
"""Characters of a prompt or completion on the console; samples.jsonl has all of them."""


class Console:
    """The console of one run of `method` with `total` steps; without a terminal a line every `every` steps."""

    def __init__(self, method: str, total: int, every: int) -> None:
        self._method, self._total, self._every = method, total, every
        self._start: tuple[int, float] | None = None  # step and time of the first record: what is slow at first is over
        self._bar = _bar(method, total) if sys.stdout.isatty() else None

    def progress(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Show the record of `step`, where its turn has come."""
        first, began = self._start = self._start or (step, time.monotonic())
        labels = SUMMARY[self._method].items()
        parts = [f"{label}={_short(numbers[key])}" for key, label in labels if key in numbers]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, facts=" ".join(parts))
        elif step in (first, self._total) or step % self._every == 0 or any(key.startswith("eval/") for key in numbers):
            if step > first:
                left = (time.monotonic() - began) / (step - first) * (self._total - step)
                parts.append(f"eta={_duration(left)}")
            now = datetime.datetime.now().isoformat(timespec="seconds")
            self._print(f"{now} {self._method} step {step}/{self._total} {' '.join(parts)}")

    def sample(self, step: int, row: Mapping[str, Any]) -> None:
        """Show what a model answered: "prompt" and "completion" of `row`, and its numbers."""
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
        """Say something between the progress lines."""
        self._print(visible(text))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, nothing is drawn: somebody else has the terminal."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
            return
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def visible(text: str) -> str:
    """Text that cannot move the cursor or change colours: every control character in its escaped spelling."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text) - SHOWN} more characters)"


def _bar(method: str, total: int) -> Any:
    """The status line of a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(method), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn()
    )
    bar.add_task(method, total=total, facts="")
    bar.start()
    return bar
