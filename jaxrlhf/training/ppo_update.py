"""The device programs of a PPO update: `annotate` turns a scored rollout into experience, `update` learns from it."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.advantages import gae, whiten
from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.ppo import additive_to_final, policy_loss, rollout_metrics, token_rewards, value_loss
from jaxrlhf.config import PPO, PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.models import ModelConfig, init_head
from jaxrlhf.models import scores as scalar
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.training.setup import attending, copy, split_head
from jaxrlhf.training.step import Metrics, apply, gradients, join_rows, split_rows
from jaxrlhf.types import Experience, Params, Rollout, TrainState


@dataclass(frozen=True)
class Roles:
    """Everything about an update that is static."""

    policy: ModelConfig
    critic: ModelConfig
    optimizers: tuple[tuple[str, Optimizer], ...]
    ppo: PPO
    temperature: float
    trunk: Literal["trained", "reference", "frozen"]  # the critic's; reference: frozen, and the reference's arrays
    mesh: jax.sharding.Mesh

    def micro_rows(self, batch: int) -> int:
        """Rows of one forward pass. Annotation uses the update's number: bf16 products depend on the row count."""
        return self.ppo.micro_batch_size or batch // self.ppo.num_mini_batches

    def one_step(self, batch: int) -> bool:
        """Whether the whole update is one forward and one optimizer step, so that pi_old is stop_gradient(pi).

        Then annotation runs neither policy nor critic. An update of one optimizer step in several micro-batches is not
        such: whitening needs every row's advantage before the first row's loss, so annotation runs, and its
        old_logprobs are those of the update to rounding (1e-5) and not by definition.
        """
        return self.ppo.num_ppo_epochs == 1 and self.micro_rows(batch) == batch


def make_critic(
    config: PPOConfig,
    policy_model: ModelConfig,
    policy: Params,
    reference: Params,
    reward: tuple[ModelConfig, Params] | None,
    mesh: jax.sharding.Mesh,
    key: Array,
) -> tuple[ModelConfig, Params, Params]:
    """(model, what trains, what is frozen) of the value model: a trunk from elsewhere and a head that starts at zero.

    A frozen trunk is the reference's or the reward model's own arrays. Raises ConfigError when the reward model reads
    other tokens than the policy.
    """
    model, trunk = policy_model, policy
    if config.critic.init == "reward":
        assert reward is not None
        model, trunk = reward
        if model.vocab_size != policy_model.vocab_size:
            raise ConfigError(
                f"critic.init is 'reward' but the reward model has {model.vocab_size} token rows and the policy "
                f"{policy_model.vocab_size}; use critic.init: policy"
            )
    elif config.critic.frozen_trunk:
        trunk = reference
    model = dataclasses.replace(
        model, head=config.critic.head, num_labels=1, dtype=policy_model.dtype, remat=policy_model.remat
    )
    model = attending(model, config.model)
    trunk = {k: v for k, v in trunk.items() if k not in ("lm_head", "score")}
    if not config.critic.frozen_trunk:
        trunk = copy(trunk, policy["norm"]["scale"].dtype, mesh)
    head = init_head(model, key)
    output = "kernel" if config.critic.head == "linear" else "dense_2"
    head["score"][output] = jax.tree.map(jnp.zeros_like, head["score"][output])
    trained, frozen = split_head({**trunk, **sharding.put_whole(head, mesh)}, config.critic.frozen_trunk)
    return model, trained, frozen


def sequence_logprobs(
    params: Params, model: ModelConfig, rollout: Rollout, hidden: Array, temperature: float
) -> tuple[Array, Array]:
    """(log-probs, entropy) of every response token, f32 [B, R]: the one function for old, new and reference policy.

    `hidden` are the states [B, R, D] before the tokens. Over the rollout's `support` if it has one, the reference too,
    else over the whole vocabulary.
    """
    targets = rollout.tokens[:, -rollout.response_mask.shape[1] :]
    logprobs, entropy = token_logprobs(params, model, hidden, targets, temperature, rollout.support)
    return masked.keep(logprobs, rollout.response_mask), masked.keep(entropy, rollout.response_mask)


