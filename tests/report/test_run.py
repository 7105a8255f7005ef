"""What the report of a run holds, from the files of its directory."""

import base64
import gzip
import json
import math
import random
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recorded_runs import page_data, record, token_record, write_lines, write_run, write_tokens

from jaxrlhf import report
from jaxrlhf.config import Component, Data, Environment, Judge, MixedSource, PPOConfig, RewardSource, text
from jaxrlhf.config.file import METHODS
from jaxrlhf.errors import DataError, StorageError
from jaxrlhf.metrics.columns import Columns
from jaxrlhf.metrics.keys import METRICS
from jaxrlhf.report import curves, reward_health, tokens, verdict
from jaxrlhf.report.run import collect


def unpacked(text, *, floats=False):
    """The numbers that were packed as 3 bytes each."""
    raw = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3)
    bits = np.zeros((len(raw), 4), np.uint8)
    bits[:, 1 if floats else 0 :][:, :3] = raw
    return bits.view("<f4" if floats else "<u4")[:, 0].tolist()


@pytest.mark.parametrize(
    "method, said",
    {
        "sft": "Loss fell from 3.9",
        "reward": "Training accuracy rose from 0.5",
        "dpo": "Accuracy of the implicit reward rose",
        "ppo": "Score rose from .1.7",
        "grpo": "Score rose from .1.7",
    }.items(),
)
def test_every_method_has_a_page(method, said, tmp_path):
    path = report.write(write_run(tmp_path / method, method))
    assert path == tmp_path / method / "report.html"
    data = page_data(path)
    assert re.match(said, data["verdict"][0]) and "over 20" in data["verdict"][0]
    assert data["status"] == {"kind": "done", "text": "Finished."} and not data["warnings"]
    drawn = [series["label"] for group in data["curves"] for chart in group["charts"] for series in chart["series"]]
    assert len(drawn) == len(set(drawn))
    logged = set(record(method, 1, 2, random.Random(0))) - {"step", *curves.HIDDEN}
    assert set(drawn) == logged
    assert all(data["definitions"][key] for key in drawn)
    assert bool(data["tradeoffs"]) == (method in ("ppo", "grpo"))
    assert [change[0] for change in data["changes"]] == ["run_dir"]
    assert data["reproduce"]["command"] == f"jaxrlhf {method}"


def test_every_data_set_every_component_and_the_environment_are_named(tmp_path):
    directory = write_run(tmp_path / "run", "ppo")
    settings = PPOConfig(
        run_dir=str(directory),
        data=Data(mix=(MixedSource(path="a.jsonl"), MixedSource(path="b.jsonl"))),
        reward=RewardSource(
            components=(Component(model="judge/rm"), Component(judge=Judge(url="http://localhost:1/v1", model="m")))
        ),
        environment=Environment(function="game.py:Game"),
    )
    (directory / "config.yaml").write_text(text.dump(settings))
    facts = dict(collect(directory)["facts"])
    assert facts["Data"] == "a.jsonl, b.jsonl" and facts["Environment"] == "game.py:Game"
    assert facts["Reward"] == "judge/rm, http://localhost:1/v1"


def test_metrics_of_all_charts_are_defined():
    keys = [key for group in curves.GROUPS.values() for _, _, keys in group for key in keys]
    assert set(keys) <= set(METRICS)


@pytest.mark.parametrize(
    "outcome, facts, kind, said",
    [
        (None, {}, "failed", "killed"),
        ("preempted", {}, "stopped", "after 20 of 90 updates; the same command resumes it"),
        ("RewardError", {"error": "no score"}, "failed", "Ended by RewardError after 20 of 90 updates: no score"),
        ("done", {}, "done", "Finished early, after 20 of 90"),
    ],
)
def test_the_end_of_a_run_is_told(outcome, facts, kind, said, tmp_path):
    status = collect(write_run(tmp_path / "run", "ppo", outcome=outcome, **facts, total_steps=90))["status"]
    assert status["kind"] == kind and said in status["text"]


