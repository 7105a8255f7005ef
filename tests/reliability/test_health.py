"""A run that learns nothing says so and stops; standard deviations do not overflow."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf import config
from jaxrlhf.algorithms import groups, masked
from jaxrlhf.algorithms.advantages import whiten
from jaxrlhf.errors import NumericsError, RewardError
from jaxrlhf.metrics import read_records
from jaxrlhf.metrics.statistics import deviation
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.health import MAX_SKIPPED, Health
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer

GROUP = jnp.array([0, 0, 0, 1, 1, 1, 2, 2])
MASK = jnp.ones(8, bool)


def plain_grpo(scores, group):
    """GRPO without units, in float32 as it is on paper."""
    same = group[:, None] == group
    differences = jnp.sum(jnp.where(same, scores[:, None] - scores, 0.0), axis=1)
    size = jnp.sum(same, axis=1)
    centred = differences / size
    squares = jnp.sum(jnp.where(same, jnp.square(centred), 0.0), axis=1)
    return centred / (jnp.sqrt(squares / jnp.maximum(size - 1, 1)) + 1e-4)


def exact_grpo(scores, group):
    """The same, in float64."""
    scores, group, found = np.asarray(scores, np.float64), np.asarray(group), np.zeros(len(scores))
    for g in set(group.tolist()):
        part = scores[group == g]
        found[group == g] = (part - part.mean()) / (part.std(ddof=1) + 1e-4)
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8))
def test_ordinary_scores_give_the_same_bits_with_units_as_without(scores):
    scores = jnp.array(scores, jnp.float32)
    scores = jnp.where(jnp.abs(scores) < 1e-6, 0, scores)  # smaller squares underflow without units
    np.testing.assert_array_equal(groups.grpo(scores, GROUP, scale=True), plain_grpo(scores, GROUP))
    centred = scores - jnp.mean(scores)
    plain = jnp.sqrt(jnp.sum(jnp.square(centred)) / 8)
    np.testing.assert_array_equal(masked.deviation(centred, MASK, 8), plain)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e19, 1e25, 1e37])
def test_advantages_of_scores_of_any_size(size):
    base = np.array([1, 2, 4, -1, 0, 3, 5, -5], np.float32)
    scores = jnp.array(base * size, jnp.float32)
    exact = exact_grpo(scores, GROUP)
    np.testing.assert_allclose(groups.grpo(scores, GROUP, scale=True), exact, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(
        masked.deviation(scores, MASK, 7), np.sqrt(np.sum(np.float64(scores) ** 2) / 7), rtol=1e-6
    )
    summed = groups.gdpo(scores[:, None], jnp.ones(1), GROUP)
    expected = exact - exact.mean()
    np.testing.assert_allclose(summed, expected / (expected.std(ddof=1) + 1e-4), rtol=1e-5, atol=1e-9)
    white = whiten(scores, MASK, shift_mean=True)
    centred = np.float64(scores) - np.float64(scores).mean()
    np.testing.assert_allclose(white, centred / np.sqrt(centred.var(ddof=1) + 1e-8), rtol=1e-5, atol=1e-30)
    if size >= 1:
        one = groups.pass_at_k(jnp.array(base), GROUP, 2) if size > 1 else groups.pass_at_k(scores, GROUP, 2)
        np.testing.assert_allclose(groups.pass_at_k(scores, GROUP, 2), one, rtol=1e-3)
        y = jnp.arange(8.0)
        expected = np.corrcoef(np.float64(scores), np.arange(8.0))[0, 1]
        np.testing.assert_allclose(masked.correlation(scores, y, MASK), expected, rtol=1e-5)
        np.testing.assert_allclose(deviation(np.asarray(scores)), np.float64(scores).std(), rtol=1e-6)


def test_a_group_of_large_scores_leaves_the_others_as_they_are():
    scores = jnp.array([1, 2, 4, -1e30, 0, 3e30, 5e-3, -5e-3], jnp.float32)
    np.testing.assert_allclose(groups.grpo(scores, GROUP, scale=True), exact_grpo(scores, GROUP), rtol=2e-6)


ZERO, GOOD = {"grad_norm": 0.0}, {"grad_norm": 1.0}
FLAT = {"policy/grad_norm": 0.0, "groups/count": 4.0, "groups/flat": 4.0}


@pytest.mark.parametrize(
    ("records", "total", "stops_at", "reason"),
    [
        ([ZERO] * 9, 100, 3, "gradient is zero or vanishing in 3 steps in a row .last: 3"),
        ([{"policy/grad_norm": 1e-15}] * 9, 100, 3, "gradient is zero"),
        ([GOOD, ZERO, ZERO, GOOD] * 5, 100, None, ""),
        ([{"objective/scores_std": float("inf")}] * 9, 100, 3, "statistics of the scores are not finite in 3 steps"),
        ([{"rewards/a/std": float("nan"), **GOOD}] * 9, 100, 3, "statistics of the scores"),
        ([{"skipped_updates": 1.0, **ZERO}] * 9, 100, MAX_SKIPPED, "non-finite losses or gradients in 5 steps"),
        ([FLAT] * 9, 100, 7, "all scores are equal within every group, 7 steps in a row"),
        ([FLAT | {"groups/flat": 3.0}] * 9, 100, 3, "gradient is zero"),
        ([GOOD, ZERO], 2, None, ""),
        ([GOOD, GOOD, ZERO, ZERO], 4, "end", "gradient is zero"),
        ([GOOD, FLAT, FLAT, FLAT], 4, None, ""),
        ([{"loss": 1.0}] * 9, 9, None, ""),
    ],
)
def test_what_stops_a_run(records, total, stops_at, reason):
    for resumed_after in range(len(records)):
        health, lines, stopped = Health(3, 7, total, records[:resumed_after]), [], None
        try:
            for step, record in enumerate(records[resumed_after:], resumed_after + 1):
                stopped = step
                marks, new = health(step, record)
                lines += new
                assert set(marks) <= {"alarm/gradient", "alarm/scores"}
                health.check()
            stopped = "end"
            health.at_end()
            stopped = None
        except NumericsError as error:
            assert error.exit_code == 6
            assert re.search(reason, str(error)) or resumed_after >= stops_at
        if isinstance(stops_at, int) and resumed_after >= stops_at:
            assert stopped == resumed_after + 1, "repeating the command does not reset the count"
        else:
            assert stopped == stops_at
    for step, record in enumerate(records, 1):  # warn only
        unlimited = Health(0, 0, total)
        if not record.get("skipped_updates"):
            unlimited(step, record)
            unlimited.check()
            unlimited.at_end()


def test_the_first_step_of_several_gives_one_line():
    health = Health(5, 0, 100)
    assert [len(health(i, record)[1]) for i, record in enumerate([ZERO, ZERO, GOOD, ZERO])] == [1, 0, 0, 1]
    assert health(5, ZERO)[0] == {"alarm/gradient": 1.0} and health(6, GOOD)[0] == {}


def test_a_saturated_model_stops_the_run(tiny_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say ", "completion": "red"}\n' * 8)
    run = config.SFTConfig(
        run_dir=str(tmp_path / "run"),
        model=config.ModelSource(path=str(tiny_model), init="random"),
        data=config.Data(path=str(rows)),
        optim=config.Optim(learning_rate=1e6, schedule="constant", idle_steps=3),
        train=config.Train(batch_size=4, num_train_epochs=20),
        logging=config.Logging(tensorboard=False, report=False),
    )
    with pytest.raises(NumericsError, match="gradient is zero or vanishing in 3 steps in a row") as caught:
        SFTTrainer(run).train()
    assert caught.value.exit_code == 6
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["grad_norm"] for r in records[-3:]] == [0, 0, 0] and records[-1]["alarm/gradient"] == 1
    assert "alarm: the norm of the gradient is 0: this step teaches nothing" in capsys.readouterr().out
    assert not (tmp_path / "run" / "export").exists()


def grpo_of(ppo, **options):
    fields = {name: getattr(ppo, name) for name in ("run_dir", "model", "data", "sampling", "logging", "checkpoint")}
    grpo = config.GRPO(batch_size=8, num_generations=4, total_episodes=24)
    return config.GRPOConfig(**fields, grpo=grpo, **options)


def test_huge_scores_train_like_small_ones(ppo):
    def run(size, directory):
        def reward(prompts, completions):
            return [size * (len(set(text)) - 0.1 * len(text)) for text in completions]

        trainer = GRPOTrainer(grpo_of(config.replace(ppo, run_dir=directory), optim=config.Optim()), reward=reward)
        trainer.train()
        return trainer.params

    # the unit must be so large that 1e-4 beside the deviation vanishes in both
    small, large = (run(size, f"{ppo.run_dir}-{size:g}") for size in (2.0**40, 2.0**83))
    jax.tree.map(np.testing.assert_array_equal, small, large)
    records = read_records(f"{ppo.run_dir}-{2.0**83:g}/metrics.jsonl")
    assert all(np.isfinite(record["objective/scores_std"]) and record["policy/grad_norm"] > 0 for record in records)


def test_statistics_that_overflow_and_missing_scores_are_errors(ppo):
    with pytest.raises(RewardError, match="none of the 8 responses of this update has a score"):
        GRPOTrainer(grpo_of(ppo), reward=lambda prompts, completions: [None] * len(prompts)).train()
    running = config.replace(ppo, **{"scores.normalise": "running", "run_dir": ppo.run_dir + "2"})
    with pytest.raises(RewardError, match="statistics of scores.normalise overflow: scores reach .*e"):
        PPOTrainer(running, reward=lambda prompts, completions: [1e25 * i for i in range(len(prompts))]).train()
