"""The load-balancing loss in the update of every method: of the whole batch, whatever its micro-batches and padding.

Its gradient is found in the norm that an update reports, under a coefficient beside which the method's own loss is
nothing; the expected one is that of the load-balancing loss alone, over all rows of the batch at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import ppo_case
from support.tiny import tiny
from training import test_grpo_update as grpo_case

from jaxrlhf import config, models, sharding
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, SFTRow
from jaxrlhf.models.experts import router_sums
from jaxrlhf.training import sft, step
from jaxrlhf.training.by_length import Budget
from jaxrlhf.training.distill import update as distill
from jaxrlhf.training.dpo import update as dpo
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.reward import trainer as reward
from jaxrlhf.training.reward.loss import objective_of
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Spec

COEF, WIDTH, ROWS = 1e6, 16, 16
MODEL = tiny(
    family="qwen3_moe", num_experts=5, experts_per_token=2, vocab_size=19, mlp_size=8, router_aux_loss_coef=COEF
)
MESH, KEY = sharding.make_mesh(config.Mesh()), jax.random.key(0)
OPTIMIZER = make_optimizer(config.Optim(), 1e-3, 10)
LENGTHS = (3, 15, 4, 9, 2, 13, 5, 8)


def text(size, seed):
    generator = np.random.default_rng([size, seed])
    return SFTRow(generator.integers(0, 19, size).tolist(), [False] + [True] * (size - 1))


TEXTS = [text(size, i) for i, size in enumerate(LENGTHS)]
PAIRS = [PairRow(text(size, 100 + i), text(size % 7 + 2, 200 + i)) for i, size in enumerate(LENGTHS)]


def weights_of(model, key=KEY):
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(model, key))


@jax.jit
def alone(params, tokens, mask):
    """(load-balancing loss, largest share, norm of the gradient) of all rows, as eq. 4 to 6 of the paper have it."""

    def loss(params):
        choices, probabilities = models.forward_with_router(params, MODEL, tokens, mask)[1]["router"]
        count = MODEL.num_layers * jnp.sum(mask)
        value = MODEL.num_experts * jnp.sum(choices / count * probabilities / count)
        return value, (value, jnp.max(choices) / jnp.sum(choices))

    gradient, found = jax.grad(loss, has_aux=True)(params)
    return *found, optax.tree.norm(gradient)


def check(params, texts, metrics, norm="grad_norm", loss="loss/router_aux", router="router"):
    """`texts` are (tokens, mask) of all rows that the model reads."""
    params = {name: leaf for name, leaf in params.items() if name not in ("score", "lm_head")}
    rows, columns = np.shape(texts[0])
    padded = (jnp.pad(jnp.asarray(x), [(0, ROWS - rows), (0, WIDTH - columns)]) for x in texts)  # one program for all
    value, share, gradient = alone(params, *padded)
    assert value > 1.01 * MODEL.experts_per_token, "experts that are not balanced"
    assert metrics[loss] == pytest.approx(float(value), rel=1e-5)
    assert metrics[f"{router}/largest_share"] == pytest.approx(float(share), rel=1e-5)
    assert metrics[norm] == pytest.approx(COEF * float(gradient), rel=1e-3)


def both(pairs):
    return tuple(
        jnp.concatenate([getattr(pairs.chosen, name), getattr(pairs.rejected, name)]) for name in ("tokens", "mask")
    )


def supervised(method):
    """(parameters, texts, metrics) of an update in two micro-batches."""
    model = dataclasses.replace(MODEL, head="linear") if method == "reward" else MODEL
    params, role = weights_of(model), "reward" if method == "reward" else "policy"
    state = State({role: jax.tree.map(jnp.array, params)}, {role: OPTIMIZER}, MESH).value
    spec = functools.partial(Spec, model, OPTIMIZER, 2, MESH)
    if method in ("sft", "distill"):
        batch = jax.tree.map(jnp.asarray, batching.batch(TEXTS, 0, WIDTH))
        texts = batch.tokens, batch.mask
        if method == "sft":
            return params, texts, sft.update(state, {}, batch, KEY, spec=spec("nll"))[1]
        objective = distill.Objective(config.Distill(), MODEL)
        teacher = weights_of(MODEL, jax.random.key(1))
        return params, texts, distill.update(state, {}, teacher, batch, KEY, spec=spec(objective))[1]
    if method == "reward":
        batch = jax.tree.map(jnp.asarray, batching.responses(PAIRS, [0.0] * len(PAIRS), 0, WIDTH, 2))
        texts = tuple(x.reshape(-1, WIDTH) for x in (batch.tokens, batch.mask))
        return params, texts, reward.update(state, {}, batch, KEY, spec=spec(objective_of(config.RewardConfig())))[1]
    pairs = jax.tree.map(jnp.asarray, batching.pairs(PAIRS, 0, WIDTH))
    reference, every = jnp.full((len(PAIRS), 2), -3.0), jnp.ones(len(PAIRS), bool)
    settings = config.dpo.DPO(loss="kto" if method == "kto" else "sigmoid")
    batch = dpo.Preferences(pairs, reference, every)
    metrics = dpo.update(state, {}, batch, KEY, spec=spec((settings, dpo.beta_schedule(settings, 10))))[1]
    return params, (pairs.chosen.tokens, pairs.chosen.mask) if method == "kto" else both(pairs), metrics


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", pytest.param("kto", marks=pytest.mark.long), "distill"])
def test_a_supervised_update_adds_the_loss_of_the_whole_batch(method):
    check(*supervised(method))


def test_held_out_rows_are_measured_without_it():
    batch = jax.tree.map(jnp.asarray, batching.batch(TEXTS, 0, WIDTH))
    _, metrics = sft.evaluate(weights_of(MODEL), batch, model=MODEL)
    assert set(metrics) == {"loss", "entropy"} and metrics["loss"] < 20


@pytest.fixture
def on_policy(monkeypatch):
    monkeypatch.setattr(ppo_case, "MODEL", MODEL)
    options = {"num_ppo_epochs": 1, "num_mini_batches": 1, "micro_batch_size": 4}
    return ppo_case.case(**options, drift=8.0)


def test_a_ppo_update_adds_those_of_policy_and_critic(on_policy):
    _, _, metrics = on_policy.run()
    texts = on_policy.rollout.tokens, on_policy.rollout.mask
    check(on_policy.policy, texts, metrics, "policy/grad_norm")
    critic = on_policy.policy  # whose trunk it starts with
    check(critic, texts, metrics, "critic/grad_norm", "loss/critic_router_aux", "critic_router")


@pytest.mark.parametrize("method", ["grpo", pytest.param("online_dpo", marks=pytest.mark.long)])
def test_a_grpo_update_adds_that_of_the_policy(method, on_policy):
    problem = dataclasses.replace(on_policy, rollout=dataclasses.replace(on_policy.rollout, index=jnp.arange(8) // 4))
    grpo = grpo_case.settings(method, micro_batch_size=2)
    _, compared, metrics = grpo_case.run(problem, grpo)
    tokens, mask = (getattr(compared.rollout, name) for name in ("tokens", "mask"))
    check(problem.policy, tuple(x.reshape(-1, x.shape[-1]) for x in (tokens, mask)), metrics, "policy/grad_norm")


@pytest.mark.parametrize("parts", [1, 4, Budget(20, 1, "train.micro_batch_tokens")], ids=["whole", "rows", "tokens"])
def test_micro_batches_add_up_to_the_loss_of_the_batch(parts):
    """With a linear router in place of a model, in NumPy and float64."""
    model = dataclasses.replace(MODEL, router_aux_loss_coef=3.0)
    batch = jax.tree.map(jnp.asarray, batching.batch(TEXTS, 0, WIDTH))
    weight = np.random.default_rng(0).normal(size=(19, 5)).astype(np.float32)

    def loss(params, rows):
        probabilities = jax.nn.softmax(params["weight"][rows.tokens])
        chosen = jax.lax.top_k(probabilities, 2)[1]
        value = jnp.sum(params["weight"] ** 2) * jnp.sum(rows.mask) / jnp.sum(batch.mask)
        return value, {"loss": value, "router": router_sums(probabilities, chosen, rows.mask)}

    grads, metrics = step.gradients(loss, {"weight": jnp.asarray(weight)}, batch, parts, {"router": model})
    logits = np.float64(weight)[np.asarray(batch.tokens)[np.asarray(batch.mask)]]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    f = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=5) / len(logits)
    assert metrics["loss"] == pytest.approx(np.sum(np.float64(weight) ** 2), rel=1e-5)
    assert metrics["loss/router_aux"] == pytest.approx(5 * f @ probabilities.mean(0), rel=1e-5)
    assert metrics["router/largest_share"] == pytest.approx(f.max() / 2, rel=1e-6)
    of_logits = 3 * 5 / len(logits) * probabilities * (f - probabilities @ f[:, None])
    expected = 2 * np.float64(weight)
    np.add.at(expected, np.asarray(batch.tokens)[np.asarray(batch.mask)], of_logits)
    np.testing.assert_allclose(grads["weight"], expected, rtol=1e-4, atol=1e-5)


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    params, batch = weights_of(MODEL), batching.batch(TEXTS, 0, WIDTH)
    placed = jax.tree.map(jax.device_put, params, sharding.shardings(params, mesh))
    texts = sharding.put_rows((batch.tokens, batch.mask), mesh)
    on_mesh = dataclasses.replace(MODEL, mesh=mesh)

    def sums(model):
        return jax.jit(lambda params, *texts: models.forward_with_router(params, model, *texts)[1]["router"])

    found, expected = sums(on_mesh)(placed, *texts), sums(MODEL)(params, batch.tokens, batch.mask)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
