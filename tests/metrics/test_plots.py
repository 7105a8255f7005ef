"""Plots and the CSV of a metrics.jsonl."""

import csv
import json
import math
import sys

import pytest

from jaxrlhf.errors import DataError, JaxrlhfError
from jaxrlhf.metrics import plots

RECORDS = [
    {"step": 1, "loss/policy_avg": 0.5, "objective/kl": 0.0, "objective/scores": -1.0, "learning_rate": 1e-5},
    {
        "step": 2,
        "loss/policy_avg": 0.25,
        "objective/kl": 1.5,
        "objective/scores": 1.0,
        "learning_rate": 5e-6,
        "eps": 3.0,
    },
]


def write(run, records, tail=""):
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_the_csv_holds_every_value_and_the_picture_is_a_png(tmp_path):
    write(tmp_path, RECORDS)
    picture, table = plots.plot(tmp_path)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == RECORDS
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert next(iter(rows[0])) == "step"


def test_panels_draw_what_was_logged_and_say_what_was_not(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure, *_, **__):
        for axes in figure.axes:
            lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
            drawn[axes.get_title()] = (lines, [text.get_text() for text in axes.texts])

    monkeypatch.setattr(Figure, "savefig", keep)
    write(tmp_path, [{"step": 1, "rewards/chosen": 0.1, "rewards/rejected": -0.2, "kl": 0.5}])
    plots.plot(tmp_path)
    assert drawn["mean reward"][0] == {"rewards/chosen": [0.1], "rewards/rejected": [-0.2]}, "of preferences"
    write(tmp_path, [{k: v for k, v in r.items() if k != "objective/kl"} for r in RECORDS])
    plots.plot(tmp_path)
    assert len(drawn) == 4
    assert drawn["loss"] == ({"loss/policy_avg": [0.5, 0.25]}, [])
    assert drawn["mean reward"] == ({"objective/scores": [-1.0, 1.0]}, [])
    assert drawn["KL to the reference (nats per response)"] == ({}, ["not logged in this run"])


def test_a_reward_model_gets_a_histogram_of_scores_in_place_of_the_kl(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure, *_, **__):
        axes = figure.axes[-1]
        drawn[axes.get_title()] = {p.get_label(): [list(map(float, x)) for x in p.get_data()[:2]] for p in axes.patches}

    monkeypatch.setattr(Figure, "savefig", keep)
    write(tmp_path, [{"step": 1, "loss": 0.7, "mean_reward": 0.1}])
    histogram = {"edges": [-1.0, 0.0, 2.0], "best": [1, 4], "others": [3, 2]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"histogram": histogram}))
    plots.plot(tmp_path)
    edges = histogram["edges"]
    assert drawn == {"scores of held-out responses": {"best": [[1, 4], edges], "others": [[3, 2], edges]}}


def test_without_matplotlib_the_csv_is_still_written(tmp_path, monkeypatch):
    write(tmp_path, RECORDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JaxrlhfError, match=r"jaxrlhf\[plots\]"):
        plots.plot(tmp_path)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


def test_non_finite_numbers_are_gaps_in_plots_and_numbers_in_the_csv(tmp_path):
    records = [*RECORDS, {"step": 3, "objective/kl": "NaN", "objective/scores": "-Infinity"}]
    write(tmp_path, records, tail='{"step": 4, "lo')  # and a line that a kill cut short is left out
    picture, table = plots.plot(tmp_path)
    with table.open(newline="") as file:
        last = list(csv.DictReader(file))[2]
    assert math.isnan(float(last["objective/kl"])) and float(last["objective/scores"]) == -math.inf
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="run directory"):
        plots.plot(tmp_path)
    write(tmp_path, [])
    with pytest.raises(DataError, match="no metrics"):
        plots.plot(tmp_path)
