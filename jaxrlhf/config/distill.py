"""Config of distillation from a teacher."""

from typing import NamedTuple

from jaxrlhf.config.base import FilePath, Fraction, Positive, section
from jaxrlhf.config.model import Teacher
from jaxrlhf.config.sampling import Generation, Sampling
from jaxrlhf.config.sft import SupervisedConfig


@section
class Distill:
    """Generalised knowledge distillation (GKD, https://arxiv.org/abs/2306.13649)."""

    lmbda: Fraction = 0.5
    """Share of the batches whose completions the student samples; the others have those of the data. 1: on-policy
    distillation, for which the data may be prompts alone. 0: supervised."""
    beta: Fraction = 0.5
    """Divergence between teacher and student for each token. 0: forward KL(teacher, student), which covers all that the
    teacher does. 1: reverse KL(student, teacher), which prefers what it does most. Between: generalised Jensen-Shannon
    divergence, beta KL(teacher, m) + (1 - beta) KL(student, m) with m = beta teacher + (1 - beta) student."""
    temperature: Positive = 1.0
    """Temperature of both distributions in the divergence; `sampling.temperature` is that of the samples."""


class Draws(NamedTuple):
    """The numbers of the responses of a batch, as those of PPO and GRPO have them."""

    batch_size: int
    group: int = 1


@section
class DistillConfig(SupervisedConfig):
    """On-policy distillation: a student learns the probabilities of a teacher on completions of its own, or of the
    data."""

    method = "distill"
    run_dir: FilePath = "runs/distill"
    teacher: Teacher = Teacher()
    distill: Distill = Distill()
    sampling: Sampling = Sampling()
    """Of the student's completions to learn on, and of the samples printed during training."""
    rollout: Generation = Generation()

    @property
    def settings(self) -> Draws:
        return Draws(self.train.batch_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.packing:
            raise ValueError("train.packing is true, and distillation does not pack rows; leave it out")
        if self.train.micro_batch_tokens:
            raise ValueError(
                f"train.micro_batch_tokens is {self.train.micro_batch_tokens}, and distillation also trains on "
                "responses of different prompts, which begin in different columns; use train.micro_batch_size"
            )
        if self.rollout.devices:
            raise ValueError(
                f"rollout.devices is {self.rollout.devices}, which is for PPO and GRPO; distillation samples and "
                "trains on the same devices; leave it out"
            )
