"""The KL over the whole vocabulary in the loss of PPO and GRPO, against whole logits in float64.

Under a coefficient beside which the method's own loss is nothing, the norm that an update reports is that of its
gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.ppo_case import case
from support.runs import records
from training.test_grpo_update import B, G, run, spec_of

from jaxrlhf import config, runtime, sharding
from jaxrlhf.config import GRPO, PPO
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import forward, lm_logits
from jaxrlhf.training.grpo.trainer import GRPOTrainer

COEF, TEMPERATURE = 1e6, 0.7
BETAS = [1.0, 0.0, 0.3]


@pytest.fixture(scope="module")
def problem():
    made = case(drift=1.0)
    made.rollout = dataclasses.replace(made.rollout, index=jnp.arange(B) // G)
    return made


def log_probabilities(params, model, rollout):
    """Of the whole vocabulary at every response token, at the temperature of the run."""
    logits = lm_logits(params, model, forward(params, model, rollout.tokens, rollout.mask))
    logits = logits[:, -rollout.response_mask.shape[1] - 1 : -1] / TEMPERATURE
    return logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def divergence(xp, ours, theirs, beta):
    """Per token, from log-probabilities; equation 1 of https://arxiv.org/abs/2306.13649."""
    q, p = xp.exp(ours), xp.exp(theirs)
    if beta == 1:
        return xp.sum(q * (ours - theirs), axis=-1)
    if beta == 0:
        return xp.sum(p * (theirs - ours), axis=-1)
    middle = xp.log(beta * p + (1 - beta) * q)
    return xp.sum(beta * p * (theirs - middle) + (1 - beta) * q * (ours - middle), axis=-1)


def expected(problem, beta, weights):
    """(value in float64, norm of its gradient) of the weighted mean over response tokens."""
    model, rollout, mask = problem.spec.policy, problem.rollout, np.asarray(problem.rollout.response_mask)
    theirs = log_probabilities(problem.frozen["reference"], model, rollout)
    ours = log_probabilities(problem.policy, model, rollout)
    tokens = divergence(np, np.float64(ours), np.float64(theirs), beta)

    def loss(params):
        tokens = divergence(jnp, log_probabilities(params, model, rollout), theirs, beta)
        return jnp.sum(jnp.where(mask, tokens * weights, 0)) / mask.sum()

    return (tokens * weights)[mask].sum() / mask.sum(), float(optax.tree.norm(jax.grad(loss)(problem.policy)))


def weights_of(problem, method):
    lengths = np.asarray(problem.rollout.response_mask).sum(axis=1, keepdims=True)
    return lengths.sum() / (B * lengths) if method == "grpo" else np.ones_like(lengths)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("method", ["grpo", "dapo"])
