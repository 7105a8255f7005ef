"""Errors of PPO runs that are raised before weights are read, beside those of `on_policy/checks.py`."""

from collections.abc import Sequence

from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.ppo.critic import critic_model


def check_run(config: PPOConfig, model: ModelConfig, scorer: Scorer, updates: int) -> None:
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
    critic_model(config, model, scorer.model and scorer.model.model_config)


def check_step(config: PPOConfig, prompts: Sequence[str]) -> None:
    """Raise ConfigError for a number of prompts that replay does not allow."""
    if len(prompts) != config.ppo.batch_size and config.ppo.replay:
        raise ConfigError(f"ppo_step got {len(prompts)} prompts; with ppo.replay it needs {config.ppo.batch_size}")
