"""A run of a group-relative method: responses are compared with the others to their prompt, and there is no critic."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from jaxrlhf.config import online
from jaxrlhf.config.base import Count, Natural, NonNegative, Positive, Seed, section
from jaxrlhf.config.lora import LoRA
from jaxrlhf.config.ppo import Alarms, Reference, Scores, Validation
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
)


class Recipe(NamedTuple):
    """What a method is made of. The numbers are defaults, of the method's paper where it has them."""

    advantage: Literal[
        "scaled", "centred", "leave_one_out", "gpg", "greedy", "whitened_tokens", "whitened_group", "pairs"
    ]
    """Of algorithms/groups.py; pairs: the best and the worst response of a group, compared as in DPO."""
    loss: Literal["clip", "gspo", "cispo", "reinforce", "dpo"]
    """clip: that of PPO. reinforce: -A log pi, for one optimizer step per rollout."""
    normalise: Literal["sequence", "constant", "token", "sum"]
    """`algorithms.grpo.token_weights`; sum: over the tokens of a response, then the mean over responses."""
    cliprange: float | None
    cliprange_high: float | None
    kl_coef: float
    kl_in: Literal["loss", "reward"] = "loss"
    max_refills: int = 0

    @property
    def needs_group(self) -> bool:
        """Whether a response is compared with others."""
        return self.advantage not in ("greedy", "whitened_tokens")


RECIPES = {
    "grpo": Recipe("scaled", "clip", "sequence", 0.2, 0.2, 0.04),
    "dr_grpo": Recipe("centred", "clip", "constant", 0.2, 0.2, 0.0),
    "dapo": Recipe("scaled", "clip", "token", 0.2, 0.28, 0.0, max_refills=3),
    "gspo": Recipe("scaled", "gspo", "sequence", 3e-4, 4e-4, 0.0),
    "cispo": Recipe("scaled", "cispo", "token", 1.0, 4.0, 0.0),  # weights up to 5 (https://arxiv.org/abs/2510.13786)
    "rloo": Recipe("leave_one_out", "reinforce", "sum", None, None, 0.05, "reward"),
    "reinforce_pp": Recipe("whitened_tokens", "clip", "token", 0.2, 0.2, 0.01, "reward"),
    "reinforce_pp_baseline": Recipe("whitened_group", "clip", "token", 0.2, 0.2, 0.01),
    "remax": Recipe("greedy", "reinforce", "sum", None, None, 0.0),
    "gpg": Recipe("gpg", "reinforce", "token", None, None, 0.0),
    "online_dpo": Recipe("pairs", "dpo", "sequence", None, None, 0.0),
}
"""What each method is. docs/grpo.md says which one when."""

_OPTIM: dict[str, Any] = {"eps": 1e-5, "learning_rate": 1e-6}


