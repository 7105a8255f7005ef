"""The initial state of a PPO run: policy, critic and reference parameters, their optimizers, and the update's spec."""

import dataclasses

import jax
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.training.abstract import abstract_call, build, is_abstract
from jaxrlhf.training.adapters import add_adapters, split_trainable
from jaxrlhf.training.on_policy.policy import reference_dtype
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo.critic import critic_model, init_critic, trunk_of
from jaxrlhf.training.ppo.replay import empty_replay
from jaxrlhf.training.ppo.update import PPOSpec
from jaxrlhf.training.setup import cast_copy, params_fingerprint
from jaxrlhf.training.state import State
from jaxrlhf.types import Experience, Params


def initial_state(
    config: PPOConfig,
    sampler: Sampler,
    policy: Params,
    reward: tuple[ModelConfig, Params] | None,
    updates: int,
    keys: tuple[Array, Array],
) -> tuple[State, dict[str, Params], PPOSpec, str]:
    """(state, frozen parameters by role, spec, hash of the reference) of a run of so many `updates`.

    Takes over `policy`; with adapters, its base model is shared by policy, reference and critic. `reward` is the reward
    model, if there is one that the critic could start from; `keys` are for the critic and for adapters. Raises
    ConfigError for what the config asks of models or devices that they cannot do.
    """
    ppo, model, mesh = config.ppo, sampler.model, sampler.mesh
    critic = critic_model(config, model, reward and reward[0])

    def initial_params(policy: Params, reward_params: Params | None) -> tuple[Params, Params, Params, Params | None]:
        critic_key, lora_key = keys
        trained, base = split_trainable(add_adapters(policy, model, config.lora, lora_key), config.lora.enabled)
        reference = base or cast_copy(policy, reference_dtype(config.reference, model), mesh)
        value, trunk = init_critic(config, critic, base or policy, reference, reward_params, mesh, critic_key)
        moving = None
        if config.reference.sync_every:
            moving = cast_copy(trained, "float32", mesh) if base else reference
        fixed = reference if moving is None else base
        frozen = {"policy": base, "reference": fixed, "critic": trunk}
        return {"policy": trained, "critic": value}, frozen, reference, moving

    trained, frozen, reference, moving = build(initial_params, mesh, policy, reward and reward[1])
    digest = "" if is_abstract(reference) else params_fingerprint(reference)
    if config.reference.offload and not is_abstract(reference):
        frozen["reference"] = sharding.to_host(reference)

    def optimizer_steps(first: int) -> int:
        """Steps from update number `first` on. A rollout can be replayed only once it exists."""
        passes = sum(1 + min(number, ppo.replay) for number in range(first, updates))
        return passes * ppo.num_ppo_epochs * ppo.num_mini_batches

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
        warmup_updates=config.critic.warmup_updates,
        sync_every=config.reference.sync_every,
        sync_alpha=config.reference.sync_alpha,
    )
    state = State(
        trained,
        optimizers,
        mesh,
        ppo.kl_coef,
        optim.offload,
        score_stats=sharding.put_whole(no_stats(), mesh),
        reference=moving,
        replay=_replay(config, spec, sampler, abstract=is_abstract(reference)) if ppo.replay else None,
    )
    return state, frozen, spec, digest


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
    return sharding.put_whole(jax.tree.map(lambda x: np.array(x), empty_replay(config, spec, width)), spec.mesh)
