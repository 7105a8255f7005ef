"""Every run's configuration: frozen, strict and complete. A default is said here and nowhere else; no jax in sight.

A run's config is one of `SFTConfig`, `RewardConfig`, `DPOConfig`, `PPOConfig`, `GRPOConfig`; each is a record of
sections.
`config_file.py` reads them from YAML and overrides. Names are TRL's where the meaning is TRL's.
"""

from jaxrlhf.config.base import DType, replace
from jaxrlhf.config.dpo import DPO, DPOConfig
from jaxrlhf.config.grpo import GRPO, GRPOConfig
from jaxrlhf.config.lora import LoRA
from jaxrlhf.config.methods import PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.ppo import PPO, Alarms, Critic, Reference, Scores, Validation
from jaxrlhf.config.rewards import Component, RewardSource
from jaxrlhf.config.sections import (
    Checkpoint,
    Data,
    Generation,
    Logging,
    Mesh,
    ModelSource,
    Optim,
    Sampling,
    TokenizerSource,
    Train,
)

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "Alarms",
    "Checkpoint",
    "Component",
    "Critic",
    "DPOConfig",
    "DType",
    "Data",
    "GRPOConfig",
    "Generation",
    "LoRA",
    "Logging",
    "Mesh",
    "ModelSource",
    "Optim",
    "PPOConfig",
    "Reference",
    "RewardConfig",
    "RewardSource",
    "SFTConfig",
    "Sampling",
    "Scores",
    "TokenizerSource",
    "Train",
    "Validation",
    "replace",
]
