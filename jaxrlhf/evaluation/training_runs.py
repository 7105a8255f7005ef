"""Costs of training from run directories: time, memory and generated tokens; metrics of runs at equal tokens."""

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf import runs
from jaxrlhf.config import yaml12
from jaxrlhf.config.reader import read_config
from jaxrlhf.errors import StorageError, first_line
from jaxrlhf.metrics import read_records
from jaxrlhf.secrets import redact_value

ON_POLICY = ("ppo", "grpo")
GENERATED = "tokens/generated"
SCORE, KL = "objective/raw_scores", "objective/kl"


@dataclass(frozen=True)
class TrainingRun:
    """A run directory's record: `run.json` and `metrics.jsonl`."""

    directory: Path
    method: str
    starts: list[dict[str, Any]]
    records: list[dict[str, Any]]
    reward: Any
    """Section `reward` of its config."""

    @cached_property
    def generated(self) -> list[float] | None:
        """Response tokens generated in training up to each record; None if an on-policy run did not record them."""
        if self.method not in ON_POLICY:
            return [0.0] * len(self.records)
        if not self.records or any(GENERATED not in record for record in self.records):
            return None
        return list(itertools.accumulate(float(record[GENERATED]) for record in self.records))

    def costs(self) -> dict[str, Any]:
        """Method, seconds (sum over starts with an end; `open_starts` have none, as they run or were killed), peak
        memory in bytes (maximum over starts, None where not recorded) and generated tokens."""
        spans = [
            (datetime.datetime.fromisoformat(start["end"]) - datetime.datetime.fromisoformat(start["time"]))
            for start in self.starts
            if "end" in start
        ]
        peaks = {
            kind: max((p for s in self.starts if (p := s.get("peak_memory", {}).get(kind)) is not None), default=None)
            for kind in ("host", "device")
        }
        generated = self.generated
        return {
            "method": self.method,
            "outcome": self.starts[-1].get("outcome", "no end recorded"),
            "starts": len(self.starts),
            "open_starts": len(self.starts) - len(spans),
            "seconds": sum(span.total_seconds() for span in spans),
            "peak_memory": peaks,
            "steps": self.records[-1]["step"] if self.records else 0,
            "generated_tokens": None if generated is None else (generated[-1] if generated else 0.0),
        }


def read(directory: str) -> TrainingRun | None:
    """The record of a run directory; None if it is not one. Raises StorageError for files that cannot be read."""
    folder = Path(directory)
    if not (folder / "run.json").is_file():
        return None
    try:
        record = runs.read_record(folder)
        config = yaml12.load(read_config(folder / "config.yaml"))
        log = folder / "metrics.jsonl"
        records = read_records(log) if log.is_file() else []
        reward = redact_value(config.get("reward"))
        return TrainingRun(folder, record["method"], record["starts"], records, reward)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise StorageError(f"the record of the run {directory} cannot be read: {first_line(error)}") from error


def at_equal_tokens(runs: Sequence[TrainingRun | None]) -> tuple[list[dict[str, Any] | None], list[str]]:
    """Training score and KL of each on-policy run at the first update at which it had generated as many tokens as the
    run that generated fewest did in all; None for other models. Also notes on what to know about them.

    The score is objective/raw_scores and the KL objective/kl of that update: means over its batch, on training prompts.
    """
    on_policy = [run for run in runs if run is not None and run.method in ON_POLICY]
    counted = [run for run in on_policy if run.generated]
    notes = [f"{run.directory} has no record of generated tokens" for run in on_policy if run not in counted]
    if not counted:
        return [None] * len(runs), notes
    least = min(run.generated[-1] for run in counted if run.generated)
    found: list[dict[str, Any] | None] = []
    for run in runs:
        if run not in counted or run is None or not run.generated:
            found.append(None)
            continue
        number = next(i for i, tokens in enumerate(run.generated) if tokens >= least)
        record = run.records[number]
        found.append(
            {
                "tokens": run.generated[number],
                "step": record["step"],
                "score": record.get(SCORE),
                "kl": record.get(KL),
            }
        )
    if any(run.reward != counted[0].reward for run in counted):
        notes.append(
            "the runs were trained with different rewards: their scores at equal tokens are not comparable, unlike the "
            "scores on the prompts given here"
        )
    return found, notes
