"""Sections, options and checks that the configs of the on-policy methods, PPO and GRPO, share."""

import dataclasses
from typing import Any, Literal

from pydantic import field_validator

from jaxrlhf.config.base import (
    AboveOne,
    BatchSize,
    Bool,
    Count,
    DType,
    FilePath,
    Fraction,
    FractionBelowOne,
    Natural,
    NonNegative,
    Positive,
    PositiveFraction,
    Real,
    check_divides,
    default_of,
    section,
)
from jaxrlhf.config.environment import Environment
from jaxrlhf.config.reward_source import RewardSource
from jaxrlhf.config.sampling import Generation, Sampling
from jaxrlhf.config.sections import BaseConfig


@section
class Reference:
    """The reference model of the KL penalty: a frozen copy of the initial policy, or a teacher."""

    path: FilePath = ""
    """A teacher that the KL is measured to instead: folder, run directory or hub id of a model with the same tokenizer.
    The KL penalty then draws the policy to the teacher (on-policy distillation beside the reward). Empty: the initial
    policy."""
    revision: str | None = None
    """Branch, tag or commit of the teacher on the hub."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the matrices of the teacher's layers, as `lora.quantize`."""
    dtype: DType = "auto"
    """Dtype in which it is stored. auto: the policy's compute dtype. No effect with adapters, whose base model serves
    as the reference, unless there is a teacher."""
    sync_every: Natural = 0
    """Updates between synchronisations of the reference with the policy. 0: never."""
    sync_alpha: PositiveFraction = 1.0
    """Weight of the policy in a synchronisation: reference = sync_alpha * policy + (1 - sync_alpha) * reference."""
    offload: Bool = False
    """Keep the reference in host memory, except while it computes log-probs."""

    def __post_init__(self) -> None:
        if self.path and self.sync_every:
            raise ValueError(
                f"sync_every is {self.sync_every}, and a teacher (path) does not move with the policy; leave one of "
                "them out"
            )
        if not self.path and (self.revision or self.quantize != "none"):
            raise ValueError("revision and quantize are a teacher's, and path is empty; give it, or leave them out")


@section
class Scores:
    """Shaping of sequence scores before they become rewards, in this order."""

    normalise: Literal["none", "reference", "running"] = "none"
    """Normalisation to mean 0 and standard deviation 1. reference: with statistics of reference responses sampled once
    before training (https://arxiv.org/abs/1909.08593). running: with statistics of all scores of the run so far. Both
    are checkpointed."""
    reference_samples: Count = 256
    """Number of responses to sample for `normalise: reference`."""
    scale: Real = 1.0
    """Factor applied to the score: score * scale + shift."""
    shift: Real = 0.0
    """Constant added to the scaled score."""
    clip: Positive | None = None
    """Clip the score to [-clip, clip]. None: no clipping."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response without a stop token or stop string (truncated at the maximum length)."""
    overlong_buffer: Natural = 0
    """Length in tokens of the penalised zone before sampling.response_length: the penalty rises linearly from 0 to
    `overlong_penalty` over it (https://arxiv.org/abs/2503.14476, eq. 13). 0: disabled."""
    overlong_penalty: NonNegative = 1.0
    """Penalty of a response of maximum length, with `overlong_buffer`."""


@section
class Validation:
    """Evaluation on held-out prompts (data.validation_path or data.validation_fraction) during training."""

    eval_steps: Natural = 0
    """Updates between evaluations, besides those at the start and at the end. 0: only these two."""
    max_prompts: Count = 64
    """Number of held-out prompts to use (the first ones). Each is completed greedily and by sampling."""
    metric: str = "eval/scores"
    """Metric that selects the best checkpoint and is watched by `patience`; any metric logged with an evaluation."""
    mode: Literal["max", "min"] = "max"
    """Direction of `metric`: max if higher is better, min if lower."""
    keep_best: Bool = False
    """Keep the checkpoint with the best `metric` and export it at the end."""
    patience: Natural = 0
    """Early stopping: evaluations in a row without improvement before training stops. 0: disabled."""
    reward_model: FilePath = ""
    """A second reward model, not used in training, whose scores are logged to detect over-optimisation."""


@section
class Alarms:
    """Warnings for reward hacking and collapse. They are printed and logged (alarm/...); only `flat_steps` stops the
    run."""

    kl: Positive | None = None
    """Warn if the KL to the reference, in nats per response, exceeds this value. None: disabled."""
    entropy: FractionBelowOne = 0.1
    """Warn if entropy per token falls below this fraction of its value in the first update. 0: disabled."""
    length_correlation: PositiveFraction = 0.9
    """Warn if the absolute correlation between score and response length exceeds this value. 1: disabled."""
    finished: Fraction = 0.5
    """Warn if the fraction of finished responses drops by more than this since the first update. 1: disabled."""
    window: Count = 5
    """Number of updates the values are averaged over; no warnings before that many updates."""
    flat_steps: Natural = 100
    """grpo: updates in a row in which all scores are equal within every group, so that no reward reaches the policy,
    after which the run stops with exit code 6. 0: never."""


