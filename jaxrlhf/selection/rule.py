"""Rules that decide which scored completions are kept, and the summary of a selection. Imports no jax."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.formats import FORMAT_COLUMNS
from jaxrlhf.errors import ConfigError

if TYPE_CHECKING:
    from jaxrlhf.data.datasets import PromptRow

Completion = dict[str, Any]  # text, score (None: unscored), finished
KEEP = ("best", "pairs", "above", "all", "prompts")
SCORE_COLUMNS = {"pairs": ("chosen_score", "rejected_score"), "prompts": ("mean_score",)}  # of other rules: score


@dataclass(frozen=True)
class Rule:
    """Selects completions of a prompt by their scores; those without a score are left out.

    best: keep the completion with the highest score. pairs: those with the highest and the lowest score. above: all
    that score at least `threshold`. all: all of them. prompts: keep the prompt as it was read, without a completion.
    With a threshold, a prompt's pass rate is the share of its scored completions that score at least this; prompts with
    a pass rate outside [`min_pass_rate`, `max_pass_rate`] are dropped. Raises ConfigError for options that contradict
    each other.
    """

    keep: str
    threshold: float | None = None
    min_pass_rate: float | None = None
    max_pass_rate: float | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ConfigError(f"--keep is {self.keep!r}; it must be one of {', '.join(KEEP)}")
        needs_threshold = self.keep == "above" or (self.min_pass_rate, self.max_pass_rate) != (None, None)
        if needs_threshold and self.threshold is None:
            raise ConfigError(
                "--keep above, --min-pass-rate and --max-pass-rate need --threshold, the minimum score of a completion "
                "that passes"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold is {self.threshold}; it must be a finite number")
        low, high = self.pass_rates
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"pass rates from {low:g} to {high:g}: they are shares from 0 to 1, the lower one first")

    @property
    def pass_rates(self) -> tuple[float, float]:
        """Minimum and maximum pass rate of a prompt that is kept."""
        low, high = self.min_pass_rate, self.max_pass_rate
        return 0.0 if low is None else low, 1.0 if high is None else high

    def apply(self, row: "PromptRow", completions: Sequence[Completion]) -> tuple[list[dict[str, Any]], str]:
        """Return the rows to write for a prompt, and the reason if there are none."""
        scored = [completion for completion in completions if completion["score"] is not None]
        if not scored:
            return [], "no completion has a score"
        extra: dict[str, Any] = {}
        if self.threshold is not None:
            passed = [completion for completion in scored if completion["score"] >= self.threshold]
            extra["pass_rate"] = rate = len(passed) / len(scored)
            low, high = self.pass_rates
            if rate < low:
                return [], "the pass rate is below --min-pass-rate"
            if rate > high:
                return [], "the pass rate is above --max-pass-rate"
            if self.keep == "above":
                scored = passed
                if not passed:
                    return [], f"no completion scores {self.threshold:g} or more"
        if self.keep == "prompts":
            return [row.columns | {"mean_score": mean([completion["score"] for completion in scored])} | extra], ""
        common = {name: value for name, value in row.columns.items() if name not in FORMAT_COLUMNS} | extra
        common |= {"prompt": row.text if row.messages is None else row.messages}
        best = max(scored, key=lambda completion: completion["score"])
        if self.keep == "pairs":
            worst = min(scored, key=lambda completion: completion["score"])
            for key in ("score", "text"):
                if best[key] == worst[key]:
                    return [], f"best and worst have the same {key}"
            chosen = {"chosen": _like_prompt(row, best), "chosen_score": best["score"]}
            rejected = {"rejected": _like_prompt(row, worst), "rejected_score": worst["score"]}
            return [common | chosen | rejected], ""
        return [
            common | {"completion": _like_prompt(row, kept), "score": kept["score"], "finished": kept["finished"]}
            for kept in ([best] if self.keep == "best" else scored)
        ], ""


def _like_prompt(row: "PromptRow", completion: Completion) -> Any:
    """A completion in the form of its prompt: text, or the assistant's turn of a conversation."""
    return completion["text"] if row.messages is None else [{"role": "assistant", "content": completion["text"]}]


@dataclass
class Summary:
    """Counts and scores of a selection; print it."""

    model: str
    rule: Rule
    completions_per_prompt: int
    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> prompts
    unscored: int = 0
    unfinished: int = 0  # of the completions that are written
    scores: list[float] = field(default_factory=list)
    kept_scores: dict[str, list[float]] = field(default_factory=dict)  # by column of the written file
    left_out: list[str] = field(default_factory=list)  # columns of the prompt file that are not written

    def add(self, completions: Sequence[Completion], rows: Sequence[dict[str, Any]], reason: str) -> None:
        """Count a prompt: its completions, the rows written for it, and the reason if there are none."""
        scores = scores_of(completions)
        self.prompts += 1
        self.rows += len(rows)
        if reason:
            self.dropped[reason] += 1
        self.unscored += len(completions) - len(scores)
        self.scores += scores
        names = SCORE_COLUMNS.get(self.rule.keep, ("score",))
        for row in rows:
            self.unfinished += names == ("score",) and not row["finished"]
            for name in names:
                self.kept_scores.setdefault(name, []).append(row[name])

    def __str__(self) -> str:
        n = self.completions_per_prompt
        kept = ", ".join(f"{name} {mean(values):.4f}" for name, values in self.kept_scores.items()) or "none"
        lines = [f"{self.prompts} prompts, {self.prompts * n} completions of {self.model}, {n} per prompt"]
        lines.append(f"kept          {self.rows} rows ({self.rule.keep})")
        lines += [f"dropped       {count} prompts: {reason}" for reason, count in self.dropped.most_common()]
        if self.unscored:
            lines.append(f"unscored      {self.unscored} completions, left out")
        if self.unfinished:
            lines.append(
                f"unfinished    {self.unfinished} rows, truncated at sampling.response_length (finished: false)"
            )
        if self.left_out:
            lines.append(f"left out      {', '.join(self.left_out)} of the prompt file, which would change its format")
        score = f"{mean(self.scores):.4f}" if self.scores else "none"
        lines.append(f"mean          score {score}; of the rows kept: {kept}")
        if self.rule.keep == "best":
            lines.append(f"KL            the best of {n} is at most {kl_bound(n):.3f} nats from the model per response")
        return "\n".join(lines)


def kl_bound(n: int) -> float:
    """Upper bound on the KL of best-of-n from the model, log n - (n - 1) / n nats (https://arxiv.org/abs/2009.01325).

    It is a bound (https://arxiv.org/abs/2401.01879), and exact if all completions are distinct.
    """
    return math.log(n) - (n - 1) / n


def scores_of(completions: Sequence[Completion]) -> list[float]:
    """Scores of the completions that have one."""
    return [completion["score"] for completion in completions if completion["score"] is not None]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
