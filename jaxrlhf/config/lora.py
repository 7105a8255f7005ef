"""The section of low-rank adapters."""

from typing import Annotated

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
    """Of what goes into the adapters, in SFT and reward models; never in PPO, whose ratio would not be one."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices that get adapters, named as in PEFT (q_proj, c_attn, ...); `all-linear`: those of every layer."""
    layers: tuple[Natural, Natural] | None = None
    """The first layer with adapters and the first after it without, [8, 16] for example. None: all layers."""

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: nothing would train; name matrices, or all-linear")
        if self.layers and self.layers[0] >= self.layers[1]:
            raise ValueError(f"lora.layers is {list(self.layers)}: give the first layer and the first after the last")
