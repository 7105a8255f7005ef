"""An optimizer step on preferences: its gradient, and what it does not depend on."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import config, models, sharding
from jaxrlhf.algorithms.dpo import LOSSES, RunningMean
from jaxrlhf.config.dpo import REFERENCE_FREE, Loss
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, Report, SFTRow, Split
from jaxrlhf.data.packing import pack
from jaxrlhf.training.dpo.update import Preferences, beta_schedule, kto_objective, objective, score, update
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Spec

MODEL = tiny(num_layers=1, sliding_layers=(False,))
MESH = sharding.make_mesh(config.Mesh())
PARAMS = jax.tree.map(lambda x: jnp.where(x == 1, x, 10 * x), models.init(MODEL, jax.random.key(0)))  # far from flat
PROMPTS, SIZES = (2, 3, 1, 4), ((3, 5), (4, 2), (6, 1), (1, 2))
GOOD = jnp.array([True, False, False, True])
NAMES = typing.get_args(Loss)
PLAIN_DPO = config.DPO()
# Adam's first step is g / (|g| + eps): with an eps and a rate of 1 the gradient can be read from it
PLAIN = make_optimizer(config.Optim(learning_rate=1.0, schedule="constant", eps=1.0, max_grad_norm=1e9), 1.0, 1)


def pair(prompt, sizes):
    generator = np.random.default_rng([prompt, *sizes])
    start = generator.integers(3, 29, prompt).tolist()
    answers = [generator.integers(3, 29, size).tolist() for size in sizes]
    return PairRow(*(SFTRow(start + a, [False] * prompt + [True] * len(a)) for a in answers))


PAIRS = [pair(prompt, sizes) for prompt, sizes in zip(PROMPTS, SIZES, strict=True)]
REFERENCE = np.array([[-sum(sizes) - i, -4.0 * sizes[1]] for i, sizes in enumerate(SIZES)], np.float32)


def preferences(width=12):
    return Preferences(batching.pairs(PAIRS, 0, width), REFERENCE, GOOD)  # type: ignore[arg-type]


def packed():
    """Two rows with room for three pairs each: other rows, other padding, and a place without a pair."""
    split = Split(PAIRS, [], Report("pairs", "", len(PAIRS)))
    rows = pack(split, lambda p: (p.chosen, p.rejected), 32).train
    assert [len(row.lengths) for row in rows] != [2] * len(PAIRS)
    made, first = batching.packed_pairs(rows, 0, 32, 3), {tuple(p.chosen.tokens): i for i, p in enumerate(PAIRS)}
    reference = np.zeros((len(rows), 3, 2), np.float32)
    for r, row in enumerate(rows):
        ends = np.cumsum(row.lengths)
        for k, begin in enumerate([0, *ends[1:-1:2]]):
            reference[r, k] = REFERENCE[first[tuple(row.tokens[begin : ends[2 * k]])]]
    return Preferences(made, reference, np.ones(len(rows), bool))  # type: ignore[arg-type]


def step(settings, batch, num_micro=1):
    """(gradient, metrics) of one update of a policy that begins as PARAMS."""
    running = RunningMean(jnp.float32(10), jnp.float32(0.25)) if "bco_pair" in settings.losses else None
    state = State({"policy": jax.tree.map(jnp.copy, PARAMS)}, {"policy": PLAIN}, MESH, score_stats=running).value
    spec = Spec(MODEL, PLAIN, num_micro, MESH, (settings, beta_schedule(settings, 1)))
    state, metrics = update(state, {}, jax.tree.map(jnp.asarray, batch), jax.random.key(1), spec=spec)
    if running:
        metrics["running"] = state.score_stats.mean
    moved = jax.tree.map(lambda new, old: np.asarray(old - new, np.float64), state.params["policy"], PARAMS)
    return jax.tree.map(lambda u: u / (1 - np.abs(u)), moved), jax.device_get(metrics)


def agree(found, wanted, rtol=2e-3):
    """To what is lost by reading a gradient from the parameters, of the largest one."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    assert largest > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest), found, wanted)


def log_p(params, side):
    """Sums over the tokens of responses [B], from all logits at once."""
    batch = jax.tree.map(jnp.asarray, getattr(preferences().pairs, side))
    logits = models.forward(params, MODEL, batch.tokens, batch.mask) @ params["embed"]["embedding"].T
    logprobs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=2, keepdims=True))
    found = [
        [logprobs[i, t - 1, row.tokens[t]] for t in range(1, len(row.tokens)) if row.loss_mask[t]]
        for i, row in enumerate(getattr(p, side) for p in PAIRS)
    ]
    return jnp.stack([sum(parts) for parts in found])