@section
class OnPolicy:
    """Options shared by the sections `ppo` and `grpo`."""

    total_episodes: Count = 1024
    """Total number of completions to generate and train on."""
    num_train_epochs: Positive | None = None
    """Passes over the prompts; replaces total_episodes if set."""
    batch_size: BatchSize = 16
    """Completions per update."""
    num_mini_batches: Count = 1
    """Mini-batches (optimizer steps) per epoch; must divide batch_size."""
    micro_batch_size: Count | None = None
    """Rows per forward pass of the update (gradient accumulation). None: a mini-batch. Affects memory and speed, not
    the result."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward pass of update and annotation (prompt, response and padding), in place of micro_batch_size:
    rows of like length share a micro-batch, no wider than they need. Affects memory and speed, not the result."""
    local_rollout_forward_batch_size: Count | None = None
    """Rows per forward pass when computing log-probs (and values) of a rollout; all if there are fewer. None: as in the
    update. Affects memory and speed, not the result."""
    log_ratio_clamp: Positive = 20.0
    """Clamp on |log pi - log pi_old|, so that the ratio stays finite; tokens beyond it have no gradient."""
    kl_beta: Fraction = 1.0
    """Divergence of `kl_estimator: exact`. 1: reverse KL(policy, reference). 0: forward KL(reference, policy). Between:
    generalised Jensen-Shannon divergence, as `distill.beta`."""
    sampler_correction: Literal["none", "truncate", "sequence_truncate", "mask", "sequence_mask", "token_mask"] = "none"
    """Importance correction if the sampler's log-probs differ from those of training (ratio = pi_old / pi_sampler),
    e.g. because of precision. truncate: weight each token by its ratio (gspo, luspo and gmpo: each response by the
    geometric mean), at most `sampler_cap` (https://fengyao.notion.site/off-policy-rl). sequence_truncate: weight each
    response by the product of its ratios, at most `sampler_cap`. mask: drop responses whose product is outside
    [sampler_floor, sampler_cap]. sequence_mask: drop them, and weight the others by the product (masked importance
    sampling). token_mask: weight each token by its ratio, and drop tokens with a ratio outside that range (IcePop)."""
    sampler_cap: AboveOne = 3.0
    """Upper bound of the sampler correction."""
    sampler_floor: PositiveFraction | None = None
    """Lower bound of the sampler correction, of the modes that mask. None: 1 / sampler_cap. IcePop's range is 0.5 to
    5."""

    @property
    def sampler_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the ratio in the sampler correction."""
        return 1 / self.sampler_cap if self.sampler_floor is None else self.sampler_floor, self.sampler_cap

    @property
    def group(self) -> int:
        """Completions per prompt of an update."""
        return 1

    @property
    def has_exact_kl(self) -> bool:
        """Return True if the KL is computed over the whole vocabulary (`kl_estimator: exact`)."""
        return False

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of a pass over the completions of an update."""
        return self.num_mini_batches

    def trained_rows(self, batch: int) -> int:
        """Number of completions out of `batch` that an update trains on."""
        return batch

    def micro_rows(self, batch: int) -> int:
        """Rows per forward pass of an update on `batch` completions."""
        return self.micro_batch_size or self.trained_rows(batch) // self.num_mini_batches

    def annotation_rows(self, batch: int) -> int:
        """Rows per forward pass of annotation. The default is the update's, since bfloat16 products depend on the
        number of rows."""
        return min(self.local_rollout_forward_batch_size or self.micro_rows(batch), self.trained_rows(batch))


_REWARD_HAS_NO_GRADIENT = (
    "a reward is a constant to the gradient, so the part that flows through the estimate, nearly all of it near "
    "the reference, would be lost; use k1, or a KL in the loss"
)
WRONG_KL = {
    ("k1", "loss"): "its expected gradient is zero and would not hold the policy; use k2, k3, or a KL in the reward",
    ("k2", "reward"): _REWARD_HAS_NO_GRADIENT,
    ("k3", "reward"): _REWARD_HAS_NO_GRADIENT,
    ("exact", "reward"): _REWARD_HAS_NO_GRADIENT,
}
"""Why a (kl_estimator, kl_in) combination has a wrong gradient."""


