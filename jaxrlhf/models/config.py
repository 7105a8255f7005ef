"""Model configuration: one frozen, hashable dataclass for all supported families."""

import math
from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
"""Scaling of rotary frequencies: see models/rope.py."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings and their scaling. Fields that a `kind` does not use keep their defaults."""

    theta: float
    kind: Kind = "default"
    partial_rotary_factor: float = 1.0  # share of the components of a head, from the first, that turn
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: computed from `factor`, or yarn's mscale pair
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies for lengths up to the original
    long_factor: tuple[float, ...] = ()  # longrope: those for longer sequences
    length: int | None = None  # dynamic, longrope: length that all sequences are rotated for; None: each row its own
    query_scale_beta: float = 0.0  # queries times 1 + beta ln(1 + floor(position / original_max_positions)) (Llama 4)

    @property
    def depends_on_length(self) -> bool:
        """True if the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta-net layers (https://arxiv.org/abs/2412.06464), which have a recurrent state in place of keys and
    values. See models/delta.py."""

    layers: tuple[bool, ...]  # [L]   True for layers with it, False for layers with attention
    key_heads: int
    value_heads: int  # a multiple of key_heads; each has a state [key_size, value_size]
    key_size: int  # of a head
    value_size: int  # of a head
    conv_width: int  # tokens that the convolution of queries, keys and values reads

    @property
    def channels(self) -> int:
        """Width of queries, keys and values of all heads together, which the convolution reads."""
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size


