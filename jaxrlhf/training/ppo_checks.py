"""What is refused of a PPO run before it has cost anything: before weights are read, before a response is drawn."""

from collections.abc import Sequence

import jax

from jaxrlhf import sharding
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training import setup
from jaxrlhf.training.ppo_roles import critic_model
from jaxrlhf.training.ppo_rollout import LOWER


def check_run(
    config: PPOConfig, model: ModelConfig, scorer: Scorer, mesh: jax.sharding.Mesh, longest: int, updates: int
) -> None:
    """Raise ConfigError for what models and devices cannot do, as far as descriptions of them tell. `longest` is the
    length of the longest prompt (0: not known)."""
    ppo, size = config.ppo, config.ppo.batch_size
    for section in ("optim", "reference"):
        if getattr(config, section).offload:
            sharding.check_host_memory(mesh, f"{section}.offload")
    if config.critic.warmup_updates >= updates:
        raise ConfigError(
            f"critic.warmup_updates is {config.critic.warmup_updates} and the run has {updates} updates: the policy "
            "would never learn; give fewer, or raise ppo.total_episodes"
        )
    from_reward = config.critic.init == "reward"
    if from_reward and not scorer.shares_tokenizer:
        raise ConfigError(
            "critic.init is 'reward' but the reward model reads other tokens than the policy; use 'policy'"
        )
    critic_model(config, model, scorer.model and scorer.model.described)
    for reader in scorer.readers(from_reward) if longest else []:
        what = f"for the reward model {reader.path}, the longest prompt with its response"
        setup.check_context([longest + config.sampling.response_length], reader.described, what, LOWER)
    sharding.check_rows(ppo.micro_rows(size), mesh, "ppo.micro_batch_size, or a mini-batch,")
    sharding.check_rows(ppo.annotation_rows(size), mesh, "ppo.local_rollout_forward_batch_size")


def check_step(config: PPOConfig, mesh: jax.sharding.Mesh, prompts: Sequence[str], step: int, updates: int) -> None:
    """Raise ConfigError for prompts that `ppo_step` cannot take as update number `step` of so many."""
    ppo = config.ppo
    if isinstance(prompts, str):
        raise ConfigError("ppo_step got one text; it takes a list of prompts")
    multiple = ppo.num_mini_batches * (ppo.micro_batch_size or 1)
    if not prompts or len(prompts) % multiple:
        raise ConfigError(f"ppo_step got {len(prompts)} prompts; it needs a positive multiple of {multiple}")
    if len(prompts) != ppo.batch_size and ppo.replay:
        raise ConfigError(f"ppo_step got {len(prompts)} prompts; with ppo.replay it needs {ppo.batch_size}")
    sharding.check_rows(ppo.micro_rows(len(prompts)), mesh, "ppo_step: rows of a forward pass")
    if len(prompts) % ppo.annotation_rows(len(prompts)):
        raise ConfigError(
            f"ppo_step got {len(prompts)} prompts; ppo.local_rollout_forward_batch_size is "
            f"{ppo.local_rollout_forward_batch_size}, which does not divide them"
        )
    if step >= updates and config.optim.schedule != "constant":
        raise ConfigError(
            f"the learning rate schedule ended after {updates} updates (ppo.total_episodes / ppo.batch_size); raise "
            "ppo.total_episodes or set optim.schedule: constant"
        )
