"""Plots of runs, and their metrics and samples as CSV."""

import csv
import json
import math
import sys

import pytest

from jaxrlhf.errors import ConfigError, DataError, JaxrlhfError
from jaxrlhf.metrics import plots
from jaxrlhf.metrics.keys import METRICS
from jaxrlhf.metrics.panels import PANELS

RECORDS = [
    {
        "step": 1,
        "loss/policy_avg": 0.5,
        "loss/value_avg": 900.0,
        "objective/kl": 0.0,
        "objective/scores": -1.0,
        "objective/rlhf_reward": -1.0,
        "learning_rate": 1e-5,
    },
    {
        "step": 2,
        "loss/policy_avg": 0.25,
        "loss/value_avg": 800.0,
        "objective/rlhf_reward": 0.5,
        "objective/kl": 1.5,
        "objective/scores": 1.0,
        "learning_rate": 5e-6,
        "eps": 3.0,
    },
]
SMALL = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]  # a picture takes a second per panel


def write(run, records, tail=""):
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the figures that are saved: title -> {label or colour of a line: its values}, in order."""
    from matplotlib.figure import Figure

    found = {}

    def keep(figure, *_, **__):
        found.clear()
        found.update(
            {
                axes.get_title(): {
                    line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
                }
                for axes in figure.axes
                if axes.axison and axes.get_title()
            }
        )

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_metric_of_a_panel_is_defined():
    for method, panels in PANELS.items():
        keys = [key for panel in panels for key in (*panel.metrics, panel.against) if key]
        assert set(keys) <= METRICS.keys(), method
        assert len({panel.title for panel in panels}) == len(panels)


@pytest.mark.parametrize("format", plots.FORMATS)
def test_the_csv_holds_every_value_and_the_picture_has_its_format(tmp_path, format):
    write(tmp_path, SMALL)
    picture, table = plots.plot([tmp_path], format=format)
    rows = read_csv(table)
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == SMALL
    assert next(iter(rows[0])) == "step"
    assert picture == tmp_path / f"plot.{format}"
    assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[format] == picture.read_bytes()[: 5 - (format != "svg")]


def test_output_names_the_picture_and_its_format(tmp_path):
    write(tmp_path, SMALL)
    assert plots.plot([tmp_path], tmp_path / "a" / "b.svg")[0].read_bytes().startswith(b"<?xml")
    for output, format in (("b.jpg", None), ("b", "png"), ("b.pdf", "png")):
        with pytest.raises(ConfigError, match=r"must end in .*\.png"):
            plots.plot([tmp_path], tmp_path / output, format)


def test_panels_are_those_of_the_method_and_of_what_was_logged(tmp_path, drawn):
    write(tmp_path, RECORDS)
    plots.plot([tmp_path])
    assert drawn["policy loss"] == {"policy loss": ([1, 2], [0.5, 0.25])}
    assert drawn["value loss"] == {"value loss": ([1, 2], [900.0, 800.0])}, "on axes of its own"
    assert drawn["score and reward"] == {
        "score": ([1, 2], [-1.0, 1.0]),
        "RLHF reward: score - coefficient x KL": ([1, 2], [-1.0, 0.5]),
    }
    ((x, y),) = drawn["score against KL"].values()
    assert (x, y) == ([0.0, 1.5], [-1.0, 1.0])
    assert "held-out score" not in drawn and "accuracy" not in drawn
    write(tmp_path, [{"step": 1, "rewards/chosen": 0.1, "rewards/rejected": -0.2, "eval/rewards/margins": 0.5}])
    plots.plot([tmp_path])
    assert drawn == {
        "implicit reward": {"chosen": ([1], [0.1]), "rejected": ([1], [-0.2])},
        "margin of implicit rewards": {"held out": ([1], [0.5])},
    }
    write(tmp_path, [{"step": 1, "learning_rate": 0.1}])
    (tmp_path / "run.json").write_text('{"method": "reward"}')
    plots.plot([tmp_path])
    assert list(drawn) == ["learning rate"]
    write(tmp_path, [{"step": 1, "perf/reward_seconds": 0.1}])
    with pytest.raises(DataError, match=r"none of the metrics logged has a panel; see metrics\.csv"):
        plots.plot([tmp_path])


def test_held_out_curves_begin_with_the_initial_policy(tmp_path, drawn):
    write(tmp_path, [RECORDS[0], RECORDS[1] | {"eval/scores": 2.0, "eval/kl": 1.0}])
    metrics = {"eval/scores": 0.5, "eval/kl": 0.0}
    (tmp_path / "validation.json").write_text(json.dumps({"scores": [0.5], "metrics": metrics}))
    plots.plot([tmp_path])
    assert drawn["held-out score"]["sampled"] == ([0, 2], [0.5, 2.0])
    assert drawn["KL to the reference, nats per response"]["held out"] == ([0, 2], [0.0, 1.0])
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_loss_and_accuracy_of_a_reward_model_are_side_by_side(tmp_path, drawn):
    write(tmp_path, [{"step": 1, "loss": 0.7, "accuracy": 0.5, "eval/accuracy": 0.6, "eval/loss": 0.8, "margin": 0.1}])
    plots.plot([tmp_path])
    assert list(drawn)[:2] == ["loss", "accuracy"]
    assert drawn["accuracy"] == {"training": ([1], [0.5]), "held out": ([1], [0.6])}


def test_a_reward_model_gets_a_histogram_of_scores(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure, *_, **__):
        (axes,) = [axes for axes in figure.axes if axes.patches]
        drawn[axes.get_title()] = {p.get_label(): [list(map(float, x)) for x in p.get_data()[:2]] for p in axes.patches}

    monkeypatch.setattr(Figure, "savefig", keep)
    write(tmp_path, [{"step": 1, "loss": 0.7, "mean_reward": 0.1}])
    histogram = {"edges": [-1.0, 0.0, 2.0], "best": [1, 4], "others": [3, 2]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"histogram": histogram}))
    plots.plot([tmp_path])
    edges = histogram["edges"]
    assert drawn == {"scores of held-out responses": {"best": [[1, 4], edges], "others": [[3, 2], edges]}}
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json: not valid JSON"):
        plots.plot([tmp_path])


def test_several_runs_share_panels_with_a_colour_each(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "a" / "ppo", tmp_path / "b" / "ppo", tmp_path / "rm"]
    for shift, run in enumerate(runs[:2]):
        run.mkdir(parents=True)
        write(run, [record | {"objective/kl": record["objective/kl"] + shift} for record in RECORDS])
    runs[2].mkdir()
    write(runs[2], [{"step": 1, "accuracy": 0.5, "margin": 0.1, "loss": 0.1}])
    picture, *tables = plots.plot(runs)
    assert picture.name == "plot.png" and picture.resolve().parent == tmp_path
    assert tables == [run / "metrics.csv" for run in runs]
    (figure,) = figures
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["a/ppo", "b/ppo", f"{tmp_path.name}/rm (reward)"]
    axes = {axes.get_title(): axes for axes in figure.axes}
    kl = axes["KL to the reference, nats per response"]
    assert [(line.get_color(), list(line.get_ydata())) for line in kl.lines] == [("C0", [0, 1.5]), ("C1", [1, 2.5])]
    scores = [(line.get_color(), line.get_linestyle()) for line in axes["score and reward"].lines]
    assert scores == [("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "--")]
    assert [line.get_color() for line in axes["accuracy"].lines] == ["C2"]
    with pytest.raises(ConfigError, match="given twice"):
        plots.plot([runs[0], runs[0] / ".." / "ppo"])


def test_steps_are_integers_on_the_axis(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    ticks = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: ticks.append([axes.get_xticks().tolist() for axes in figure.axes])
    )
    for count in (1, 2, 3, 1000):
        write(tmp_path, [{"step": n, "loss": 1 / n, "entropy": 1.0} for n in range(1, count + 1)])
        plots.plot([tmp_path])
        assert all(tick == int(tick) for axes in ticks[-1] for tick in axes), count


def test_a_long_noisy_curve_has_a_running_mean(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    records = [
        {"step": n, "loss": n if n != 50 else "NaN", "learning_rate": n, "entropy": n % 2} for n in range(1, 201)
    ]
    write(tmp_path, records)
    plots.plot([tmp_path])
    axes = {axes.get_title(): axes for axes in figures[0].axes}
    raw, mean = axes["loss"].lines
    assert len(raw.get_xdata()) == 200 and raw.get_alpha() < 1
    window = [n for n in range(1, 201) if n != 50][:10]
    assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (window[5], pytest.approx(sum(window) / 10, rel=1e-12))
    assert len(mean.get_xdata()) == 190 and all(map(math.isfinite, mean.get_ydata()))
    assert list(axes["entropy, nats per token"].lines[1].get_ydata()) == pytest.approx([0.5] * 191, rel=1e-12)
    assert len(axes["learning rate"].lines) == 1


def test_without_matplotlib_the_csv_is_still_written(tmp_path, monkeypatch):
    write(tmp_path, RECORDS)
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "completion": "c"}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JaxrlhfError, match=r"metrics\.csv, .*samples\.csv.*jaxrlhf\[plots\]"):
        plots.plot([tmp_path])
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


def test_non_finite_numbers_are_gaps_in_plots_and_numbers_in_the_csv(tmp_path):
    records = [*SMALL, {"step": 3, "loss": "NaN", "eval/loss": "-Infinity"}]
    write(tmp_path, records, tail='{"step": 4, "lo')  # and a line that a kill cut short is left out
    picture, table = plots.plot([tmp_path])
    last = read_csv(table)[2]
    assert math.isnan(float(last["loss"])) and float(last["eval/loss"]) == -math.inf
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="run directory"):
        plots.plot([tmp_path])
    write(tmp_path, [])
    with pytest.raises(DataError, match="no metrics"):
        plots.plot([tmp_path])


def test_samples_as_csv_are_text_and_no_formulas(tmp_path):
    write(tmp_path, SMALL)
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]
    plain = ["", " =1", "a,b", 'say "hi"\nthere', "'quoted'", "é\x00"]
    rows = [{"step": 1, "completion": text, "prompt": "p", "score": -0.5} for text in formulas + plain]
    rows.append(
        {"step": 2, "prompt": [{"role": "user", "content": "é"}], "completion": "c", "greedy": None, "=x": True}
    )
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    *_, table = plots.plot([tmp_path])
    read = read_csv(table)
    assert list(read[0]) == ["step", "prompt", "completion", "score", "greedy", "'=x"]
    assert [row["completion"] for row in read] == [f"'{text}" for text in formulas] + plain + ["c"]
    assert {row["score"] for row in read[:-1]} == {"-0.5"}, "a number stays one"
    assert json.loads(read[-1]["prompt"]) == [{"role": "user", "content": "é"}] and read[-1]["'=x"] == "True"


def test_a_measure_per_prompt_is_drawn_for_each_model(tmp_path, monkeypatch):
    picture = plots.bars({"sft": [10.0, 20.0], "$x^": [None, 5.0]}, tmp_path / "bleu.png", title="$ of _")
    assert picture.read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.bars({"sft": [10.0, 20.0], "ppo": [None, 5.0]}, tmp_path / "bleu.png")
    (axes,) = figures[0].axes
    bars = [[bar.get_height() for bar in group] for group in axes.containers]
    assert bars[0] == [10.0, 20.0] and math.isnan(bars[1][0]) and bars[1][1] == 5.0
    assert [line.get_ydata()[0] for line in axes.lines] == [15.0, 5.0]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft (mean 15)", "ppo (mean 5)"]
    many = [float(n % 7) for n in range(200)]
    plots.bars({"sft": many, "ppo": many[::-1]}, tmp_path / "bleu.png")
    first, _, second, _ = figures[1].axes[0].lines
    assert list(first.get_ydata()) == sorted(many) and sorted(second.get_ydata()) == sorted(many)
    pairs = zip(first.get_ydata(), second.get_ydata(), strict=True)
    assert sorted(pairs) == sorted(zip(many, many[::-1], strict=True)), "prompts stay together"
    with pytest.raises(DataError, match="no BLEU"):
        plots.bars({"sft": []}, tmp_path / "bleu.png")
