"""What a card computes, against transformers (tests/fixtures/models) and against our own plain code.

    python -m pytest -m gpu tests/gpu

JAXRLHF_GPU_REHEARSAL=1 runs the same on a CPU, to test these tests.
"""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny import tiny

import jaxrlhf
from jaxrlhf import models, sharding
from jaxrlhf.config import Mesh, Sampling
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.models.attention import cudnn_trouble
from jaxrlhf.rollout.decode import generate
from jaxrlhf.rollout.inference_copy import convert, inference_copy, inference_model, split_axes
from jaxrlhf.types import Prompts

pytestmark = pytest.mark.gpu
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
CASES = ("llama", "llama-llama3", "gpt2", "mistral-window", "qwen2", "qwen3", "gemma3", "phi3-longrope")
CASES += ("qwen3_moe", "qwen3_5")
REHEARSAL = "JAXRLHF_GPU_REHEARSAL"


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if sharding.platform() != "gpu" and REHEARSAL not in os.environ:
        pytest.skip("no GPU (or not asked for: pytest -m gpu)")


@pytest.fixture(params=CASES, scope="module")
def golden(request):
    """(model, parameters in float32, what transformers computed in float32)."""
    folder = FOLDER / request.param
    model, params = jaxrlhf.load(folder, dtype="float32", compute_dtype="float32")
    return model, params, load_file(folder / "golden.safetensors")


def padded(rows):
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return tokens, mask


def logits_of(model, params, tokens, mask):
    run = jax.jit(lambda p, *rows: models.lm_logits(p, model, models.forward(p, model, *rows)))
    return np.asarray(run(params, tokens, mask))[np.asarray(mask)]


def prompts_of(rows):
    tokens, mask = padded(rows)
    return Prompts(tokens, mask, np.arange(len(rows), dtype=np.int32), np.zeros(len(rows), np.int32))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_logits_are_those_of_transformers(golden, dtype, tolerance):
    """In bfloat16 relative to the largest logit: a few roundings."""
    model, params, expected = golden
    tokens, mask = padded([r[:n] for r, n in zip(expected["tokens"], expected["lengths"], strict=True)])
    logits = logits_of(dataclasses.replace(model, dtype=dtype), params, tokens, mask)
    scale = np.abs(expected["logits"]).max() if dtype == "bfloat16" else 1.0
    np.testing.assert_allclose(logits, expected["logits"], atol=tolerance * scale, rtol=0)


def test_greedy_decoding_gives_the_tokens_of_transformers(golden):
    model, params, expected = golden
    rows = [r[len(r) - n :] for r, n in zip(expected["prompts"], expected["prompt_lengths"], strict=True)]
    length = expected["greedy"].shape[1]
    inference, copy = inference_copy(model, params, "float32")
    rollout = generate(
        copy, inference, prompts_of(rows), jax.random.key(0), Sampling(response_length=length, greedy=True), (), 0
    )
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, -length:], expected["greedy"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.12)])
def test_decoding_and_training_agree_on_logprobs(golden, dtype, tolerance):
    model, params, expected = golden
    rows = [r[len(r) - n :] for r, n in zip(expected["prompts"], expected["prompt_lengths"], strict=True)]
    inference, copy = inference_copy(model, params, dtype)
    rollout = generate(copy, inference, prompts_of(rows), jax.random.key(0), Sampling(response_length=16), (), 0)

    @jax.jit
    def exact(params, rollout):
        hidden = response_states(params, model, rollout)
        return token_logprobs(params, model, hidden[:, :-1], rollout.tokens[:, -16:], 1.0)[0]

    gap = np.abs(np.asarray(rollout.logprobs) - np.asarray(exact(params, rollout)))
    assert gap.mean() <= tolerance


@pytest.mark.parametrize("heads", [(9, 3, 64), (14, 2, 64), (12, 2, 128)], ids=["S", "M", "L"])
def test_cudnn_attention_agrees_with_plain(heads):
    if sharding.platform() != "gpu":
        pytest.skip("cuDNN is on GPUs")
    assert cudnn_trouble(*heads) == ""


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_sharded_equals_single(axis):
    count = 2 if axis == "tensor" else len(jax.devices())
    if count > len(jax.devices()) or count == 1:
        pytest.skip("one device")
    model = tiny(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_size=128, vocab_size=512)
    params = jax.tree.map(lambda x: jnp.where(x == 1, x, 8 * x), models.init(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = prompts_of([rng.integers(1, 512, n) for n in rng.integers(2, 9, 2 * len(jax.devices()))])
    found = []
    for shape in (Mesh(), Mesh(**{axis: count})):
        mesh = sharding.make_mesh(shape)
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        rows = sharding.put_rows(prompts, mesh)
        logits = logits_of(model, placed, rows.tokens, rows.mask)
        inference = inference_model(model, "float32")
        copy = convert(placed, model, inference, mesh, split_axes(inference, mesh, "auto"))
        rollout = generate(copy, inference, rows, jax.random.key(1), Sampling(response_length=16), (2,), 0)
        found.append((logits, np.asarray(rollout.tokens)))
    (alone, tokens), (together, others) = found
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())
    np.testing.assert_array_equal(others, tokens)