@section
class GRPO:
    """Policy optimisation by comparison within groups. `method` says which; what is None below is the method's own."""

    method: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "gpg",
        "online_dpo",
    ] = "grpo"  # fmt: skip
    """Advantage, loss, and what a token weighs in it; see docs/grpo.md."""
    total_episodes: Count = 1024
    """Completions in the whole run."""
    num_train_epochs: Positive | None = None
    """Or passes over the prompts; if given, it decides and total_episodes does not."""
    batch_size: Count = 64
    """Completions per update, a multiple of num_generations."""
    num_generations: Count = 8
    """Completions of each prompt: the group."""
    num_iterations: Count = 1
    """Passes over a rollout, each in an order of its own. More than one optimizer step per rollout needs a forward pass
    of the policy before the first."""
    num_mini_batches: Count = 1
    """Optimizer steps per pass; a divisor of batch_size."""
    micro_batch_size: Count | None = None
    """Rows per forward pass of the update; None: a mini-batch. Changes memory, not the result."""
    local_rollout_forward_batch_size: Count | None = None
    """Rows per forward pass of annotation; None: the update's. Changes memory, not the result."""
    max_refills: Natural | None = None
    """Further rollouts of an update, at most, whose groups take the place of those whose scores are all equal
    (dynamic sampling, https://arxiv.org/abs/2503.14476, 3.2). None: 3 for dapo, else 0. Flat groups that stay have an
    advantage of 0."""
    kl_coef: NonNegative | None = None
    """What a nat of KL to the reference costs. 0: there is no reference, neither in memory nor in time."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Of the KL at a token, with d = log pi - log ref. In the loss: k2 = d^2 / 2, or k3 = exp(-d) - 1 + d with
    importance weights pi / pi_old. In the reward (rloo, reinforce_pp): k1 = d. None: k3, or k1."""
    cliprange: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    """How far pi / pi_old may fall below 1 for a gain; in cispo, how far below 1 a weight may be, 1: no bound."""
    cliprange_high: Positive | None = None
    """How far it may rise above 1. None: cliprange if that is given, else the method's."""
    gamma: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """reinforce_pp: what a token's reward, the score too, counts a token earlier."""
    log_ratio_clamp: Positive = 20.0
    """log pi - log pi_old beyond it counts as it, without a gradient: keeps exp finite."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Where rollout and training compute log-probs in different precision: weigh each token by pi_old / pi_sampler (in
    gspo each response, by its geometric mean), at most `sampler_cap` (truncate); or leave out responses whose product
    of those weights is above it or below its inverse (mask)."""
    sampler_cap: Annotated[float, Field(strict=True, gt=1)] = 3.0
    beta: Positive = 0.1
    """online_dpo: how much the log-ratio to the reference counts."""
    dpo_loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = "sigmoid"
    """online_dpo: by the names of algorithms/dpo.py."""
    rejected_text: str | None = None
    """online_dpo: what is rejected for every prompt, in place of the worst of its group, which may then be of one."""

    @property
    def recipe(self) -> Recipe:
        """What the method is."""
        return RECIPES[self.method]

    @property
    def clip(self) -> tuple[float, float]:
        """How far pi / pi_old counts below and above 1; 1, 1 where the loss has no ratio."""
        low = self.recipe.cliprange if self.cliprange is None else self.cliprange
        high = (self.cliprange or self.recipe.cliprange_high) if self.cliprange_high is None else self.cliprange_high
        return low or 1.0, high or 1.0

    @property
    def kl_weight(self) -> float:
        """kl_coef, given or the method's."""
        return self.recipe.kl_coef if self.kl_coef is None else self.kl_coef

    @property
    def refills(self) -> int:
        """max_refills, given or the method's."""
        return self.recipe.max_refills if self.max_refills is None else self.max_refills

    @property
    def has_reference(self) -> bool:
        """Whether a reference has a part in it."""
        return self.kl_weight > 0 or self.recipe.loss == "dpo"

    def learnt(self, batch: int) -> int:
        """How many of `batch` completions are learnt from: all, or two of each group."""
        return 2 * (batch // self.num_generations) if self.recipe.loss == "dpo" else batch

    def micro_rows(self, batch: int) -> int:
        """Rows of one forward pass of an update on `batch` completions."""
        return self.micro_batch_size or self.learnt(batch) // self.num_mini_batches

    def annotation_rows(self, batch: int) -> int:
        """Rows of one forward pass of annotation: the update's unless told otherwise, since bfloat16 products depend on
        the row count."""
        return self.local_rollout_forward_batch_size or self.micro_rows(batch)

    def __post_init__(self) -> None:
        recipe, group = self.recipe, self.num_generations
        if recipe.needs_group and group < 2 and self.rejected_text is None:
            instead = "give grpo.rejected_text" if recipe.loss == "dpo" else "use remax or reinforce_pp"
            raise ValueError(
                f"grpo.num_generations is 1, and {self.method} compares a response with others to its prompt: there "
                f"would be nothing to learn; give 2 or more, or {instead}"
            )
        if self.batch_size % group:
            near = max(self.batch_size // group, 1) * group
            raise ValueError(
                f"grpo.batch_size ({self.batch_size}) counts completions and must be a multiple of "
                f"grpo.num_generations ({group}); {near} would do"
            )
        if recipe.loss == "reinforce" and self.num_iterations * self.num_mini_batches > 1:
            raise ValueError(
                f"{self.method} has no ratio pi / pi_old, so it cannot learn from responses of a policy that has moved "
                "on: grpo.num_iterations and grpo.num_mini_batches must be 1; grpo, dapo and cispo have a ratio"
            )
        for key in ("cliprange", "cliprange_high"):
            if getattr(self, key) is not None and recipe.loss in ("reinforce", "dpo"):
                raise ValueError(f"grpo.{key} is set, and {self.method} has no ratio to clip; leave it out")
        if self.gamma != 1 and recipe.advantage != "whitened_tokens":
            raise ValueError(
                f"grpo.gamma is {self.gamma:g}, and in {self.method} all tokens of a response have one advantage; "
                "leave it out, or use reinforce_pp"
            )
        self._check_kl(recipe)
        if self.refills and not recipe.needs_group:
            raise ValueError(
                f"grpo.max_refills is {self.refills}, and {self.method} compares no groups that could be flat; use 0"
            )
        if recipe.loss == "dpo":
            self._check_pairs()
        else:
            self._check_no_pairs()

    def _check_kl(self, recipe: Recipe) -> None:
        if recipe.loss == "dpo" and self.kl_coef:
            raise ValueError("grpo.kl_coef is set, and online_dpo has no KL beside its loss; grpo.beta is its own")
        reason = self.kl_estimator and online.WRONG_KL.get((self.kl_estimator, recipe.kl_in))
        if reason:
            raise ValueError(
                f"grpo.kl_estimator {self.kl_estimator} does not go with {self.method}, whose KL is in the "
                f"{recipe.kl_in}: {reason}"
            )
        if self.kl_estimator and not self.kl_weight:
            raise ValueError(
                f"grpo.kl_estimator is set, and {self.method} with a grpo.kl_coef of 0 has no KL to estimate; give a "
                "grpo.kl_coef, or leave it out"
            )

    def _check_no_pairs(self) -> None:
        fields: dict[str, Any] = self.__pydantic_fields__  # type: ignore[attr-defined]
        for key in ("beta", "dpo_loss", "rejected_text"):
            if getattr(self, key) != fields[key].default:
                instead = "; what a nat of KL costs is grpo.kl_coef" if key == "beta" else ""
                raise ValueError(
                    f"grpo.{key} is set, and {self.method} learns from no pairs; it is for online_dpo{instead}"
                )

    def _check_pairs(self) -> None:
        if self.sampler_correction != "none":
            raise ValueError("grpo.sampler_correction is set, and online_dpo has no importance weights; leave it out")
        rows = self.learnt(self.batch_size) // self.num_mini_batches
        if rows * self.num_mini_batches != self.learnt(self.batch_size) or rows % 2:
            raise ValueError(
                f"grpo.num_mini_batches ({self.num_mini_batches}) must divide the pairs of a batch, one of each group "
                f"({self.batch_size // self.num_generations})"
            )
        if self.micro_batch_size and self.micro_batch_size % 2:
            raise ValueError("grpo.micro_batch_size must be even: online_dpo learns from pairs")


@section
class GRPOConfig:
    """GRPO and its relatives, online DPO too, against any sum of reward models, functions, endpoints and people."""

    run_dir: str = "runs/grpo"
    seed: Seed = 0
    model: ModelSource = Field(default_factory=ModelSource)
    lora: LoRA = Field(default_factory=LoRA)
    tokenizer: TokenizerSource = Field(default_factory=TokenizerSource)
    reference: Reference = Field(default_factory=Reference)
    data: Data = Field(default_factory=Data)
    reward: RewardSource = Field(default_factory=RewardSource)
    scores: Scores = Field(default_factory=Scores)
    grpo: GRPO = Field(default_factory=GRPO)
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: Generation = Field(default_factory=Generation)
    optim: Optim = Field(default_factory=lambda: Optim(**_OPTIM))
    """A learning_rate of 1e-6 and an eps of 1e-5 unless given; an `Optim` made in Python has its own defaults."""
    validation: Validation = Field(default_factory=Validation)
    alarms: Alarms = Field(default_factory=Alarms)
    mesh: Mesh = Field(default_factory=Mesh)
    logging: Logging = Field(default_factory=Logging)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)

    @field_validator("optim", mode="before")
    @classmethod
    def _part_of_optim(cls, given: Any) -> Any:
        return {**_OPTIM, **given} if isinstance(given, dict) else given

    def __post_init__(self) -> None:
        grpo = self.grpo
        online.check("grpo", self, grpo.learnt(grpo.batch_size))
        if grpo.rejected_text is not None and self.sampling.renormalise_logprobs:
            raise ValueError(
                "grpo.rejected_text is set, and sampling.renormalise_logprobs true: the text need not be one that "
                "could be drawn; leave renormalise_logprobs false"
            )
        if grpo.has_reference:
            return
        for key, value in (
            ("reference.offload", self.reference.offload),
            ("reference.sync_every", self.reference.sync_every),
            ("alarms.kl", self.alarms.kl),
        ):
            if value:
                raise ValueError(
                    f"{key} is set, and with a grpo.kl_coef of 0 ({grpo.method}) there is no reference; give a "
                    "grpo.kl_coef, or leave it out"
                )
