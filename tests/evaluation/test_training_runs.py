"""Costs of training, and training metrics at equal generated tokens, from records written by hand."""

import json

import pytest

from jaxrlhf.errors import StorageError
from jaxrlhf.evaluation.training_runs import at_equal_tokens, read


def write(folder, method, records, starts, reward="{}"):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"method": method, "starts": starts}))
    (folder / "config.yaml").write_text(f"# jaxrlhf {method}\nreward: {reward}\n")
    lines = [{"step": i + 1, **record} for i, record in enumerate(records)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(str(folder))


def update(tokens, score, kl):
    return {"tokens/generated": tokens, "objective/raw_scores": score, "objective/kl": kl}


def start(begin, end=None, host=None):
    found = {"time": f"2026-01-01T{begin}+00:00", "outcome": "done"}
    return (
        found
        | ({"end": f"2026-01-01T{end}+00:00"} if end else {})
        | ({"peak_memory": {"host": host, "device": None}} if host else {})
    )


def test_time_is_summed_and_memory_the_maximum_over_starts(tmp_path):
    starts = [start("10:00:00", "10:01:30", 100), start("11:00:00"), start("12:00:00", "12:00:10", 70)]
    costs = write(tmp_path / "ppo", "ppo", [update(10, 0, 0), update(7, 0, 0)], starts).costs()
    assert (costs["seconds"], costs["starts"], costs["open_starts"]) == (100, 3, 1)
    assert costs["peak_memory"] == {"host": 100, "device": None}
    assert (costs["generated_tokens"], costs["steps"], costs["method"]) == (17, 2, "ppo")
    sft = write(tmp_path / "sft", "sft", [{"loss": 1.0}] * 4, [start("10:00:00", "10:00:20")]).costs()
    assert (sft["generated_tokens"], sft["steps"], sft["peak_memory"]["host"]) == (0, 4, None)


def test_runs_are_read_off_where_they_had_generated_as_much_as_the_smallest_did(tmp_path):
    ended = [start("10:00:00", "10:00:01")]
    short = write(tmp_path / "a", "grpo", [update(10, 1.0, 0.1), update(15, 2.0, 0.2)], ended)
    long = write(tmp_path / "b", "ppo", [update(8, k, k / 10) for k in range(6)], ended)
    exact = write(tmp_path / "c", "ppo", [update(25, 9.0, 0.9), update(25, 8.0, 0.8)], ended)
    sft = write(tmp_path / "d", "sft", [{"loss": 1.0}], ended)
    found, notes = at_equal_tokens([sft, short, None, long, exact])
    assert found[0] is None and found[2] is None and not notes
    assert found[1] == {"tokens": 25, "step": 2, "score": 2.0, "kl": 0.2}
    assert found[3] == {"tokens": 32, "step": 4, "score": 3, "kl": 0.3}, "8, 16 and 24 are too few"
    assert found[4] == {"tokens": 25, "step": 1, "score": 9.0, "kl": 0.9}


def test_what_is_missing_is_said(tmp_path):
    ended = [start("10:00:00", "10:00:01")]
    old = write(tmp_path / "old", "ppo", [{"objective/kl": 0.0}], ended)
    one = write(tmp_path / "one", "ppo", [update(8, 1.0, 0.1)], ended, "{function: a.py:f}")
    two = write(tmp_path / "two", "grpo", [update(8, 1.0, 0.1)], ended, "{function: b.py:f}")
    assert old.costs()["generated_tokens"] is None
    found, notes = at_equal_tokens([old, one, two])
    assert found[0] is None and found[1]["tokens"] == found[2]["tokens"] == 8
    assert len(notes) == 2 and "old has no record of generated tokens" in notes[0]
    assert "trained with different rewards" in notes[1]
    assert at_equal_tokens([old, None]) == ([None, None], notes[:1])
    assert read(str(tmp_path / "nowhere")) is None
    (tmp_path / "old" / "run.json").write_text("{")
    with pytest.raises(StorageError, match="the record of the run .*old cannot be read"):
        read(str(tmp_path / "old"))


def test_a_run_without_an_update_has_no_tokens(tmp_path):
    run = write(tmp_path / "a", "ppo", [], [start("10:00:00")])
    assert run.costs()["generated_tokens"] is None and run.costs()["steps"] == 0
    assert at_equal_tokens([run])[0] == [None]
