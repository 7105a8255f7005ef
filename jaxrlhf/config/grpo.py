"""Config of GRPO and related methods, which compare the responses to a prompt instead of training a critic."""

from typing import Literal

from jaxrlhf.config.base import (
    BatchSize,
    Bool,
    Count,
    FilePath,
    Natural,
    NonNegative,
    Passes,
    Positive,
    PositiveFraction,
    Real,
    Text,
    constant,
    default_of,
    section,
)
from jaxrlhf.config.grpo_methods import RECIPES, USED_BY, Method, Recipe
from jaxrlhf.config.on_policy import WRONG_KL, OnPolicy, OnPolicyConfig
from jaxrlhf.config.sections import Optim


@section
class GRPO(OnPolicy):
    """Group relative policy optimisation and related methods. Options left at None use the default of `method`."""

    method: Method = "grpo"
    """Algorithm: sets the advantage estimator, the loss and its aggregation over tokens. See docs/grpo.md."""
    batch_size: BatchSize = 64
    """Completions per update; must be a multiple of num_generations."""
    num_generations: Count = 8
    """Completions per prompt (group size)."""
    num_iterations: Passes = 1
    """Epochs over each rollout, each in a new order. More than one optimizer step per rollout needs an additional
    forward pass to compute the old log-probs."""
    max_refills: Natural | None = None
    """Dynamic sampling (https://arxiv.org/abs/2503.14476, section 3.2): maximum number of additional rollouts per
    update to replace groups whose scores are all equal. None: 3 for dapo, else 0. Such groups have advantage 0 if they
    remain."""
    kl_coef: NonNegative | None = None
    """KL penalty coefficient. 0: no reference model is loaded. None: the method's default."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] | None = None
    """Estimator of the KL per token, with d = log pi - log ref. For methods with the KL in the loss: k2 = d^2 / 2, k3 =
    exp(-d) - 1 + d with importance weights pi / pi_old, or exact, the divergence `kl_beta` over the whole vocabulary in
    place of an estimate from the sampled token. For methods with it in the reward (rloo, reinforce_pp): k1 = d. None:
    k3 in the loss, k1 in the reward."""
    cliprange: PositiveFraction | None = None
    """Lower clip range: the ratio pi / pi_old is clipped to at least 1 - cliprange. In cispo it bounds the importance
    weights from below; 1: no bound. None: the method's default."""
    cliprange_high: Positive | None = None
    """Upper clip range: the ratio is clipped to at most 1 + cliprange_high. None: cliprange if it is set, else the
    method's default."""
    mask_truncated_completions: Bool = False
    """Leave truncated completions out of the loss (https://arxiv.org/abs/2503.14476, "overlong filtering"). They
    remain part of their group's baseline."""
    entropy_coef: NonNegative = 0.0
    """Entropy bonus coefficient, per nat of mean token entropy; with `entropy_target` the initial value."""
    entropy_target: Positive | None = None
    """Adaptive entropy control (https://arxiv.org/abs/2505.22312): target of the mean token entropy, in nats. After
    each update the coefficient rises by entropy_coef_delta if the entropy was at or below the target, else it falls.
    The bonus only applies while the entropy is at or below the target. None: constant entropy_coef."""
    entropy_coef_delta: Positive = 0.005
    """Step of the adaptive entropy coefficient."""
    entropy_coef_min: NonNegative = 0.0
    """Minimum of the adaptive entropy coefficient."""
    entropy_coef_max: Positive = 1.0
    """Maximum of the adaptive entropy coefficient."""
    top_entropy_quantile: PositiveFraction = 1.0
    """Compute the policy loss only on this share of tokens, those with the highest entropy
    (https://arxiv.org/abs/2506.01939, which uses 0.2). 1: on all."""
    sapo_temperature_pos: Positive = 1.0
    """sapo: temperature of the gate for tokens with a positive advantage."""
    sapo_temperature_neg: Positive = 1.05
    """sapo: temperature of the gate for tokens with a negative advantage; higher values decay faster."""
    cov_ratio: PositiveFraction = 2e-4
    """clip_cov, kl_cov: share of tokens selected for their covariance of log-prob and advantage."""
    clip_cov_low: Real = 1.0
    """clip_cov: lower bound of the covariance of tokens to select."""
    clip_cov_high: Real = 5.0
    """clip_cov: upper bound of the covariance of tokens to select."""
    kl_cov_coef: Positive = 1.0
    """kl_cov: coefficient of the KL penalty on the selected tokens."""
    pass_k: Count = 4
    """pass_at_k: size k of the subsets of a group whose maximum score is optimised; below num_generations."""
    gamma: PositiveFraction = 1.0
    """reinforce_pp: discount factor per token."""
    beta: Positive = 0.1
    """online_dpo: beta of the DPO loss; higher values keep the policy closer to the reference."""
    dpo_loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = "sigmoid"
    """online_dpo: type of DPO loss, as in `jaxrlhf dpo`."""
    rejected_text: Text | None = None
    """online_dpo: fixed text to use as every prompt's rejected completion instead of the worst of its group, which may
    then have a single completion; with a single one, no reward is needed."""

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.method]

    @property
    def clip(self) -> tuple[float, float]:
        """Lower and upper clip range; (1, 1) if the loss has no ratio."""
        low = next(x for x in (self.cliprange, self.recipe.cliprange, 1.0) if x is not None)
        of_recipe = self.recipe.cliprange_high if self.cliprange is None else self.cliprange
        return low, next(x for x in (self.cliprange_high, of_recipe, 1.0) if x is not None)

    @property
    def has_exact_kl(self) -> bool:
        return self.kl_estimator == "exact"

    @property
    def kl_weight(self) -> float:
        """`kl_coef`, or the method's default."""
        return self.recipe.kl_coef if self.kl_coef is None else self.kl_coef

    @property
    def refills(self) -> int:
        """`max_refills`, or the method's default."""
        return self.recipe.max_refills if self.max_refills is None else self.max_refills

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of an update."""
        return self.num_iterations * self.num_mini_batches

    @property
    def has_reference(self) -> bool:
        return not constant(self.kl_weight, 0) or self.recipe.loss == "dpo"

    @property
    def has_entropy_bonus(self) -> bool:
        return not constant(self.entropy_coef, 0) or self.entropy_target is not None

    @property
    def selects_tokens(self) -> bool:
        """True if some tokens of a rollout are selected by their entropy or covariance."""
        return not constant(self.top_entropy_quantile, 1) or self.recipe.loss in ("clip_cov", "kl_cov")

    @property
    def group(self) -> int:
        return self.num_generations

    def trained_rows(self, batch: int) -> int:
        """Number of completions out of `batch` that an update trains on: all, or two per group for online_dpo."""
        return 2 * (batch // self.num_generations) if self.recipe.loss == "dpo" else batch

    def __post_init__(self) -> None:
        recipe, group = self.recipe, self.num_generations
        if recipe.needs_group and group < 2 and self.rejected_text is None:
            alternative = "give grpo.rejected_text" if recipe.loss == "dpo" else "use remax or reinforce_pp"
            raise ValueError(
                f"grpo.num_generations is 1, but {self.method} compares the responses to a prompt: there would be "
                f"nothing to learn; give 2 or more, or {alternative}"
            )
        if self.batch_size % group:
            nearest = max(self.batch_size // group, 1) * group
            raise ValueError(
                f"grpo.batch_size ({self.batch_size}) counts completions and must be a multiple of "
                f"grpo.num_generations ({group}); {nearest} would do"
            )
        if recipe.loss == "reinforce" and self.optimizer_steps > 1:
            raise ValueError(
                f"{self.method} has no ratio pi / pi_old to correct for off-policy responses: grpo.num_iterations and "
                "grpo.num_mini_batches must be 1; grpo, dapo and cispo have a ratio"
            )
        for key in ("cliprange", "cliprange_high"):
            if getattr(self, key) is not None and recipe.cliprange is None:
                raise ValueError(f"grpo.{key} is set, but {self.method} clips no ratio; leave it out")
        if self.gamma != 1 and recipe.advantage != "whitened_tokens":
            raise ValueError(
                f"grpo.gamma is {self.gamma:g}, but in {self.method} all tokens of a response have one advantage; "
                "leave it out, or use reinforce_pp"
            )
        self._check_kl()
        if self.refills and not recipe.needs_group:
            raise ValueError(f"grpo.max_refills is {self.refills}, but {self.method} compares no groups; set it to 0")
        for key, methods in USED_BY.items():
            if self.method not in methods and getattr(self, key) != default_of(type(self), key):
                hint = "; the KL penalty coefficient is grpo.kl_coef" if key == "beta" else ""
                users = ", ".join(methods) if len(methods) <= 2 else f"methods other than {self.method}"
                raise ValueError(f"grpo.{key} is set, but {self.method} does not use it; it is for {users}{hint}")
        if recipe.loss == "dpo":
            self._check_online_dpo()
        self._check_entropy()
        if recipe.advantage == "pass_at_k" and self.pass_k >= group:
            raise ValueError(
                f"grpo.pass_k is {self.pass_k} and grpo.num_generations {group}: every subset of that size would have "
                "the same maximum; give fewer, or more completions per prompt"
            )
        if self.clip_cov_low >= self.clip_cov_high:
            raise ValueError(
                f"grpo.clip_cov_low ({self.clip_cov_low:g}) must be below grpo.clip_cov_high ({self.clip_cov_high:g})"
            )

    def _check_entropy(self) -> None:
        if self.entropy_target is None:
            for key in ("entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"):
                if getattr(self, key) != default_of(type(self), key):
                    raise ValueError(f"grpo.{key} is set without grpo.entropy_target, which it belongs to; give both")
        elif not self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max:
            raise ValueError(
                f"grpo.entropy_coef ({self.entropy_coef:g}), where the adaptive coefficient starts, must be between "
                f"grpo.entropy_coef_min ({self.entropy_coef_min:g}) and grpo.entropy_coef_max "
                f"({self.entropy_coef_max:g})"
            )

    def _check_kl(self) -> None:
        recipe = self.recipe
        if recipe.loss == "dpo" and self.kl_coef:
            raise ValueError("grpo.kl_coef is set, but online_dpo has no KL penalty: grpo.beta is its own coefficient")
        reason = self.kl_estimator and WRONG_KL.get((self.kl_estimator, recipe.kl_in))
        if reason:
            raise ValueError(
                f"grpo.kl_estimator {self.kl_estimator} does not go with {self.method}, whose KL is in the "
                f"{recipe.kl_in}: {reason}"
            )
        if self.kl_estimator and not self.kl_weight:
            raise ValueError(
                f"grpo.kl_estimator is set, but {self.method} with a grpo.kl_coef of 0 has no KL to estimate; give a "
                "grpo.kl_coef, or leave it out"
            )

    def _check_online_dpo(self) -> None:
        if self.sampler_correction != "none":
            raise ValueError("grpo.sampler_correction is set, but online_dpo has no importance weights; leave it out")
        pairs = self.trained_rows(self.batch_size) // 2
        if pairs % self.num_mini_batches:
            raise ValueError(
                f"grpo.num_mini_batches ({self.num_mini_batches}) must divide the pairs of a batch, one per group "
                f"({pairs})"
            )
        if self.micro_batch_tokens:
            raise ValueError(
                "grpo.micro_batch_tokens is for rows of different lengths, and online_dpo trains on pairs; use "
                "grpo.micro_batch_size"
            )
        if self.micro_batch_size and self.micro_batch_size % 2:
            raise ValueError("grpo.micro_batch_size must be even: online_dpo trains on pairs")


@section
class GRPOConfig(OnPolicyConfig):
    """GRPO, related methods and online DPO, with any sum of reward models, reward functions, endpoints and human
    feedback."""

    method = "grpo"
    run_dir: FilePath = "runs/grpo"
    optim: Optim = Optim(learning_rate=1e-6, eps=1e-5)
    """GRPO's defaults are learning_rate 1e-6 and eps 1e-5; an `Optim` created in Python has those of `Optim`."""
    grpo: GRPO = GRPO()

    @property
    def needs_reward(self) -> bool:
        return super().needs_reward and (self.grpo.rejected_text is None or self.grpo.num_generations > 1)

    @property
    def kl_option(self) -> str:
        return "grpo.beta" if self.grpo.recipe.loss == "dpo" else super().kl_option

    def __post_init__(self) -> None:
        grpo = self.grpo
        if self.rollout.devices and grpo.recipe.loss == "dpo":
            raise ValueError(
                f"rollout.devices is {self.rollout.devices}, but online_dpo has no importance weights to correct for "
                "responses of an older policy; set it to 0"
            )
        super().__post_init__()
        if grpo.recipe.advantage == "decoupled" and self.scores != default_of(type(self), "scores"):
            raise ValueError(
                f"an option of scores is set, but {grpo.method} normalises each component of the reward, and scores "
                "shape their sum; leave them out, and make a penalty a component of reward.components"
            )
        if grpo.rejected_text is not None and self.sampling.renormalise_logprobs:
            raise ValueError(
                "grpo.rejected_text is set and sampling.renormalise_logprobs is true, but the text may contain tokens "
                "that sampling filters out; set renormalise_logprobs to false"
            )
        if grpo.has_reference:
            return
        for section_name, key in (
            ("reference", "path"),
            ("reference", "offload"),
            ("reference", "sync_every"),
            ("alarms", "kl"),
        ):
            if getattr(getattr(self, section_name), key):
                raise ValueError(
                    f"{section_name}.{key} is set, and with a grpo.kl_coef of 0 ({grpo.method}) there is no reference; "
                    "give a grpo.kl_coef, or leave it out"
                )
