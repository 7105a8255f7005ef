"""Steps that teach nothing: they are warned of, and a run that makes no others stops."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.errors import NumericsError, counted

MAX_SKIPPED = 5  # records in a row with a skipped update before the run fails
VANISHING = 1e-12  # gradient norm, before clipping, below which it is rounding: Adam adds 1e-8 to its root mean square
_SCORES = ("objective/scores", "objective/raw_scores", "rewards/")


class Health:
    """Counts, for each way to learn nothing, the records in a row that show it. `before` are the records of a resumed
    run: repeating its command does not reset the counts.

    Raises:
        NumericsError: by a call, after MAX_SKIPPED records in a row with a skipped update, `idle_steps` with a gradient
            of zero or scores whose statistics are not finite, or `flat_steps` without a group that differs in itself;
            by `at_end`, if the last half of the run is such.
    """

    def __init__(
        self, idle_steps: int, flat_steps: int, total_steps: int, before: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._limits = {"skipped": MAX_SKIPPED, "gradient": idle_steps, "scores": idle_steps, "flat": flat_steps}
        self._half = max(2, math.ceil(total_steps / 2))
        self._in_a_row = dict.fromkeys(self._limits, 0)
        for record in before:
            self._count(record)

    def __call__(self, step: int, record: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """({alarm/<name>: 1} of what is on, a line for each that has begun) of the record of `step`."""
        self._count(record)
        self._step = step
        on = [kind for kind in ("gradient", "scores") if self._in_a_row[kind]]
        new = [f"alarm: {_describe(kind, record)}" for kind in on if self._in_a_row[kind] == 1]
        return {f"alarm/{kind}": 1.0 for kind in on}, new

    def check(self) -> None:
        """Raise NumericsError if the records counted last reach a limit."""
        for kind, limit in self._limits.items():
            if 0 < limit <= self._in_a_row[kind]:
                raise NumericsError(self._message(kind))

    def at_end(self) -> None:
        """Raise NumericsError if the last half of the run taught nothing."""
        for kind in ("gradient", "scores"):
            if self._limits[kind] and self._in_a_row[kind] >= self._half:
                raise NumericsError(self._message(kind))

    def _count(self, record: Mapping[str, Any]) -> None:
        found = _found(record)
        self._in_a_row = {kind: count + 1 if kind in found else 0 for kind, count in self._in_a_row.items()}

    def _message(self, kind: str) -> str:
        rows = f"{counted(self._in_a_row[kind], 'step')} in a row (last: {self._step})"
        if kind == "skipped":
            return (
                f"non-finite losses or gradients in {rows}. Those updates were skipped, but earlier ones may already "
                "have damaged the model: look at the metrics before them, lower optim.learning_rate or fix the data "
                "and rewards, and start over with --fresh"
            )
        if kind == "flat":
            return (
                f"all scores are equal within every group, {rows}, so no reward reaches the policy. If the task is "
                "solved, export the last checkpoint; else give prompts of another difficulty or another reward. The "
                "limit is alarms.flat_steps, 0 for none"
            )
        if kind == "scores":
            return (
                f"statistics of the scores are not finite in {rows}: the reward gives numbers that float32 cannot add "
                "up. Lower its weight or bound it, and start over with --fresh. The limit is optim.idle_steps, 0 for "
                "none"
            )
        return (
            f"the gradient is zero or vanishing in {rows}: nothing is learnt. If it was not so from the start, an "
            "update may have saturated the model: lower optim.learning_rate and start over with --fresh; else look at "
            "the rewards, and at what the loss is taken over (jaxrlhf data). The limit is optim.idle_steps, 0 for none"
        )


def _found(record: Mapping[str, Any]) -> set[str]:
    """The ways to learn nothing that a record shows."""
    found = set()
    flat = record.get("groups/count", 0) and record.get("groups/flat") == record["groups/count"]
    norm = record.get("policy/grad_norm", record.get("grad_norm"))
    if record.get("skipped_updates"):
        found.add("skipped")
    elif flat:  # there is no gradient of a reward
        found.add("flat")
    elif isinstance(norm, float | int) and norm < VANISHING:
        found.add("gradient")
    if _not_finite(record):
        found.add("scores")
    return found


def _not_finite(record: Mapping[str, Any]) -> list[str]:
    return [k for k, v in record.items() if k.startswith(_SCORES) and isinstance(v, float) and not math.isfinite(v)]


def _describe(kind: str, record: Mapping[str, Any]) -> str:
    if kind == "scores":
        return f"{', '.join(_not_finite(record))} not finite: the scores are too large for float32"
    norm = record.get("policy/grad_norm", record.get("grad_norm"))
    return f"the norm of the gradient is {norm:.3g}: this step teaches nothing"