def test_files_that_are_missing_incomplete_or_broken_are_named(tmp_path):
    run = write_run(tmp_path / "run", "ppo")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "objective/sco')  # being written
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "a"\nno JSON\n')
    (run / "validation.json").write_text("{")
    (run / "evaluation.json").write_text("[1]")
    (run / "tokens").mkdir()
    (run / "tokens" / "step-000001.jsonl.gz").write_bytes(b"no gzip")
    damaged = bytearray(gzip.compress(b'{"pieces": []}\n'))
    damaged[10] = 0xFF  # a block of a type that does not exist
    (run / "tokens" / "step-000002.jsonl.gz").write_bytes(damaged)
    data = collect(run)
    assert "20 updates" in data["verdict"][0]
    assert [line.split(" ")[0] for line in data["warnings"]] == [
        "samples.jsonl",
        "validation.json",
        "evaluation.json",
        "step-000001.jsonl.gz",
        "step-000002.jsonl.gz",
    ]
    (run / "run.json").unlink()
    (run / "config.yaml").write_text("a: [")
    data = collect(run)
    assert data["status"]["kind"] == "stopped" and any(w.startswith("config.yaml") for w in data["warnings"])
    report.write(run)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_short_runs_have_a_page(method, steps, tmp_path):
    data = page_data(report.write(write_run(tmp_path / "run", method, steps)))
    assert data["verdict"] and not re.search(r"\bnan\b", json.dumps([data["verdict"], data["facts"], data["warnings"]]))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a directory"):
        report.write(tmp_path / "nowhere")
    write_run(tmp_path / "demo" / "ppo", "ppo", 1)
    with pytest.raises(DataError, match="not a run directory; ppo in it is"):
        report.write(tmp_path / "demo")
    with pytest.raises(StorageError):
        report.write(tmp_path / "demo" / "ppo", tmp_path / "demo")


def test_noise_is_not_called_progress():
    chance = random.Random(0)
    flat = [{"step": i, "objective/scores": chance.gauss(0, 1)} for i in range(50)]
    assert "did not change beyond noise" in verdict.verdict("ppo", Columns(flat), {}, {})[0]
    falling = [{"step": i, "objective/scores": -i + chance.gauss(0, 1), "objective/kl": 2.0} for i in range(50)]
    assert re.match(
        r"Score fell from .* at a KL to the reference of 2 nats", verdict.verdict("ppo", Columns(falling), {}, {})[0]
    )
    # Two sigma: of 400 runs without progress about 5 % are called a change.
    runs = [[{"step": i, "loss": chance.gauss(0, 1)} for i in range(40)] for _ in range(400)]
    called = sum("noise" not in str(verdict.change(Columns(run), "loss")) for run in runs)
    assert 5 <= called <= 45


@pytest.mark.parametrize("steps", [1, 3, 12, 40])
def test_the_table_of_components_and_the_sentence_have_the_same_final_value(steps, tmp_path):
    run = write_run(tmp_path / "run", "ppo", 0)
    rows = [
        {"step": i, **dict.fromkeys(("objective/scores", "rewards/m/mean"), i * i), "rewards/m/errors": 0}
        for i in range(steps)
    ]
    write_lines(run / "metrics.jsonl", rows)
    (row,) = collect(run)["components"]
    found = verdict.change(Columns(rows), "objective/scores")
    assert row["first"] == 0 and row["last"] == curves.rounded(found.last if found else rows[-1]["objective/scores"])


def test_held_out_prompts_are_reported_with_an_interval():
    records = [{"step": i, "objective/scores": float(i)} for i in range(9)]
    records[-1] |= {"eval/scores": 3.0, "eval/win_rate": 0.75, "eval/gain": 2.0, "eval/heldout_gain": -1.0}
    baseline = {"scores": [1.0] * 40, "metrics": {"eval/scores": 1.0}}
    sentences = verdict.verdict("ppo", Columns(records), baseline, {})
    assert "On 40 held-out prompts the score went from 1 to 3" in sentences[1]
    assert "75 %" in sentences[1] and "59.8 to 85.8 %" in sentences[1]  # Wilson's interval of 30 of 40
    assert "disagrees" in sentences[2]


def test_what_is_not_finite_is_left_out_of_sentences(tmp_path):
    records = [{"step": i, "objective/scores": 1.0, "rewards/m/mean": 1.0, "rewards/m/errors": 2} for i in (1, 2)]
    records[1] |= {"rewards/m/errors": math.nan, "eval/scores": 2.0, "eval/win_rate": math.nan}
    records = Columns(records)
    (row,) = reward_health.components(records)
    assert row["errors"] == 2
    baseline = {"scores": [1.0] * 4, "metrics": {"eval/scores": 1.0}}
    assert verdict.verdict("ppo", records, baseline, {})[1] == "On 4 held-out prompts the score went from 1 to 2."
    losses = Columns([{"step": i, "loss": 1.0, "eval/loss": loss} for i, loss in enumerate((1.0, math.nan, 2.0))])
    assert "above its best of 1 at step 0" in verdict.verdict("sft", losses, {}, {})[1]


