"""Run configuration: frozen dataclasses, strictly validated. They define every default and do not import jax.

There is one config per method (`SFTConfig`, `RewardConfig`, `DPOConfig`, `PPOConfig`, `GRPOConfig`,
`DistillConfig`), composed of
sections. `config.file` reads them from YAML files and command-line overrides; `config.text` writes them. Options have
TRL's names where they mean the same.
"""

from jaxrlhf.config.base import DType, replace
from jaxrlhf.config.distill import Distill, DistillConfig
from jaxrlhf.config.dpo import DPO, DPOConfig
from jaxrlhf.config.environment import Environment
from jaxrlhf.config.grpo import GRPO, GRPOConfig
from jaxrlhf.config.judge import Judge
from jaxrlhf.config.model import LoRA, ModelSource, Teacher, TokenizerSource
from jaxrlhf.config.on_policy import Alarms, Reference, Scores, Validation
from jaxrlhf.config.ppo import PPO, Critic, PPOConfig
from jaxrlhf.config.reward import RewardConfig
from jaxrlhf.config.reward_source import Component, RewardSource
from jaxrlhf.config.sampling import Generation, Sampling
from jaxrlhf.config.sections import Checkpoint, Data, Logging, Mesh, MixedSource, Optim, Train
from jaxrlhf.config.sft import SFTConfig

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
    "Distill",
    "DistillConfig",
    "Environment",
    "GRPOConfig",
    "Generation",
    "Judge",
    "LoRA",
    "Logging",
    "Mesh",
    "MixedSource",
    "ModelSource",
    "Optim",
    "PPOConfig",
    "Reference",
    "RewardConfig",
    "RewardSource",
    "SFTConfig",
    "Sampling",
    "Scores",
    "Teacher",
    "TokenizerSource",
    "Train",
    "Validation",
    "replace",
]
