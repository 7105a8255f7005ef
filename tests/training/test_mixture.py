"""Runs on a mixture of data sets: they resume exactly, and say how often each data set was seen."""

import json

import pytest

from jaxrlhf import config
from jaxrlhf.errors import Preempted
from jaxrlhf.metrics import read_records
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer


@pytest.fixture
def mixed(rows, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"add {i} ", "completion": "red"}) + "\n" for i in range(5)))
    entries = (
        {"path": str(rows), "weight": 1.0, "validation_fraction": 0.25},
        {"path": str(other), "weight": 1.0, "name": "sums"},
    )
    return config.Data(mix=entries)


def records(trainer):
    found = read_records(f"{trainer.config.run_dir}/metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_run_on_a_mixture_resumes_exactly(method, mixed, supervised, ppo, tmp_path, stop_at_two, capsys):
    def trainer(name):
        if method == "sft":
            return SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / name), **supervised | {"data": mixed}))
        made = config.PPOConfig(run_dir=str(tmp_path / name), **ppo | {"data": mixed})
        return PPOTrainer(made, reward=lambda prompts, completions, **_: [float(len(text)) for text in completions])

    with pytest.raises(Preempted):
        trainer("stopped").train()
    again = trainer("stopped")
    again.train()
    whole = trainer("whole")
    whole.train()
    assert records(again) == records(whole)
    last, rows = records(whole)[-1], len(whole.data.train)
    seen = len(records(whole)) * (6 if method == "sft" else 8)
    assert rows == 23 and last["epochs/rows"] == pytest.approx(seen * 12 / 23 / 18, abs=1 / 18)
    assert last["epochs/sums"] == pytest.approx(seen * 11 / 23 / 5, abs=1 / 5)
    card = (tmp_path / "whole" / "export" / "README.md").read_text()
    assert "other.jsonl" in card and "rows.jsonl" in card
    assert "rows 52.2% (12 rows of 18" in whole.describe() and "6 held out" in whole.describe()
