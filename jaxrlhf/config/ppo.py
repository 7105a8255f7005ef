"""The sections of a PPO run that no other method has."""

from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import Bool, Count, DType, Fraction, Natural, NonNegative, Positive, Real, section


@section
class Critic:
    """The value model of PPO. Its head starts at zero."""

    init: Literal["policy", "reward"] = "policy"
    """Whose trunk it starts from, unless it shares the policy's."""
    trunk: Literal["own", "shared", "frozen"] = "own"
    """own: a second model that trains. shared: the policy's trunk, which learns from both losses. frozen: the
    reference's (or the reward model's), of which only the head trains: no second copy."""
    head: Literal["linear", "mlp"] = "linear"
    learning_rate: Positive | None = None
    """None: the policy's."""
    max_grad_norm: Positive | None = None
    """Clip of the critic's gradient. None: optim.max_grad_norm."""
    warmup_updates: Natural = 0
    """Updates at the start in which only the critic learns; with a shared trunk, only its head."""

    def __post_init__(self) -> None:
        if self.trunk == "shared" and self.init == "reward":
            raise ValueError("critic.init is 'reward' but critic.trunk is 'shared': the policy's; use trunk 'own'")


@section
class Reference:
    """The frozen model that the KL is measured against: the policy as it was at the start."""

    dtype: DType = "auto"
    """Storage. auto: the policy's compute dtype. With adapters there is no second copy for it to be about."""
    sync_every: Natural = 0
    """Updates after which the reference moves to the policy; 0: never. From then on the KL is to a moving point."""
    sync_alpha: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """How far it moves: 1 all the way; less keeps an exponential moving average of the policy."""
    offload: Bool = False
    """Keep it in the host's memory, and on the device only while it scores a rollout."""


@section
class Scores:
    """What happens to a sequence's score before it becomes a reward: in this order."""

    normalise: Literal["none", "reference", "running"] = "none"
    """reference: mean 0 and deviation 1 over responses of the reference, drawn once before training (gain and bias of
    https://arxiv.org/abs/1909.08593). running: over all scores of the run so far. Both are in the checkpoint."""
    reference_samples: Count = 256
    """Responses drawn for `normalise: reference`."""
    scale: Real = 1.0
    shift: Real = 0.0
    """score * scale + shift."""
    clip: Positive | None = None
    """Largest score either way."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that ran out of room: no stop token, no stop string."""
    overlong_buffer: Natural = 0
    """The last so many tokens before sampling.response_length cost more and more, up to `overlong_penalty` at the end
    (https://arxiv.org/abs/2503.14476, eq. 13); 0: none."""
    overlong_penalty: NonNegative = 1.0


