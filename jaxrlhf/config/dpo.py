"""What a run of the preference losses is configured by, and which settings a loss does not go with."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import Bool, NonNegative, Positive, Seed, section
from jaxrlhf.config.lora import LoRA
from jaxrlhf.config.methods import check_supervised
from jaxrlhf.config.sections import (
    Checkpoint,
    Data,
    Logging,
    Mesh,
    ModelSource,
    Optim,
    Sampling,
    TokenizerSource,
    Train,
)

REFERENCE_FREE = ("simpo", "orpo", "cpo")
_RATIOS = ("sigmoid", "robust", "hinge", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
_DIVERGING = (*_RATIOS, "sigmoid_norm", "ipo", "aot_unpaired")
_USED_BY = {
    "label_smoothing": ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"),
    "discopop_tau": ("discopop",),
    "divergence": _DIVERGING,
    "alpha": _DIVERGING,
    "length_normalised": (*_RATIOS, "cpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_folder": (*_DIVERGING, "aot", "kto"),
}
"""Which losses look at a setting; what is not here all of them do, but for `sft_coef`, which kto does not."""


@section
class DPO:
    """The loss. Its names and those of its settings are TRL's where the meaning is TRL's."""

    loss: Literal[
        "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "simpo", "orpo", "cpo", "kto",
    ] = "sigmoid"  # fmt: skip
    """sigmoid is DPO. simpo, orpo and cpo need no reference. kto learns from rows with a label (prompt, completion,
    label); of pairs it takes the chosen response as a good one and the rejected as a bad one. docs/preferences.md says
    what each is for."""
    beta: Positive = 0.1
    """Multiplies log(policy / reference): the smaller, the further the policy may go. simpo wants 2 and more; in orpo
    it is the weight of the odds ratio."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """linear and cosine: from `beta` at the first optimizer step to `beta_final` at the last."""
    beta_final: Positive | None = None
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] = 0.0
    """The probability that a pair is the wrong way round. exo_pair needs one above 0, 0.001 say."""
    discopop_tau: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.05
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """From the reference, in the losses that compare policy and reference."""
    alpha: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.5
    """Of alpha_divergence, as in the paper (https://arxiv.org/abs/2309.16240): 0 is the reverse and 1 the forward KL.
    TRL's is 1 - alpha."""
    length_normalised: Bool = False
    """Compare log(policy / reference) per token. ipo, sigmoid_norm, simpo and orpo always do."""
    sft_coef: NonNegative | None = None
    """Of -log p(chosen) per token, which is added. None: 1 for orpo and cpo, else 0."""
    simpo_gamma: NonNegative = 0.5
    """The margin that simpo asks for; not divided by `beta`."""
    desirable_weight: Positive = 1.0
    """kto: of rows whose label is true. Rows times weight should be about the same for both labels."""
    undesirable_weight: Positive = 1.0
    reference_folder: str = ""
    """Where log-probs of the reference are kept, by their content. Empty: `reference` in the run directory."""

    @property
    def sft_weight(self) -> float:
        """`sft_coef`, or what stands for None."""
        return float(self.loss in ("orpo", "cpo")) if self.sft_coef is None else self.sft_coef

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, losses = getattr(self, field.name), _USED_BY.get(field.name)
            if losses and self.loss not in losses and value != field.default:
                free = ": it needs no reference" * (self.loss in REFERENCE_FREE and field.name == "reference_folder")
                raise ValueError(
                    f"dpo.{field.name} is {value} and dpo.loss {self.loss}, which does not use it{free}; leave it at "
                    f"{field.default!r}. It is for {', '.join(losses)}"
                )
        if self.loss == "kto" and self.sft_coef:
            raise ValueError(f"dpo.sft_coef is {self.sft_coef:g} and dpo.loss kto, which has no SFT term; leave it out")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "dpo.label_smoothing is 0 and dpo.loss exo_pair: the divergence from a label that is certain is "
                "infinite; give 0.001, say"
            )
        if self.alpha != 0.5 and self.divergence != "alpha_divergence":
            raise ValueError(
                f"dpo.alpha is {self.alpha:g} and dpo.divergence {self.divergence}, which has none; it is for "
                "alpha_divergence"
            )
        if (self.beta_final is None) != (self.beta_schedule == "constant"):
            raise ValueError(
                f"dpo.beta_schedule is {self.beta_schedule} and dpo.beta_final "
                f"{'not given' if self.beta_final is None else f'{self.beta_final:g}'}: a schedule other than constant "
                "ends at beta_final, and constant takes none"
            )


@section
class DPOConfig:
    """Learning from preferences without a reward model: DPO and its relatives."""

    run_dir: str = "runs/dpo"
    seed: Seed = 0
    model: ModelSource = Field(default_factory=ModelSource)
    """The reference is this model too, as it is before the first step."""
    lora: LoRA = Field(default_factory=LoRA)
    tokenizer: TokenizerSource = Field(default_factory=TokenizerSource)
    data: Data = Field(default_factory=Data)
    dpo: DPO = Field(default_factory=DPO)
    train: Train = Field(default_factory=Train)
    optim: Optim = Field(default_factory=Optim)
    sampling: Sampling = Field(default_factory=Sampling)
    """For the samples that are printed while it trains."""
    mesh: Mesh = Field(default_factory=Mesh)
    logging: Logging = Field(default_factory=Logging)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        check_supervised(self.train, self.optim)
        loss, train = self.dpo.loss, self.train
        if loss.startswith("aot") and (train.micro_batch_size or train.batch_size) != train.batch_size:
            raise ValueError(
                f"train.micro_batch_size is {train.micro_batch_size} and dpo.loss {loss}, which ranks the pairs of the "
                "whole batch; leave it out (lora.enabled and model.remat: full save memory too)"
            )
        if loss == "kto" and train.packing:
            raise ValueError(
                "train.packing is true and dpo.loss kto, whose KL is of the answers to other prompts, texts of their "
                "own; leave it false"
            )
