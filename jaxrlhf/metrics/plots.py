"""Pictures of one or several runs, and of a measure per prompt; the CSV files beside them."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.errors import ConfigError, DataError, JaxrlhfError
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.metrics import read_records, tables
from jaxrlhf.metrics.drawing import Run, figure_of, plain
from jaxrlhf.metrics.panels import PANELS, method_of

FORMATS = ("png", "pdf", "svg")


def plot(runs: Sequence[Path], output: Path | None = None, format: str | None = None) -> list[Path]:
    """Draw the metrics of a run, or of several over each other, and write metrics.csv and samples.csv into each.

    output: the picture; default: plot.FORMAT in the run directory, or for several runs in the current directory.
    format: one of FORMATS; default: that of `output`, or png.
    Returns the paths of all files, the picture first. Raises DataError if a directory has no readable metrics,
    ConfigError for another format. If matplotlib is missing the CSV files are written first.
    """
    output = _output(runs, output, format)
    loaded = [_read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    files: list[Path] = []
    for run, content in zip(runs, loaded, strict=True):
        files.append(tables.write_metrics(run / "metrics.csv", content.records))
        if (run / "samples.jsonl").is_file() and (samples := read_records(run / "samples.jsonl")):
            files.append(tables.write_samples(run / "samples.csv", samples))
    try:
        import matplotlib
    except ImportError as error:
        raise JaxrlhfError(
            f'wrote {", ".join(map(str, files))}, but the plot needs matplotlib: pip install "jaxrlhf[plots]" and run '
            "this again"
        ) from error
    matplotlib.use("Agg")
    drawn = [
        content._replace(records=[*_before(run), *content.records]) for run, content in zip(runs, loaded, strict=True)
    ]
    return [_save(figure_of(drawn), output), *files]


def panels(output: Path, draw: Sequence[Callable[[Any], None]], title: str) -> Path:
    """Draw a picture of panels in two columns: each of `draw` draws on the axes it is given.

    Raises JaxrlhfError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise JaxrlhfError('a plot needs matplotlib: pip install "jaxrlhf[plots]" and run this again') from error
    rows = -(-len(draw) // 2)
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained")
    figure.suptitle(plain(title), fontsize=9)
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for panel, place in zip(draw, axes, strict=False):
        panel(place)
        place.grid(alpha=0.3)
    for place in axes[len(draw) :]:
        place.set_axis_off()
    return _save(figure, output)


def bars(values: Mapping[str, Sequence[float | None]], output: Path, ylabel: str = "BLEU", title: str = "") -> Path:
    """Draw values per prompt, by label (of a model), and the mean of each label as a dashed line: bars, or points in
    the order of the first label's values if they are too many. None leaves a gap.

    Raises JaxrlhfError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise JaxrlhfError('a plot needs matplotlib: pip install "jaxrlhf[plots]" and run this again') from error
    count = max(map(len, values.values()), default=0)
    if not count:
        raise DataError(f"there is no {ylabel} of any prompt to draw")
    columns = {label: [float("nan") if x is None else float(x) for x in column] for label, column in values.items()}
    drawn_as_bars = count * len(columns) <= 120
    order = list(range(count))
    if not drawn_as_bars:
        first = next(iter(columns.values()))
        order.sort(key=lambda i: (first[i] != first[i], first[i]) if i < len(first) else (True, 0.0))
    figure = Figure(figsize=(max(7.0, min(16.0, 0.35 * count * len(columns))), 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, column) in enumerate(columns.items()):
        column = [*column, *[float("nan")] * (count - len(column))]
        known = [x for x in column if x == x]
        mean = sum(known) / len(known) if known else float("nan")
        colour, text = f"C{index % 10}", f"{plain(label)} (mean {mean:.3g})"
        if drawn_as_bars:
            width = 0.8 / len(columns)
            places = [i + 1 + (index - (len(columns) - 1) / 2) * width for i in range(count)]
            axes.bar(places, column, width, color=colour, label=text)
        else:
            axes.plot(range(1, count + 1), [column[i] for i in order], ".", color=colour, label=text, markersize=4)
        axes.axhline(mean, color=colour, linestyle="--", linewidth=1)
    axes.set_xlim(0.4, count + 0.6)
    if count <= 30:
        axes.set_xticks(range(1, count + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.set_xlabel("prompt" if drawn_as_bars else "prompt, in order of the first model")
    axes.set_ylabel(ylabel)
    axes.set_title(plain(title))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, output)


def _output(runs: Sequence[Path], output: Path | None, format: str | None) -> Path:
    if output is None:
        folder = runs[0] if len(runs) == 1 else Path()
        return folder / f"plot.{format or 'png'}"
    suffix = output.suffix.removeprefix(".").lower()
    if suffix not in FORMATS or format not in (None, suffix):
        wanted = f".{format}" if format else f"one of {', '.join(f'.{name}' for name in FORMATS)}"
        raise ConfigError(f"plot: the name of --output {output} must end in {wanted}")
    return output


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of run directories, with as much of their paths as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("plot: a run directory is given twice; give each once")


def _read(run: Path, name: str) -> Run:
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise DataError(f"{run / 'metrics.jsonl'} holds no metrics yet")
    method = _json(run / "run.json").get("method")
    if method not in PANELS:
        method = method_of({key for record in records for key in record})
    return Run(name, method, records, _json(run / "evaluation.json").get("histogram", {}))


def _before(run: Path) -> list[dict[str, Any]]:
    """The metrics of the initial policy on held-out prompts as a record of step 0, if the run measured them."""
    metrics = _json(run / "validation.json").get("metrics")
    return [{"step": 0, **metrics}] if isinstance(metrics, dict) and metrics else []


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none."""
    return read_json(path) if path.is_file() else {}


def _save(figure: Any, output: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format=output.suffix.removeprefix(".").lower(), dpi=130)
    return write_whole(output, picture.getvalue())
