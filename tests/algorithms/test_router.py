"""The load-balancing loss against Switch Transformers' equations in float64, one token of one layer after another."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.router import load_balancing_loss

E, K, TOKENS = 5, 2, 40


def routed(logits):
    """(choices, probabilities), each [tokens, E]."""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choices = np.zeros(logits.shape)
    np.put_along_axis(choices, np.argsort(-logits, axis=-1)[..., :K], 1.0, axis=-1)
    return choices, probabilities


def by_the_paper(choices, probabilities):
    """Eq. 4 to 6, with the number of choices of an expert per token in eq. 5."""
    loss = 0.0
    for expert in range(E):
        f = sum(row[expert] for row in choices) / len(choices)
        p = sum(row[expert] for row in probabilities) / len(probabilities)
        loss += E * f * p
    return loss


def test_the_loss_is_that_of_the_paper_and_parts_add_up():
    choices, probabilities = routed(np.random.default_rng(0).normal(size=(TOKENS, E)) * [3, 1, 1, 0.2, 2])
    expected = by_the_paper(choices, probabilities)
    assert expected > 1.01 * K
    total = choices.sum(0)
    found = load_balancing_loss(*map(jnp.asarray, (total, probabilities.sum(0))), K)
    assert found == pytest.approx(expected, rel=1e-6)
    parts = [probabilities[:7], probabilities[7:]]
    summed = sum(load_balancing_loss(*map(jnp.asarray, (total, p.sum(0))), K) for p in parts)
    assert summed == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("choices", "probabilities", "expected"),
    [([8, 8, 8, 8, 8], [4, 4, 4, 4, 4], K), ([20, 20, 0, 0, 0], [10, 10, 0, 0, 0], E), ([0] * 5, [0] * 5, 0)],
    ids=["balanced", "two experts take all", "no tokens"],
)
def test_extremes(choices, probabilities, expected):
    sums = (jnp.array(x, jnp.float32) for x in (choices, probabilities))
    assert load_balancing_loss(*sums, K) == pytest.approx(expected)
