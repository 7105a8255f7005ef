import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.config import Sampling
from jaxrlhf.errors import ConfigError
from jaxrlhf.rollout.sampling import BLOCK, apply_filters, check_sampling, inverse_cdf, sample

ALMOST_ONE = 1 - 2.0**-23  # the largest uniform that jax.random draws
inverse_cdf = jax.jit(inverse_cdf)
apply_filters = jax.jit(apply_filters)
sample = jax.jit(sample)
FILTERS = [(1, 1.0, 0.0), (5, 1.0, 0.0), (39, 1.0, 0.0), (0, 2**-10, 0.0), (0, 0.5, 0.0), (0, 1.0, 2**-11)]
FILTERS += [(0, 1.0, 0.5), (3, 0.75, 0.0), (5, 0.25, 0.125), (1000, 0.75, 2**-6)]


def odds_of(seed, size, spread):
    """Odds over several orders of magnitude, a third of them 0."""
    rng = np.random.default_rng(seed)
    odds = np.where(rng.random(size) < 0.33, 0, np.exp(-spread * rng.random(size)))
    odds[rng.integers(size)] = 1
    return odds.astype(np.float32)


def drawn(odds, u, v):
    """Tokens of one distribution at every pair of uniforms."""
    uniforms = np.stack(np.broadcast_arrays(u, v), axis=1).astype(np.float32)
    rows = jnp.broadcast_to(jnp.asarray(odds), (len(uniforms), len(odds)))
    return np.asarray(inverse_cdf(rows, jnp.asarray(uniforms))[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 2, 50, BLOCK]), spread=st.sampled_from([0, 3, 12]))
def test_the_draw_inverts_the_cdf(seed, size, spread):
    """Over a grid of n uniforms, a token of probability p comes up n p times, give or take the grid's ends."""
    odds, n = odds_of(seed, size, spread), 4096
    grid = (np.arange(n) + 0.5) / n
    counts = np.bincount(drawn(odds, 0.3, grid), minlength=size)
    np.testing.assert_allclose(counts, n * odds.astype(np.float64) / odds.sum(dtype=np.float64), atol=1.01)
    assert not counts[odds == 0].any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 7]))
