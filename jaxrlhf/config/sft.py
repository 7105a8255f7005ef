"""Config of supervised fine-tuning, and the checks that all supervised methods share."""

from jaxrlhf.config.base import Bool, Seed, check_divides, section
from jaxrlhf.config.model import LoRA, ModelSource, TokenizerSource
from jaxrlhf.config.sections import Checkpoint, Data, Logging, Mesh, Optim, Sampling, Train


@section
class SFTConfig:
    """Supervised fine-tuning."""

    run_dir: str = "runs/sft"
    """Output directory: checkpoints, metrics and the exported model."""
    seed: Seed = 0
    """Random seed."""
    model: ModelSource = ModelSource()
    lora: LoRA = LoRA()
    tokenizer: TokenizerSource = TokenizerSource()
    data: Data = Data()
    completion_only: Bool = True
    """Compute the loss on completions (assistant turns) only; false: on all tokens. Plain text without a prompt is
    always trained on in full."""
    train: Train = Train()
    optim: Optim = Optim()
    sampling: Sampling = Sampling()
    """Used for the samples printed during training."""
    mesh: Mesh = Mesh()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self) -> None:
        check_supervised(self.train, self.optim)


def check_supervised(train: Train, optim: Optim) -> None:
    """Check the options of SFT, reward and DPO runs. Raises ValueError."""
    if optim.offload:
        raise ValueError(
            "optim.offload is true: it is for PPO and GRPO. Supervised training needs the optimizer state in every "
            "step, so it would save nothing; optim.state_dtype: bfloat16, train.micro_batch_size and lora.enabled do"
        )
    if train.micro_batch_size:
        total = f"train.batch_size ({train.batch_size})"
        check_divides("train.micro_batch_size", train.micro_batch_size, total, train.batch_size)
