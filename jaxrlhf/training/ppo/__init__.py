from jaxrlhf.training.ppo.trainer import PPOTrainer

__all__ = ["PPOTrainer"]