@dataclass(frozen=True)
class Adapters:
    """Configuration of low-rank adapters (https://arxiv.org/abs/2106.09685): W + scale A B in place of W.

    Their parameters are created by `lora.init` and stored under "lora" of the model's parameters. Without "lora" the
    model is the base model.
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False  # https://arxiv.org/abs/2312.03732
    dropout: float = 0.0  # on the input of A, in `models.forward` with `keys`
    layers: tuple[int, int] | None = None  # (first, last + 1) layer with adapters; None: all
    tokens: tuple[int, ...] = ()  # tokens whose embedding rows and untied head columns are trained too

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and execution options of a decoder. Static under jit."""

    family: str  # Hugging Face model_type; selects the table of parameter names
    vocab_size: int  # V   rows of the embedding, which may exceed the tokenizer's size
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K   divides N
    head_dim: int  # H   need not be D / N
    mlp_size: int  # F
    max_positions: int  # longest sequence the model was trained for
    norm: Literal["rmsnorm", "rmsnorm_1p", "layernorm"]  # rmsnorm_1p: x / rms(x) * (1 + scale)
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh"]
    gated_mlp: bool  # act(x W_gate) * (x W_up) W_down, else act(x W_up) W_down
    rope: Rope | None  # None: learned absolute positions
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of q and k, see `qk_norm_over`
    sliding_window: int | None  # a query sees itself and the window - 1 tokens before it
    sliding_layers: tuple[bool, ...]  # [L]   True for layers with the window
    tie_embeddings: bool
    head: Literal["lm", "linear", "mlp"] = "lm"  # lm: logits; linear, mlp: scalar head
    num_labels: int = 1  # of a scalar head; 2: the score is the probability of label 1
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_scale_by_layer: bool = False  # GPT-2's scale_attn_by_inverse_layer_idx
    attention_gate: bool = False  # `q` also computes a gate, whose sigmoid multiplies the output of attention
    attention_softcap: float | None = None  # c: attention logits x become c tanh(x / c)
    qk_norm_over: Literal["head", "all_heads"] = "head"  # what `qk_norm` normalises: each head, or all heads together
    norm_placement: Literal["pre", "post", "both"] = "pre"  # norms of attention's and the MLP's input, output, or both
    sliding_rope: Rope | None = None  # of layers with the window; None: `rope`
    rope_layers: tuple[bool, ...] = ()  # [L]   False for layers without rotary embeddings; (): all have them
    delta: DeltaNet | None = None  # layers without attention; None: all have it
    embedding_multiplier: float = 1.0  # on the embedding, rounded to `dtype`
    residual_multiplier: float = 1.0  # on the outputs of attention and MLP
    logits_divisor: float = 1.0
    logits_softcap: float | None = None  # after the division, as `attention_softcap`
    num_experts: int = 0  # E   0: a dense MLP
    experts_per_token: int = 0  # those with the largest probabilities in a softmax over all
    normalise_expert_shares: bool = False  # True: the shares of a token's experts sum to 1; False: the probabilities
    router_aux_loss_coef: float = 0.0  # of the load-balancing loss in training, see algorithms/router.py
    parallel_residual: bool = False  # the MLP reads the input of the layer, not that plus attention's output
    platform: Literal["cpu", "gpu", "tpu"] = "cpu"  # that computes it: sizes of chunks, layouts for decoding
    dtype: Literal["float32", "bfloat16"] = "float32"  # operands of matrix products; they accumulate in float32
    kernels: Literal["float", "left", "int8"] = "float"  # left, int8: for inference only, see rollout/inference_copy.py
    key_columns: Literal[2, 3] = 2  # axis of a layer's cached keys that has the columns: [B, K, S, H] or [B, K, H, S]
    remat: Literal["none", "full", "dots"] = "none"
    micro_batch_rows: int | None = None  # of whole sequences that a layer computes, a divisor of the batch; None: all
    mesh: Mesh | None = None  # over which its parameters are sharded, see placement.py; None: one device, or not known
    attention: Literal["plain", "cudnn"] = "plain"  # for whole sequences; with a cache or a softcap always plain
    adapters: Adapters | None = None

    @property
    def scans_layers(self) -> bool:
        """True if decoding scans over stacked layers and a stacked cache. Unrolled layers are faster on CPUs; a TPU's
        compiler takes minutes for thirty of them, and copies their caches. Layers of two kinds are always unrolled."""
        return self.platform == "tpu" and self.delta is None

    @property
    def delta_layers(self) -> tuple[bool, ...]:
        """[L] True for layers with a delta net, False for layers with attention."""
        return self.delta.layers if self.delta else (False,) * self.num_layers

    @property
    def period(self) -> int:
        """The least number of layers after which their kinds repeat."""
        kinds, count = self.delta_layers, self.num_layers
        return next(n for n in range(1, count + 1) if count % n == 0 and kinds == kinds[:n] * (count // n))

    def layers_with(self, module: str) -> tuple[int, ...]:
        """Numbers of the layers that have a module ("attention", "delta", "mlp", ...), over which it is stacked."""
        without = {"attention": True, "delta": False}.get(module)
        return tuple(i for i, delta in enumerate(self.delta_layers) if delta != without)

    @property
    def balances_experts(self) -> bool:
        """True if training adds the load-balancing loss."""
        return self.num_experts > 0 and self.router_aux_loss_coef > 0

    @property
    def adapter_scale(self) -> float:
        """The factor of the adapters' output."""
        return self.adapters.scale if self.adapters else 1.0

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """[L] The rotary embeddings of every layer."""
        with_rope = self.rope_layers or (True,) * self.num_layers
        return tuple(
            ((sliding and self.sliding_rope) or self.rope) if has_rope else None
            for sliding, has_rope in zip(self.sliding_layers, with_rope, strict=True)
        )

    @property
    def adapted_layers(self) -> tuple[int, int]:
        """(first, last + 1) layer with adapters."""
        return (self.adapters and self.adapters.layers) or (0, self.num_layers)

    def adapted_in(self, module: str) -> tuple[int, int]:
        """(first, last + 1) layer with adapters in the stack of a module of the layers."""
        layers, (first, last) = self.layers_with(module), self.adapted_layers
        return sum(i < first for i in layers), sum(i < last for i in layers)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        if len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers")
        if len(self.rope_layers) not in (0, self.num_layers):
            raise ValueError(f"rope_layers has {len(self.rope_layers)} entries for {self.num_layers} layers")
        if self.delta is not None:
            if len(self.delta.layers) != self.num_layers:
                raise ValueError(f"delta.layers has {len(self.delta.layers)} entries for {self.num_layers} layers")
            if self.delta.value_heads % self.delta.key_heads:
                raise ValueError(
                    f"the key heads of delta nets ({self.delta.key_heads}) must divide their value heads "
                    f"({self.delta.value_heads})"
                )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head_dim, got {self.head_dim}")
