"""Token records of a run: their numbers, their text, and that they change nothing else."""

import gzip
import json

import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer

EVERY_TOKEN = {"tokens", "pieces", "logprob", "ref_logprob", "kl", "advantage", "ratio", "entropy", "top"}
OF_A_CRITIC = {"reward", "value", "td_error", "return"}


@pytest.fixture
def make(ppo, tmp_path):
    """A trainer of four updates with records of five sequences at updates 1, 3 and 4."""

    def build(name="run", *, grpo=None, fresh=False, **changes):
        reward = None if "reward" in changes else changes.pop("function", length_reward)
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


@pytest.mark.parametrize("grpo", [None, {"method": "dapo"}, {"method": "remax", "num_generations": 2}])
def test_the_first_prompts_are_completed_again_with_the_same_key(make, tmp_path, grpo):
    """Before training, after updates 1 and 3 and at the end; a policy that does not move says the same again."""
    frozen = config.Optim(learning_rate=1e-30)
    trainer = make(grpo=grpo, optim=frozen, token_samples=0)
    trainer.train()
    prompts = list(dict.fromkeys(row.text for row in trainer.prompts(0)))[:2]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    before, *after = [
        [row for row in map(json.loads, lines) if row["step"] == step and row["prompt"] in prompts]
        for step in (0, 1, 3, 4)
    ]
    assert [row["prompt"] for row in before] == prompts and all(row["score"] is not None for row in before)
    for rows in after:
        again = [row for row in rows if "score" not in row]  # a function is not called for a log
        assert [(row["prompt"], row["completion"]) for row in again] == [
            (row["prompt"], row["completion"]) for row in before
        ]


def test_the_first_prompts_are_scored_by_a_reward_model(make, supervised, tmp_path):
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised)).train()
    options = {"reward": config.RewardSource(model=str(tmp_path / "rm")), "token_samples": 0}
    trainer = make(**{"optim": config.Optim(learning_rate=1e-30)} | options)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    fixed = [row for row in rows if row["prompt"] == rows[0]["prompt"] and row["completion"] == rows[0]["completion"]]
    assert {row["step"] for row in fixed} == {0, 1, 3, 4}
    assert {row["score"] for row in fixed} == {rows[0]["score"]}
