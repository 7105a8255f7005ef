"""Micro-batches of a token budget give the loss, gradients and metrics of the whole batch, whatever the lengths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ppo_case import PAD, B, P, R, case, close
from support.tiny import tiny
from training.test_grpo_update import run as grpo_run
from training.test_grpo_update import settings as grpo_settings

from jaxrlhf import config, models, sharding
from jaxrlhf.config import GRPO, Mesh
from jaxrlhf.config.dpo import DPO
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, SFTRow
from jaxrlhf.data.labelled import RankedRow
from jaxrlhf.errors import ConfigError
from jaxrlhf.training import by_length, sft, step
from jaxrlhf.training.by_length import Budget, Shape
from jaxrlhf.training.dpo.update import Preferences, objective, pair_logprobs
from jaxrlhf.training.on_policy.rollout import pad_rollout
from jaxrlhf.training.reward.loss import objective_of, response_loss, response_scores

LENGTHS = (3, 23, 4, 9, 2, 13, 5, 24, 4, 6)
WIDTH = 24


def text(size, seed):
    generator = np.random.default_rng([size, seed])
    learnt = [False, *(generator.random(size - 2) < 0.7), True]
    return SFTRow(generator.integers(0, 29, size).tolist(), [bool(flag) for flag in learnt])


def ranking(i, size):
    return RankedRow(tuple(text(2 + size % (5 + k), 300 + k) for k in range(2 + i % 2)))


TEXTS = [text(size, i) for i, size in enumerate(LENGTHS)]
PAIRS = [PairRow(text(size, 100 + i), text(size % 7 + 2, 200 + i)) for i, size in enumerate(LENGTHS)]
RANKED = [ranking(i, size) for i, size in enumerate(LENGTHS)]


def weights_of(model):
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 10 * x), models.init(model, jax.random.key(0)))


def sft_case():
    model, batch = tiny(), batching.batch(TEXTS, 0, WIDTH)
    count = jnp.sum(batch.loss_mask)
    return model, (batch, None), lambda p, rows: sft.loss(p, *rows, model=model, count=count, name="nll")


def reward_case(loss):
    model = tiny(head="mlp")  # whose dropout is that of the row, whichever micro-batch it is in
    rows = RANKED if loss == "ranking" else PAIRS
    batch = batching.responses(rows, [0.1 * i for i in range(len(rows))], 0, WIDTH, 3 if loss == "ranking" else 2)
    chosen = objective_of(config.RewardConfig(loss=loss))

    def of_rows(params, rows):
        part, keys = rows
        scores = response_scores(params, part, model, keys)
        value, metrics = response_loss(scores, part.real, part.target, len(LENGTHS), chosen)
        return value, metrics | {"score_max": jnp.where(part.real, scores, -jnp.inf).max()}

    return model, (batch, jax.random.split(jax.random.key(1), len(LENGTHS))), of_rows


def dpo_case():
    model, reference = tiny(), np.linspace(-40, -1, 2 * len(LENGTHS)).reshape(-1, 2).astype(np.float32)
    batch = Preferences(batching.pairs(PAIRS, 0, WIDTH), reference, np.ones(len(LENGTHS), bool))
    chosen, chosen_tokens = DPO(sft_coef=0.3), jnp.sum(batch.pairs.chosen.loss_mask)

    def of_rows(params, rows):
        part, keys = rows
        scored = pair_logprobs(params, part.pairs, model, keys, chosen)
        return objective(scored, part.reference, len(LENGTHS), chosen_tokens, 0.1, 0.0, chosen)

    return model, (batch, None), of_rows


CASES = {
    "sft": sft_case,
    "pairwise": functools.partial(reward_case, "pairwise"),
    "ranking": functools.partial(reward_case, "ranking"),
    "dpo": dpo_case,
}


@pytest.mark.parametrize("kind", CASES)
def test_a_budget_gives_the_gradients_and_metrics_of_the_whole_batch(kind):
    model, batch, loss = CASES[kind]()
    batch, params = jax.tree.map(jnp.asarray, batch), weights_of(model)
    run = jax.jit(lambda p, rows, parts: step.gradients(loss, p, rows, parts), static_argnums=2)
    texts = {"ranking": 3, "sft": 1}.get(kind, 2)
    grads, metrics = run(params, batch, 1)
    found, logged = run(params, batch, Budget(texts * 60, 1, "train.micro_batch_tokens"))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * largest), found, grads)
    assert {k: float(v) for k, v in logged.items()} == pytest.approx(
        {k: float(v) for k, v in metrics.items()}, rel=1e-5, abs=1e-6
    )


def test_shapes_hold_the_budget_and_the_longest_row():
    budget = Budget(100, 1, "train.micro_batch_tokens")
    wide = [Shape(6, 10), Shape(12, 8), Shape(18, 5), Shape(24, 4)]
    assert by_length.shapes(budget, 24, 10, 1) == (Shape(3, 10), *wide)
    assert by_length.shapes(budget, 24, 10, 2) == (Shape(3, 10), Shape(6, 8), Shape(12, 4), Shape(18, 2), Shape(24, 2))
    four = budget._replace(multiple=4)
    assert [shape.rows for shape in by_length.shapes(four, 24, 10, 1)] == [12, 12, 8, 4, 4]
    with pytest.raises(
        ConfigError, match=r"micro_batch_tokens is 100, and the longest row takes 101 tokens.*least 101"
    ):
        by_length.shapes(budget, 101, 10, 1)
    with pytest.raises(ConfigError, match=r"2 texts of 24 tokens with padding on each of 4 devices; give at least 192"):
        by_length.shapes(budget._replace(multiple=4), 24, 10, 2)


@settings(deadline=None, max_examples=6)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=9), tokens=st.integers(16, 60))
def test_results_stay_with_their_rows(lengths, tokens):
    rows = [SFTRow([7] * size, [True] * size) for size in lengths]
    batch = jax.tree.map(jnp.asarray, batching.batch(rows, 0, 16))

    def function(part):
        return part.tokens + jnp.sum(part.mask, axis=1, keepdims=True), jnp.sum(part.mask, axis=1)

    matrix, sums = by_length.mapped(function, batch, Budget(tokens, 1, "x"))
    assert sums.tolist() == lengths
    for row, size in zip(matrix, lengths, strict=True):
        assert row[:size].tolist() == [7 + size] * size and set(row[size:].tolist()) <= {0, size}


@pytest.fixture(scope="module")
def ragged():
    """A PPO case whose responses have very different lengths; one is unscored, with no response at all."""
    made = case(num_ppo_epochs=2, num_mini_batches=2, bootstrap_truncated=True)
    rollout, mask = made.rollout, np.asarray(made.rollout.response_mask).copy()
    for row, size in enumerate((1, 7, 2, 0, 3, 1, 7, 5)):
        mask[row, size:] = False
    cut = np.asarray(rollout.mask).copy()
    cut[:, P:] &= mask
    made.rollout = dataclasses.replace(
        rollout,
        mask=jnp.asarray(cut),
        response_mask=jnp.asarray(mask),
        logprobs=rollout.logprobs * mask,
        finished=~jnp.asarray(mask[:, -1]),  # only a response of all columns is truncated
    )
    return made


def budgeted(problem, **options):
    ppo = dataclasses.replace(problem.spec.ppo, **options)
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, ppo=ppo))


def equal(found, wanted):
    (state, experience, metrics), (old, before, logged) = found, wanted
    close(state.params, old.params, rtol=2e-4, atol=2e-6)
    experience, before = (dataclasses.replace(x, features=None) for x in (experience, before))  # of padding, anything
    close(experience, before, rtol=2e-4, atol=5e-6)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in logged.items()}, rel=2e-4, abs=5e-6
    )


@pytest.mark.parametrize("critic", ["own", pytest.param("frozen", marks=pytest.mark.long)])
def test_a_ppo_update_within_a_budget_is_the_update(critic, ragged):
    made = ragged
    if critic != "own":
        made = case(num_ppo_epochs=1, critic=config.Critic(trunk=critic), kl_in="loss", kl_estimator="k3")
        made.rollout = ragged.rollout
    equal(budgeted(made, micro_batch_tokens=30).run(), made.run())


@pytest.mark.long
def test_an_update_of_one_step_is_the_same_within_a_budget(ragged):
    made = budgeted(ragged, num_ppo_epochs=1, num_mini_batches=1)
    (state, _, metrics), (old, _, logged) = budgeted(made, micro_batch_tokens=26).run(), made.run()
    close(state.params, old.params, rtol=2e-4, atol=2e-6)
    assert metrics["loss/value_avg"] == pytest.approx(float(logged["loss/value_avg"]), rel=2e-4)


@pytest.mark.long
def test_padding_of_a_rollout_does_not_change_an_update_within_a_budget(ragged):
    made = budgeted(ragged, micro_batch_tokens=40, bootstrap_truncated=False)  # a truncated one has all columns
    wide, _ = pad_rollout(made.rollout, None, (P + 5, R + 4), PAD, made.spec.mesh)
    state, _, metrics = made.run()
    other, _, logged = dataclasses.replace(made, rollout=wide).run()
    close(other.params, state.params, rtol=2e-4, atol=2e-6)
    assert float(logged["loss/policy_avg"]) == pytest.approx(float(metrics["loss/policy_avg"]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"method": "grpo", "num_iterations": 2}, {"method": "kl_cov", "cov_ratio": 0.2, "num_mini_batches": 2}],
    ids=lambda options: options["method"],
)
def test_a_grpo_update_within_a_budget_is_the_update(options, ragged):
    problem = dataclasses.replace(ragged, rollout=dataclasses.replace(ragged.rollout, index=jnp.arange(B) // 4))
    policy, _, logged = grpo_run(problem, grpo_settings(**options))
    found, _, metrics = grpo_run(problem, grpo_settings(**options, micro_batch_tokens=30))
    close(found, policy, rtol=2e-4, atol=2e-6)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in logged.items()}, rel=2e-4, abs=5e-6
    )


@pytest.mark.long
def test_devices_share_the_rows_of_a_budget(ragged):
    mesh = sharding.make_mesh(Mesh(data=2))
    problem = dataclasses.replace(ragged, rollout=dataclasses.replace(ragged.rollout, index=jnp.arange(B) // 4))
    alone = grpo_run(problem, grpo_settings("grpo", micro_batch_tokens=60))[0]
    close(grpo_run(problem, grpo_settings("grpo", micro_batch_tokens=60), mesh=mesh)[0], alone, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: config.SFTConfig(train={"micro_batch_tokens": 64, "micro_batch_size": 2}), "both size micro-batches"),
        (lambda: config.SFTConfig(train={"micro_batch_tokens": 64, "packing": True}), "packed rows are all full"),
        (lambda: config.DPOConfig(train={"micro_batch_tokens": 64}, dpo={"loss": "aot"}), "compares the rows"),
        (lambda: config.DistillConfig(train={"micro_batch_tokens": 64}), "responses of different prompts"),
        (lambda: config.PPOConfig(ppo={"micro_batch_tokens": 64, "micro_batch_size": 2}), "leave one out"),
        (lambda: config.GRPOConfig(grpo=GRPO(method="online_dpo", micro_batch_tokens=64)), "trains on pairs"),
    ],
)
def test_what_does_not_go_together_is_refused(made, said):
    with pytest.raises(ConfigError, match=said):
        made()