def test_grpo_has_the_divergence_of_whole_logits(problem, method, beta, monkeypatch):
    monkeypatch.setattr(runtime, "logits_alive", lambda _: 2 * B * problem.spec.policy.vocab_size)  # 2 of 7 columns
    options = {"method": method, "batch_size": B, "num_generations": G, "kl_coef": COEF, "kl_estimator": "exact"}
    _, experience, metrics = run(problem, GRPO(**options, kl_beta=beta))
    value, norm = expected(problem, beta, weights_of(problem, method))
    assert value > 1e-3
    assert metrics["loss/kl_avg"] == pytest.approx(value, rel=2e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(COEF * norm, rel=1e-3)
    assert experience.ref_hidden.shape == (*experience.ref_logprobs.shape, problem.spec.policy.hidden_size)


@pytest.mark.parametrize("beta", BETAS)
def test_ppo_has_the_divergence_of_whole_logits(beta):
    options = {"kl_in": "loss", "kl_estimator": "exact", "kl_coef": COEF, "kl_beta": beta}
    problem = case(drift=1.0, ppo=PPO(batch_size=B, total_episodes=B, num_ppo_epochs=1, **options))
    _, _, metrics = problem.run()
    value, norm = expected(problem, beta, 1.0)
    assert metrics["loss/kl_avg"] == pytest.approx(value, rel=2e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(COEF * norm, rel=1e-3)


def test_micro_batches_padding_and_rows_by_length_change_nothing(problem):
    options = {"batch_size": B, "num_generations": G, "kl_coef": 0.5, "kl_estimator": "exact", "num_iterations": 2}
    whole, _, metrics = run(problem, GRPO(**options))
    rollout = problem.rollout
    wider = {name: jnp.pad(getattr(rollout, name), [(0, 0), (3, 0)]) for name in ("tokens", "mask")}
    padded = dataclasses.replace(rollout, **wider)
    for more, given in (({"micro_batch_size": 2}, rollout), ({"micro_batch_tokens": 40}, rollout), ({}, padded)):
        other, _, others = run(problem, GRPO(**options, **more), rollout=given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, whole)
        assert others["loss/kl_avg"] == pytest.approx(float(metrics["loss/kl_avg"]), rel=1e-5)


def test_an_update_on_eight_devices_is_that_on_one(problem):
    options = {"batch_size": B, "num_generations": G, "kl_coef": 0.5, "kl_estimator": "exact", "kl_beta": 0.3}
    (one, _, metrics), (eight, _, others) = (
        run(problem, GRPO(**options), mesh=sharding.make_mesh(mesh))
        for mesh in (config.Mesh(), config.Mesh(fsdp=4, tensor=2))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), eight, one)
    assert others["loss/kl_avg"] == pytest.approx(float(metrics["loss/kl_avg"]), rel=1e-5)


def test_only_the_exact_divergence_takes_the_reference_into_the_update(problem):
    exact = GRPO(batch_size=B, num_generations=G, kl_coef=1.0, kl_estimator="exact")
    assert spec_of(problem, exact).update_roles == ("policy", "reference")
    assert spec_of(problem, dataclasses.replace(exact, kl_estimator="k3")).update_roles == ("policy",)


@pytest.mark.long
def test_a_policy_without_another_reward_comes_near_its_teacher(parts, teacher, tmp_path):
    """By the reverse KL over the vocabulary, with adapters over the model that would be the reference."""
    options = parts | {
        "run_dir": str(tmp_path / "run"),
        "sampling": config.Sampling(response_length=8),
        "optim": config.Optim(learning_rate=2e-2),
        "reference": config.Reference(path=str(teacher)),
        "grpo": config.GRPO(
            batch_size=16, num_generations=2, total_episodes=640, kl_coef=1.0, kl_estimator="exact"
        ),
    }  # fmt: skip
    trainer = GRPOTrainer(config.GRPOConfig(**options), reward=lambda prompts, completions: [0.0] * len(prompts))
    trainer.train()
    log = records(tmp_path / "run")
    assert log[-1]["loss/kl_avg"] < 0.5 * log[0]["loss/kl_avg"]


def test_what_does_not_go_with_it_is_refused():
    exact = {"kl_estimator": "exact", "kl_coef": 0.1}
    for wrong, reason in (
        ({"grpo": GRPO(kl_beta=0.5)}, "grpo.kl_beta is set, and it is an option of grpo.kl_estimator: exact"),
        ({"grpo": GRPO(**exact), "reference": config.Reference(offload=True)}, "uses the reference's output layer"),
        (
            {"grpo": GRPO(**exact), "sampling": config.Sampling(renormalise_logprobs=True, top_k=5)},
            "sampling.renormalise_logprobs leaves out what sampling filters",
        ),
    ):
        with pytest.raises(ConfigError, match=reason):
            config.GRPOConfig(**wrong)
    with pytest.raises(ConfigError, match="exact does not go with rloo, whose KL is in the reward"):
        GRPO(method="rloo", **exact)
    with pytest.raises(ConfigError, match="ppo.kl_estimator exact does not go with ppo.kl_in reward"):
        PPO(kl_estimator="exact")
    with pytest.raises(ConfigError, match="ppo.kl_estimator is exact and ppo.replay 2"):
        PPO(kl_estimator="exact", kl_in="loss", replay=2)
