"""A decoder of a few thousand parameters, for tests that need a model and no file."""

import dataclasses
from typing import Any

from jaxrlhf.models import ModelConfig, Rope

_LLAMA = ModelConfig(
    family="llama",
    vocab_size=29,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=16,
    max_positions=64,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=Rope(theta=1e4),
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    sliding_layers=(False, False),
    tie_embeddings=True,
)


def tiny(**changes: Any) -> ModelConfig:
    """A Llama of two layers with grouped queries and a tied head, but for `changes`."""
    return dataclasses.replace(_LLAMA, **changes)