def test_warnings_name_what_went_wrong():
    quiet = [record("ppo", step, 10, random.Random(step)) for step in range(1, 11)]
    assert verdict.warnings(Columns(quiet)) == []
    loud = [dict(row) for row in quiet]
    loud[3] |= {"skipped_updates": 2.0, "alarm/kl": 1.0}
    for row in loud[5:]:
        row |= {
            "tokens/finished": 0.5,
            "tokens/identical": 0.8,
            "rewards/model/errors": 3.0,
            "objective/unscored": 0.25,
        }
        row |= {"groups/flat": 9.0, "groups/count": 10.0, "val/sampler_logprob_gap": 0.3}
    text = "\n".join(verdict.warnings(Columns(loud)))
    for part in (
        "2 optimizer steps were skipped",
        "first at step 4, last at step 4",
        "15 completions",
        "25 %",
        "50 %",
        "80 %",
        "90 %",
        "0.3 nats",
        "KL to the reference is over",
    ):
        assert part in text
    assert len(verdict.warnings(Columns(loud))) == 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32) | st.sampled_from([math.nan, math.inf]), max_size=400),
    st.integers(4, 60),
)
def test_thinned_curves_keep_ends_and_extremes(values, limit):
    kept = curves.thin(np.array(values), limit)
    assert kept == sorted(set(kept)) and len(kept) <= max(limit, len(values) if len(values) <= limit else 0)
    finite = [v for v in values if math.isfinite(v)]
    if finite:
        shown = [values[i] for i in kept if math.isfinite(values[i])]
        assert min(shown) == min(finite) and max(shown) == max(finite)
    if values:
        assert kept[0] == 0 and kept[-1] == len(values) - 1


def test_a_curve_is_broken_where_nothing_is_finite():
    values = np.arange(3000.0)
    values[1000:2000] = math.nan
    kept = curves.thin(values, 60)
    assert any(math.isnan(values[i]) for i in kept) and len(kept) <= 60


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.floats(-(2.0**90), 2.0**90, width=32), max_size=30))
def test_packed_numbers_have_sixteen_bits(values):
    back = unpacked(tokens.floats24(values), floats=True)
    for value, found in zip(values, back, strict=True):
        if value is None:
            assert math.isnan(found)
        else:
            assert abs(found - value) <= max(2**-16 * abs(value), 1e-38)


def test_token_records_are_chosen_and_packed(tmp_path):
    run = write_run(tmp_path / "run", "ppo", 3)
    assert collect(run)["tokens"] == {"words": [], "records": []}
    for step in range(1, 41):
        scores = [0.0, 5.0, None, -5.0, 1.0, 2.0, 3.0, 4.0]
        write_tokens(run, step, [token_record(step, i, ["a", "", " b"], score) for i, score in enumerate(scores)])
    packed = collect(run)["tokens"]
    steps = sorted({r["step"] for r in packed["records"]})
    assert len(packed["records"]) == 64 and len(steps) == 16 and steps[0] == 1 and steps[-1] == 40
    for step in steps:
        assert {5.0, -5.0} <= {r["score"] for r in packed["records"] if r["step"] == step}
    first = packed["records"][0]
    assert [packed["words"][i] for i in unpacked(first["pieces"])] == ["a", "", " b"] and first["length"] == 3
    assert unpacked(first["ids"]) == [0, 1, 2] and first["ranks"] == 5
    assert packed["words"][unpacked(first["top"][0])[10]] == " b"
    assert unpacked(first["top"][1], floats=True)[10] == pytest.approx(-0.1234, rel=2**-16)
    assert set(first["series"]) == set(tokens.SERIES)


def test_the_page_of_a_long_run_with_many_tokens_is_small(tmp_path):
    run = write_run(tmp_path / "run", "ppo", 1)
    chance = random.Random(0)
    prefixes = ("objective/", "policy/", "loss/", "val/", "critic/", "tokens/", "perf/")
    keys = [key for key in METRICS if key.startswith(prefixes)]
    rows = [{"step": i} | {key: chance.gauss(0, 1) for key in keys} for i in range(1, 1001)]
    for row in rows[::10]:
        row |= {"eval/scores": chance.gauss(0, 1), "eval/kl": chance.gauss(0, 1)}
    write_lines(run / "metrics.jsonl", rows)
    for step in range(1, 9):
        pieces = [[f" word{chance.randrange(6000)}" for _ in range(256)] for _ in range(8)]
        write_tokens(run, step, [token_record(step, i, part) for i, part in enumerate(pieces)])
    samples = [{"step": s, "prompt": "p" * 900, "completion": "c" * 900, "score": 1.0} for s in range(300)]
    write_lines(run / "samples.jsonl", samples)
    path = report.write(run)
    data = page_data(path)
    assert len(data["tokens"]["records"]) == 64
    assert sum(len(unpacked(r["pieces"])) for r in data["tokens"]["records"]) == 64 * 256
    assert path.stat().st_size < 2_000_000


