import dataclasses
import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import config, models, runtime, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import generation
from jaxrlhf.models.product import FEW, int8_product, left_product
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.training.on_policy.sampler import Sampler

QWEN = tiny(
    family="qwen2",
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    head_dim=16,
    mlp_size=96,
    qkv_bias=True,
    qk_norm=True,
    sliding_layers=(False,) * 3,
)
GPT2 = dataclasses.replace(
    QWEN, family="gpt2", rope=None, norm="layernorm", gated_mlp=False, mlp_bias=True, attention_out_bias=True
)
CAPPED = dataclasses.replace(
    QWEN,
    norm="rmsnorm_1p",
    norm_placement="both",
    embedding_multiplier=8.0,
    attention_softcap=2.0,
    logits_softcap=3.0,
    rope_layers=(True, False, True),
)
UNTIED = dataclasses.replace(QWEN, tie_embeddings=False)
MODELS = pytest.mark.parametrize("model", [QWEN, GPT2, UNTIED, CAPPED], ids=["qwen2", "gpt2", "untied", "capped"])


def logits(params, model, tokens):
    ones = jnp.ones(tokens.shape, bool)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = models.empty_cache(model, *tokens.shape)
    hidden, _ = jax.jit(models.forward_cached, static_argnums=1)(params, model, tokens, ones, positions, cache, 0)
    return np.asarray(models.lm_logits(params, model, hidden))


def exact(model, key, tokens):
    params = jax.tree.map(lambda x: jnp.where(x == 1, x, 4 * x), models.init(model, key))
    hidden = models.forward(params, model, tokens, jnp.ones(tokens.shape, bool))
    return params, np.asarray(models.lm_logits(params, model, hidden))


@MODELS
def test_a_float32_copy_computes_what_the_model_does(model, key):
    tokens = jax.random.randint(key, (3, 9), 0, 96)
    params, expected = exact(model, key, tokens)
    inference, copy = inference_copy(model, params, "float32")
    np.testing.assert_allclose(logits(copy, inference, tokens), expected, atol=2e-5)


AVX2 = runtime.Processor("a processor", 2, ("AVX2",), "avx2")
EXPERTS = dataclasses.replace(QWEN, num_experts=4, experts_per_token=2)


@pytest.mark.parametrize("model", [QWEN, GPT2, UNTIED, CAPPED, EXPERTS])
@pytest.mark.parametrize("columns", [1, 9, 40])
def test_a_copy_with_weights_on_the_left_computes_what_the_model_does(model, columns, key, monkeypatch):
    monkeypatch.setattr(runtime, "processor", lambda: AVX2)
    tokens = jax.random.randint(key, (3, columns), 0, 96)
    params, expected = exact(model, key, tokens)
    inference, copy = inference_copy(model, params, "float32", rows=3)
    assert inference.kernels == "left"
    assert copy["layers"][0]["attention"]["k"]["kernel"].shape == (model.num_kv_heads * model.head_dim, 64)
    np.testing.assert_allclose(logits(copy, inference, tokens), expected, atol=2e-5)


@pytest.mark.parametrize(("rows", "shape"), [(FEW, "96,64"), (FEW + 1, "65,96")])
def test_xla_leaves_the_weight_on_the_left_of_few_rows(rows, shape):
    """Inside a loop, where it turns the product of a weight and an activation around."""

    def loop(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(left_product(x, kernel, "float32")) + x, x)

    text = jax.jit(loop).lower(jnp.ones((rows, 96)), jnp.ones((96, 96))).compile().as_text()
    assert re.findall(r"f32\[([\d,]*)\]\S* dot\(", text) == [shape]


@MODELS
def test_a_bfloat16_copy_computes_what_a_bfloat16_model_does(model, key):
    """Stored rounded or rounded at each product: the same numbers. Norms and biases stay unrounded in both."""
    tokens = jax.random.randint(key, (3, 9), 0, 96)
    half = dataclasses.replace(model, dtype="bfloat16")
    params, expected = exact(half, key, tokens)
    inference, copy = inference_copy(model, params, "bfloat16")
    np.testing.assert_allclose(logits(copy, inference, tokens), expected, atol=1e-2)
    assert copy["layers"][0]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert copy["layers"][0]["mlp_norm"]["scale"].dtype == jnp.float32


@MODELS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_copy_is_near_and_small(model, key, dtype):
    tokens = jax.random.randint(key, (3, 9), 0, 96)
    half = dataclasses.replace(model, dtype=dtype)
    params, expected = exact(half, key, tokens)
    inference, copy = inference_copy(half, params, "int8")
    found = logits(copy, inference, tokens)
    assert 1e-3 < np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995
    assert sum(x.nbytes for x in jax.tree.leaves(copy)) < 0.36 * sum(x.nbytes for x in jax.tree.leaves(params))


def test_int8_products_of_whole_numbers_are_exact():
    """Rows whose largest entry is 127 lose nothing: an integer product by hand."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-126, 127, (4, 3, 8)).astype(np.float32), rng.integers(-127, 128, (5, 8)).astype(np.int8)
    x[..., 0] = 127
    scale = np.array([1, 0.5, 2, 4, 0.25], np.float32)
    expected = np.einsum("abi,oi->abo", x.astype(np.int64), w.astype(np.int64)) * scale
    np.testing.assert_allclose(int8_product(jnp.asarray(x), jnp.asarray(w), jnp.asarray(scale)), expected, rtol=1e-6)
    assert not np.asarray(int8_product(jnp.zeros((1, 8)), jnp.asarray(w), jnp.asarray(scale))).any()


def test_the_copy_is_not_the_model(key):
    """Training donates its parameters: a copy that shared their buffers would die with them."""
    params = models.init(QWEN, key)
    _, copy = inference_copy(QWEN, params, "float32")
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert held.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(copy))


def test_another_dtype_is_refused():
    with pytest.raises(ConfigError, match="cannot be 'float16'; choose one of float32, bfloat16, int8"):
        inspect.unwrap(inference_copy)(QWEN, {}, "float16")  # without the tests' own type checks


@pytest.mark.parametrize(("slots", "devices", "kernels"), [(0, 1, "float"), (0, 2, "left"), (32, 1, "left")])
def test_a_run_counts_the_rows_that_a_device_decodes_at_a_time(slots, devices, kernels, monkeypatch):
    monkeypatch.setattr(runtime, "processor", lambda: AVX2)
    run = config.PPOConfig(ppo=config.PPO(batch_size=64), rollout=config.Generation(slots=slots))
    tokenizer = SimpleNamespace(stops=lambda strings: (0,), pad_id=1)
    mesh = sharding.make_mesh(config.Mesh(data=devices))
    sampler = Sampler(run, QWEN, tokenizer, mesh, 0)  # type: ignore[arg-type]
    assert sampler.decoder.kernels == kernels


@pytest.mark.parametrize(("count", "kernels"), [(32, "left"), (33, "float")])
def test_a_command_counts_the_responses_that_it_was_asked_for(count, kernels, tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(runtime, "processor", lambda: AVX2)
    monkeypatch.setattr(generation, "generate", lambda _, model, *given: seen.append(model.kernels))
    monkeypatch.setattr(generation, "decoded", lambda *given: (None, []))
    source = config.ModelSource(path=str(tiny_model), init="random")
    run = config.PPOConfig(model=source, ppo=config.PPO(batch_size=128), sampling=config.Sampling(response_length=8))
    generation.complete(run, "a", count)
    assert seen == [kernels]
