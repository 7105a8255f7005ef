"""Decoding as a scan over stacked layers, as on TPUs, draws what unrolled layers draw."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import lora, models, sharding
from jaxrlhf.config import Mesh, Sampling
from jaxrlhf.models import Adapters
from jaxrlhf.rollout import engine, stream
from jaxrlhf.rollout.decode import Decoding, generate
from jaxrlhf.rollout.inference_copy import copy_shardings, inference_copy
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.types import Prompts
from jaxrlhf.weights import peft

STOPS, PAD = (7, 2), 0
SAMPLING = Sampling(response_length=20, temperature=1.1)
LLAMA = tiny(
    vocab_size=40,
    num_layers=3,
    max_positions=1024,
    sliding_window=9,
    sliding_layers=(False, True, False),
    tie_embeddings=False,  # as float32 copies on CPUs are
)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    rope=None,
    norm="layernorm",
    gated_mlp=False,
    attention_scale_by_layer=True,
    sliding_window=None,
    sliding_layers=(False,) * 3,
)
ROPES = (
    dataclasses.replace(  # another rotation in the sliding layer and none in the last, and all else that is not GPT-2's
        LLAMA,
        family="gemma3_text",
        norm="rmsnorm_1p",
        norm_placement="both",
        qk_norm=True,
        qk_norm_over="all_heads",
        sliding_rope=models.Rope(theta=10.0),
        rope_layers=(True, True, False),
        attention_softcap=2.0,
        logits_softcap=4.0,
        logits_divisor=0.5,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
    )
)


def prompts_of(lengths, width):
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), width), PAD, np.int32), np.zeros((len(lengths), width), bool)
    for i, n in enumerate(lengths):
        tokens[i, width - n :], mask[i, width - n :] = rng.integers(0, 40, n), True
    return Prompts(tokens, mask, np.arange(len(lengths), dtype=np.int32), np.zeros(len(lengths), np.int32))


PROMPTS = prompts_of([3, 40, 1, 17, 25, 5, 30, 4], 40)


def copies(model, dtype="float32", params=None):
    """Two inference copies: of layers unrolled, and stacked."""
    if params is None:
        params = jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(model, jax.random.key(0)))
    both = [inference_copy(dataclasses.replace(model, platform=kind), params, dtype) for kind in ("gpu", "tpu")]
    assert [isinstance(copy["layers"], tuple) for _, copy in both] == [True, False]
    return both


def same(rollout, other):
    """Tokens and log-probs equal; what is compiled apart may be rounded apart by a last bit or two."""
    assert len(set(np.sum(rollout.response_mask, 1).tolist())) > 1, "rows end at different times"
    for field in dataclasses.fields(rollout):
        ours, theirs = getattr(rollout, field.name), getattr(other, field.name)
        if field.name == "logprobs":
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


@pytest.mark.parametrize("model", [LLAMA, GPT2, ROPES], ids=["llama", "gpt2", "ropes"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_batch(model, dtype, key):
    unrolled, stacked = (
        generate(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, 2) for model, params in copies(model, dtype)
    )
    same(stacked, unrolled)


@pytest.mark.parametrize(("sizes", "dtype"), [(None, "float32"), (Mesh(data=2, tensor=2), "int8")])
def test_slots(sizes, dtype, key):
    """Refilled slots, groups that share a prefill, and fewer slots for the last rows."""
    (model, params), (scanning, stack) = copies(LLAMA, dtype)
    expected = generate(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, 2)
    mesh = None
    if sizes:
        mesh = sharding.make_mesh(sizes)
        stack = jax.device_put(stack, copy_shardings(stack, scanning, mesh, ("tensor",)))
        kernel = stack["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 2
    queue = PromptQueue(PROMPTS, 8, 2)
    same(engine.generate_in_slots(stack, Decoding(scanning, SAMPLING, STOPS, PAD), queue, key, mesh), expected)


def test_a_stream(key):
    """A cache that grows and outlives its response."""
    both = copies(LLAMA)
    unrolled, stacked = (stream.Stream(params, Decoding(model, SAMPLING, STOPS, PAD)) for model, params in both)
    prompt = np.random.default_rng(1).integers(3, 40, 500).tolist()
    for length in (5, 500, 9):
        ours, theirs = ([*source.generate(prompt[:length], key, limit=20)] for source in (stacked, unrolled))
        assert ours == theirs


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all layers", "one layer"])
def test_merged_adapters(quantize, layers, key):
    base = models.init(LLAMA, key)
    model = dataclasses.replace(LLAMA, adapters=Adapters(2, 4.0, layers=layers))
    added = lora.init(model, base, peft.modules(model, ("all-linear",)), key, magnitudes=True)
    added = jax.tree.map(lambda x: x + 0.05, added)
    if quantize != "none":
        base = lora.pack(base, quantize, True)
    (_, unrolled), (_, stacked) = copies(model, params={**base, **added})
    restacked = jax.tree.map(lambda *x: jnp.stack(x), *unrolled["layers"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), stacked["layers"], restacked)