@section
class OnPolicyConfig(BaseConfig):
    """Base of the configs of PPO and GRPO. A subclass has a section named `method`, and its own default of
    `optim`, of which a config file may set a part."""

    reference: Reference = Reference()
    reward: RewardSource = RewardSource()
    environment: Environment = Environment()
    scores: Scores = Scores()
    sampling: Sampling = Sampling()
    rollout: Generation = Generation()
    validation: Validation = Validation()
    alarms: Alarms = Alarms()

    @property
    def settings(self) -> OnPolicy:
        """The section `ppo` or `grpo`."""
        return getattr(self, self.method)

    @property
    def needs_reward(self) -> bool:
        """Return False if there are scores without a reward, or the method learns without scores."""
        return not self.environment.function

    @property
    def kl_option(self) -> str:
        """The option that keeps the policy near its reference."""
        return f"{self.method}.kl_coef"

    @field_validator("optim", mode="before")
    @classmethod
    def _optim_defaults(cls, optim: Any) -> Any:
        return {**dataclasses.asdict(default_of(cls, "optim")), **optim} if isinstance(optim, dict) else optim

    def __post_init__(self) -> None:
        """Check options against each other. Raises ValueError."""
        super().__post_init__()
        sampling, validation, scores = self.sampling, self.validation, self.scores
        filters = sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.min_length
        if sampling.renormalise_logprobs and not filters:
            raise ValueError(
                "sampling.renormalise_logprobs is true but sampling filters nothing: nothing to renormalise; "
                "set top_k, top_p, min_p or min_length, or leave it false"
            )
        if self.rollout.devices and self.settings.sampler_correction == "none":
            raise ValueError(
                f"rollout.devices is {self.rollout.devices}, so responses are drawn by a policy one update older than "
                f"the one that trains on them; set {self.method}.sampler_correction to truncate or mask, or "
                "rollout.devices to 0"
            )
        if self.settings.sampler_floor is not None and not self.settings.sampler_correction.endswith("mask"):
            raise ValueError(
                f"{self.method}.sampler_floor is set, but {self.method}.sampler_correction "
                f"{self.settings.sampler_correction} has no lower bound; it is for mask, sequence_mask and token_mask"
            )
        if self.rollout.devices and self.checkpoint.save_minutes:
            raise ValueError(
                f"checkpoint.save_minutes is {self.checkpoint.save_minutes:g} and rollout.devices "
                f"{self.rollout.devices}: rollouts are drawn ahead until the next checkpoint, whose step must be known "
                "before; use checkpoint.save_every"
            )
        if self.rollout.devices and self.environment.function:
            raise ValueError(
                f"rollout.devices is {self.rollout.devices} and environment.function is set: episodes cannot be drawn "
                "during an update; set rollout.devices to 0"
            )
        self._check_batch_sizes()
        if scores.overlong_buffer > sampling.response_length:
            raise ValueError(
                f"scores.overlong_buffer ({scores.overlong_buffer}) is more than sampling.response_length "
                f"({sampling.response_length}): every response would be penalised; lower scores.overlong_buffer"
            )
        self._check_reference()
        if self.reference.path and sampling.renormalise_logprobs:
            raise ValueError(
                "sampling.renormalise_logprobs is true, and the teacher of reference.path has a vocabulary of its own: "
                "its log-probs are over all of it; leave one of them out"
            )
        wanted = [key for key in ("eval_steps", "keep_best", "patience", "reward_model") if getattr(validation, key)]
        if wanted and not self.data.holds_out:
            raise ValueError(
                f"validation.{wanted[0]} is set but there are no held-out prompts; give data.validation_path, "
                "data.validation_split or data.validation_fraction"
            )

    def _check_batch_sizes(self) -> None:
        method, settings = self.method, self.settings
        batch_size = settings.trained_rows(settings.batch_size)
        total = f"{method}.batch_size ({batch_size})"
        check_divides(f"{method}.num_mini_batches", settings.num_mini_batches, total, batch_size)
        rows = batch_size // settings.num_mini_batches
        if settings.micro_batch_tokens:
            for option in ("micro_batch_size", "local_rollout_forward_batch_size"):
                if getattr(settings, option):
                    raise ValueError(
                        f"{method}.micro_batch_tokens and {method}.{option} both size the forward passes; leave one out"
                    )
        if settings.micro_batch_size:
            mini_batch = f"a mini-batch ({rows} rows: {method}.batch_size / {method}.num_mini_batches)"
            check_divides(f"{method}.micro_batch_size", settings.micro_batch_size, mini_batch, rows)
        annotation_rows = settings.annotation_rows(settings.batch_size)
        check_divides(f"{method}.local_rollout_forward_batch_size", annotation_rows, total, batch_size)

    def _check_reference(self) -> None:
        reference, method = self.reference, self.method
        if not self.settings.has_exact_kl:
            if self.settings.kl_beta != 1:
                raise ValueError(f"{method}.kl_beta is set, and it is an option of {method}.kl_estimator: exact")
        elif self.sampling.renormalise_logprobs:
            raise ValueError(
                f"{method}.kl_estimator is exact, a divergence over the whole vocabulary, and "
                "sampling.renormalise_logprobs leaves out what sampling filters; leave one of them out"
            )
        elif reference.offload:
            raise ValueError(
                f"{method}.kl_estimator is exact, so every update uses the reference's output layer; set "
                "reference.offload to false"
            )
        if reference.sync_alpha < 1 and reference.dtype == "bfloat16":
            raise ValueError(
                "reference.dtype is bfloat16 with reference.sync_alpha below 1: small moves would be rounded away; "
                "use float32 or auto"
            )
        if reference.offload and self.lora.enabled and not reference.path:
            raise ValueError(
                "reference.offload and lora.enabled are both true: with adapters the reference is the model under the "
                "policy's adapters, which has to stay on the device; set reference.offload to false"
            )
        if reference.offload and reference.sync_every:
            raise ValueError(
                f"reference.offload is true and reference.sync_every is {reference.sync_every}: a reference that is "
                "updated has to stay on the device; set reference.offload to false"
            )