def dpo(params):
    """https://arxiv.org/abs/2305.18290, eq. 7, and 0.7 nats per token of the chosen responses."""
    chosen, rejected = log_p(params, "chosen"), log_p(params, "rejected")
    margin = 0.3 * ((chosen - REFERENCE[:, 0]) - (rejected - REFERENCE[:, 1]))
    return jnp.mean(jnp.log1p(jnp.exp(-margin))) - 0.7 * jnp.sum(chosen) / sum(sizes[0] for sizes in SIZES)


MIXED = config.DPO(
    loss=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 0.5), beta=0.3, use_weighting=True, ld_alpha=0.4
)


def mixed(params):
    """0.8 DPO + 0.2 BCO, of LD-DPO's log-probs and with WPO's weights, + 0.5 nats per token of the chosen responses."""
    sides, plain, aligned = [], [], 0.0
    for side in ("chosen", "rejected"):
        batch = jax.tree.map(jnp.asarray, getattr(preferences().pairs, side))
        logits = models.forward(params, MODEL, batch.tokens, batch.mask) @ params["embed"]["embedding"].T
        p = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=2, keepdims=True)
        found = [[], [], []]
        for i, (prompt, sizes) in enumerate(zip(PROMPTS, SIZES, strict=True)):
            at = prompt + np.arange(sizes[side == "rejected"])
            taken = jnp.log(p[i, at - 1, batch.tokens[i, at]])
            found[0].append(jnp.sum(taken * np.where(np.arange(len(at)) < min(sizes), 1.0, 0.4)))
            found[1].append(jnp.sum(taken))
            found[2].append(jnp.mean(taken - jnp.log(jnp.sum(jnp.square(p[i, at - 1]), axis=1))))
        sides.append(jnp.stack(found[0]))
        plain.append(jnp.stack(found[1]))
        aligned += jnp.stack(found[2])
    weights = jax.lax.stop_gradient(jnp.exp(aligned))
    chosen, rejected = (0.3 * (side - REFERENCE[:, k]) for k, side in enumerate(sides))
    sigmoid = jnp.log1p(jnp.exp(rejected - chosen))
    bco = jnp.log1p(jnp.exp(-(chosen - 0.25))) + jnp.log1p(jnp.exp(rejected - 0.25))
    pairs = jnp.mean(weights * (0.8 * sigmoid + 0.2 * bco))
    return pairs - 0.5 * jnp.sum(plain[0]) / sum(sizes[0] for sizes in SIZES)


def kto(params):
    """The loss of https://arxiv.org/abs/2402.01306: lambda 1.5 and 1, z0 of the whole batch."""
    own, other = log_p(params, "chosen"), log_p(params, "rejected")
    z0 = jax.lax.stop_gradient(jnp.mean(other - REFERENCE[:, 1]))  # here above 0
    weight, sign = jnp.where(GOOD, 1.5, 1.0), jnp.where(GOOD, 1, -1)
    return jnp.mean(weight - weight / (1 + jnp.exp(-0.3 * sign * (own - REFERENCE[:, 0] - z0))))


@pytest.mark.parametrize(
    ("by_hand", "settings"),
    [
        (dpo, config.DPO(beta=0.3, sft_coef=0.7)),
        (mixed, MIXED),
        (kto, config.DPO(loss="kto", beta=0.3, desirable_weight=1.5)),
    ],
)
def test_the_gradient_of_an_update_is_that_of_the_papers_formula(by_hand, settings):
    loss, gradient = jax.jit(jax.value_and_grad(by_hand))(PARAMS)
    found, metrics = step(settings, preferences(), num_micro=2)
    agree(found, gradient)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics.get("kl", 1) > 0.1
    if "running" in metrics:  # of the ten rewards before and the eight of this step
        rewards = 0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"])
        np.testing.assert_allclose(metrics["running"], (10 * 0.25 + 8 * rewards) / 18, rtol=1e-5)


@pytest.mark.parametrize("settings", [config.DPO(loss="sigmoid_norm", beta=0.3, sft_coef=0.5), MIXED])
def test_padding_and_packing_do_not_change_an_update(settings):
    gradient, metrics = step(settings, preferences())
    for other in (preferences(width=20), packed()):
        found, told = step(settings, other)
        agree(found, gradient)
        assert {k: float(v) for k, v in told.items()} == pytest.approx(
            {k: float(v) for k, v in metrics.items()}, rel=1e-4, abs=1e-6
        )


