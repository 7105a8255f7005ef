"""Notes in a checkpoint of an evaluation or samples of its step that a signal ended, for the resumed run to finish."""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.errors import StorageError, quoted
from jaxrlhf.metrics.lines import is_metric

PENDING = "evaluation to come"
"""In a checkpoint: the record of its step, and samples, which are logged once the step has been evaluated. An earlier
start may have done that and then have been killed before its next checkpoint: it is done again."""
UNDRAWN = "samples to come"
"""In a checkpoint: the number of samples of its step that were logged before a signal ended the drawing of others, and
are kept when these are drawn."""


def left_to_do(extra: Mapping[str, Any]) -> dict[str, Any]:
    """PENDING and UNDRAWN of a checkpoint's `extra`, as far as it has them. Raises StorageError if they are not what a
    run writes: a seal keeps accidents out, not forgers."""
    left = {name: extra[name] for name in (PENDING, UNDRAWN) if name in extra}
    if PENDING in left and not (isinstance(left[PENDING], dict) and _is_step(left[PENDING])):
        raise StorageError(_changed(PENDING, left[PENDING]))
    if UNDRAWN in left and not (type(left[UNDRAWN]) is int and left[UNDRAWN] >= 0):
        raise StorageError(_changed(UNDRAWN, left[UNDRAWN]))
    return left


def pending(left: Mapping[str, Any]) -> dict[str, Any]:
    """`record`, of floats, and `samples` of the step that is still to be evaluated; empty if there is none."""
    if PENDING not in left:
        return {}
    return left[PENDING] | {"record": {key: float(value) for key, value in left[PENDING]["record"].items()}}


def _is_step(step: dict[str, Any]) -> bool:
    record, samples = step.get("record"), step.get("samples")
    if not isinstance(record, dict) or not isinstance(samples, list):
        return False
    return all(is_metric(key) and _is_number(value) for key, value in record.items()) and all(
        isinstance(row, dict) for row in samples
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63) or value in ("nan", "inf", "-inf")


def _changed(name: str, value: Any) -> str:
    return (
        f"the newest checkpoint has been changed: its '{name}' is {quoted(value, 60)}, which no run writes; put an "
        "unchanged copy back, or move its folder away to go on from the one before it"
    )