class Measured(NamedTuple):
    """What policy and critic say about a rollout; 0 outside the response mask."""

    logprobs: Array  # f32 [B, R]
    entropy: Array  # f32 [B, R]
    values: Array  # f32 [B, R]   before each response token
    tail: Array  # f32 [B]   value after the last column


def measure(
    params: dict[str, Params], frozen: dict[str, Params], rollout: Rollout, features: Array | None, roles: Roles
) -> Measured:
    """What policy and critic say about a rollout: one forward each, or of the critic's head alone on `features`."""
    hidden = response_states(params["policy"], roles.policy, rollout)[:, :-1]
    logprobs, entropy = sequence_logprobs(params["policy"], roles.policy, rollout, hidden, roles.temperature)
    critic = {**frozen["critic"], **params["critic"]}
    if features is None:
        features = response_states(critic, roles.critic, rollout)
    values = scalar(critic, roles.critic, features)
    return Measured(logprobs, entropy, masked.keep(values[:, :-1], rollout.response_mask), values[:, -1])


@functools.partial(jax.jit, static_argnames="roles")
def annotate(
    state: TrainState,
    frozen: dict[str, Params],
    rollout: Rollout,
    scores: Array,
    token_scores: Array | None = None,
    *,
    roles: Roles,
) -> tuple[Experience, Metrics]:
    """Score a rollout's tokens by policy, reference and critic, and work out rewards, advantages and returns.

    Forwards run in slices of the update's micro-batch rows, so memory is bounded by those. When the update will be one
    step, policy and critic are not run here: `update` completes the experience from its own forward. A frozen critic
    trunk runs here and nowhere else, and not at all where it is the reference's.
    """
    batch = scores.shape[0]

    def rows(part: Rollout) -> tuple[Array, Array | None, Measured | None]:
        hidden = response_states(frozen["reference"], roles.policy, part)
        ref_logprobs, _ = sequence_logprobs(frozen["reference"], roles.policy, part, hidden[:, :-1], roles.temperature)
        features = None
        if roles.trunk != "trained":
            features = hidden if roles.trunk == "reference" else response_states(frozen["critic"], roles.critic, part)
        if roles.one_step(batch):
            return ref_logprobs, features, None
        return ref_logprobs, features, measure(state.params, frozen, part, features, roles)

    parts = jax.lax.map(rows, split_rows(rollout, batch // roles.micro_rows(batch)))
    ref_logprobs, features, measured = join_rows(parts)
    if measured is None:
        blank, metrics = jnp.zeros_like(ref_logprobs), {}
        experience = Experience(
            rollout, scores, blank, ref_logprobs, blank, blank, blank, blank, jnp.zeros_like(scores)
        )
    else:
        experience, metrics = complete(rollout, scores, token_scores, ref_logprobs, measured, state.kl_coef, roles.ppo)
    return dataclasses.replace(experience, features=features, token_scores=token_scores), metrics


def complete(
    rollout: Rollout,
    scores: Array,
    token_scores: Array | None,
    ref_logprobs: Array,
    measured: Measured,
    kl_coef: Array,
    ppo: PPO,
) -> tuple[Experience, Metrics]:
    """Rewards, advantages and returns of a whole batch, and what it was worth. No gradient flows through."""
    logprobs, entropy, values, tail = jax.lax.stop_gradient(measured)
    mask, finished = rollout.response_mask, rollout.finished
    count = jnp.maximum(jnp.sum(mask), 1)

    def variance(x: Array) -> Array:
        return masked.total(jnp.square(x - masked.total(x, mask) / count), mask) / count

    scores = scores - ppo.missing_eos_penalty * (~finished)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef if ppo.kl_in == "reward" else 0.0)
    worth = scores
    if token_scores is not None:
        token_scores = masked.keep(token_scores, mask)
        rewards, worth = rewards + token_scores, scores + jnp.sum(token_scores, axis=1)
    metrics = rollout_metrics(worth, logprobs, ref_logprobs, mask, finished, kl_coef, ppo.kl_in)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    bootstrap = jnp.where(finished, 0.0, tail) if ppo.bootstrap_truncated else jnp.zeros_like(tail)
    advantages, returns = gae(rewards, values, mask, bootstrap, ppo.gamma, ppo.lam)
    experience = Experience(
        rollout=rollout,
        scores=scores,
        old_logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        advantages=whiten(advantages, mask, shift_mean=True) if ppo.whiten_advantages else advantages,
        returns=returns,
        bootstrap=bootstrap,
    )
    return experience, metrics | {
        "objective/entropy": jnp.mean(jnp.sum(entropy, axis=1)),
        "objective/kl_coef": kl_coef,
        "objective/kl_per_token": masked.total(logprobs - ref_logprobs, mask) / count,
        "objective/scores_std": jnp.std(worth),
        "tokens/mean_length": jnp.mean(jnp.sum(mask, axis=1)),
        "tokens/finished": jnp.mean(finished),
        "val/explained_variance": 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8),
        "val/sampler_logprob_gap": masked.total(jnp.abs(rollout.logprobs - logprobs), mask) / count,
    }


