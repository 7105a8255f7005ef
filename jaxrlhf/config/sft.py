"""Config of supervised fine-tuning, and what the configs of all supervised methods share."""

from typing import Literal

from jaxrlhf.config.base import Bool, FilePath, check_divides, section
from jaxrlhf.config.sampling import Sampling
from jaxrlhf.config.sections import BaseConfig, Train


@section
class SupervisedConfig(BaseConfig):
    """Base of the configs of SFT, reward models and DPO."""

    train: Train = Train()

    def __post_init__(self) -> None:
        """Check options against each other. Raises ValueError."""
        super().__post_init__()
        if self.optim.offload:
            raise ValueError(
                "optim.offload is true: it is for PPO and GRPO. Supervised training needs the optimizer state in every "
                "step, so it would save nothing; optim.state_dtype: bfloat16, train.micro_batch_size and lora.enabled "
                "do"
            )
        if self.train.micro_batch_tokens:
            for option, why in (
                ("micro_batch_size", "both size micro-batches"),
                ("packing", "packed rows are all full"),
            ):
                if getattr(self.train, option):
                    raise ValueError(f"train.micro_batch_tokens and train.{option} are both set: {why}; leave one out")
        if self.train.micro_batch_size:
            total = f"train.batch_size ({self.train.batch_size})"
            check_divides("train.micro_batch_size", self.train.micro_batch_size, total, self.train.batch_size)


@section
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning."""

    method = "sft"
    run_dir: FilePath = "runs/sft"
    completion_only: Bool = True
    """Compute the loss on completions (assistant turns) only; false: on all tokens. Plain text without a prompt is
    always trained on in full."""
    loss_type: Literal["nll", "dft"] = "nll"
    """Training loss per token. nll: cross-entropy, -log p. dft: dynamic fine-tuning, -p log p with p as a weight
    without a gradient (https://arxiv.org/abs/2508.05629). Held-out rows are measured with nll in either case."""
    sampling: Sampling = Sampling()
    """Used for the samples printed during training."""
