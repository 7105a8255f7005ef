"""The section of low-rank adapters."""

from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import Bool, Count, Natural, Positive, section


@section
class LoRA:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): they train, and the model under them is frozen."""

    enabled: Bool = False
    """`--use-lora` for short."""
    rank: Count = 16
    alpha: Positive = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    use_rslora: Bool = False
    """By alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: Bool = False
    """Magnitudes of the outputs train too (https://arxiv.org/abs/2402.09353)."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Of what goes into the adapters, in supervised training; never in PPO, whose ratio would not be one."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices that get adapters, named as in PEFT (q_proj, c_attn, ...); `all-linear`: those of every layer."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """The matrices under the adapters in 8 bits, a scale for each output, or in 4, a scale for each 64 weights
    (https://arxiv.org/abs/2305.14314)."""
    double_quant: Bool = False
    """With nf4: those scales in 8 bits too."""
    layers: tuple[Natural, Natural] | None = None
    """The first layer with adapters and the first after it without, [8, 16] for example. None: all layers."""

    def __post_init__(self) -> None:
        if self.quantize != "none" and not self.enabled:
            raise ValueError(
                f"lora.quantize is {self.quantize} and lora.enabled false: a model in so few bits cannot train itself, "
                "only adapters beside it can; set lora.enabled (or --use-lora)"
            )
        if self.double_quant and self.quantize != "nf4":
            raise ValueError(f"lora.double_quant is for nf4, and lora.quantize is {self.quantize}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: nothing would train; name matrices, or all-linear")
        if self.layers and self.layers[0] >= self.layers[1]:
            raise ValueError(f"lora.layers is {list(self.layers)}: give the first layer and the first after the last")