@functools.partial(jax.jit, static_argnames="roles", donate_argnames="state")
def update(
    state: TrainState, frozen: dict[str, Params], experience: Experience, key: Array, *, roles: Roles
) -> tuple[TrainState, Metrics]:
    """`num_ppo_epochs` passes over the experience, each over `num_mini_batches` freshly shuffled mini-batches."""
    ppo, batch = roles.ppo, experience.scores.shape[0]
    rows_each = batch // ppo.num_mini_batches
    num_micro = rows_each // roles.micro_rows(batch)

    def mini_batch(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
        chosen = jax.tree.map(lambda x: x[rows], experience)
        count = jnp.maximum(jnp.sum(chosen.rollout.response_mask), 1)

        def loss(params: dict[str, Params], part: Experience) -> tuple[Array, Metrics]:
            rollout, mask, extra = part.rollout, part.rollout.response_mask, {}
            now = measure(params, frozen, rollout, part.features, roles)
            if roles.one_step(batch):
                part, extra = complete(
                    rollout, part.scores, part.token_scores, part.ref_logprobs, now, state.kl_coef, ppo
                )
            policy, about_policy = policy_loss(
                now.logprobs, part.old_logprobs, part.advantages, mask, count, ppo.cliprange
            )
            value, about_value = value_loss(now.values, part.values, part.returns, mask, count, ppo.cliprange_value)
            total = policy + ppo.vf_coef * value
            if ppo.kl_in == "loss":
                assert ppo.kl_estimator != "k1"
                kl, about_kl = kl_loss(
                    now.logprobs, part.old_logprobs, part.ref_logprobs, mask, count, ppo.kl_estimator
                )
                total, extra = total + state.kl_coef * kl, extra | about_kl
            return total, {
                **about_policy,
                **about_value,
                **extra,
                "policy/entropy_avg": masked.total(now.entropy, mask) / count,
                "val/log_ratio_max": jnp.max(jnp.abs(now.logprobs - part.old_logprobs)),
            }

        grads, metrics = gradients(loss, state.params, chosen, num_micro)
        state, norms = apply(state, grads, metrics.pop("loss"), roles.optimizers)
        return sharding.constrain(state, roles.mesh), additive_to_final(metrics) | norms

    def epoch(state: TrainState, key: Array) -> tuple[TrainState, Metrics]:
        order = jax.random.permutation(key, batch).reshape(ppo.num_mini_batches, rows_each)
        return jax.lax.scan(mini_batch, state, order)

    state, stacked = jax.lax.scan(epoch, state, jax.random.split(key, ppo.num_ppo_epochs))
    metrics = {k: jnp.mean(v) for k, v in stacked.items()}
    metrics["val/first_log_ratio_max"] = stacked["val/log_ratio_max"][0, 0]
    metrics["val/log_ratio_max"] = jnp.max(stacked["val/log_ratio_max"])
    metrics["skipped_updates"] = jnp.sum(stacked["skipped_updates"])
    return sharding.constrain(dataclasses.replace(state, step=state.step + 1), roles.mesh), metrics
