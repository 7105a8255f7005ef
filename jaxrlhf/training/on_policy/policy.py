"""Policy and reference of an on-policy run: loading, initial and current parameters."""

from typing import NamedTuple

import jax

from jaxrlhf import sharding, weights
from jaxrlhf.config import GRPOConfig, PPOConfig, Reference, Teacher
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training import setup
from jaxrlhf.training.abstract import build, is_abstract
from jaxrlhf.training.adapters import add_adapters, split_trainable
from jaxrlhf.training.on_policy.sampler import LOWER, Sampler
from jaxrlhf.training.teacher import load_teacher, teacher_model
from jaxrlhf.types import Params, TrainState


class InitialPolicy(NamedTuple):
    """Parameters at the start of a run."""

    trained: Params
    frozen: dict[str, Params]  # the base model under adapters ("policy"), the part of the reference that does not move
    reference: Params | None  # the whole reference; None if nothing uses one
    moving: Params | None  # the part of the reference that moves (`reference.sync_every`)
    digest: str  # hash of the reference, or of the base model without one or with a teacher; "" for shapes


def load_policy(
    config: PPOConfig | GRPOConfig, sampler: Sampler, scorer: Scorer, *, critic_from_reward: bool = False
) -> Params:
    """Load the policy and the reward models; returns the policy's parameters.

    A reward model that is adapters over the same base model shares its arrays, except for one whose adapters a critic
    trains. Raises ConfigError, before it reads weights, for a reward model whose context the longest prompt and its
    response exceed.
    """
    for model in scorer.models_reading_rollouts(critic_from_reward) if sampler.longest else []:
        what = f"for the reward model {model.path}, the longest prompt with its response"
        length = sampler.longest + config.sampling.response_length
        setup.check_context(length, model.model_config, what, LOWER)
    policy = setup.load_model(config, sampler.tokenizer, sampler.mesh, "lm")
    folder = weights.resolve(config.model.path, config.model.revision, weights=False)
    base, merged = weights.base_and_adapters(folder)
    if config.lora.enabled and not merged:
        for model in scorer.models.values():
            if not (critic_from_reward and model is scorer.model):
                model.share_base_params(base, policy)
    scorer.load()
    return policy


def reference_teacher(config: PPOConfig | GRPOConfig, sampler: Sampler) -> ModelConfig | None:
    """The model of `reference.path`; None without one. Raises what `teacher_model` does, before weights are read."""
    if not config.reference.path:
        return None
    longest = (sampler.longest or config.data.max_length) + config.sampling.response_length
    place = sampler.tokenizer, config.model.path, sampler.mesh, longest
    return teacher_model(_teacher(config.reference, sampler.model), "reference", *place)


def _teacher(reference: Reference, policy: ModelConfig) -> Teacher:
    dtype = reference_dtype(reference, policy)
    return Teacher(path=reference.path, revision=reference.revision, quantize=reference.quantize, dtype=dtype)  # type: ignore[arg-type]


def initial_policy(
    config: PPOConfig | GRPOConfig,
    sampler: Sampler,
    policy: Params,
    lora_key: jax.Array,
    *,
    has_reference: bool = True,
    teacher: ModelConfig | None = None,
) -> InitialPolicy:
    """The initial policy and its reference. Takes over `policy`; with adapters, its base model is the reference, unless
    there is a `teacher` (of `reference.path`)."""
    model, mesh, lora = sampler.model, sampler.mesh, config.lora

    def make(policy: Params) -> tuple[Params, dict[str, Params], Params | None, Params | None]:
        trained, base = split_trainable(add_adapters(policy, model, lora, lora_key), lora.enabled)
        if not has_reference or teacher:
            return trained, {"policy": base}, None, None
        reference = base or setup.cast_copy(policy, reference_dtype(config.reference, model), mesh)
        if not config.reference.sync_every:
            return trained, {"policy": base, "reference": reference}, reference, None
        moving = setup.cast_copy(trained, "float32", mesh) if base else reference
        return trained, {"policy": base, "reference": base}, reference, moving

    trained, frozen, reference, moving = build(make, mesh, policy)
    digest = "" if is_abstract(trained) else setup.params_fingerprint(reference or frozen["policy"])
    if teacher:
        frozen["reference"] = reference = load_teacher(_teacher(config.reference, model), teacher, mesh)
    if is_abstract(trained):
        return InitialPolicy(trained, frozen, reference, moving, digest)
    if config.reference.offload:
        frozen["reference"] = reference = sharding.to_host(reference)
    return InitialPolicy(trained, frozen, reference, moving, digest)


def reference_dtype(reference: Reference, policy: ModelConfig) -> str:
    """Storage dtype of the reference. A moving average stays in float32, because small steps would be rounded away."""
    if reference.dtype != "auto":
        return reference.dtype
    return "float32" if reference.sync_every and reference.sync_alpha < 1 else policy.dtype


def policy_params(params: dict[str, Params], frozen: dict[str, Params]) -> Params:
    """The policy's parameters: what trains laid over its frozen base."""
    return {**frozen["policy"], **params["policy"]}


def reference_params(state: TrainState, frozen: dict[str, Params]) -> Params:
    """The reference's current parameters: the part that moves (`reference.sync_every`) laid over the frozen part."""
    return {**frozen["reference"], **(state.reference or {})}
