"""Plots of a run in four panels, and its metrics as CSV. matplotlib is imported only when a plot is drawn."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.errors import DataError, JaxrlhfError
from jaxrlhf.files import write_whole
from jaxrlhf.metrics import read_records

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval/loss", "loss/policy_avg", "loss/value_avg"),
    "learning rate": ("learning_rate",),
    "mean reward": (
        "objective/scores",
        "objective/rlhf_reward",
        "mean_reward",
        "eval/mean_reward",
        "rewards/chosen",
        "rewards/rejected",
    ),
    "KL to the reference (nats per response)": ("objective/kl", "kl"),
}
"""Panel title -> metrics drawn in it."""


def plot(run: Path) -> tuple[Path, Path]:
    """Write `plot.png` and `metrics.csv` into a run directory and return their paths.

    Raises DataError if the directory has no readable metrics. If matplotlib is missing the CSV is written first.
    """
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise DataError(f"{run / 'metrics.jsonl'} holds no metrics yet")
    table = write_whole(run / "metrics.csv", _csv(records))
    try:
        import matplotlib
    except ImportError as error:
        raise JaxrlhfError(
            f'wrote {table}, but the plot needs matplotlib: pip install "jaxrlhf[plots]" and run this again'
        ) from error
    matplotlib.use("Agg")
    evaluation = run / "evaluation.json"  # written by reward model training
    histogram = json.loads(evaluation.read_text(encoding="utf-8"))["histogram"] if evaluation.is_file() else {}
    return write_whole(run / "plot.png", _draw(records, run.resolve().name, histogram)), table


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, from the records that have it."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and "step" in r]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _csv(records: Sequence[dict[str, Any]]) -> str:
    columns = sorted({key for record in records for key in record}, key=lambda name: (name != "step", name))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _draw(records: Sequence[dict[str, Any]], title: str, histogram: dict[str, list[float]]) -> bytes:
    """Draw a PNG. For a reward model, whose runs have no KL, the `histogram` of held-out scores takes that panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (panel, keys) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        curves = {key: series(records, key) for key in keys}
        curves = {key: curve for key, curve in curves.items() if curve[0]}
        axes.set_title(panel)
        if histogram and "objective/kl" in keys:
            for label in (name for name in histogram if name != "edges"):
                axes.stairs(histogram[label], histogram["edges"], fill=True, alpha=0.5, label=label)
            axes.set_title("scores of held-out responses")
            axes.legend(fontsize="small")
        elif curves:
            for key, (steps, values) in curves.items():
                axes.plot(steps, values, label=key, linewidth=1.2, marker="." if len(steps) < 50 else "")
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if len(curves) > 1:
                axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    return picture.getvalue()
