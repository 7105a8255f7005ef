"""Config of PPO."""

from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import (
    AboveOne,
    Bool,
    Count,
    FilePath,
    Fraction,
    LearningRate,
    Natural,
    NonNegative,
    Passes,
    Positive,
    PositiveFraction,
    section,
)
from jaxrlhf.config.on_policy import WRONG_KL, OnPolicy, OnPolicyConfig
from jaxrlhf.config.sections import Optim


@section
class Critic:
    """The critic (value model). Its head is initialised to zero."""

    init: Literal["policy", "reward"] = "policy"
    """Model that a critic with its own or a frozen trunk is initialised from: the policy or the reward model."""
    trunk: Literal["own", "shared", "frozen"] = "own"
    """Transformer under the value head. own: a separate trainable model. shared: the policy's, trained with both
    losses. frozen: the reference's or the reward model's, with only the head trained; takes no memory for a second
    copy."""
    head: Literal["linear", "mlp"] = "linear"
    """Architecture of the value head."""
    learning_rate: LearningRate | None = None
    """Learning rate of the critic. None: optim.learning_rate."""
    max_grad_norm: Positive | None = None
    """Maximum gradient norm of the critic. None: optim.max_grad_norm."""
    warmup_updates: Natural = 0
    """Number of initial updates that train only the critic (with a shared trunk, only its head)."""

    def __post_init__(self) -> None:
        if self.trunk == "shared" and self.init == "reward":
            raise ValueError(
                "critic.init is 'reward' but critic.trunk is 'shared', which is the policy's trunk; use trunk 'own'"
            )


