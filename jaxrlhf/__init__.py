"""RLHF for causal language models in JAX: SFT, reward models, DPO and PPO, between Hugging Face models.

The names below are imported when they are first used, so that neither `import jaxrlhf` nor the command line loads jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrlhf.config import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, Sampling, SFTConfig
    from jaxrlhf.data.tokenizer import load_tokenizer
    from jaxrlhf.logprobs import last_token_scores
    from jaxrlhf.models import ModelConfig
    from jaxrlhf.rewards.sources.model import score
    from jaxrlhf.rollout.decode import generate
    from jaxrlhf.rollout.inference_copy import inference_copy
    from jaxrlhf.training.distill.trainer import DistillTrainer
    from jaxrlhf.training.dpo.trainer import DPOTrainer
    from jaxrlhf.training.grpo.trainer import GRPOTrainer
    from jaxrlhf.training.on_policy.inspection import inspect
    from jaxrlhf.training.on_policy.update import sequence_logprobs
    from jaxrlhf.training.ppo.trainer import PPOTrainer
    from jaxrlhf.training.reward.trainer import RewardTrainer
    from jaxrlhf.training.sft import SFTTrainer
    from jaxrlhf.types import Prompts
    from jaxrlhf.weights import export, load, push_to_hub

    __version__: str

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DistillConfig",
    "DistillTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "Prompts",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Sampling",
    "__version__",
    "export",
    "generate",
    "inference_copy",
    "inspect",
    "last_token_scores",
    "load",
    "load_tokenizer",
    "push_to_hub",
    "score",
    "sequence_logprobs",
]

_HOMES = {
    "DPOConfig": "jaxrlhf.config",
    "DistillConfig": "jaxrlhf.config",
    "DistillTrainer": "jaxrlhf.training.distill.trainer",
    "DPOTrainer": "jaxrlhf.training.dpo.trainer",
    "GRPOConfig": "jaxrlhf.config",
    "GRPOTrainer": "jaxrlhf.training.grpo.trainer",
    "ModelConfig": "jaxrlhf.models",
    "PPOConfig": "jaxrlhf.config",
    "PPOTrainer": "jaxrlhf.training.ppo.trainer",
    "Prompts": "jaxrlhf.types",
    "RewardConfig": "jaxrlhf.config",
    "RewardTrainer": "jaxrlhf.training.reward.trainer",
    "SFTConfig": "jaxrlhf.config",
    "SFTTrainer": "jaxrlhf.training.sft",
    "Sampling": "jaxrlhf.config",
    "export": "jaxrlhf.weights",
    "generate": "jaxrlhf.rollout.decode",
    "inference_copy": "jaxrlhf.rollout.inference_copy",
    "inspect": "jaxrlhf.training.on_policy.inspection",
    "last_token_scores": "jaxrlhf.logprobs",
    "load": "jaxrlhf.weights",
    "load_tokenizer": "jaxrlhf.data.tokenizer",
    "push_to_hub": "jaxrlhf.weights",
    "score": "jaxrlhf.rewards.sources.model",
    "sequence_logprobs": "jaxrlhf.training.on_policy.update",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxrlhf")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxrlhf' has no attribute '{name}'")
    if _HOMES[name] != "jaxrlhf.config":  # the one that does without jax
        from jaxrlhf import runtime

        runtime.configure()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