def test_the_draw_inverts_the_cdf_of_blocks_and_then_inside(seed, size):
    odds, n = odds_of(seed, size, 6), 1024
    grid = (np.arange(n) + 0.5) / n
    masses = np.add.reduceat(odds.astype(np.float64), np.arange(0, size, BLOCK))
    blocks = np.bincount(drawn(odds, grid, 0.3) // BLOCK, minlength=len(masses))
    np.testing.assert_allclose(blocks, n * masses / masses.sum(), atol=1.01)
    for b, u in enumerate((np.cumsum(masses) - 0.5 * masses) / masses.sum()):
        inside = odds[b * BLOCK : (b + 1) * BLOCK]
        if not inside.any():
            continue
        tokens = drawn(odds, u, grid) - b * BLOCK
        np.testing.assert_allclose(np.bincount(tokens, minlength=len(inside)), n * inside / masses[b], atol=1.01)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([7, 1000]),
    spread=st.sampled_from([1, 85]),
    u=st.sampled_from([0.0, 1e-7, 0.5, ALMOST_ONE]),
)
def test_a_token_without_probability_is_never_drawn(seed, size, spread, u):
    odds = odds_of(seed, size, spread)
    odds[: size // 3], odds[-size // 3 :] = 0, 0
    odds[size // 2] = 1
    uniforms = np.append(np.random.default_rng(seed).random(50), [0, ALMOST_ONE])
    assert (odds[drawn(odds, u, uniforms)] > 0).all()
    assert (odds[drawn(odds, uniforms, u)] > 0).all()


def test_a_token_takes_the_uniforms_from_its_lower_edge_up():
    assert drawn(np.ones(4, np.float32), 0.0, np.array([0, 0.2499, 0.25, 0.5, 0.75])).tolist() == [0, 0, 1, 2, 3]


def test_rounding_of_cumulative_sums_draws_nothing_impossible():
    """Sums made in parallel creep up over zeros too; uniforms that fall into such a step must land elsewhere."""
    rng = np.random.default_rng(0)
    sums = np.where(rng.random(594) < 0.5, 0, rng.random(594)).astype(np.float32)
    odds = np.zeros(594 * BLOCK, np.float32)
    odds[::BLOCK] = sums
    cumulative = np.asarray(jnp.cumsum(jnp.asarray(sums)[None], axis=1))[0]
    steps = np.flatnonzero((np.diff(cumulative) > 0) & (sums[1:] == 0))
    uniforms = np.append(cumulative[steps] / cumulative[-1], [0, ALMOST_ONE])
    assert (odds[drawn(odds, uniforms, 0.5)] > 0).all()


@pytest.mark.parametrize("size", [151_936, 50_257])
def test_a_large_flat_vocabulary_is_drawn_evenly(size):
    """The tokens of a flat distribution take equal shares of the two uniforms, the last and ragged block included."""
    u, v = np.random.default_rng(0).random((2, 64)).astype(np.float32)
    blocks = np.minimum(np.floor(u.astype(np.float64) * size / BLOCK), size // BLOCK)
    width = np.where(blocks == size // BLOCK, size % BLOCK, BLOCK)
    expected = blocks * BLOCK + np.floor(v * width)
    tokens = drawn(np.ones(size, np.float32), u, v)
    assert (tokens != expected).mean() < 0.05 and (np.abs(tokens // BLOCK - blocks) <= 1).all()


def kept_by_definition(odds, top_k, top_p, min_p):
    """One row, by sorting, in float64; ties at an edge stay."""
    keep = odds > 0
    if top_k:
        keep &= np.array([(odds > x).sum() < top_k for x in odds])
    left = np.where(keep, odds, 0).astype(np.float64)
    if top_p < 1:
        keep &= np.array([left[left > x].sum() < top_p * left.sum() for x in left])
    return keep & (odds >= min_p)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@settings(max_examples=25, deadline=None)
@given(exponents=st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_filters_keep_what_the_definition_keeps(top_k, top_p, min_p, exponents):
    """Odds are powers of two and full of ties, and their sums exact, so that not even the edges may differ."""
    odds = np.zeros(40, np.float32)
    odds[: len(exponents)] = 2.0 ** -(np.array(exponents) - min(exponents))
    got = apply_filters(jnp.asarray(odds[None]), sampling=Sampling(top_k=top_k, top_p=top_p, min_p=min_p))[0]
    np.testing.assert_array_equal(got, np.where(kept_by_definition(odds, top_k, top_p, min_p), odds, 0))


def test_filters_that_are_off_change_nothing():
    odds = jnp.asarray(np.stack([odds_of(s, 300, 40) for s in range(4)]))
    for sampling in (Sampling(), Sampling(top_k=300), Sampling(top_k=10**6), Sampling(top_p=1.0)):
        np.testing.assert_array_equal(apply_filters(odds, sampling), odds)


def test_top_k_one_is_greedy_and_tiny_top_p_too():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, 500)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 16)
    likeliest = jnp.argmax(logits, axis=1)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(greedy=True)):
        np.testing.assert_array_equal(sample(logits, keys, sampling, None)[0], likeliest)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_and_logprobs_are_those_of_the_softmax(temperature):
    logits = np.array([0.5, -1.0, 2.0, -np.inf, 0.0, 1.5], np.float32)
    rows = 20_000
    keys = jax.random.split(jax.random.key(1), rows)
    tokens, logprobs, _ = sample(
        jnp.tile(logits, (rows, 1)), keys, sampling=Sampling(temperature=temperature), allowed=None
    )
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - np.logaddexp.reduce(scaled))
    counts = np.bincount(tokens, minlength=6)
    sigma = np.sqrt(rows * probabilities * (1 - probabilities))
    assert (np.abs(counts - rows * probabilities) <= 4.5 * sigma).all()
    np.testing.assert_allclose(logprobs, np.log(probabilities[tokens]), atol=1e-5)


def test_logprobs_ignore_filters_and_bans():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(32, 60)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 32)
    allowed = jnp.arange(60)[None] % 3 != 0
    full = np.asarray(jax.nn.log_softmax(logits / 0.7))
    tokens, logprobs, _ = sample(logits, keys, Sampling(temperature=0.7, top_k=5, top_p=0.5, min_p=0.1), allowed)
    assert np.asarray(allowed)[0, tokens].all()
    np.testing.assert_allclose(logprobs, full[np.arange(32), tokens], atol=1e-5)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8}, {}])
