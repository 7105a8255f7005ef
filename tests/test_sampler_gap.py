"""scripts/sampler_gap.py: its table, and that it sees what it is for."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import sampler_gap

from jaxrlhf import weights
from jaxrlhf.models import forward, lm_logits
from jaxrlhf.types import Rollout


def test_the_table_has_small_gaps_for_equal_weights_and_large_ones_for_rounded_ones(tiny_model, monkeypatch, capsys):
    options = ["--random", "--dtype", "float32", "bfloat16", "--rows", "4", "--length", "8"]
    monkeypatch.setattr(sys, "argv", ["sampler_gap.py", str(tiny_model), *options])
    sampler_gap.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [re.match(r"\| (\w+) \| 4 \| ([\d.]+)% \| ([\d.e-]+) \| ([\d.e-]+) \|$", line).groups() for line in lines]
    assert [cell[0] for cell in cells] == ["float32", "bfloat16"]
    (_, equal, mean, most), (_, rounded_equal, rounded_mean, _) = cells
    assert 0 <= float(mean) <= float(most) < 2e-5 and float(rounded_mean) > 1e-4
    assert float(equal) > float(rounded_equal)


def test_training_logprobs_are_those_of_the_tokens(tiny_model):
    """Beside a log-softmax in float64 over the logits of the whole model."""
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(0))
    given, length = sampler_gap.prompts(3, model.vocab_size), 5
    responses = np.random.default_rng(1).integers(0, model.vocab_size, (3, length)).astype(np.int32)
    tokens = np.concatenate([given.tokens, responses], axis=1)
    mask = np.concatenate([given.mask, np.ones((3, length), bool)], axis=1)
    tokens, mask, ones = jnp.asarray(tokens), jnp.asarray(mask), jnp.ones((3, length), bool)
    rollout = Rollout(tokens, mask, ones, jnp.zeros((3, length)), ones[:, 0], given.index, given.sample)
    found = sampler_gap.training_logprobs(params, model, rollout)
    logits = np.asarray(lm_logits(params, model, forward(params, model, tokens, mask)), np.float64)[:, -length - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, np.take_along_axis(expected, responses[..., None], -1)[..., 0], atol=1e-5)
