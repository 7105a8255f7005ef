"""What is refused of every on-policy run's config."""

from typing import Any

from jaxrlhf.config.base import nearest_divisor

_NO_PATHWISE = (
    "a reward is a constant to the gradient, so the part that flows through the estimate is lost, which near the "
    "reference is nearly all of it; use k1, or a KL in the loss"
)
WRONG_KL = {
    (
        "k1",
        "loss",
    ): "its expected gradient is zero, so nothing would hold the policy; use k2, k3, or a KL in the reward",
    ("k2", "reward"): _NO_PATHWISE,
    ("k3", "reward"): _NO_PATHWISE,
}
"""Why an estimator of the KL has the wrong gradient in that place."""


def check(method: str, config: Any, learnt: int) -> None:
    """Raise ValueError for what does not go together in the config of a `method` that learns from so many completions
    per update."""
    settings, sampling = getattr(config, method), config.sampling
    filters = sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.min_length
    if sampling.renormalise_logprobs and not filters:
        raise ValueError(
            "sampling.renormalise_logprobs is true but sampling filters nothing: nothing to renormalise; "
            "set top_k, top_p, min_p or min_length, or leave it false"
        )
    _check_rows(method, settings, learnt)
    if config.lora.enabled and config.lora.dropout:
        raise ValueError(
            f"lora.dropout is {config.lora.dropout:g}: pi / pi_old would not be 1 before anything is learnt; set 0"
        )
    if config.scores.overlong_buffer > sampling.response_length:
        raise ValueError(
            f"scores.overlong_buffer ({config.scores.overlong_buffer}) is more than sampling.response_length "
            f"({sampling.response_length}): every response would be too long; give fewer tokens"
        )
    _check_reference(config)
    validation = config.validation
    wanted = [key for key in ("eval_steps", "keep_best", "patience", "reward_model") if getattr(validation, key)]
    if wanted and not (config.data.validation_path or config.data.validation_fraction):
        raise ValueError(
            f"validation.{wanted[0]} is set but there are no held-out prompts; give data.validation_path or "
            "data.validation_fraction"
        )


def _check_rows(method: str, settings: Any, learnt: int) -> None:
    if learnt % settings.num_mini_batches:
        raise ValueError(
            f"{method}.num_mini_batches ({settings.num_mini_batches}) must divide {method}.batch_size ({learnt}); "
            f"{nearest_divisor(settings.num_mini_batches, learnt)} would"
        )
    rows = learnt // settings.num_mini_batches
    if settings.micro_batch_size and rows % settings.micro_batch_size:
        raise ValueError(
            f"{method}.micro_batch_size ({settings.micro_batch_size}) must divide a mini-batch ({rows} rows, that is "
            f"{method}.batch_size / {method}.num_mini_batches); {nearest_divisor(settings.micro_batch_size, rows)} "
            "would"
        )
    scored = settings.local_rollout_forward_batch_size
    if scored and learnt % scored:
        raise ValueError(
            f"{method}.local_rollout_forward_batch_size ({scored}) must divide {method}.batch_size ({learnt}); "
            f"{nearest_divisor(scored, learnt)} would"
        )


def _check_reference(config: Any) -> None:
    """Small moves are not rounded away, and what is no model of its own cannot leave the device."""
    reference = config.reference
    if reference.sync_alpha < 1 and reference.dtype == "bfloat16":
        raise ValueError(
            "reference.dtype is bfloat16 with reference.sync_alpha below 1: small moves would be rounded away; "
            "use float32, or auto"
        )
    reason = ""
    if config.lora.enabled:
        reason = "lora.enabled is too: the reference is the model under the policy's adapters, and no second copy"
    elif reference.sync_every:
        reason = f"reference.sync_every is {reference.sync_every}: an update moves it, on the device"
    if reference.offload and reason:
        raise ValueError(f"reference.offload is true, and {reason}; leave it false")
