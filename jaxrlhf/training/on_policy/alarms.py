"""Alarms for reward hacking and collapse, from a run's own metrics. Each is marked in the record and printed once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import Alarms

Record = dict[str, Any]


class Watch:
    """Checks one record after another, each of `rows` completions. `before` are the records of a resumed run, and
    `kl_option` is the option that keeps the policy near its reference.

    Except for held-out prompts, alarms wait for `config.window` records: one batch may show chance. The correlation of
    score and length needs at least 4 completions.
    """

    def __init__(self, config: Alarms, rows: int, before: Sequence[Record], *, kl_option: str) -> None:
        self.config, self._rows, self._kl_option = config, rows, kl_option
        self._first: Record | None = None
        self._recent: list[Record] = []
        self._on: set[str] = set()
        for record in before:
            self(record)

    def __call__(self, record: Record) -> tuple[dict[str, float], list[str]]:
        """({alarm/<name>: 1 or 0}, a line for each new alarm)."""
        self._first = self._first or record
        self._recent = [*self._recent, record][-self.config.window :]
        full = len(self._recent) == self.config.window
        found = {name: line for name, line in self._alarms() if line is not None and (full or name == "held_out")}
        new = [f"alarm: {line}" for name, line in found.items() if name not in self._on]
        marks = {f"alarm/{name}": float(name in found) for name, _ in self._alarms()}
        self._on = set(found)
        return marks, new

    def _mean(self, key: str) -> float:
        return float(np.mean([record[key] for record in self._recent if key in record] or [np.nan]))

    def _alarms(self) -> list[tuple[str, str | None]]:
        """(name, a line if it is on) of every configured alarm. Comparisons with nan are false: no alarm."""
        config, signs = self.config, []
        first = self._first or {}
        if config.kl is not None:
            kl = self._mean("objective/kl")
            line = f"KL to the reference is {kl:.3g} nats per response, over the budget of {config.kl:g}"
            signs.append(("kl", f"{line}; raise {self._kl_option}" if kl > config.kl else None))
        if config.entropy:
            now, start = self._mean("objective/entropy_per_token"), first.get("objective/entropy_per_token", np.nan)
            line = f"entropy per token fell from {start:.3g} to {now:.3g} nats: answers are becoming all the same"
            low = now < config.entropy * start
            signs.append(("entropy", f"{line}; raise {self._kl_option}" if low else None))
        if config.length_correlation < 1 and self._rows >= 4:
            r = self._mean("objective/score_length_correlation")
            line = f"score and length correlate at {r:.2f}: the reward may be paying for length"
            signs.append(("length", line if abs(r) > config.length_correlation else None))
        if config.finished < 1:
            now, start = self._mean("tokens/finished"), first.get("tokens/finished", np.nan)
            line = f"the share of finished responses fell from {start:.2f} to {now:.2f}"
            advice = "; raise sampling.response_length or scores.missing_eos_penalty"
            signs.append(("finished", line + advice if start - now > config.finished else None))
        if "eval/heldout_gain" in self._recent[-1] or "held_out" in self._on:
            mine, other = self._latest("eval/gain"), self._latest("eval/heldout_gain")
            line = f"on held-out prompts the score rose by {mine:.3g} and the held-out reward model's by {other:.3g}"
            signs.append(("held_out", f"{line}: they disagree" if mine > 0 > other else None))
        return signs

    def _latest(self, key: str) -> float:
        return float(next((record[key] for record in reversed(self._recent) if key in record), np.nan))
