from jaxrlhf.training.grpo.trainer import GRPOTrainer

__all__ = ["GRPOTrainer"]