@section
class PPO:
    """Proximal policy optimisation (https://arxiv.org/abs/1707.06347) on token-level rewards with a KL penalty."""

    total_episodes: Count = 1024
    """Completions in the whole run."""
    num_train_epochs: Positive | None = None
    """Or passes over the prompts; if given, it decides and total_episodes does not."""
    batch_size: Count = 16
    """Completions per update."""
    num_ppo_epochs: Count = 4
    """Passes over a rollout, each in an order of its own."""
    num_mini_batches: Count = 1
    """Optimizer steps per epoch; a divisor of batch_size."""
    micro_batch_size: Count | None = None
    """Rows per forward pass of the update; None: a mini-batch. Changes memory, not the result."""
    local_rollout_forward_batch_size: Count | None = None
    """Rows per forward pass of annotation; None: the update's. Changes memory, not the result."""
    replay: Natural = 0
    """Learn again from the last so many rollouts, after each new one. Their old log-probs are those of the policy that
    drew them, so the ratio corrects for its age; advantages stay as they were."""
    kl_coef: NonNegative = 0.05
    """What a nat of KL to the reference costs; with `kl_target`, at the start."""
    kl_target: Positive | None = None
    """Nats per response to steer for: kl_coef grows by a share of kl / kl_target - 1, cut to 0.2 either way
    (https://arxiv.org/abs/1909.08593, 2.2). None: kl_coef stays."""
    kl_horizon: Positive = 10000.0
    """Episodes in which an error of 1 would multiply kl_coef by e."""
    kl_in: Literal["reward", "loss"] = "reward"
    """The KL is taken from each token's reward, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the KL at a token, with d = log pi - log ref. In the reward: k1 = d. In the loss: k2 = d^2 / 2, or
    k3 = exp(-d) - 1 + d with importance weights pi / pi_old. Other pairs have a wrong gradient and are refused."""
    cliprange: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    """How far pi / pi_old may move from 1 for a gain."""
    cliprange_high: Positive | None = None
    """How far above 1 (https://arxiv.org/abs/2503.14476). None: cliprange."""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """Where the advantage is negative, the loss stops growing at this ratio (https://arxiv.org/abs/1912.09729).
    None: it grows on."""
    log_ratio_clamp: Positive = 20.0
    """log pi - log pi_old beyond it counts as it, without a gradient: keeps exp finite."""
    target_kl: Positive | None = None
    """Nats per token between pi_old and pi. A mini-batch that is further off is not learnt from, nor are those after it
    in this update; one of a replayed rollout is passed over alone. Steps not made do not count for optim.schedule.
    None: all are made."""
    cliprange_value: Positive | None = 0.2
    """How far a value may move for a gain. None: plain squared error."""
    value_target: Literal["gae", "reward_to_go"] = "gae"
    """What values are regressed on: advantage + value, or the discounted sum of the rewards to come."""
    vf_coef: Positive = 0.1
    entropy_coef: NonNegative = 0.0
    """What a nat of entropy per token is worth in the loss."""
    gamma: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    lam: Fraction = 0.95
    whiten_rewards: Bool = False
    """Scale rewards to unit variance over the batch; the mean stays."""
    whiten_advantages: Bool = True
    bootstrap_truncated: Bool = False
    """Treat running out of room as an interruption: the value after the last token stands in for what would follow."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Where rollout and training compute log-probs in different precision: weigh each token by pi_old / pi_sampler, at
    most `sampler_cap` (truncate, https://fengyao.notion.site/off-policy-rl), or leave out responses whose product of
    those weights is above it or below its inverse (mask)."""
    sampler_cap: Annotated[float, Field(strict=True, gt=1)] = 3.0

    def micro_rows(self, batch: int) -> int:
        """Rows of one forward pass of an update on `batch` completions."""
        return self.micro_batch_size or batch // self.num_mini_batches

    def annotation_rows(self, batch: int) -> int:
        """Rows of one forward pass of annotation: the update's unless told otherwise, since bfloat16 products depend on
        the row count."""
        return self.local_rollout_forward_batch_size or self.micro_rows(batch)


@section
class Validation:
    """Held-out prompts (data.validation_path or data.validation_fraction) inside training."""

    eval_steps: Natural = 0
    """Updates between validations; one comes before the first update and one at the end. 0: at start and end alone."""
    max_prompts: Count = 64
    """The first so many held-out prompts are answered, greedily and sampled."""
    metric: str = "eval/scores"
    """What the best checkpoint is chosen by, if keep_best; any key of a record that ends a validation."""
    mode: Literal["max", "min"] = "max"
    keep_best: Bool = False
    """Keep the checkpoint with the best `metric`, and export that one at the end."""
    patience: Natural = 0
    """Stop after so many validations in a row without a better `metric`; 0: never."""
    reward_model: str = ""
    """A second reward model, which training never sees, to check the first by."""


@section
class Alarms:
    """Signs of reward hacking and collapse. Each is said in a line and marked in metrics.jsonl; none stops a run."""

    kl: Positive | None = None
    """objective/kl, nats per response, above which the KL is over budget. None: no alarm."""
    entropy: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.1
    """Share of the first update's entropy per token below which it has collapsed; 0: no alarm."""
    length_correlation: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.9
    """Correlation of score and length, either sign, above which length is the reward; 1: no alarm."""
    finished: Fraction = 0.5
    """How much the share of finished responses may fall below the first update's; 1: no alarm."""
    window: Count = 5
    """Updates that a measurement is averaged over; before as many there is no alarm."""
