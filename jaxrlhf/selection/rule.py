"""What of a prompt's scored completions is kept, and what it comes to. Imports no jax."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.formats import FORMAT_COLUMNS
from jaxrlhf.errors import ConfigError

if TYPE_CHECKING:
    from jaxrlhf.data.datasets import PromptRow

Answer = dict[str, Any]
KEEP = ("best", "pairs", "above", "all", "prompts")
WRITTEN = {"pairs": ("chosen_score", "rejected_score"), "prompts": ("mean_score",)}  # scores in a row; else "score"


@dataclass(frozen=True)
class Rule:
    """What of a prompt's scored completions is written.

    best: the one with the highest score. pairs: that and the one with the lowest. above: all that score at least
    `threshold`. all: all. prompts: the prompt as it was read, without a completion. Where there is a threshold, a
    prompt's pass rate is the share of its scored completions that reach it; prompts whose rate is not between
    `min_pass_rate` and `max_pass_rate` are left out. Raises ConfigError for what does not go together.
    """

    keep: str
    threshold: float | None = None
    min_pass_rate: float | None = None
    max_pass_rate: float | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ConfigError(f"--keep is {self.keep!r}; it must be one of {', '.join(KEEP)}")
        if self.threshold is None:
            needing = [f"--keep {self.keep}"] * (self.keep == "above")
            needing += ["--min-pass-rate"] * (self.min_pass_rate is not None)
            needing += ["--max-pass-rate"] * (self.max_pass_rate is not None)
            if needing:
                raise ConfigError(f"{needing[0]} needs --threshold, the least score of a completion that is good")
        elif not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold is {self.threshold}; it must be a finite number")
        low, high = self.pass_rates
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"pass rates from {low:g} to {high:g}: they are shares, from 0 to 1, the lower one first")

    @property
    def pass_rates(self) -> tuple[float, float]:
        """The least and the highest pass rate of a prompt that is kept."""
        low, high = self.min_pass_rate, self.max_pass_rate
        return 0.0 if low is None else low, 1.0 if high is None else high

    def apply(self, row: "PromptRow", answers: Sequence[Answer]) -> tuple[list[dict[str, Any]], str]:
        """The rows to write for a prompt, and why there are none. `answers` have text, score (None: none was given) and
        finished."""
        scored = [answer for answer in answers if answer["score"] is not None]
        if not scored:
            return [], "no completion has a score"
        about: dict[str, Any] = {}
        if self.threshold is not None:
            passed = [answer for answer in scored if answer["score"] >= self.threshold]
            about["pass_rate"] = rate = len(passed) / len(scored)
            if not self.pass_rates[0] <= rate <= self.pass_rates[1]:
                return [], f"the pass rate is {'below' if rate < self.pass_rates[0] else 'above'} what was asked for"
            if self.keep == "above" and not passed:
                return [], f"no completion scores {self.threshold:g} or more"
            if self.keep == "above":
                scored = passed
        if self.keep == "prompts":
            return [row.columns | {"mean_score": mean([answer["score"] for answer in scored])} | about], ""
        best = max(scored, key=lambda answer: answer["score"])
        about = {name: value for name, value in row.columns.items() if name not in FORMAT_COLUMNS} | about
        about |= {"prompt": row.text if row.messages is None else row.messages}
        if self.keep == "pairs":
            worst = min(scored, key=lambda answer: answer["score"])
            if best["score"] == worst["score"]:
                return [], "best and worst have the same score"
            if best["text"] == worst["text"]:
                return [], "best and worst have the same text"
            chosen = {"chosen": _said(row, best), "chosen_score": best["score"]}
            return [about | chosen | {"rejected": _said(row, worst), "rejected_score": worst["score"]}], ""
        kept = [best] if self.keep == "best" else scored
        return [
            about | {"completion": _said(row, answer), "score": answer["score"], "finished": answer["finished"]}
            for answer in kept
        ], ""


def _said(row: "PromptRow", answer: Answer) -> Any:
    """A completion in the form of its prompt: text, or the assistant's turn of a conversation."""
    return answer["text"] if row.messages is None else [{"role": "assistant", "content": answer["text"]}]


@dataclass
class Summary:
    """What a selection was made from and what is left, for people: print it."""

    model: str
    rule: Rule
    completions_per_prompt: int
    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # why -> prompts
    unscored: int = 0
    unfinished: int = 0  # of the completions that are written
    scores: list[float] = field(default_factory=list)
    kept_scores: dict[str, list[float]] = field(default_factory=dict)  # by the column of the file
    left_out: list[str] = field(default_factory=list)

    def add(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], why: str) -> None:
        """Count a prompt: its completions, the rows written for it, and why there are none."""
        scores = scores_of(answers)
        self.prompts += 1
        self.rows += len(rows)
        self.dropped.update([why] * bool(why))
        self.unscored += len(answers) - len(scores)
        self.scores += scores
        names = WRITTEN.get(self.rule.keep, ("score",))
        for row in rows:
            self.unfinished += names == ("score",) and not row["finished"]
            for name in names:
                self.kept_scores.setdefault(name, []).append(row[name])

    def __str__(self) -> str:
        n = self.completions_per_prompt
        kept = ", ".join(f"{name} {mean(values):.4f}" for name, values in self.kept_scores.items()) or "nothing"
        lines = [f"{self.prompts} prompts, {self.prompts * n} completions of {self.model}, {n} of each"]
        lines.append(f"kept          {self.rows} rows ({self.rule.keep})")
        lines += [f"dropped       {count} prompts: {why}" for why, count in self.dropped.most_common()]
        if self.unscored:
            lines.append(f"unscored      {self.unscored} completions, left out")
        if self.unfinished:
            lines.append(f"unfinished    {self.unfinished} rows: cut at sampling.response_length, finished is false")
        if self.left_out:
            lines.append(f"left out      {', '.join(self.left_out)} of the prompt file: rows are read by other columns")
        lines.append(f"mean          score {mean(self.scores):.4f}; of the rows kept: {kept}")
        if self.rule.keep == "best":
            lines.append(f"KL            the best of {n} is at most {kl_bound(n):.3f} nats from the model per response")
        return "\n".join(lines)


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: what the best of n is from the model in KL (https://arxiv.org/abs/2009.01325) at most
    (https://arxiv.org/abs/2401.01879): exactly that if no two completions are alike."""
    return math.log(n) - (n - 1) / n


def scores_of(answers: Sequence[Answer]) -> list[float]:
    """Those that there are."""
    return [answer["score"] for answer in answers if answer["score"] is not None]


def mean(values: Sequence[float]) -> float:
    """0 for no values."""
    return math.fsum(values) / max(1, len(values))
