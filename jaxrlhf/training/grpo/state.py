"""The initial state of a group-relative run: policy and reference parameters, the optimizer, and the update's spec."""

from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import GRPOConfig
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.training.abstract import build, is_abstract
from jaxrlhf.training.adapters import add_adapters, split_trainable
from jaxrlhf.training.grpo.update import GRPOSpec
from jaxrlhf.training.on_policy.policy import reference_dtype
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.setup import cast_copy, params_fingerprint
from jaxrlhf.training.state import State
from jaxrlhf.types import Params


def initial_state(
    config: GRPOConfig, sampler: Sampler, policy: Params, updates: int, lora_key: Array
) -> tuple[State, dict[str, Params], GRPOSpec, str]:
    """(state, frozen parameters by role, spec, hash of the reference) of a run of so many `updates`.

    Takes over `policy`; with adapters, its base model is the reference. There is no reference where nothing uses one.
    """
    grpo, model, mesh = config.grpo, sampler.model, sampler.mesh

    def initial_params(policy: Params) -> tuple[Params, dict[str, Params], Params | None]:
        trained, base = split_trainable(add_adapters(policy, model, config.lora, lora_key), config.lora.enabled)
        if not grpo.has_reference:
            return trained, {"policy": base}, None
        reference = base or cast_copy(policy, reference_dtype(config.reference, model), mesh)
        if not config.reference.sync_every:
            return trained, {"policy": base, "reference": reference}, None
        moving = cast_copy(trained, "float32", mesh) if base else reference
        return trained, {"policy": base, "reference": base}, moving

    trained, frozen, moving = build(initial_params, mesh, policy)
    hashed = frozen["policy"] or {**frozen.get("reference", {}), **(moving or {})}
    digest = "" if is_abstract(trained) else params_fingerprint(hashed)
    if config.reference.offload and not is_abstract(trained):
        frozen["reference"] = sharding.to_host(frozen["reference"])
    steps = updates * grpo.num_iterations * grpo.num_mini_batches
    optimizers = {"policy": make_optimizer(config.optim, config.optim.learning_rate, steps)}
    spec = GRPOSpec(
        policy=model,
        optimizers=tuple(optimizers.items()),
        grpo=grpo,
        response_length=config.sampling.response_length,
        temperature=config.sampling.temperature,
        mesh=mesh,
        sync_every=config.reference.sync_every,
        sync_alpha=config.reference.sync_alpha,
        rejected=_rejected_tokens(config, sampler.tokenizer),
    )
    state = State(
        {"policy": trained},
        optimizers,
        mesh,
        grpo.kl_weight,
        config.optim.offload,
        score_stats=sharding.put_whole(no_stats(), mesh),
        reference=moving,
    )
    return state, frozen, spec, digest


def _rejected_tokens(config: GRPOConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of `grpo.rejected_text` as a whole response, if it is set. Raises ConfigError if they do not fit."""
    text, length = config.grpo.rejected_text, config.sampling.response_length
    if text is None:
        return ()
    tokens = tokenizer.encode_batch([tokenizer.escape(text)], [True])[0]
    tokens += [tokenizer.eos_id] * (tokenizer.eos_id is not None)
    if not 0 < len(tokens) <= length:
        raise ConfigError(
            f"grpo.rejected_text has {len(tokens)} tokens with its end, and a response may have from 1 to {length}; "
            "change the text, or sampling.response_length"
        )
    return tuple(tokens)
