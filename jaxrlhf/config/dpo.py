"""Config of DPO and related preference losses."""

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import Field

from jaxrlhf.config.base import Bool, FlipProbability, Fraction, NonNegative, Positive, section
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
Loss = Literal[_LogRatioLoss, "sigmoid_norm", "ipo", "aot", "aot_unpaired", "simpo", "orpo", "cpo", "kto"]
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
    "reference_folder": (*_DIVERGENCE_LOSSES, "aot", "kto"),
}
"""Options that only some losses use. All losses use the other options, except `sft_coef`, which kto does not."""


@section
class DPO:
    """The preference loss. Losses and options have TRL's names where they mean the same."""

    loss: Loss = "sigmoid"
    """Type of loss; docs/preferences.md describes each. sigmoid is DPO. simpo, orpo and cpo use no reference model. kto
    trains on rows (prompt, completion, label); of pairs, it uses chosen responses as desirable and rejected ones as
    undesirable."""
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
    sft_coef: NonNegative | None = None
    """Coefficient of an additional SFT loss on chosen responses (negative log-likelihood per token). None: 1 for orpo
    and cpo, else 0."""
    simpo_gamma: NonNegative = 0.5
    """simpo: target reward margin (not divided by beta)."""
    desirable_weight: Positive = 1.0
    """kto: loss weight of desirable rows. Weight times number of rows should be similar for both labels."""
    undesirable_weight: Positive = 1.0
    """kto: loss weight of undesirable rows."""
    reference_folder: str = ""
    """Folder that caches the reference's log-probs, addressed by content. Empty: `reference` in the run directory."""

    @property
    def sft_weight(self) -> float:
        """`sft_coef`, or the loss's default."""
        return float(self.loss in ("orpo", "cpo")) if self.sft_coef is None else self.sft_coef

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, losses = getattr(self, field.name), _LOSSES_USING.get(field.name)
            if losses and self.loss not in losses and value != field.default:
                no_reference = self.loss in REFERENCE_FREE and field.name == "reference_folder"
                raise ValueError(
                    f"dpo.{field.name} is {value} and dpo.loss {self.loss}, which does not use it"
                    f"{': it needs no reference' if no_reference else ''}; leave it at {field.default!r}. "
                    f"It is for {', '.join(losses)}"
                )
        if self.loss == "kto" and self.sft_coef:
            raise ValueError(f"dpo.sft_coef is {self.sft_coef:g} and dpo.loss kto, which has no SFT term; leave it out")
        if self.loss == "exo_pair" and not self.label_smoothing:
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


@section
class DPOConfig(SupervisedConfig):
    """DPO and related losses: training on preferences without a reward model."""

    method = "dpo"
    run_dir: str = "runs/dpo"
    model: ModelSource = ModelSource()
    """The reference model is a frozen copy of it."""
    dpo: DPO = DPO()
    sampling: Sampling = Sampling()
    """Used for the samples printed during training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loss, train = self.dpo.loss, self.train
        if loss.startswith("aot") and (train.micro_batch_size or train.batch_size) != train.batch_size:
            raise ValueError(
                f"train.micro_batch_size is {train.micro_batch_size} and dpo.loss {loss}, which ranks the pairs of the "
                "whole batch; leave it out (lora.enabled and model.remat: full save memory too)"
            )
        if loss == "kto" and train.packing:
            raise ValueError(
                "train.packing is true and dpo.loss kto, which estimates its KL from mismatched prompts and "
                "completions that are not in the packed rows; set train.packing to false"
            )
