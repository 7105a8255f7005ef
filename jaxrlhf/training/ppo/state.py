"""The initial state of a PPO run: policy, critic and reference parameters, their optimizers, and the update's spec."""

import dataclasses

import jax
import numpy as np
from jax import Array

from jaxrlhf import sharding, traced
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.abstract import abstract_call, build, is_abstract
from jaxrlhf.training.on_policy.policy import initial_policy, load_policy
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo.critic import check_critic, critic_model, init_critic, trunk_of
from jaxrlhf.training.ppo.replay import empty_replay
from jaxrlhf.training.ppo.update import PPOSpec
from jaxrlhf.training.state import State
from jaxrlhf.types import Experience, Params


def initial_state(
    config: PPOConfig,
    sampler: Sampler,
    scorer: Scorer,
    teacher: ModelConfig | None,
    updates: int,
    keys: tuple[Array, ...],
) -> tuple[State, dict[str, Params], PPOSpec, str]:
    """Load the models; returns (state, frozen parameters by role, spec, hash of the reference) of a run of so many
    `updates`. With adapters, the base model is shared by policy, critic and, without a `teacher`, reference.

    `keys` are those of `setup.keys`. Raises ConfigError for what models and devices cannot do.
    """
    ppo, model, mesh = config.ppo, sampler.model, sampler.mesh
    _, _, critic_key, lora_key = keys
    check_critic(config, model, scorer, updates)
    policy = load_policy(config, sampler, scorer, critic_from_reward=config.critic.init == "reward")
    reward = scorer.model
    critic = critic_model(config, model, reward and reward.model)
    start = initial_policy(config, sampler, policy, lora_key, teacher=teacher)

    def critic_params(policy: Params, reference: Params, reward_params: Params | None) -> tuple[Params, Params]:
        return init_critic(config, critic, policy, reference, reward_params, mesh, critic_key)

    base = start.frozen["policy"] or policy
    value, trunk = build(critic_params, mesh, base, start.reference, reward and reward.params)

    def optimizer_steps(first: int) -> int:
        """Steps from update number `first` on. A rollout can be replayed only once it exists."""
        return passes(first, updates, ppo.replay) * ppo.optimizer_steps

    rate, optim = config.optim.learning_rate, config.optim
    critic_optim = dataclasses.replace(optim, max_grad_norm=config.critic.max_grad_norm or optim.max_grad_norm)
    optimizers = {
        "policy": make_optimizer(optim, rate, optimizer_steps(config.critic.warmup_updates)),
        "critic": make_optimizer(critic_optim, config.critic.learning_rate or rate, optimizer_steps(0)),
    }
    spec = PPOSpec(
        policy=model,
        critic=critic,
        optimizers=tuple(optimizers.items()),
        ppo=ppo,
        temperature=config.sampling.temperature,
        trunk=trunk_of(config),
        mesh=mesh,
        reference=config.reference,
        teacher=teacher,
        warmup_updates=config.critic.warmup_updates,
    )
    state = State(
        {"policy": start.trained, "critic": value},
        optimizers,
        mesh,
        ppo.kl_coef,
        optim.offload,
        score_stats=sharding.put_whole(no_stats(), mesh),
        reference=start.moving,
        replay=_replay(config, spec, sampler, abstract=is_abstract(policy)) if ppo.replay else None,
    )
    if not is_abstract(policy):
        sampler.check_memory()
    return state, {**start.frozen, "critic": trunk}, traced.place(spec, mesh), start.digest


def _replay(config: PPOConfig, spec: PPOSpec, sampler: Sampler, *, abstract: bool) -> Experience:
    """An empty replay buffer on the mesh, or its shapes."""
    if not sampler.columns:
        raise ConfigError(
            "ppo.replay keeps rollouts as wide as the prompts of data.path allow, and that is empty: give a file of "
            "prompts, or set ppo.replay: 0"
        )
    width = sampler.columns, config.sampling.response_length
    if abstract:
        return abstract_call(lambda: empty_replay(config, spec, width), spec.mesh)
    # np.array copies: each leaf is a buffer of its own, because the state is donated
    field = {"replay": jax.tree.map(lambda x: np.array(x), empty_replay(config, spec, width))}
    return sharding.place(field, sharding.shardings(field, spec.mesh))["replay"]


def passes(first: int, updates: int, replay: int) -> int:
    """Passes over experiences in the updates numbered `first` to `updates` - 1: number n has one over its own, and one
    over each of the last min(n, replay)."""
    full = max(first, replay)  # from here on there are `replay` of them
    return max(updates - first, 0) + sum(range(first, min(updates, replay))) + max(updates - full, 0) * replay
