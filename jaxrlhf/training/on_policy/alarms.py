"""Signs of reward hacking and collapse in a run's own measurements. Each is marked in the record and said once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import Alarms

Record = dict[str, Any]


class Watch:
    """Looks at one record after another, each of `rows` completions; `before` are those of a run that is resumed.
    `brake` is the option that holds the policy near its reference.

    But for held-out prompts, nothing is said before `config.window` records are there: what one batch shows may be
    chance. Of fewer than 4 completions the correlation of score and length is, so that alarm needs as many.
    """

    def __init__(self, config: Alarms, rows: int, before: Sequence[Record], *, brake: str) -> None:
        self.config, self._rows, self._brake = config, rows, brake
        self._first: Record | None = None
        self._recent: list[Record] = []
        self._on: set[str] = set()
        for record in before:
            self(record)

    def __call__(self, record: Record) -> tuple[dict[str, float], list[str]]:
        """({alarm/<name>: 1 or 0}, a line for each that was off before)."""
        self._first = self._first or record
        self._recent = [*self._recent, record][-self.config.window :]
        full = len(self._recent) == self.config.window
        found = {name: line for name, line in self._signs() if line is not None and (full or name == "held_out")}
        new = [f"alarm: {line}" for name, line in found.items() if name not in self._on]
        marks = {f"alarm/{name}": float(name in found) for name, _ in self._signs()}
        self._on = set(found)
        return marks, new

    def _mean(self, key: str) -> float:
        return float(np.mean([record[key] for record in self._recent if key in record] or [np.nan]))

    def _signs(self) -> list[tuple[str, str | None]]:
        """(name, the line if it is on) of every alarm that is set. Comparisons with nan are false: no alarm."""
        config, signs = self.config, []
        first = self._first or {}
        if config.kl is not None:
            kl = self._mean("objective/kl")
            line = f"KL to the reference is {kl:.3g} nats per response, over the budget of {config.kl:g}"
            signs.append(("kl", f"{line}; raise {self._brake}" if kl > config.kl else None))
        if config.entropy:
            now, start = self._mean("objective/entropy_per_token"), first.get("objective/entropy_per_token", np.nan)
            line = f"entropy per token fell from {start:.3g} to {now:.3g} nats: answers are becoming all the same"
            low = now < config.entropy * start
            signs.append(("entropy", f"{line}; raise {self._brake}" if low else None))
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