def test_long_texts_and_responses_are_cut(tmp_path):
    run = write_run(tmp_path / "run", "ppo", 1)
    rows = [{"step": s, "prompt": f"{i}", "completion": "x" * 100_000, "score": 1.0} for s in (1, 9) for i in range(60)]
    write_lines(run / "samples.jsonl", rows)
    write_tokens(run, 1, [token_record(1, i, ["a"] * 1500) for i in range(20)])
    path = report.write(run)
    data = page_data(path)
    assert path.stat().st_size < 2_000_000
    assert "(96,000 more characters)" in data["samples"]["fixed"][0]["answers"]["1"][0]
    assert len(data["samples"]["fixed"]) + data["samples"]["left_out"] == 60
    records = data["tokens"]["records"]
    assert {(r["length"], len(unpacked(r["pieces"]))) for r in records} == {(1500, 1024)} and len(records) == 16


def test_the_same_prompts_are_compared_over_steps(tmp_path):
    run = write_run(tmp_path / "run", "ppo", 3)
    rows = [
        {"step": 0, "prompt": "a", "completion": "one", "score": 1.0, "held_out": True},
        {"step": 0, "prompt": "a", "completion": "again", "score": None, "held_out": True},
        {"step": 1, "prompt": "a", "completion": "training", "score": 3.0},
        {"step": 3, "prompt": "a", "completion": "two", "score": 2.0, "held_out": True},
        {"step": 3, "prompt": "a", "completion": "twice", "score": "NaN", "held_out": True},
    ]
    write_lines(run / "samples.jsonl", rows)
    samples = collect(run)["samples"]
    assert samples["fixed"] == [
        {"prompt": "a", "held_out": True, "answers": {0: ["one", 1.0], 3: ["two", 2.0]}},
        {"prompt": "a", "held_out": True, "answers": {0: ["again", None], 3: ["twice", None]}},
    ]
    late = [{"step": step, "prompt": "by chance", "completion": "", "score": 1.0} for step in (1, 3)]
    write_lines(run / "samples.jsonl", rows + late)
    assert [row["prompt"] for row in collect(run)["samples"]["fixed"]] == ["a", "a"]
    write_lines(run / "samples.jsonl", [{"step": 0, "prompt": "b", "completion": ""}, *late])
    assert [row["prompt"] for row in collect(run)["samples"]["fixed"]] == ["by chance"]
    write_lines(run / "samples.jsonl", [{"step": s, "prompt": f"{s}", "completion": ""} for s in (1, 2, 3)])
    samples = collect(run)["samples"]
    assert not samples["fixed"] and [row["step"] for row in samples["others"]] == [1, 3]


def test_restarts_and_options_that_differ_are_shown(tmp_path):
    run = write_run(tmp_path / "run", "sft", 10)
    content = json.loads((run / "run.json").read_text())
    content["starts"] += [content["starts"][0] | {"step": 4}]
    (run / "run.json").write_text(json.dumps(content))
    text = (run / "config.yaml").read_text().replace("seed: 0", "seed: 7") + "older_option: 3\n"
    (run / "config.yaml").write_text(text)
    data = collect(run)
    assert data["time"] == []
    assert data["restarts"] == [4] and ("Time", "2 h 00 min in 2 starts") in data["facts"]
    assert ("seed", "7", "0", False) in data["changes"] and ("older_option", "3", "", False) in data["changes"]


def test_time_of_a_run_that_is_open_is_that_of_its_records(tmp_path):
    run = write_run(tmp_path / "run", "sft", 2, outcome=None, step=0)
    content = json.loads((run / "run.json").read_text()) | {"time": {"other": 5.0, "restore": 1.0}}
    (run / "run.json").write_text(json.dumps(content))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [line | {"perf/time/training": 2.0, "perf/time/save": 0.25} for line in lines])
    parts = [("other", 5.0), ("training", 4.0), ("restoring", 1.0), ("saving", 0.5)]
    assert collect(run)["time"] == parts
    content["starts"][0]["end"] = "2026-01-02T04:04:05+00:00"  # what it counts has the steps
    (run / "run.json").write_text(json.dumps(content))
    assert collect(run)["time"] == [("other", 5.0), ("restoring", 1.0)]


