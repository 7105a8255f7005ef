from jaxrlhf.training.dpo.trainer import DPOTrainer

__all__ = ["DPOTrainer"]