def test_renormalised_logprobs_are_those_of_what_bans_and_filters_leave(filters):
    logits = np.random.default_rng(2).normal(size=(32, 60)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 32)
    allowed = np.arange(60)[None] % 3 != 0
    sampling = Sampling(temperature=0.7, renormalise_logprobs=True, **filters)
    tokens, logprobs, support = (np.asarray(x) for x in sample(logits, keys, sampling, jnp.asarray(allowed)))
    full = dataclasses.replace(sampling, renormalise_logprobs=False)
    same, _, none = sample(logits, keys, full, jnp.asarray(allowed))
    assert none is None
    np.testing.assert_array_equal(tokens, same)  # what is drawn does not change
    odds = np.where(allowed, np.exp(logits / 0.7 - np.max(np.where(allowed, logits / 0.7, -9), 1, keepdims=True)), 0)
    values = sampling.top_k, sampling.top_p, sampling.min_p
    for row in range(32):
        kept = kept_by_definition(odds[row].astype(np.float32), *values)
        np.testing.assert_array_equal(support[row], kept)
        scaled = logits[row].astype(np.float64) / 0.7
        expected = scaled[tokens[row]] - np.log(np.exp(scaled[kept]).sum())
        np.testing.assert_allclose(logprobs[row], expected, atol=1e-5)
    assert support.sum() < support.size and (support.sum(1) > 1).any()


def test_bans_come_before_the_filters():
    """The likeliest token is banned: top-k must count from the second."""
    logits = jnp.array([[5.0, 1.0, 0.9, -3.0]])
    allowed = jnp.array([[False, True, True, True]])
    keys = jax.random.split(jax.random.key(0), 64)
    tokens, *_ = sample(jnp.tile(logits, (64, 1)), keys, Sampling(top_k=2), allowed)
    assert set(np.asarray(tokens).tolist()) == {1, 2}
    greedy, *_ = sample(logits, keys[:1], Sampling(greedy=True), allowed)
    assert greedy.tolist() == [1]


def test_one_hot_rows():
    logits = jnp.full((3, 700), -jnp.inf).at[jnp.arange(3), jnp.array([0, 400, 699])].set(0.0)
    keys = jax.random.split(jax.random.key(3), 3)
    for sampling in (Sampling(), Sampling(top_k=3, top_p=0.4, min_p=0.5), Sampling(greedy=True)):
        tokens, logprobs, _ = sample(logits, keys, sampling, None)
        assert tokens.tolist() == [0, 400, 699] and logprobs.tolist() == [0, 0, 0]


def test_a_row_is_drawn_from_its_own_logits_and_key_only():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(8, 300)).astype(np.float32))
    keys = jax.random.split(jax.random.key(5), 8)
    sampling = Sampling(top_p=0.9)
    tokens, logprobs, _ = sample(logits, keys, sampling, None)
    order = jnp.array([3, 1, 7, 0])
    again, more, _ = sample(logits[order], keys[order], sampling, None)
    np.testing.assert_array_equal(again, tokens[order])
    np.testing.assert_array_equal(more, logprobs[order])
    others, *_ = sample(logits, jax.random.split(jax.random.key(6), 8), sampling, None)
    assert (others != tokens).any()


def test_a_broken_row_stays_in_range_and_shows_in_its_logprob():
    logits = jnp.stack([jnp.full(300, jnp.nan), jnp.full(300, -jnp.inf), jnp.zeros(300)])
    tokens, logprobs, _ = sample(logits, jax.random.split(jax.random.key(0), 3), Sampling(top_k=5, top_p=0.9), None)
    assert (tokens >= 0).all() and (tokens < 300).all()
    assert jnp.isnan(logprobs[:2]).all() and jnp.isfinite(logprobs[2])


@pytest.mark.parity
def test_filters_agree_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(0).normal(size=(16, 400)).astype(np.float32)
    odds = jnp.exp(jnp.asarray(logits - logits.max(axis=1, keepdims=True)))
    for top_k, top_p, min_p in ((20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (50, 0.9, 0.02), (10, 0.5, 0.0)):
        warped = torch.tensor(logits)
        if top_k:
            warped = TopKLogitsWarper(top_k)(None, warped)
        if top_p < 1:
            warped = TopPLogitsWarper(top_p)(None, warped)
        if min_p:
            warped = MinPLogitsWarper(min_p)(None, warped)
        ours = apply_filters(odds, Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
        np.testing.assert_array_equal(np.asarray(ours) > 0, np.isfinite(warped.numpy()))


def test_filters_and_stops_beyond_the_vocabulary_are_refused():
    check_sampling(Sampling(top_k=19, stop_token_ids=(18,)), 19)
    with pytest.raises(ConfigError, match="top_k is 20, but the model has 19 tokens"):
        check_sampling(Sampling(top_k=20), 19)
    with pytest.raises(ConfigError, match="stop_token_ids: 19 is not a token; token ids are 0 to 18"):
        check_sampling(Sampling(stop_token_ids=(1, 19)), 19)
