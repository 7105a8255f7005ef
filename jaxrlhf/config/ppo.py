"""Config of PPO."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jaxrlhf.config import on_policy
from jaxrlhf.config.base import (
    AboveOne,
    Bool,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    PositiveFraction,
    Seed,
    section,
)
from jaxrlhf.config.model import LoRA, ModelSource, TokenizerSource
from jaxrlhf.config.on_policy import Alarms, Reference, Scores, Validation
from jaxrlhf.config.reward_source import RewardSource
from jaxrlhf.config.sections import Checkpoint, Data, Generation, Logging, Mesh, Optim, Sampling


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
    learning_rate: Positive | None = None
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
class PPO:
    """Proximal policy optimisation (https://arxiv.org/abs/1707.06347) with a KL penalty per token."""

    total_episodes: Count = 1024
    """Total number of completions to generate and train on."""
    num_train_epochs: Positive | None = None
    """Passes over the prompts; replaces total_episodes if set."""
    batch_size: Count = 16
    """Completions per update."""
    num_ppo_epochs: Count = 4
    """Epochs over each rollout, each in a new order."""
    num_mini_batches: Count = 1
    """Mini-batches (optimizer steps) per epoch; must divide batch_size."""
    micro_batch_size: Count | None = None
    """Rows per forward pass of the update (gradient accumulation). None: a mini-batch. Affects memory and speed, not
    the result."""
    local_rollout_forward_batch_size: Count | None = None
    """Rows per forward pass when computing log-probs and values of a rollout. None: as in the update. Affects memory
    and speed, not the result."""
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
    """Where the KL penalty is applied: subtracted from each token's reward, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL per token, with d = log pi - log ref. k1 = d for `kl_in: reward`; k2 = d^2 / 2, or k3 =
    exp(-d) - 1 + d with importance weights pi / pi_old, for `kl_in: loss`. Other combinations have a wrong gradient and
    are rejected."""
    cliprange: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    """PPO clip range: the probability ratio is clipped to [1 - cliprange, 1 + cliprange]."""
    cliprange_high: Positive | None = None
    """Upper clip range, replaces cliprange above 1 (clip-higher, https://arxiv.org/abs/2503.14476). None: cliprange."""
    dual_clip: AboveOne | None = None
    """Ratio above which the loss of a token with negative advantage is clipped (dual-clip PPO,
    https://arxiv.org/abs/1912.09729). None: disabled."""
    log_ratio_clamp: Positive = 20.0
    """Clamp on |log pi - log pi_old|, so that the ratio stays finite; tokens beyond it have no gradient."""
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
    whiten_rewards: Bool = False
    """Scale rewards to unit variance over the batch, keeping their mean."""
    whiten_advantages: Bool = True
    """Normalise advantages to mean 0 and variance 1 over the batch."""
    bootstrap_truncated: Bool = False
    """Treat truncated responses as unfinished episodes: bootstrap from the value after the last token."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Importance correction if the sampler's log-probs differ from those of training (pi_old / pi_sampler), e.g.
    because of precision. truncate: weight each token by the ratio, at most `sampler_cap`
    (https://fengyao.notion.site/off-policy-rl). mask: drop responses whose product of ratios is outside [1 /
    sampler_cap, sampler_cap]."""
    sampler_cap: AboveOne = 3.0
    """Bound of the sampler correction."""

    def micro_rows(self, batch: int) -> int:
        """Rows per forward pass of an update on `batch` completions."""
        return self.micro_batch_size or batch // self.num_mini_batches

    def annotation_rows(self, batch: int) -> int:
        """Rows per forward pass of annotation. The default is the update's, since bfloat16 products depend on the
        number of rows."""
        return self.local_rollout_forward_batch_size or self.micro_rows(batch)

    def __post_init__(self) -> None:
        if reason := on_policy.WRONG_KL.get((self.kl_estimator, self.kl_in)):
            raise ValueError(f"ppo.kl_estimator {self.kl_estimator} does not go with ppo.kl_in {self.kl_in}: {reason}")
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


_OPTIM: dict[str, Any] = {"eps": 1e-5, "learning_rate": 3e-6}


@section
class PPOConfig:
    """PPO with any sum of reward models, reward functions, endpoints and human feedback."""

    run_dir: str = "runs/ppo"
    """Output directory: checkpoints, metrics and the exported model."""
    seed: Seed = 0
    """Random seed."""
    model: ModelSource = ModelSource()
    lora: LoRA = LoRA()
    tokenizer: TokenizerSource = TokenizerSource()
    reference: Reference = Reference()
    data: Data = Data()
    reward: RewardSource = RewardSource()
    scores: Scores = Scores()
    critic: Critic = Critic()
    ppo: PPO = PPO()
    sampling: Sampling = Sampling()
    rollout: Generation = Generation()
    optim: Optim = Optim(**_OPTIM)
    """PPO's defaults are learning_rate 3e-6 and eps 1e-5; an `Optim` created in Python has those of `Optim`."""
    validation: Validation = Validation()
    alarms: Alarms = Alarms()
    mesh: Mesh = Mesh()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()

    @field_validator("optim", mode="before")
    @classmethod
    def _optim_defaults(cls, optim: Any) -> Any:
        return {**_OPTIM, **optim} if isinstance(optim, dict) else optim

    def __post_init__(self) -> None:
        on_policy.check("ppo", self, self.ppo.batch_size)
        if self.critic.init == "reward" and not any(part.model for part in self.reward.parts()):
            raise ValueError("critic.init is 'reward' but reward.model is empty; give a reward model or use 'policy'")
        if self.reference.offload and self.critic.trunk == "frozen" and self.critic.init == "policy":
            raise ValueError(
                "reference.offload is true, but critic.trunk: frozen uses the reference's own arrays in every update; "
                "set reference.offload to false"
            )
