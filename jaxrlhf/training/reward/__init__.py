from jaxrlhf.training.reward.trainer import RewardTrainer

__all__ = ["RewardTrainer"]
