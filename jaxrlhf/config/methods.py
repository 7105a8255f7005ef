"""What a run of each method is configured by, and which combinations are refused."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jaxrlhf.config import online
from jaxrlhf.config.base import Bool, NonNegative, Positive, Seed, nearest_divisor, section
from jaxrlhf.config.lora import LoRA
from jaxrlhf.config.ppo import PPO, Alarms, Critic, Reference, Scores, Validation
from jaxrlhf.config.rewards import RewardSource
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

_ADAM_PPO: dict[str, Any] = {"eps": 1e-5, "learning_rate": 3e-6}


@section
class SFTConfig:
    """Supervised fine-tuning."""

    run_dir: str = "runs/sft"
    seed: Seed = 0
    model: ModelSource = Field(default_factory=ModelSource)
    lora: LoRA = Field(default_factory=LoRA)
    tokenizer: TokenizerSource = Field(default_factory=TokenizerSource)
    data: Data = Field(default_factory=Data)
    completion_only: Bool = True
    """Learn completions (assistant turns) only; false: every token. Rows of plain text are always learnt whole."""
    train: Train = Field(default_factory=Train)
    optim: Optim = Field(default_factory=Optim)
    sampling: Sampling = Field(default_factory=Sampling)
    """For the samples that are printed while it trains."""
    mesh: Mesh = Field(default_factory=Mesh)
    logging: Logging = Field(default_factory=Logging)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        check_supervised(self.train, self.optim)


@section
class RewardConfig:
    """A reward model from preference pairs, rankings, labels or scores."""

    run_dir: str = "runs/reward"
    seed: Seed = 0
    model: ModelSource = Field(default_factory=ModelSource)
    lora: LoRA = Field(default_factory=LoRA)
    head: Literal["linear", "mlp"] = "linear"
    frozen_trunk: Bool = False
    """Train the head alone."""
    loss: Literal["pairwise", "ties", "ranking", "classification", "regression"] = "pairwise"
    """What it learns from. pairwise: pairs, chosen and rejected (Bradley-Terry). ties: pairs of which some are ties
    (Rao-Kupper; column tie or tied, or label: tie). ranking: a list `responses`, best first or with `ranks`
    (Plackett-Luce). classification: responses with a `label`, good or bad; as a reward, the probability of good.
    regression: responses with a `score`."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] = 0.0
    """pairwise: share of the pairs that are taken to be the wrong way round."""
    margins: Bool = False
    """pairwise: a score should be higher by the column `margin`, and not just higher."""
    center_rewards_coefficient: NonNegative = 0.0
    """pairwise and ties: times the mean of (chosen + rejected)^2, which puts the scores around 0."""
    nu: Positive = 0.5
    """ties: half the width of the band of score differences that count as a tie."""
    tokenizer: TokenizerSource = Field(default_factory=TokenizerSource)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    optim: Optim = Field(default_factory=Optim)
    mesh: Mesh = Field(default_factory=Mesh)
    logging: Logging = Field(default_factory=Logging)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        check_supervised(self.train, self.optim)
        if self.frozen_trunk and self.lora.enabled:
            raise ValueError("frozen_trunk is true and lora.enabled too: adapters are how a trunk trains; choose one")
        pairs = ("pairwise", "ties")
        for key, default, losses in (
            ("label_smoothing", 0.0, ("pairwise",)), ("margins", False, ("pairwise",)),
            ("center_rewards_coefficient", 0.0, pairs), ("nu", 0.5, ("ties",)),
        ):  # fmt: skip
            if getattr(self, key) != default and self.loss not in losses:
                raise ValueError(
                    f"{key} ({getattr(self, key)!r}) has no meaning with loss: {self.loss}, only with "
                    f"{' or '.join(losses)}; leave it out"
                )
        if self.train.packing and (self.loss != "pairwise" or self.margins):
            said = "margins is true" if self.margins else f"loss is {self.loss}"
            raise ValueError(
                f"train.packing is true and {said}: a packed row keeps where its texts end, and not what is said of "
                "them; it is for plain pairs"
            )


