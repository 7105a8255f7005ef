"""The models of PPO: who they are, how the value model is made, and what policy and critic say about a rollout."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.config import PPO, PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.logprobs import response_states
from jaxrlhf.models import ModelConfig, init_head, scalar_head
from jaxrlhf.training.on_policy.policy import policy_params, sequence_logprobs
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.training.setup import add_adapters, cast_copy, split_trainable, with_adapters, with_attention
from jaxrlhf.types import Params, Rollout


@dataclass(frozen=True)
class Roles:
    """Everything about an update that is static."""

    policy: ModelConfig
    critic: ModelConfig
    optimizers: tuple[tuple[str, Optimizer], ...]
    ppo: PPO
    temperature: float
    trunk: Literal["own", "shared", "reference", "frozen"]  # the critic's; reference: frozen, that of the reference
    mesh: jax.sharding.Mesh
    warmup_updates: int = 0  # in which the critic alone learns
    sync_every: int = 0  # updates between moves of the reference; 0: it stays
    sync_alpha: float = 1.0

    def one_step(self, batch: int) -> bool:
        """Whether the whole update is one forward and one optimizer step, so that pi_old is stop_gradient(pi).

        Then annotation runs neither policy nor critic. An update of one optimizer step in several micro-batches is not
        such: whitening needs every row's advantage before the first row's loss, so annotation runs, and its
        old_logprobs are those of the update to rounding (1e-5) and not by definition.
        """
        return self.ppo.num_ppo_epochs == 1 and self.ppo.micro_rows(batch) == batch and not self.ppo.replay


def critic_model(config: PPOConfig, policy: ModelConfig, reward: ModelConfig | None) -> ModelConfig:
    """The value model of a run. Raises ConfigError when it starts from a reward model that has other tokens than the
    policy."""
    model = policy
    if config.critic.init == "reward":
        assert reward is not None
        model = reward
        if model.vocab_size != policy.vocab_size:
            raise ConfigError(
                f"critic.init is 'reward' but the reward model has {model.vocab_size} token rows and the policy "
                f"{policy.vocab_size}; use critic.init: policy"
            )
    model = dataclasses.replace(model, head=config.critic.head, num_labels=1, dtype=policy.dtype, remat=policy.remat)
    added = policy.adapters.tokens if policy.adapters else ()
    return with_attention(with_adapters(model, config.lora, added), config.model)


def make_critic(
    config: PPOConfig,
    model: ModelConfig,
    policy: Params,
    reference: Params,
    reward: Params | None,
    mesh: jax.sharding.Mesh,
    key: Array,
) -> tuple[Params, Params]:
    """(what trains, what is frozen) of the value model `model`: a trunk from elsewhere and a head that starts at zero.

    A frozen trunk is the reference's or the reward model's own arrays, unless the reference moves; so is what lies
    under the adapters of one that trains. Of a shared one, only the head is here. `policy` is what the policy began as,
    without adapters.
    """
    head_key, lora_key = jax.random.split(key)
    trunk, kind = policy, config.critic.trunk
    if config.critic.init == "reward":
        assert reward is not None
        trunk = reward
    elif kind == "frozen" and not config.lora.enabled:
        trunk = (
            cast_copy(reference, reference["norm"]["scale"].dtype, mesh) if config.reference.sync_every else reference
        )
    trunk = {k: v for k, v in trunk.items() if k not in ("lm_head", "score")}
    if kind == "own" and not config.lora.enabled:
        trunk = cast_copy(trunk, policy["norm"]["scale"].dtype, mesh)
    head = init_head(model, head_key)
    output = "kernel" if config.critic.head == "linear" else "dense_2"
    head["score"][output] = jax.tree.map(jnp.zeros_like, head["score"][output])
    whole = {**trunk, **sharding.put_whole(head, mesh)}
    if kind == "own":
        return split_trainable(add_adapters(whole, model, config.lora, lora_key), config.lora.enabled)
    trained, frozen = split_trainable(whole, frozen_trunk=True)
    return trained, {} if kind == "shared" else frozen


def trunk_kind(config: PPOConfig) -> Literal["own", "shared", "reference", "frozen"]:
    """`Roles.trunk` of a run."""
    aliased = config.critic.trunk == "frozen" and config.critic.init == "policy" and not config.reference.sync_every
    return "reference" if aliased else config.critic.trunk


def whole_critic(params: dict[str, Params], frozen: dict[str, Params], roles: Roles) -> Params:
    """The value model's parameters, trunk and head, wherever they are kept."""
    trunk = policy_params(params, frozen) if roles.trunk == "shared" else frozen["critic"]
    trunk = frozen["reference"] if roles.trunk == "reference" else trunk
    return {**{k: v for k, v in trunk.items() if k != "lm_head"}, **params["critic"]}


class Measured(NamedTuple):
    """What policy and critic say about a rollout; 0 outside the response mask."""

    logprobs: Array  # f32 [B, R]
    entropy: Array  # f32 [B, R]
    values: Array  # f32 [B, R]   before each response token
    tail: Array  # f32 [B]   value after the last column


def measure(
    params: dict[str, Params], frozen: dict[str, Params], rollout: Rollout, features: Array | None, roles: Roles
) -> Measured:
    """What policy and critic say about a rollout: one forward each, or of the critic's head alone on `features` or on
    the policy's own states."""
    policy = policy_params(params, frozen)
    hidden = response_states(policy, roles.policy, rollout)
    logprobs, entropy = sequence_logprobs(
        policy, roles.policy, rollout, roles.temperature, hidden=hidden, entropy_gradient=roles.ppo.entropy_coef > 0
    )
    if roles.trunk == "shared":
        features = hidden
    elif features is None:
        features = response_states({**frozen["critic"], **params["critic"]}, roles.critic, rollout)
    values = scalar_head(params["critic"], roles.critic, features)
    return Measured(logprobs, entropy, masked.keep(values[:, :-1], rollout.response_mask), values[:, -1])