def test_a_start_of_a_finished_run_is_no_restart_and_the_peak_is_of_all(tmp_path):
    run = write_run(tmp_path / "run", "sft", 10)
    content = json.loads((run / "run.json").read_text())
    first = content["starts"][0] | {"step": 0, "total_steps": 10, "peak_memory": {"host": 2**30, "device": None}}
    command = ["/opt/bin/jaxrlhf", "sft", "my.yaml", "--seed=7", "--optim.schedule", "a b"]
    again = first | {"step": 10, "peak_memory": {"host": 2**20, "device": None}, "command": command}
    content["starts"] = [first, first | {"step": 4}, again]
    (run / "run.json").write_text(json.dumps(content))
    text = (run / "config.yaml").read_text().replace("seed: 0", "seed: 7") + "older_option: 3\n"
    (run / "config.yaml").write_text(text)
    data = collect(run)
    assert data["restarts"] == [4] and ("Time", "2 h 00 min in 2 starts") in data["facts"]
    assert ("Peak memory", "1.00 GiB (process)") in data["facts"] and len(data["reproduce"]["starts"]) == 3
    assert data["changes"][0] == ("seed", "7", "0", True) and not data["changes"][-1][3]
    assert data["reproduce"]["command"] == "jaxrlhf sft my.yaml \\\n  --seed=7 \\\n  --optim.schedule 'a b'"


def test_a_metric_is_in_one_chart_and_held_out_rows_beside_training():
    def titles(**record):
        groups = curves.charts(Columns([{"step": 1, **record}]), {})
        return {chart["title"]: [s["label"] for s in chart["series"]] for group in groups for chart in group["charts"]}

    assert titles(**{"objective/kl": 1.0, "eval/kl": 1.0}) == {"KL to the reference": ["objective/kl", "eval/kl"]}
    assert titles(**{"kl": 1.0, "eval/kl": 1.0}) == {"KL baseline": ["kl", "eval/kl"]}
    assert titles(**{"eval/kl": 1.0, "eval/win_rate": 0.5}) == {
        "Win rate against the initial policy": ["eval/win_rate"],
        "eval/kl": ["eval/kl"],
    }
    parts = {f"rewards/{name}/{key}": 1.0 for name in ("a", "b") for key in ("mean", "errors")}
    assert titles(**parts)["Components of the score"] == ["rewards/a/mean", "rewards/b/mean"]


def test_early_and_late_scores_are_of_what_has_most(tmp_path):
    run = write_run(tmp_path / "run", "ppo", 3)
    assert collect(run)["scores"] is None
    rows = [{"step": s, "prompt": "p", "completion": "c", "score": 1.0 * s, "held_out": True} for s in (0, 3, 0, 3)]
    write_lines(run / "samples.jsonl", [*rows, {"step": 1, "prompt": "q", "completion": "c", "score": "NaN"}])
    scores = collect(run)["scores"]
    assert scores["of"] == "held-out prompts" and [s["label"] for s in scores["series"]] == ["step 0 (2)", "step 3 (2)"]
    assert (
        [sum(s["counts"]) for s in scores["series"]] == [2, 2] and scores["edges"][0] == 0 and scores["edges"][-1] == 3
    )
    for step in (1, 2, 3):
        write_tokens(run, step, [token_record(step, i, ["a"], 1.0 * i) for i in range(4)])
    assert collect(run)["scores"]["of"] == "recorded sequences"


def test_the_report_of_a_long_run_takes_little_memory(tmp_path):
    """What it holds at once: a run writes its report again and again, and Python keeps a part of what that took."""
    run = write_run(tmp_path / "run", "ppo", 1, outcome=None, step=0)  # which still runs
    first = {"perf/time/training": 0.5} | json.loads((run / "metrics.jsonl").read_text().splitlines()[0])

    def peak(steps):
        write_lines(run / "metrics.jsonl", [first | {"step": step} for step in range(1, steps + 1)])
        tracemalloc.start()
        collect(run)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    short, long = peak(400), peak(2400)
    assert long - short < 2000 * 25 * len(first)  # bytes; dicts take 60 for each number
