"""Four panels of a run and all its metrics as CSV. Only this module imports matplotlib, and late."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.errors import DataError, JaxrlhfError

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "eval/loss", "loss/policy_avg", "loss/value_avg")),
    ("learning rate", ("learning_rate", "lr")),
    ("mean reward", ("objective/scores", "objective/rlhf_reward", "mean_reward", "eval/mean_reward")),
    ("KL to the reference (nats per response)", ("objective/kl",)),
)


def plot(run: Path) -> tuple[Path, Path]:
    """Write `plot.png` and `metrics.csv` into a run directory and return their paths.

    Raises DataError if the directory has no readable metrics. If matplotlib is missing the CSV is written first.
    """
    records = read_metrics(run / "metrics.jsonl")
    table = run / "metrics.csv"
    _write_csv(records, table)
    try:
        import matplotlib
    except ImportError as error:
        raise JaxrlhfError(
            f'wrote {table}, but the plot needs matplotlib: pip install "jaxrlhf[plots]" and run this again'
        ) from error
    matplotlib.use("Agg")
    picture = run / "plot.png"
    _draw(records, picture, run.resolve().name)
    return picture, table


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut short by a crash is left out.

    Raises DataError if the file is missing or holds no record, or if another line is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path.parent} has no {path.name}: is it a run directory?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object, found {line[:40]}")
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no metrics yet")
    return records


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric where it was logged."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and "step" in r]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _write_csv(records: Sequence[dict[str, Any]], path: Path) -> None:
    columns = dict.fromkeys(key for record in records for key in record)
    columns = ["step", *sorted(columns.keys() - {"step"})] if "step" in columns else sorted(columns)
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(records)
    os.replace(part, path)


def _draw(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (name, keys) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        drawn = [(key, *series(records, key)) for key in keys]
        drawn = [(key, steps, values) for key, steps, values in drawn if steps]
        for key, steps, values in drawn:
            axes.plot(steps, values, label=key, linewidth=1.2, marker="." if len(steps) < 50 else "")
        axes.set_title(name)
        if drawn:
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if len(drawn) > 1:
                axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    figure.savefig(path, dpi=130)
