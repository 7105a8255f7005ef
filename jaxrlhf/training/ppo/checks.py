"""What is refused of a PPO run before weights are read, beyond what is of any on-policy run (online_checks.py)."""

from collections.abc import Sequence

from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.ppo.roles import critic_model


def check_run(config: PPOConfig, model: ModelConfig, scorer: Scorer, updates: int) -> None:
    """Raise ConfigError for what the critic cannot do, as far as descriptions of models tell."""
    if config.critic.warmup_updates >= updates:
        raise ConfigError(
            f"critic.warmup_updates is {config.critic.warmup_updates} and the run has {updates} updates: the policy "
            "would never learn; give fewer, or raise ppo.total_episodes"
        )
    if config.critic.init == "reward" and not scorer.shares_tokenizer:
        raise ConfigError(
            "critic.init is 'reward' but the reward model reads other tokens than the policy; use 'policy'"
        )
    critic_model(config, model, scorer.model and scorer.model.model_config)


def check_step(config: PPOConfig, prompts: Sequence[str]) -> None:
    """Raise ConfigError for prompts that `ppo_step` cannot take."""
    if len(prompts) != config.ppo.batch_size and config.ppo.replay:
        raise ConfigError(f"ppo_step got {len(prompts)} prompts; with ppo.replay it needs {config.ppo.batch_size}")