@functools.cache
def scored_and_back(width=12):
    """Responses of PARAMS in rows of so many tokens, and the function from the gradient by their log-probs to that by
    the parameters."""
    pairs = jax.tree.map(jnp.asarray, preferences(width).pairs)

    @jax.jit
    def back(cotangent):
        return jax.vjp(lambda params: score(params, pairs, model=MODEL, settings=PLAIN_DPO).logprobs, PARAMS)[1](
            cotangent
        )

    return score(PARAMS, pairs, model=MODEL, settings=PLAIN_DPO), back


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_moves_the_policy_by_finite_numbers_whatever_the_padding(name):
    """From the reference itself, where margins are 0, as at the first step."""
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    settings = config.DPO(loss=name, **smoothing)

    def by_parameters(found, back):
        reference = found.logprobs * (name not in REFERENCE_FREE)

        def loss(logprobs):
            if name == "kto":
                return kto_objective(logprobs[:, 0], reference[:, 0], GOOD, 0.0, 4, 0.3, settings)
            return objective(found._replace(logprobs=logprobs), reference, 4, 14, 0.3, 0.0, settings)

        (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(found.logprobs)
        return value, metrics, jax.tree.leaves(back(slope))

    value, metrics, gradient = by_parameters(*scored_and_back())
    assert all(np.isfinite(x).all() for x in (*gradient, value, *metrics.values()))
    largest = max(np.abs(leaf).max() for leaf in gradient)
    assert largest > 1e-4
    if name in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired"):
        assert value == pytest.approx(np.log(2), abs=1e-6) and metrics["rewards/margins"] == 0
    padded_value, _, padded = by_parameters(*scored_and_back(20))
    assert padded_value == pytest.approx(float(value), rel=1e-5)
    for leaf, wanted in zip(padded, gradient, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * largest)


def test_the_losses_of_a_config_are_those_there_are():
    assert {*NAMES} == {*LOSSES, "simpo", "orpo", "cpo", "kto"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "exo_pair"}, "infinite; give 0.001"),
        ({"loss": "discopop", "discopop_tau": 1.0}, "less than 1"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge, which does not use it; leave it at 0.0. It is for sigmoid"),
        ({"discopop_tau": 0.5}, "It is for discopop"),
        ({"loss": "aot", "divergence": "forward_kl"}, "dpo.divergence is forward_kl and dpo.loss aot, which does not"),
        ({"alpha": 0.1}, "dpo.alpha is 0.1 and dpo.divergence reverse_kl, which has none"),
        ({"loss": "ipo", "length_normalised": True}, "ipo, which does not use it"),
        ({"simpo_gamma": 1.0}, "It is for simpo"),
        ({"loss": "sigmoid", "desirable_weight": 2.0}, "It is for kto"),
        ({"loss": "simpo", "reference_folder": "x"}, "which does not use it: it needs no reference"),
        ({"loss": "kto", "sft_coef": 0.1}, "kto, which has no SFT term"),
        ({"beta_schedule": "linear"}, "dpo.beta_final not given"),
        ({"beta_final": 0.2}, "constant takes none"),
        ({"loss_weights": (1.0,)}, "is a single loss; leave it out, or give a list"),
        ({"loss": ("sft",)}, "no loss of pairs; give one"),
        ({"loss": ("sigmoid", "sigmoid")}, "a loss twice"),
        ({"loss": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "1 weights and dpo.loss 2 losses"),
        ({"loss": ("sigmoid", "simpo")}, "simpo"),
        ({"loss": ("sigmoid", "aot"), "use_weighting": True}, "does not use it"),
        ({"loss": "kto", "ld_alpha": 0.5}, "kto, which does not use it"),
        ({"loss": "bco_pair", "divergence": "forward_kl"}, "bco_pair, which does not use it"),
    ],
)
def test_settings_that_a_loss_does_not_take_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config.DPO(**options)


@pytest.mark.parametrize(
    ("loss", "train", "said"),
    [
        ("aot", {"micro_batch_size": 2}, "aot, which ranks the pairs of the whole batch; leave it out"),
        ("aot_unpaired", {"micro_batch_size": 4}, "ranks the pairs of the whole batch"),
        (("sigmoid", "aot"), {"micro_batch_size": 2}, "dpo.loss aot, which ranks the pairs"),
        ("kto", {"packing": True}, "train.packing is true and dpo.loss kto"),
    ],
)
def test_batches_that_a_loss_does_not_take_are_refused(loss, train, said):
    with pytest.raises(ValueError, match=said):
        config.DPOConfig(dpo=config.DPO(loss=loss), train=config.Train(batch_size=8, **train))
    with pytest.raises(ValueError, match="optim.offload is true"):
        config.DPOConfig(optim=config.Optim(offload=True))
