"""The critic (value model) of PPO: its description, its initial parameters, and where its trunk is kept."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, for_length, init_head
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.adapters import add_adapters, split_trainable, with_adapters
from jaxrlhf.training.on_policy.policy import policy_params
from jaxrlhf.training.setup import cast_copy, with_attention
from jaxrlhf.types import Params

Trunk = Literal["own", "shared", "reference", "frozen"]
"""The critic's trunk: its own (trained), shared with the policy, the reference's (frozen), or another frozen one."""


def check_critic(config: PPOConfig, policy: ModelConfig, scorer: Scorer, updates: int) -> None:
    """Raise ConfigError for a critic that cannot be made, as far as model descriptions tell."""
    if config.critic.warmup_updates >= updates:
        raise ConfigError(
            f"critic.warmup_updates is {config.critic.warmup_updates} and the run has {updates} updates: the policy "
            "would never train; give fewer, or raise ppo.total_episodes"
        )
    if config.critic.init == "reward" and not scorer.shares_tokenizer:
        raise ConfigError(
            "critic.init is 'reward' but the reward model reads other tokens than the policy; use 'policy'"
        )
    critic_model(config, policy, scorer.model and scorer.model.model_config)


def critic_model(config: PPOConfig, policy: ModelConfig, reward: ModelConfig | None) -> ModelConfig:
    """The critic of a run, from the policy or the reward model. Raises ConfigError if the reward model has fewer
    token rows than the policy."""
    model = policy
    if config.critic.init == "reward":
        assert reward is not None
        model = reward
        if model.vocab_size < policy.vocab_size:
            raise ConfigError(
                f"critic.init is 'reward' but the reward model has {model.vocab_size} token rows and the policy "
                f"{policy.vocab_size}; use critic.init: policy"
            )
    as_policy = {name: getattr(policy, name) for name in ("dtype", "remat", "platform", "mesh", "router_aux_loss_coef")}
    model = dataclasses.replace(model, head=config.critic.head, num_labels=1, **as_policy)
    model = for_length(model, policy.rope and policy.rope.length)
    added = policy.adapters.tokens if policy.adapters else ()
    return with_attention(with_adapters(model, config.lora, added), config.model)


def trunk_of(config: PPOConfig) -> Trunk:
    """The critic's trunk in a run."""
    aliased = config.critic.trunk == "frozen" and config.critic.init == "policy" and not config.reference.sync_every
    return "reference" if aliased else config.critic.trunk


def init_critic(
    config: PPOConfig,
    model: ModelConfig,
    policy: Params,
    reference: Params,
    reward: Params | None,
    mesh: jax.sharding.Mesh,
    key: Array,
) -> tuple[Params, Params]:
    """(trainable, frozen) parameters of the critic `model`: a trunk from another model and a head that starts at zero.

    A frozen trunk, and the base model under trained adapters, are the arrays of the reference or the reward model,
    not a copy, unless the reference moves. A shared trunk is not returned. `policy` is the initial policy without
    adapters.
    """
    head_key, lora_key = jax.random.split(key)
    trunk, kind = policy, config.critic.trunk
    if config.critic.init == "reward":
        assert reward is not None
        trunk = reward
    elif kind == "frozen" and not config.lora.enabled:
        trunk = reference
        if config.reference.sync_every:
            trunk = cast_copy(reference, reference["norm"]["scale"].dtype, mesh)
    trunk = {k: v for k, v in trunk.items() if k not in ("lm_head", "score")}
    if kind == "own" and not config.lora.enabled:
        trunk = cast_copy(trunk, policy["norm"]["scale"].dtype, mesh)
    head = init_head(model, head_key)
    output = "kernel" if config.critic.head == "linear" else "dense_2"
    head["score"][output] = jax.tree.map(jnp.zeros_like, head["score"][output])
    params = {**trunk, **sharding.put_whole(head, mesh)}
    if kind == "own":
        return split_trainable(add_adapters(params, model, config.lora, lora_key), config.lora.enabled)
    trained, frozen = split_trainable(params, frozen_trunk=True)
    return trained, {} if kind == "shared" else frozen


def critic_params(params: dict[str, Params], frozen: dict[str, Params], trunk: Trunk) -> Params:
    """The critic's parameters, trunk and head, from wherever the trunk is kept."""
    if trunk == "shared":
        base = policy_params(params, frozen)
    else:
        base = frozen["reference" if trunk == "reference" else "critic"]
    return {**{k: v for k, v in base.items() if k != "lm_head"}, **params["critic"]}
