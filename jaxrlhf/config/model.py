"""Sections for the model, its adapters and its tokenizer."""

import datetime
from typing import Any, Literal

from pydantic import Field

from jaxrlhf.config.base import (
    Bool,
    DType,
    FilePath,
    FractionBelowOne,
    Natural,
    NonNegative,
    Positive,
    Rank,
    section,
)


@section
class ModelSource:
    """The model to start from, and its precision."""

    path: FilePath = ""
    """Hugging Face model folder (or PEFT adapter folder), run directory of an earlier run, or hub id. Required."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Pin a commit for reproducible runs."""
    merged_path: FilePath = ""
    """Folder to write the merged model to, if `path` holds PEFT adapters: they are merged into their base model
    first."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises the weights randomly; only config.json and the tokenizer are read."""
    param_dtype: DType = "auto"
    """Dtype in which parameters are stored. auto: float32 if trainable, `compute_dtype` if frozen."""
    compute_dtype: DType = "auto"
    """Dtype of matrix multiplications; sums, norms, softmax and losses always use float32. auto: float32 on CPU,
    bfloat16 elsewhere."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """Gradient checkpointing: activations recomputed in the backward pass to save memory. none: nothing. full: whole
    layers. dots: everything except matrix products. auto: full on CPU (about half the memory of none, and as fast
    within what could be measured), dots on GPU, none on TPU. On a CPU with AVX2 and without AVX-512 also dots, for SFT,
    reward models and DPO in float32 without adapters, if a micro-batch has at most twice as many tokens as the model's
    hidden size: a step is then a tenth faster."""
    router_aux_loss_coef: NonNegative | None = None
    """Mixtures of experts: weight of the load-balancing loss of the router, in every method. None: that of config.json
    if its output_router_logits is true, else 0."""
    attention: Literal["auto", "plain", "cudnn"] = "auto"
    """Attention implementation for training and scoring. cudnn: fused kernel for NVIDIA GPUs in bfloat16. auto: cudnn
    if it passes a numerical check at startup (the choice is printed), else plain."""


@section
class LoRA:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): only the adapters train; the base model is frozen."""

    enabled: Bool = False
    """Train adapters. `--use-lora` is short for it."""
    rank: Rank = 16
    """Rank of the adapter matrices."""
    alpha: Positive = 32.0
    """Scaling numerator: the adapter output is multiplied by alpha / rank."""
    use_rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: Bool = False
    """Also train the magnitude of each output (DoRA, https://arxiv.org/abs/2402.09353)."""
    dropout: FractionBelowOne = 0.0
    """Dropout on adapter inputs in SFT, reward modelling and DPO. No effect in PPO and GRPO: their rollout,
    log-probs and update are without dropout, so that the first probability ratio is 1."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices to adapt, by their PEFT names (q_proj, c_attn, ...). `all-linear`: every linear layer of each block,
    with the experts of a mixture, each of which has adapters of its own, but without the router, which is frozen."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the frozen matrices under the adapters. int8: one scale per output. nf4: 4 bits, one scale per
    64 weights (QLoRA, https://arxiv.org/abs/2305.14314)."""
    double_quant: Bool = False
    """nf4 only: quantise the scales too, to 8 bits."""
    layers: tuple[Natural, Natural] | None = None
    """Range [start, end) of layers to adapt, [8, 16] for example. None: all layers."""

    def __post_init__(self) -> None:
        if self.quantize != "none" and not self.enabled:
            raise ValueError(
                f"lora.quantize is {self.quantize} but lora.enabled is false: quantised weights cannot be trained, "
                "only adapters on top of them; set lora.enabled (or --use-lora)"
            )
        if self.double_quant and self.quantize != "nf4":
            raise ValueError(f"lora.double_quant needs lora.quantize: nf4, but lora.quantize is {self.quantize}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: nothing would train; name matrices, or use all-linear")
        if self.layers and self.layers[0] >= self.layers[1]:
            raise ValueError(
                f"lora.layers is {list(self.layers)}: give [start, end) with start < end; the layer `end` is excluded"
            )


@section
class Teacher:
    """The frozen model whose probabilities the student learns, with the student's tokenizer."""

    path: FilePath = ""
    """Hugging Face model folder (or PEFT adapter folder), run directory of an earlier run, or hub id. Required."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: DType = "auto"
    """Dtype in which its parameters are stored and its products are computed. auto: float32 on CPU, bfloat16
    elsewhere."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the matrices of its layers, as `lora.quantize`."""


_TEMPLATE_SETS = ("messages", "tools", "add_generation_prompt", "chat_template", "conversations")
_TEMPLATE_SETS += ("return_assistant_tokens_mask", "continue_final_message")


@section
class TokenizerSource:
    """The tokenizer, its chat template and special tokens."""

    path: FilePath = ""
    """Folder or hub id. Empty: the model's own tokenizer."""
    chat_template: FilePath = "auto"
    """auto: the tokenizer's own template, if it has one. none: plain text. chatml: ChatML, for a tokenizer without a
    template. Otherwise the path of a .jinja file."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for every rendering: `{enable_thinking: false}` for Qwen3, for example. An
    exported model has them as defaults of its template."""
    template_date: str = ""
    """The date (YYYY-MM-DD) that a chat template writes as today's. Empty: the date on which the run was started,
    also after a resume."""
    train_empty_thinking: Bool = False
    """Train on the empty thought (`<think></think>`) that some templates put before an answer without reasoning."""
    pad_token: str | None = None
    """Padding token. None: the tokenizer's own, else a reserved token, else eos (padding is masked by position, so
    sharing eos is safe; an exported reward model gets another one, for transformers)."""
    eos_token: str | None = None
    """End-of-sequence token. None: the tokenizer's own."""

    def __post_init__(self) -> None:
        for name in self.template_kwargs:
            if not name.isidentifier() or name in _TEMPLATE_SETS:
                reason = "is set by every rendering" if name in _TEMPLATE_SETS else "is not the name of a variable"
                raise ValueError(f"tokenizer.template_kwargs: {name!r} {reason}; leave it out")
        try:
            parsed = datetime.date.fromisoformat(self.template_date) if self.template_date else None
        except ValueError:
            parsed = None
        if self.template_date and str(parsed) != self.template_date:
            raise ValueError(f"tokenizer.template_date is {self.template_date!r}; expected YYYY-MM-DD, or nothing")
