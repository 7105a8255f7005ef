"""Properties of a whole PPO update: how a batch is written down changes nothing but rounding (float32)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ppo_case import PAD, STOPS, B, R, V, case, close

from jaxrlhf.training.on_policy.rollout import leave_out_unscored

ONE = {"num_mini_batches": 1, "num_ppo_epochs": 2}  # every row in every step, whatever the order


@functools.cache
def micro(size):
    """The case in micro-batches of so many rows; of all rows for B."""
    return case(**ONE) if size == B else case(micro_batch_size=size, **ONE)


@functools.cache
def plain_update():
    """State and metrics after an update of the whole batch."""
    after, _, metrics = micro(B).run()
    return after, metrics


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.sampled_from([1, 2, 4, B]),
    order=st.permutations(range(B)),
    pad=st.sampled_from([0, *STOPS, 13, V - 1]),
    noise=st.none() | st.integers(0, 2**16),
)
def test_an_update_does_not_depend_on_the_layout_of_its_batch(size, order, pad, noise):
    """Any cut into micro-batches, any order of the rows, any pad id (a stop token too), any tokens in the padding."""
    problem, plain, (expected, known) = micro(size), micro(B), plain_update()
    rollout, rows = plain.rollout, np.array(order)
    filling = np.full(rollout.tokens.shape, pad)
    if noise is not None:
        filling = np.random.default_rng(noise).integers(0, V, rollout.tokens.shape)
    written = dataclasses.replace(rollout, tokens=jnp.where(rollout.mask, rollout.tokens, jnp.asarray(filling)))
    problem = dataclasses.replace(problem, rollout=jax.tree.map(lambda x: x[rows], written), scores=plain.scores[rows])
    after, _, metrics = problem.run()
    close(after.params, expected.params, atol=3e-5)
    for key in ("objective/kl", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/entropy_avg"):
        np.testing.assert_allclose(metrics[key], known[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_the_rows_differ_and_are_padded():
    """Else the property above would say nothing."""
    plain = micro(B)
    mask = np.asarray(plain.rollout.mask)
    assert len({tuple(row) for row in mask}) > 4 and not mask.all()
    assert len(np.unique(plain.scores)) == B and plain.rollout.response_mask.shape[1] == R


WHITE = {"whiten_rewards": True, "whiten_advantages": True, "kl_target": 0.1, "bootstrap_truncated": True}


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"num_mini_batches": 1, "num_ppo_epochs": 2, "micro_batch_size": 2}, [0, 3, 4]),
        ({"num_mini_batches": 1, "num_ppo_epochs": 1}, [0, 3, 4]),  # one step
        ({"num_mini_batches": 4, "num_ppo_epochs": 1}, [0, 1, 2, 3, 4, 6, 7]),  # three mini-batches are empty
    ],
    ids=["steps", "one step", "empty mini-batches"],
)
def test_unscored_responses_are_no_part_of_an_update(options, silent):
    """State and metrics are those of an update on the other responses, but for the rounding of sums of float32."""
    unscored = np.isin(np.arange(B), silent)
    plain = micro(B)
    scores = np.where(unscored, np.nan, plain.scores).astype(np.float32)
    problem = case(**options | WHITE)
    left = leave_out_unscored(problem.rollout, scores, PAD, problem.spec.mesh)
    after, experience, metrics = dataclasses.replace(problem, rollout=left).run(scores=jnp.asarray(scores))
    rest = case(**options | WHITE | {"num_mini_batches": 1, "micro_batch_size": None})
    rest = dataclasses.replace(rest, rollout=jax.tree.map(lambda x: x[~unscored], rest.rollout))
    expected, alone, known = rest.run(scores=plain.scores[~unscored])
    for name in ("rewards", "values", "advantages", "returns"):
        found = getattr(experience, name)
        assert not found[unscored].any()
        if options["num_ppo_epochs"] > 1:  # else they are computed in the update
            close(found[~unscored], getattr(alone, name), rtol=1e-4, atol=2e-5)
    close((after.params, after.kl_coef), (expected.params, expected.kl_coef), atol=3e-5)
    assert metrics.keys() == known.keys() and metrics["policy/steps"] == known["policy/steps"]
    for key in metrics:
        np.testing.assert_allclose(metrics[key], known[key], rtol=1e-3, atol=2e-5, err_msg=key)