@section
class PPOConfig:
    """PPO against any sum of reward models, reward functions, endpoints and people."""

    run_dir: str = "runs/ppo"
    seed: Seed = 0
    model: ModelSource = Field(default_factory=ModelSource)
    lora: LoRA = Field(default_factory=LoRA)
    tokenizer: TokenizerSource = Field(default_factory=TokenizerSource)
    reference: Reference = Field(default_factory=Reference)
    data: Data = Field(default_factory=Data)
    reward: RewardSource = Field(default_factory=RewardSource)
    scores: Scores = Field(default_factory=Scores)
    critic: Critic = Field(default_factory=Critic)
    ppo: PPO = Field(default_factory=PPO)
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: Generation = Field(default_factory=Generation)
    optim: Optim = Field(default_factory=lambda: Optim(**_ADAM_PPO))
    """A learning_rate of 3e-6 and an eps of 1e-5 unless given; an `Optim` made in Python has its own defaults."""
    validation: Validation = Field(default_factory=Validation)
    alarms: Alarms = Field(default_factory=Alarms)
    mesh: Mesh = Field(default_factory=Mesh)
    logging: Logging = Field(default_factory=Logging)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)

    @field_validator("optim", mode="before")
    @classmethod
    def _part_of_optim(cls, given: Any) -> Any:
        return {**_ADAM_PPO, **given} if isinstance(given, dict) else given

    def __post_init__(self) -> None:
        ppo = self.ppo
        reason = online.WRONG_KL.get((ppo.kl_estimator, ppo.kl_in))
        if reason:
            raise ValueError(f"ppo.kl_estimator {ppo.kl_estimator} does not go with ppo.kl_in {ppo.kl_in}: {reason}")
        online.check("ppo", self, ppo.batch_size)
        if self.critic.init == "reward" and not any(part.model for part in self.reward.parts()):
            raise ValueError("critic.init is 'reward' but reward.model is empty; give a reward model or use 'policy'")
        if self.reference.offload and self.critic.trunk == "frozen" and self.critic.init == "policy":
            raise ValueError(
                "reference.offload is true, and critic.trunk is frozen: the critic's trunk is the reference's own "
                "arrays; leave it false"
            )
        _check_ppo(ppo)


def _check_ppo(ppo: PPO) -> None:
    """What else does not go together."""
    top = 1 + (ppo.cliprange_high or ppo.cliprange)
    if ppo.dual_clip is not None and ppo.dual_clip <= top:
        raise ValueError(
            f"ppo.dual_clip is {ppo.dual_clip}; it must be above 1 + ppo.cliprange_high ({top:g}), 3.0 say"
        )
    if ppo.kl_target is not None and not ppo.kl_coef:
        raise ValueError("ppo.kl_coef is 0, and ppo.kl_target multiplies it: it would stay 0; start from 0.05, say")
    if ppo.kl_target is not None and 0.2 * ppo.batch_size >= ppo.kl_horizon:
        raise ValueError(
            f"ppo.kl_horizon ({ppo.kl_horizon:g}) is so near ppo.batch_size ({ppo.batch_size}) that one update could "
            "turn kl_coef negative; 10000 is usual"
        )


def check_supervised(train: Train, optim: Optim) -> None:
    """What does not go together in supervised training."""
    if optim.offload:
        raise ValueError(
            "optim.offload is true: in supervised training every step needs the moments, and what comes between steps "
            "takes less memory than a step, so nothing would be saved; it is for PPO. optim.state_dtype: bfloat16, "
            "train.micro_batch_size and lora.enabled do save memory here"
        )
    if train.micro_batch_size and train.batch_size % train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size ({train.micro_batch_size}) must divide train.batch_size ({train.batch_size}); "
            f"{nearest_divisor(train.micro_batch_size, train.batch_size)} would"
        )
