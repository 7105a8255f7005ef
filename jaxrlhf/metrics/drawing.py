"""Figures of the panels of one or several runs, by matplotlib, which is imported only when one is drawn."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.errors import DataError, visible
from jaxrlhf.metrics.panels import HISTOGRAM, Panel, panels_of

MARKED = 60  # curves of fewer points have a marker at each
SMOOTHED = 100  # noisy curves of at least as many points are drawn pale under their running mean


class Run(NamedTuple):
    """Records of a run that are drawn."""

    name: str
    method: str
    records: list[dict[str, Any]]
    histogram: dict[str, list[float]]  # of scores, from evaluation.json


def figure_of(runs: Sequence[Run]) -> Any:
    """A figure of the panels of all runs: a colour per metric for one run, per run for several."""
    from matplotlib.figure import Figure

    panels = panels_of([(run.method, run.records) for run in runs])
    panels = [panel for panel in panels if panel.title != HISTOGRAM or any(run.histogram for run in runs)]
    if not panels:
        raise DataError(
            f"{', '.join(run.name for run in runs)}: none of the metrics logged has a panel; see metrics.csv"
        )
    columns = min(len(panels), 3 if len(panels) in (3, 5, 6, 9) else 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows + 0.6), layout="constrained")
    names = [run.name if run.method in run.name else f"{run.name} ({run.method})" for run in runs]
    figure.suptitle(plain("  |  ".join(names)))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small")
        if panel.title == HISTOGRAM:
            _histogram(axes, runs)
        elif panel.against:
            _against(figure, axes, panel, runs)
        else:
            _curves(axes, panel, runs)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    smoothed = max(len(run.records) for run in runs) >= SMOOTHED
    note = "pale: every record; full: running mean of a twentieth of them" if smoothed else ""
    if len(runs) == 1:
        figure.supxlabel(note, fontsize="x-small")
    else:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=_colour(i), label=plain(name)) for i, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4), title=note)
    return figure


def _curves(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """Metrics over steps. Several runs have a colour each, and the metrics then differ by the style of their lines."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    for number, run in enumerate(runs):
        for index, (key, name) in enumerate(panel.metrics.items()):
            steps, values = series(run.records, key)
            if not steps:
                continue
            colour, style = (_colour(index), "-") if len(runs) == 1 else (_colour(number), _style(index))
            marker = "." if len(steps) < MARKED else ""
            if panel.noisy and len(steps) >= SMOOTHED:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
                steps, values = _running_mean(steps, values, len(steps) // 20)
            axes.plot(steps, values, color=colour, linestyle=style, marker=marker, linewidth=1.2, label=name)
    axes.set_xlabel("step", fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    names = list(panel.metrics.values())
    if len(names) > 1 and len(runs) == 1:
        axes.legend(fontsize="x-small")
    elif len(names) > 1:
        lines = [Line2D([], [], color="0.3", linestyle=_style(i), label=name) for i, name in enumerate(names)]
        axes.legend(handles=lines, fontsize="x-small")


def _running_mean(steps: list[int], values: list[float], window: int) -> tuple[list[int], list[float]]:
    """Means of `window` finite values in a row, each at the step in the middle of its window."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(points) < window:
        return [], []
    means = np.convolve([value for _, value in points], np.full(window, 1 / window), "valid").tolist()
    return [step for step, _ in points[window // 2 :]][: len(means)], means


def _against(figure: Any, axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """A metric against another, from record to record: points coloured by step for one run, by run for several."""
    ((key, name),) = panel.metrics.items()
    for number, run in enumerate(runs):
        points = [(r[panel.against], r[key], r["step"]) for r in run.records if panel.against in r and key in r]
        if not points:
            continue
        x, y, steps = zip(*points, strict=True)
        axes.plot(x, y, color="0.6" if len(runs) == 1 else _colour(number), linewidth=0.6, alpha=0.5)
        if len(runs) == 1:
            drawn = axes.scatter(x, y, c=steps, s=9, cmap="viridis", zorder=2)
            figure.colorbar(drawn, ax=axes, label="step").ax.tick_params(labelsize="x-small")
        else:
            axes.scatter(x, y, s=7, color=_colour(number), zorder=2)
    axes.set_xlabel("KL to the reference", fontsize="small")
    axes.set_ylabel(name, fontsize="small")


def _histogram(axes: Any, runs: Sequence[Run]) -> None:
    """Scores of held-out responses at the end of training a reward model."""
    for number, run in enumerate(runs):
        labels = [label for label in run.histogram if label != "edges"]
        for index, label in enumerate(labels):
            style = {"fill": True, "alpha": 0.5} if len(runs) == 1 else {"linestyle": _style(index)}
            colour = _colour(index if len(runs) == 1 else number)
            axes.stairs(run.histogram[label], run.histogram["edges"], color=colour, label=label, **style)
        if number == 0 and labels:
            axes.legend(fontsize="x-small")
    axes.set_xlabel("score", fontsize="small")


def _colour(index: int) -> str:
    return f"C{index % 10}"


def _style(index: int) -> Any:
    return ("-", "--", ":", "-.")[index % 4]


def plain(text: str) -> str:
    """Text in which matplotlib reads no formula, without control characters and unpaired surrogates."""
    return visible(text).replace("$", r"\$")


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, from the records that have it."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and "step" in r]
    return [int(step) for step, _ in pairs], [float(value) for _, value in pairs]
