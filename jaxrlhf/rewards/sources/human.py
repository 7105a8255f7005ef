"""Rewards from a person at the terminal. Every answer is written down at once, so that no question comes twice."""

import contextlib
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from jaxrlhf.errors import ConfigError, RewardError, StorageError
from jaxrlhf.metrics.console import visible
from jaxrlhf.rewards.sources.answers import Answer, Request

Ask = Callable[[str], str]
_END = "Enter alone: no opinion; Ctrl-D: stop here"


class Human:
    """Asks for a number for each completion (`score`), or which completion of a prompt is the best (`pick`: 1 for it, 0
    for the others; a prompt with one completion: good or bad, 1 or 0).

    Answers are kept in `file`, by a hash of what was shown, and taken from there in later runs; without a file each
    is asked again. `ask` shows a text and returns a line, like `input`, which it is unless given; then standard input
    must be a terminal, or ConfigError is raised. `pausing` is entered while questions are asked, for whatever else
    writes to the terminal.
    """

    def __init__(self, kind: Literal["score", "pick"], file: Path | None, ask: Ask | None = None) -> None:
        if ask is None and not sys.stdin.isatty():
            raise ConfigError(
                f"reward human: {kind} asks a person, and standard input is no terminal. Run the command in one (tmux "
                "or screen for a long run), without redirecting its input; or set enabled: false for this component"
            )
        self.kind, self.file, self._ask = kind, file, ask or input
        self.pausing: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self._known: dict[str, Any] | None = None

    def __call__(self, request: Request) -> Answer:
        """Raises RewardError if the person leaves (Ctrl-D); what was answered before is kept."""
        if self._known is None:
            self._known = _read(self.file) if self.file else {}
        try:
            with self.pausing():
                if self.kind == "score":
                    return Answer([self._score(p, c) for p, c in _pairs(request)])
                return Answer(self._pick(request))
        except EOFError:
            raise RewardError(
                f"{request.about('human')}: the person left. What was answered is kept and not asked for again"
            ) from None

    def _score(self, prompt: str, completion: str) -> float | None:
        shown = f"\n{_shown('prompt', prompt)}\n{_shown('completion', completion)}\n"
        return self._answer([prompt, completion], shown, f"score (a number; {_END}): ", _number)

    def _pick(self, request: Request) -> list[float | None]:
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(request.prompts):
            groups.setdefault(prompt, []).append(i)
        values: list[float | None] = [None] * len(request.prompts)
        for prompt, rows in groups.items():
            texts = list(dict.fromkeys(request.completions[i] for i in rows))  # what reads the same is one choice
            shown = f"\n{_shown('prompt', prompt)}\n"
            if len(texts) == 1:
                shown += f"{_shown('completion', texts[0])}\n"
                best = self._answer([prompt, *texts], shown, f"good? (y/n; {_END}): ", _yes_or_no)
                chosen = {texts[0]: best}
            else:
                shown += "".join(f"{_shown(str(n), text)}\n" for n, text in enumerate(texts, 1))
                question = f"best (1 to {len(texts)}; {_END}): "
                best = self._answer([prompt, *texts], shown, question, functools.partial(_choice, len(texts)))
                chosen = {text: None if best is None else float(n == best) for n, text in enumerate(texts, 1)}
            for i in rows:
                values[i] = chosen[request.completions[i]]
        return values

    def _answer(self, texts: list[str], shown: str, question: str, read: Callable[[str], float]) -> float | None:
        """The answer to a question, from the file or from the person, who is asked until it makes sense."""
        assert self._known is not None
        key = hashlib.sha256(json.dumps([self.kind, *texts]).encode()).hexdigest()
        if key not in self._known:
            line = self._ask(shown + question).strip()
            while line:
                try:
                    self._known[key] = read(line)
                    break
                except ValueError as error:
                    line = self._ask(f"{error}. {question}").strip()
            else:
                self._known[key] = None
            if self.file:
                _append(self.file, {"key": key, "kind": self.kind, "answer": self._known[key], "texts": texts})
        return self._known[key]


def _pairs(request: Request) -> Iterable[tuple[str, str]]:
    return zip(request.prompts, request.completions, strict=True)


def _shown(label: str, text: str) -> str:
    """Text that a model wrote cannot move the cursor or change colours."""
    return f"  {label}: " + visible(text).replace("\n", "\n    ")


def _number(line: str) -> float:
    try:
        number = float(line)
    except ValueError:
        raise ValueError(f"'{visible(line)}' is not a number") from None
    if not math.isfinite(number) or abs(number) > 1e30:
        raise ValueError(f"{line} is not a number to learn from")
    return number


def _yes_or_no(line: str) -> float:
    if line.lower() in ("y", "yes", "n", "no"):
        return float(line.lower()[0] == "y")
    raise ValueError(f"'{visible(line)}' is neither y nor n")


def _choice(count: int, line: str) -> float:
    if line.isascii() and line.isdecimal() and 1 <= int(line) <= count:
        return float(line)
    raise ValueError(f"'{visible(line)}' is not one of 1 to {count}")


def _read(file: Path) -> dict[str, Any]:
    """The answers in a file, by key. A line that a crash cut short is asked again."""
    answers = {}
    try:
        lines = file.read_bytes().splitlines() if file.exists() else []
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror or error}") from error
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            answers[row["key"]] = row["answer"]
    return answers


def _append(file: Path, row: dict[str, Any]) -> None:
    """Add a line, whole or not at all, and have it on disk before going on."""
    line = json.dumps(row).encode() + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b", buffering=0) as out:
            if out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n":
                line = b"\n" + line
            out.write(line)
            os.fsync(out.fileno())
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error
