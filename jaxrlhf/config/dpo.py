"""Config of DPO and related preference losses."""

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import Field

from jaxrlhf.config.base import Bool, FilePath, FlipProbability, Fraction, NonNegative, Positive, section
from jaxrlhf.config.model import ModelSource
from jaxrlhf.config.sampling import Sampling
from jaxrlhf.config.sft import SupervisedConfig

REFERENCE_FREE = ("simpo", "orpo", "cpo")
_LogRatioLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
PairLoss = Literal[_LogRatioLoss, "sigmoid_norm", "ipo", "bco_pair", "aot", "aot_unpaired"]
Loss = Literal[PairLoss, "simpo", "orpo", "cpo", "kto"]
_LOG_RATIO_LOSSES = get_args(_LogRatioLoss)
_DIVERGENCE_LOSSES = (*_LOG_RATIO_LOSSES, "sigmoid_norm", "ipo", "aot_unpaired")
_LOSSES_USING = {
    "label_smoothing": ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"),
    "discopop_tau": ("discopop",),
    "divergence": _DIVERGENCE_LOSSES,
    "alpha": _DIVERGENCE_LOSSES,
    "length_normalised": (*_LOG_RATIO_LOSSES, "cpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_folder": (*get_args(PairLoss), "kto"),
    "use_weighting": (*_LOG_RATIO_LOSSES, "sigmoid_norm", "ipo", "bco_pair"),
    "ld_alpha": (*get_args(PairLoss), "cpo"),
}
"""Options that only some losses use. All losses use the other options, except `sft_coef`, which kto does not."""


@section
class DPO:
    """The preference loss. Losses and options have TRL's names where they mean the same."""

    loss: Loss | tuple[Literal[PairLoss, "sft"], ...] = "sigmoid"
    """Type of loss; docs/preferences.md describes each. sigmoid is DPO. simpo, orpo and cpo use no reference model. kto
    trains on rows (prompt, completion, label); of pairs, it uses chosen responses as desirable and rejected ones as
    undesirable. A list is a sum of losses of pairs with a reference, and of sft, the SFT loss on chosen responses."""
    loss_weights: tuple[Positive, ...] | None = None
    """Weight of each loss of a list. None: 1 each."""
    beta: Positive = 0.1
    """Strength of the implicit KL constraint; higher values keep the policy closer to the reference. simpo uses 2 or
    more; in orpo it weights the odds ratio term."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of beta over the run, from `beta` to `beta_final`."""
    beta_final: Positive | None = None
    """Beta at the last optimizer step; required by the linear and cosine schedules."""
    label_smoothing: FlipProbability = 0.0
    """Assumed probability that a pair's labels are flipped. Must be positive for exo_pair, e.g. 0.001."""
    discopop_tau: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.05
    """discopop: temperature that blends the logistic and the exponential loss."""
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """f-divergence between policy and reference, for losses that use a reference."""
    alpha: Fraction = 0.5
    """alpha_divergence: alpha as in https://arxiv.org/abs/2309.16240; 0 is the reverse KL and 1 the forward KL. TRL's
    parameter is 1 - alpha."""
    length_normalised: Bool = False
    """Divide log-ratios by the response length. Always on for ipo, sigmoid_norm, simpo and orpo."""
    use_weighting: Bool = False
    """Weight the loss of each pair by how likely both responses are under the policy, without a gradient (WPO,
    https://arxiv.org/abs/2406.11827)."""
    ld_alpha: Fraction | None = None
    """Weight of the log-probs of tokens beyond the length of the shorter response of a pair (LD-DPO,
    https://arxiv.org/abs/2409.06411); lower values reduce the preference for long responses. None: 1."""
    sft_coef: NonNegative | None = None
    """Coefficient of an additional SFT loss on chosen responses (negative log-likelihood per token). None: 1 for orpo
    and cpo, else 0."""
    simpo_gamma: NonNegative = 0.5
    """simpo: target reward margin (not divided by beta)."""
    desirable_weight: Positive = 1.0
    """kto: loss weight of desirable rows. Weight times number of rows should be similar for both labels."""
    undesirable_weight: Positive = 1.0
    """kto: loss weight of undesirable rows."""
    reference_folder: FilePath = ""
    """Folder that caches the reference's log-probs, addressed by content. Empty: `reference` in the run directory."""

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss, without that of sft."""
        return {name: weight for name, weight in self._weights.items() if name != "sft"}

    @property
    def sft_weight(self) -> float:
        """`sft_coef`, or the loss's default, and the weight of sft in a list of losses."""
        coef = float(self.loss in ("orpo", "cpo")) if self.sft_coef is None else self.sft_coef
        return coef + self._weights.get("sft", 0.0)

    @property
    def _loss_text(self) -> str:
        return self.loss if isinstance(self.loss, str) else f"[{', '.join(self.loss)}]"

    @property
    def _weights(self) -> dict[str, float]:
        names = (self.loss,) if isinstance(self.loss, str) else self.loss
        return dict(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    def __post_init__(self) -> None:
        self._check_losses()
        for field in dataclasses.fields(self):
            value, losses = getattr(self, field.name), _LOSSES_USING.get(field.name)
            every = field.name == "use_weighting"  # a loss that ranks responses mixes up the pairs
            used = losses and (all if every else any)(name in losses for name in self.losses)
            if losses and not used and value != field.default:
                no_reference = self.loss in REFERENCE_FREE and field.name == "reference_folder"
                raise ValueError(
                    f"dpo.{field.name} is {value} and dpo.loss {self._loss_text}, which does not use it"
                    f"{': it needs no reference' if no_reference else ''}; leave it at {field.default!r}. "
                    f"It is for {', '.join(losses)}"
                )
        if self.loss == "kto" and self.sft_coef:
            raise ValueError(f"dpo.sft_coef is {self.sft_coef:g} and dpo.loss kto, which has no SFT term; leave it out")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError(
                "dpo.label_smoothing is 0 and dpo.loss exo_pair, whose divergence from a one-hot label is infinite; "
                "give 0.001, say"
            )
        if self.alpha != 0.5 and self.divergence != "alpha_divergence":
            raise ValueError(
                f"dpo.alpha is {self.alpha:g} and dpo.divergence {self.divergence}, which has none; it is for "
                "alpha_divergence"
            )
        if (self.beta_final is None) != (self.beta_schedule == "constant"):
            final = "not given" if self.beta_final is None else f"{self.beta_final:g}"
            raise ValueError(
                f"dpo.beta_schedule is {self.beta_schedule} and dpo.beta_final {final}: linear and cosine need a "
                "beta_final, and constant takes none"
            )

    def _check_losses(self) -> None:
        if isinstance(self.loss, str):
            if self.loss_weights is not None:
                raise ValueError("dpo.loss_weights is set and dpo.loss is a single loss; leave it out, or give a list")
            return
        given = self._loss_text
        if not self.loss or set(self.loss) == {"sft"}:
            raise ValueError(f"dpo.loss is {given}, which has no loss of pairs; give one, e.g. [sigmoid, sft]")
        if len(set(self.loss)) < len(self.loss):
            raise ValueError(f"dpo.loss is {given}, which has a loss twice; give its weight in dpo.loss_weights")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(
                f"dpo.loss_weights has {len(self.loss_weights)} weights and dpo.loss {len(self.loss)} losses; give one "
                "for each"
            )


@section
class DPOConfig(SupervisedConfig):
    """DPO and related losses: training on preferences without a reward model."""

    method = "dpo"
    run_dir: FilePath = "runs/dpo"
    model: ModelSource = ModelSource()
    """The reference model is a frozen copy of it."""
    dpo: DPO = DPO()
    sampling: Sampling = Sampling()
    """Used for the samples printed during training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loss, train = self.dpo.loss, self.train
        ranking = [name for name in self.dpo.losses if name.startswith("aot")]
        if ranking and (train.micro_batch_size or train.batch_size) != train.batch_size:
            raise ValueError(
                f"train.micro_batch_size is {train.micro_batch_size} and dpo.loss {ranking[0]}, which ranks the pairs "
                "of the whole batch; leave it out (lora.enabled and model.remat: full save memory too)"
            )
        if train.micro_batch_tokens and (ranking or loss == "kto"):
            raise ValueError(
                f"train.micro_batch_tokens is {train.micro_batch_tokens} and dpo.loss {(*ranking, loss)[0]}, which "
                "compares the rows of the whole batch; leave it out"
            )
        if loss == "kto" and train.packing:
            raise ValueError(
                "train.packing is true and dpo.loss kto, which estimates its KL from mismatched prompts and "
                "completions that are not in the packed rows; set train.packing to false"
            )