@section
class PPO(OnPolicy):
    """Proximal policy optimisation (https://arxiv.org/abs/1707.06347) with a KL penalty per token."""

    num_generations: Count = 1
    """Completions per prompt (group size); must divide batch_size."""
    baseline: Literal["none", "leave_one_out"] = "none"
    """Subtracted from the score before the rewards, so that the critic learns what is left. leave_one_out: the mean
    score of the other completions of the prompt (https://arxiv.org/abs/2402.14740); needs num_generations of 2 or
    more."""
    num_ppo_epochs: Passes = 4
    """Epochs over each rollout, each in a new order."""
    replay: Natural = 0
    """Number of past rollouts to train on again after each new one. The ratio uses their original log-probs, which
    corrects for their age; advantages are not recomputed."""
    kl_coef: NonNegative = 0.05
    """KL penalty coefficient (the initial value if `kl_target` is set)."""
    kl_target: Positive | None = None
    """Target KL for the adaptive KL controller, in nats per response (https://arxiv.org/abs/1909.08593, section 2.2).
    None: constant kl_coef."""
    kl_horizon: Positive = 10000.0
    """Horizon of the adaptive KL controller, in episodes: each update multiplies kl_coef by 1 + clip(kl / kl_target -
    1, -0.2, 0.2) * batch_size / kl_horizon."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Apply the KL penalty in the reward (subtracted from each token's) or in the loss (as an added term)."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Estimator of the KL per token, with d = log pi - log ref. k1 = d for `kl_in: reward`. For `kl_in: loss`: k2 =
    d^2 / 2, k3 = exp(-d) - 1 + d with importance weights pi / pi_old, or exact, the divergence `kl_beta` over the whole
    vocabulary in place of an estimate from the sampled token. Other combinations have a wrong gradient and are
    rejected."""
    cliprange: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    """PPO clip range: the probability ratio is clipped to [1 - cliprange, 1 + cliprange]."""
    cliprange_high: Positive | None = None
    """Upper clip range, replaces cliprange above 1 (clip-higher, https://arxiv.org/abs/2503.14476). None: cliprange."""
    dual_clip: AboveOne | None = None
    """Ratio above which the loss of a token with negative advantage is clipped (dual-clip PPO,
    https://arxiv.org/abs/1912.09729). None: disabled."""
    target_kl: Positive | None = None
    """Early stopping of an update: maximum KL between pi_old and pi, in nats per token. A mini-batch above it is
    skipped, as are the remaining mini-batches of the update (of a replayed rollout, only that mini-batch). Skipped
    steps do not advance optim.schedule. None: disabled."""
    cliprange_value: Positive | None = 0.2
    """Clip range of the value function. None: unclipped squared error."""
    value_target: Literal["gae", "reward_to_go"] = "gae"
    """Regression target of the critic: advantage + old value, or the discounted sum of future rewards."""
    vf_coef: Positive = 0.1
    """Value function coefficient of the loss."""
    entropy_coef: NonNegative = 0.0
    """Entropy bonus coefficient, per nat of mean token entropy."""
    gamma: PositiveFraction = 1.0
    """Discount factor."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE)."""
    lam_alpha: Positive | None = None
    """Length-adaptive lambda (VAPO, https://arxiv.org/abs/2504.05118): 1 - 1 / (lam_alpha * response length), at least
    0, in place of `lam`. VAPO uses 0.05, with `value_target: reward_to_go`, which is GAE's with a lambda of 1. None:
    constant lam."""
    whiten_rewards: Bool = False
    """Scale rewards to unit variance over the batch, keeping their mean."""
    whiten_advantages: Bool = True
    """Normalise advantages to mean 0 and variance 1 over the batch."""
    bootstrap_truncated: Bool = False
    """Treat truncated responses as unfinished episodes: bootstrap from the value after the last token."""

    @property
    def group(self) -> int:
        return self.num_generations

    @property
    def has_exact_kl(self) -> bool:
        return self.kl_estimator == "exact"

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of a pass over an experience."""
        return self.num_ppo_epochs * self.num_mini_batches

    def __post_init__(self) -> None:
        if reason := WRONG_KL.get((self.kl_estimator, self.kl_in)):
            raise ValueError(f"ppo.kl_estimator {self.kl_estimator} does not go with ppo.kl_in {self.kl_in}: {reason}")
        if self.has_exact_kl and self.replay:
            raise ValueError(
                f"ppo.kl_estimator is exact and ppo.replay {self.replay}: the reference's hidden states would be kept "
                "for every past rollout; use k3, or set replay to 0"
            )
        if self.lam_alpha is not None and self.lam != 0.95:
            raise ValueError(f"ppo.lam is {self.lam:g}, and ppo.lam_alpha replaces it; leave one of them out")
        if self.batch_size % self.num_generations:
            nearest = max(self.batch_size // self.num_generations, 1) * self.num_generations
            raise ValueError(
                f"ppo.batch_size ({self.batch_size}) counts completions and must be a multiple of ppo.num_generations "
                f"({self.num_generations}); {nearest} would do"
            )
        if self.baseline != "none" and self.num_generations < 2:
            raise ValueError(
                f"ppo.baseline is {self.baseline} and ppo.num_generations 1: a completion has no others to be compared "
                "with; give 2 or more"
            )
        highest = 1 + (self.cliprange_high or self.cliprange)
        if self.dual_clip is not None and self.dual_clip <= highest:
            raise ValueError(
                f"ppo.dual_clip is {self.dual_clip}; it must be above 1 + ppo.cliprange_high ({highest:g}), e.g. 3.0"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("ppo.kl_coef is 0, and ppo.kl_target multiplies it: it would stay 0; set it to 0.05, say")
        if self.kl_target is not None and 0.2 * self.batch_size >= self.kl_horizon:
            raise ValueError(
                f"ppo.kl_horizon ({self.kl_horizon:g}) is so small next to ppo.batch_size ({self.batch_size}) that one "
                "update could turn kl_coef negative; 10000 is usual"
            )


@section
class PPOConfig(OnPolicyConfig):
    """PPO with any sum of reward models, reward functions, endpoints and human feedback."""

    method = "ppo"
    run_dir: FilePath = "runs/ppo"
    optim: Optim = Optim(learning_rate=3e-6, eps=1e-5)
    """PPO's defaults are learning_rate 3e-6 and eps 1e-5; an `Optim` created in Python has those of `Optim`."""
    critic: Critic = Critic()
    ppo: PPO = PPO()

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in (("scores.normalise", self.scores.normalise), ("ppo.baseline", self.ppo.baseline)):
            if self.environment.function and value != "none" and not self.reward.parts():
                raise ValueError(
                    f"{key} is {value}, which is for scores of responses, and there is no reward beside the "
                    "environment, whose rewards are of single turns; set it to none"
                )
        if self.critic.init == "reward" and not any(part.model for part in self.reward.parts()):
            raise ValueError("critic.init is 'reward' but reward.model is empty; give a reward model or use 'policy'")
        if self.reference.path and self.critic.trunk == "frozen" and self.critic.init == "policy":
            raise ValueError(
                "critic.trunk: frozen takes the arrays of the reference, which reference.path makes another model; "
                "choose another trunk, or critic.init: reward"
            )
        if self.reference.offload and self.critic.trunk == "frozen" and self.critic.init == "policy":
            raise ValueError(
                "reference.offload is true, but critic.trunk: frozen uses the reference's own arrays in every update; "
                "set reference.offload to false"
            )
