"""Token records of a run: their numbers, their text, and that they change nothing else."""

import gzip
import json

import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer

EVERY_TOKEN = {"tokens", "pieces", "logprob", "ref_logprob", "kl", "advantage", "ratio", "entropy", "top"}
OF_A_CRITIC = {"reward", "value", "td_error", "return"}


@pytest.fixture
def make(ppo, tmp_path):
    """A trainer of four updates with records of five sequences at updates 1, 3 and 4."""

    def build(name="run", *, reward=length_reward, grpo=None, fresh=False, **changes):
        logging = config.replace(ppo["logging"], sample_every=2, token_samples=changes.pop("token_samples", 5))
        options = ppo | {"run_dir": str(tmp_path / name), "logging": logging} | changes
        if grpo is None:
            return PPOTrainer(config.PPOConfig(**options), reward=reward, fresh=fresh)
        del options["ppo"]
        section = config.GRPO(**{"batch_size": 8, "num_generations": 4, "total_episodes": 32} | grpo)
        return GRPOTrainer(config.GRPOConfig(grpo=section, **options), reward=reward, fresh=fresh)

    return build


def read(run):
    """{file name: rows}"""
    files = sorted((run / "tokens").iterdir())
    return {file.name: [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")] for file in files}


def test_a_record_has_one_entry_per_token_and_joins_to_the_completion(make, tmp_path):
    make().train()
    files = read(tmp_path / "run")
    assert list(files) == [f"step-00000{step}.jsonl.gz" for step in (1, 3, 4)]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for step, rows in zip((1, 3, 4), files.values(), strict=True):
        assert [row["step"] for row in rows] == [step] * 5 and {row["schema"] for row in rows} == {1}
        for row in rows:
            assert {key for key, value in row.items() if isinstance(value, list)} == EVERY_TOKEN | OF_A_CRITIC
            assert {len(row[key]) for key in EVERY_TOKEN | OF_A_CRITIC} == {len(row["tokens"])}
            assert "".join(row["pieces"]) == row["completion"]
            assert row["score"] == pytest.approx(0.1 * len(row["completion"]), rel=1e-4)
            assert row["reward"][-1] == pytest.approx(row["score"] - 0.05 * row["kl"][-1], rel=1e-3)
            assert all(len(position) == 5 for position in row["top"])
            assert row["finished"] == (row["tokens"][-1] == 2)
        logged = [(row["prompt"], row["completion"]) for row in samples if row["step"] == step]
        assert logged == [(row["prompt"], row["completion"]) for row in rows[:2]]
    assert {x for row in files["step-000001.jsonl.gz"] for x in row["kl"]} == {0}, "the policy is still the reference"
    assert all(x != 1 for row in files["step-000001.jsonl.gz"] for x in row["ratio"]), "the update has moved it"


def test_records_change_nothing_else(make, tmp_path):
    """Metrics and the trained state are bit for bit those of a run without records."""
    with_records, without = make("a"), make("b", token_samples=0)
    with_records.train(), without.train()
    assert records(tmp_path / "a") == records(tmp_path / "b")
    equal(with_records.state.value, without.state.value)
    assert not (tmp_path / "b" / "tokens").exists()
