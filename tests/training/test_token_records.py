"""Token records of a run: their numbers, their text, and that they change nothing else."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config
from jaxrlhf.errors import Preempted
from jaxrlhf.models import forward, lm_logits
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer

EVERY_TOKEN = {"sampled", "tokens", "pieces", "logprob", "ref_logprob", "kl", "advantage", "ratio", "entropy", "top"}
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
        assert logged[:2] == [(row["prompt"], row["completion"]) for row in rows[:2]]
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


VARIANTS = {
    "filtered": {"sampling": config.Sampling(response_length=8, temperature=0.7, top_k=5)},
    "adapters": {"lora": config.LoRA(enabled=True, rank=2), "critic": config.Critic(trunk="shared")},
    "devices": {
        "mesh": config.Mesh(fsdp=2, tensor=2),
        "reference": config.Reference(offload=True),
        "model": "bfloat16",
    },
    "one step": {
        "ppo": config.PPO(batch_size=8, total_episodes=8, num_mini_batches=1, num_ppo_epochs=1, gamma=0.9),
        "sampling": config.Sampling(response_length=8, top_k=7, renormalise_logprobs=True),
    },
    "replay": {"ppo": config.PPO(batch_size=8, total_episodes=8, num_mini_batches=2, micro_batch_size=2, replay=1)},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_numbers_of_a_record_are_those_of_training_and_of_a_plain_forward_pass(make, ppo, tmp_path, variant):
    """Of the policy before and after an update of a single-update run, which is exported by neither."""
    changes = {"ppo": config.replace(ppo["ppo"], total_episodes=8)} | VARIANTS[variant]
    if "model" in changes:
        changes["model"] = config.replace(ppo["model"], compute_dtype=changes["model"])
    trainer = make(**changes)
    rough = 0.03 if variant == "devices" else 1e-4
    old, learn, seen = jax.device_get(trainer.params), trainer.learn, []

    def watched(*args, **options):
        seen.append(learn(*args, **options))
        return seen[-1]

    trainer.learn = watched
    trainer.train()
    (experience, metrics), (rows,) = seen[0], read(tmp_path / "run").values()
    mask = np.asarray(experience.rollout.response_mask)
    for key, array in {
        "objective/kl": (experience.old_logprobs - experience.ref_logprobs).sum() / len(mask),
        "val/value_mean": experience.values.sum() / mask.sum(),
        "objective/scores": experience.scores.mean(),
    }.items():
        assert float(array) == pytest.approx(float(metrics[key]), abs=1e-5), key
    width, model, temperature = mask.shape[1], trainer.model, trainer.config.sampling.temperature
    texts = [trainer.token_records.text(i) for i in range(model.vocab_size)]
    tokens, masks, support = jax.device_get(
        (experience.rollout.tokens, experience.rollout.mask, experience.rollout.support)
    )

    @jax.jit
    def plain(params):
        hidden = forward(params, model, jnp.asarray(tokens), jnp.asarray(masks))[:, -width - 1 : -1]
        return jax.nn.log_softmax(lm_logits(params, model, hidden) / temperature)

    plain_logprobs = [np.asarray(plain(jax.device_get(params))) for params in (old, trainer.params)]
    for i, row in enumerate(rows):
        real = mask[i]
        known = {
            "logprob": experience.old_logprobs,
            "ref_logprob": experience.ref_logprobs,
            "value": experience.values,
            "reward": experience.rewards,
            "advantage": experience.advantages,
            "return": experience.returns,
        }
        for key, array in known.items():
            np.testing.assert_allclose(row[key], np.asarray(array)[i][real], rtol=1e-4, err_msg=key)
        values = [*row["value"], float(experience.bootstrap[i])]
        gamma = trainer.config.ppo.gamma
        td = [r + gamma * after - v for r, v, after in zip(row["reward"], values, values[1:], strict=False)]
        np.testing.assert_allclose(row["td_error"], td, rtol=1e-3, atol=1e-4)
        before, after = (logprobs[i][real] for logprobs in plain_logprobs)
        np.testing.assert_allclose(row["entropy"], -(np.exp(before) * before).sum(1), rtol=rough)
        chosen = tokens[i, -width:][real][:, None]
        if support is None:
            ratio = np.exp(np.take_along_axis(after - before, chosen, 1)[:, 0])
        else:
            inside = np.unpackbits(support[i][real], axis=-1, count=model.vocab_size).astype(bool)
            kept = [np.where(inside, x, -np.inf) for x in (before, after)]
            kept = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in kept]
            old_kept, new_kept = (np.take_along_axis(x, chosen, 1)[:, 0] for x in kept)
            ratio = np.exp(new_kept - old_kept)
        np.testing.assert_allclose(row["ratio"], ratio, rtol=rough)
        for position, found in zip(before, row["top"], strict=True):
            np.testing.assert_allclose([x for _, x in found], np.sort(position)[::-1][:5], rtol=rough, atol=1e-4)
            of_text = dict(zip(texts, position, strict=True))
            np.testing.assert_allclose([of_text[text] for text, _ in found], [x for _, x in found], rtol=rough)


@pytest.mark.parametrize(
    "grpo", [{"kl_coef": 0.04}, {"method": "online_dpo"}, {"method": "online_dpo", "rejected_text": "no"}]
)
def test_records_of_group_relative_methods(make, tmp_path, grpo):
    """Responses with their own numbers, whatever the order of the update; those outside a pair have none of it."""
    trainer = make(grpo=grpo)
    trainer.train()
    paired = "method" in grpo
    for rows in read(tmp_path / "run").values():
        assert [(row["index"], row["sample"]) for row in rows[:4]] == [(rows[0]["index"], i) for i in range(4)]
        trained = [row for row in rows if row["kl"][0] is not None]
        assert len(trained) == (5 if not paired else len(trained))
        for row in rows:
            assert OF_A_CRITIC & row.keys() == set() and ("advantage" in row) == (not paired)
            assert {len(row[key]) for key in (EVERY_TOKEN - {"advantage"})} == {len(row["tokens"])}
            assert all(x is not None for x in row["logprob"] + row["entropy"] + row["ratio"])
        for row in trained:
            np.testing.assert_allclose(row["kl"], np.subtract(row["logprob"], row["ref_logprob"]), rtol=1e-3, atol=2e-4)
        if paired:
            scores = [row["score"] for row in rows[:4]]
            best = [row for row in rows[:4] if row["kl"][0] is not None]
            expected = {max(scores)} if "rejected_text" in grpo else {max(scores), min(scores)}
            assert {row["score"] for row in best} == expected
        else:
            assert all(len(set(row["advantage"])) == 1 for row in rows)


def test_an_unscored_response_is_recorded_without_numbers_of_the_update(make, ppo, tmp_path):
    def some(prompts, completions):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    make(function=some, ppo=config.replace(ppo["ppo"], total_episodes=8)).train()
    (rows,) = read(tmp_path / "run").values()
    for i, row in enumerate(rows):
        assert row["score"] == (None if i % 2 else i) and "".join(row["pieces"]) == row["completion"]
        for key in ("value", "ref_logprob", "kl", "advantage"):
            assert (None in row[key]) == (i % 2 == 1), key
        assert not {None} & {*row["logprob"], *row["entropy"], *row["ratio"]}


def test_a_resumed_run_has_the_records_of_an_unbroken_one(make, tmp_path, stop_at_two):
    with pytest.raises(Preempted):
        make().train()
    leftover = tmp_path / "run" / "tokens" / "step-000003.jsonl.gz"
    leftover.write_bytes(b"of an update after the checkpoint, half written")
    (tmp_path / "run" / "tokens" / "step-000900.jsonl.gz").write_bytes(b"")
    make().train()
    make("whole").train()
    resumed, whole = (
        {f.name: f.read_bytes() for f in (tmp_path / name / "tokens").iterdir()} for name in ("run", "whole")
    )
    assert resumed == whole and len(whole) == 3
    trainer = make(fresh=True, token_samples=2)
    trainer.train()
    assert {len(rows) for rows in read(tmp_path / "run").values()} == {2}
