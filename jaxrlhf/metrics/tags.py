"""Names of metrics in TensorBoard, W&B and trackio: ours, or TRL's where TRL logs the same quantity."""

from collections.abc import Mapping
from typing import Literal, TypeVar

T = TypeVar("T")

_ON_POLICY = {
    "objective/scores": ("objective/scores", "rewards/mean"),
    "objective/kl": ("objective/kl", "kl_divergence"),
}
TRL: dict[str, dict[str, tuple[str, ...]]] = {
    "ppo": {
        **_ON_POLICY,
        "loss/policy_avg": ("loss/policy_avg", "loss"),
        "learning_rate": ("learning_rate", "lr"),
    },
    "grpo": {
        **_ON_POLICY,
        "loss/policy_avg": ("loss",),
        "objective/scores": ("reward", "rewards/mean"),
        "policy/entropy_avg": ("entropy",),
        "policy/grad_norm": ("grad_norm",),
        "policy/clipfrac_low_avg": ("clip_ratio/low_mean",),
        "policy/clipfrac_high_avg": ("clip_ratio/high_mean",),
        "policy/clipfrac_avg": ("clip_ratio/region_mean",),
        "tokens/mean_length": ("completions/mean_length",),
        "tokens/min_length": ("completions/min_length",),
        "tokens/max_length": ("completions/max_length",),
    },
}
"""Method -> metric -> its tags with `logging.tags: trl`. Every other metric keeps its name: SFT, DPO and reward models
have TRL's already. `rewards/mean`, `kl_divergence` and, for PPO, `loss` are in none of TRL's trainers but
commonly logged by scripts around them; they come beside TRL's own name."""


def tagged(numbers: Mapping[str, T], method: str, style: Literal["ours", "trl"], prefix: str = "") -> dict[str, T]:
    """`numbers` by tag: `prefix` is put before those that are not of held-out data, as transformers' Trainer does."""
    table = TRL.get(method, {}) if style == "trl" else {}
    return {
        tag if tag.startswith("eval/") else prefix + tag: value
        for key, value in numbers.items()
        for tag in table.get(key, (key,))
    }
