"""The initial state of a group-relative run: policy and reference parameters, the optimizer, and the update's spec."""

import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding, traced
from jaxrlhf.algorithms.entropy import EntropyControl
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import GRPO, GRPOConfig
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.abstract import is_abstract
from jaxrlhf.training.grpo.update import GRPOSpec
from jaxrlhf.training.on_policy.policy import initial_policy, load_policy
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.state import State
from jaxrlhf.types import Params


def initial_state(
    config: GRPOConfig,
    sampler: Sampler,
    scorer: Scorer,
    teacher: ModelConfig | None,
    updates: int,
    keys: tuple[Array, ...],
) -> tuple[State, dict[str, Params], GRPOSpec, str]:
    """Load the models; returns (state, frozen parameters by role, spec, hash of the reference) of a run of so many
    `updates`. With adapters, the base model is the reference, unless there is a `teacher`; there is none where
    nothing uses one.

    `keys` are those of `setup.keys`. Raises ConfigError for what models and devices cannot do.
    """
    grpo, mesh = config.grpo, sampler.mesh
    policy = load_policy(config, sampler, scorer)
    start = initial_policy(config, sampler, policy, keys[3], has_reference=grpo.has_reference, teacher=teacher)
    steps = updates * grpo.optimizer_steps
    optimizers = {"policy": make_optimizer(config.optim, config.optim.learning_rate, steps)}
    spec = GRPOSpec(
        policy=sampler.model,
        optimizers=tuple(optimizers.items()),
        grpo=grpo,
        response_length=config.sampling.response_length,
        temperature=config.sampling.temperature,
        mesh=mesh,
        reference=config.reference,
        teacher=teacher,
        rejected=_rejected_tokens(config, sampler.tokenizer),
        reward_weights=tuple(scorer.summed.values()) if grpo.recipe.advantage == "decoupled" else (),
    )
    state = State(
        {"policy": start.trained},
        optimizers,
        mesh,
        grpo.kl_weight,
        config.optim.offload,
        score_stats=sharding.put_whole(no_stats(), mesh),
        reference=start.moving,
        entropy=sharding.put_whole(_entropy_control(grpo), mesh),
    )
    if not is_abstract(policy):
        sampler.check_memory()
    return state, start.frozen, traced.place(spec, mesh), start.digest


def _entropy_control(grpo: GRPO) -> EntropyControl | None:
    """The entropy control of a run that begins, with `grpo.entropy_target`."""
    if grpo.entropy_target is None:
        return None
    return EntropyControl(jnp.float32(grpo.entropy_coef), jnp.float32(0))


def _rejected_tokens(config: GRPOConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of `grpo.rejected_text` as a whole response, if it is set. Raises ConfigError if they do not fit."""
    text, length = config.grpo.rejected_text, config.sampling.response_length
    if text is None:
        return ()
    tokens = [*tokenizer.encode_batch([tokenizer.escape(text)], [True])[0], tokenizer.eos_id]
    if len(tokens) > length:
        raise ConfigError(
            f"grpo.rejected_text has {len(tokens)} tokens with its end, and a response may have from 1 to {length}; "
            "change the text, or sampling.response_length"
        )
    return tuple(tokens)
