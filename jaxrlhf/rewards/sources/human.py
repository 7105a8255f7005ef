"""Rewards from a person at the terminal. Answers are written to disk at once, so that no question is asked twice."""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from jaxrlhf import stopping
from jaxrlhf.errors import ConfigError, RewardError, visible
from jaxrlhf.rewards.sources import answers
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores

_KEYS = "Enter: leave it unscored; Ctrl-D: stop"


class Human:
    """Ask a person for a number per completion (`score`), or for the best completion of a prompt (`pick`).

    `pick` scores 1 for the best and 0 for the others, or good (1) or bad (0) for a prompt with a single completion.
    Answers are stored in `file` under a hash of the texts shown, and reused in later runs; without a file everything is
    asked again. `ask` shows a text and returns a line; the default, `input`, needs a terminal as standard input, or
    ConfigError is raised. The context manager `pause_while_asking` is entered while questions are asked, to stop other
    output to the terminal.
    """

    def __init__(
        self, kind: Literal["score", "pick"], file: Path | None, ask: Callable[[str], str] | None = None
    ) -> None:
        if ask is None and not sys.stdin.isatty():
            raise ConfigError(
                f"reward human: {kind} asks a person, and standard input is no terminal. Run the command in one (tmux "
                "or screen for a long run), without redirecting its input; or set enabled: false for this component"
            )
        self.kind, self.file, self._ask = kind, file, ask or input
        self.pause_while_asking: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self._answers: dict[str, Any] | None = None

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Raises RewardError if the person stops (Ctrl-D); earlier answers are kept."""
        if self._answers is None:
            self._answers = answers.read([self.file] if self.file else [])
        try:
            with self.pause_while_asking(), stopping.interruptible():
                return SourceScores(self._score(request) if self.kind == "score" else self._pick(request))
        except EOFError:
            raise RewardError(
                f"{request.error_prefix('human')}: the person left (Ctrl-D). Answers are kept and not asked for again"
            ) from None

    def _score(self, request: ScoreRequest) -> list[float | None]:
        return [
            self._answer(
                [prompt, completion],
                f"\n{_labelled('prompt', prompt)}\n{_labelled('completion', completion)}\n",
                f"score (a number; {_KEYS}): ",
                _parse_number,
            )
            for prompt, completion in zip(request.prompts, request.completions, strict=True)
        ]

    def _pick(self, request: ScoreRequest) -> list[float | None]:
        rows_of_prompt: dict[str, list[int]] = {}
        for i, prompt in enumerate(request.prompts):
            rows_of_prompt.setdefault(prompt, []).append(i)
        values: list[float | None] = [None] * len(request.prompts)
        for prompt, rows in rows_of_prompt.items():
            scores = self._pick_best(prompt, list(dict.fromkeys(request.completions[i] for i in rows)))
            for i in rows:
                values[i] = scores[request.completions[i]]
        return values

    def _pick_best(self, prompt: str, completions: list[str]) -> dict[str, float | None]:
        """Score of each of the distinct completions of a prompt."""
        texts, shown = [prompt, *completions], f"\n{_labelled('prompt', prompt)}\n"
        if len(completions) == 1:
            shown += f"{_labelled('completion', completions[0])}\n"
            return {completions[0]: self._answer(texts, shown, f"good? (y/n; {_KEYS}): ", _parse_yes_or_no)}
        shown += "".join(f"{_labelled(str(n), text)}\n" for n, text in enumerate(completions, 1))
        question, count = f"best (1 to {len(completions)}; {_KEYS}): ", len(completions)
        best = self._answer(texts, shown, question, lambda line: _parse_choice(line, count))
        return {text: None if best is None else float(n == best) for n, text in enumerate(completions, 1)}

    def _answer(self, texts: list[str], shown: str, question: str, parse: Callable[[str], float]) -> float | None:
        """The stored answer to a question, or a new one; asks again until the line can be parsed or is empty."""
        assert self._answers is not None
        key = hashlib.sha256(json.dumps([self.kind, *texts]).encode()).hexdigest()
        if key not in self._answers:
            line = self._ask(shown + question).strip()
            while line:
                try:
                    self._answers[key] = parse(line)
                    break
                except ValueError as error:
                    line = self._ask(f"{error}. {question}").strip()
            else:
                self._answers[key] = None
            if self.file:
                answers.append(self.file, {"key": key, "kind": self.kind, "answer": self._answers[key], "texts": texts})
        return self._answers[key]


def _labelled(label: str, text: str) -> str:
    """A text to show; control characters are escaped, so that it cannot move the cursor or change colours."""
    return f"  {label}: " + visible(text).replace("\n", "\n    ")


def _parse_number(line: str) -> float:
    try:
        number = float(line)
    except ValueError:
        raise ValueError(f"'{visible(line)}' is not a number") from None
    if not math.isfinite(number) or abs(number) > 1e30:
        raise ValueError(f"{line} is not a finite number of at most 1e30")
    return number


def _parse_yes_or_no(line: str) -> float:
    if line.lower() in ("y", "yes", "n", "no"):
        return float(line.lower()[0] == "y")
    raise ValueError(f"'{visible(line)}' is neither y nor n")


def _parse_choice(line: str, count: int) -> float:
    if line.isascii() and line.isdecimal() and 1 <= int(line) <= count:
        return float(line)
    raise ValueError(f"'{visible(line)}' is not one of 1 to {count}")
