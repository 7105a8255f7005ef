"""The metric that ranks the checkpoints of a run, and its direction."""

from collections.abc import Collection
from typing import Literal

from jaxrlhf.config import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError
from jaxrlhf.training.setup import RunConfig

Best = Literal["min", "max"] | None
LESS_IS_BETTER = ("eval/loss", "eval/nll_loss", "eval/entropy", "eval/ece", "eval/absolute_error", "eval/kl")


def best_of(config: RunConfig) -> Best:
    """The direction of the metric that ranks checkpoints; None if the run does not keep its best one."""
    if isinstance(config, PPOConfig | GRPOConfig):
        return config.validation.mode if config.validation.keep_best else None
    if not config.train.keep_best:
        return None
    if config.train.mode != "auto":
        return config.train.mode
    return "min" if metric_of(config) in LESS_IS_BETTER else "max"


def checkpoints_at_once(config: RunConfig) -> int:
    """The most checkpoints that a run has on disk: the last ones, the best one, and the next while it is written."""
    return config.checkpoint.keep + (best_of(config) is not None and config.data.holds_out) + 1


def metric_of(config: RunConfig) -> str:
    """The evaluation metric that ranks checkpoints."""
    match config:
        case PPOConfig() | GRPOConfig():
            return config.validation.metric
        case DPOConfig():
            default = "eval/rewards/margins" if config.dpo.loss == "kto" else "eval/rewards/accuracies"
        case RewardConfig():
            default = "eval/loss" if config.loss == "regression" else "eval/accuracy"
        case SFTConfig() | DistillConfig():
            default = "eval/loss"
    return config.train.metric or default


def check_metric(
    config: SFTConfig | RewardConfig | DPOConfig | DistillConfig, known: Collection[str], held_out: bool
) -> None:
    """Raise ConfigError for a `train.metric` that evaluations do not give (`known`: those they do), or if nothing is
    held out to evaluate."""
    metric = config.train.metric
    if metric and not held_out:
        raise ConfigError(
            f"train.metric is '{metric}' but there are no held-out rows to measure it on; give "
            "data.validation_path, data.validation_split or data.validation_fraction"
        )
    if metric and metric not in known:
        raise ConfigError(
            f"train.metric: no evaluation here gives '{metric}'{did_you_mean(metric, sorted(known))}; there are "
            f"{', '.join(sorted(known))}"
        )
