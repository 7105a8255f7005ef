import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.config import Critic, ModelSource, PPOConfig, RewardSource
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import attention
from jaxrlhf.training.ppo.critic import critic_model
from jaxrlhf.training.setup import with_attention


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("softcap", "columns_last"), [(None, False), (1.5, False), (None, True)])
def test_attention_against_a_loop(softcap, columns_last):
    q, k, v = normal(2, 3, 4, 6), normal(2, 5, 2, 6, seed=1), normal(2, 5, 2, 6, seed=2)
    mask = np.random.default_rng(3).random((2, 3, 5)) < 0.6
    mask[:, :, 0] = True
    keys = k.transpose(0, 2, 3, 1) if columns_last else k.swapaxes(1, 2)
    found = attention.attend(q, keys, v.swapaxes(1, 2), jnp.asarray(mask), "float32", softcap, columns_last)
    for b, t, n in np.ndindex(2, 3, 4):
        seen = np.flatnonzero(mask[b, t])
        logits = np.array([float(q[b, t, n] @ k[b, s, n // 2]) for s in seen])
        weights = np.exp(logits if softcap is None else softcap * np.tanh(logits / softcap))
        expected = sum(w * v[b, s, n // 2] for w, s in zip(weights / weights.sum(), seen, strict=True))
        np.testing.assert_allclose(found[b, t, n], expected, atol=1e-5)


def padded(length=6):
    """q, k, v of four heads on two key heads, and a causal mask; a row is padded on the left, and another packed."""
    q, k, v = normal(3, length, 4, 8), normal(3, 2, length, 8, seed=1), normal(3, 2, length, 8, seed=2)
    real = jnp.arange(length) >= jnp.array([[0], [2], [0]])
    segments = jnp.array([[0] * length, [0] * length, [0, 0, 1, 1, 1, 2]])
    same = segments[:, :, None] == segments[:, None]
    return q, k, v, jnp.tril(jnp.ones((length, length), bool))[None] & real[:, None] & same


def test_what_cudnn_is_asked_for_is_our_attention():
    """The same call with jax's own kernel: values and gradients, where a query sees anything at all."""
    q, k, v, mask = padded()

    def results(function, *more):
        def total(q, k, v):
            y = jnp.where(mask.any(-1)[:, :, None, None], function(q, k, v, mask, "float32", *more), 0)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return y, *grads

    for found, wanted in zip(results(attention.cudnn_attend, "xla"), results(attention.attend), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_the_program_for_a_gpu_calls_cudnn_forward_and_backward(monkeypatch):
    """Lowered for CUDA on this computer, whatever it has; nothing runs."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100)
    q, k, v, mask = padded()
    total = jax.jit(jax.grad(lambda q: attention.cudnn_attend(q, k, v, mask, "bfloat16").sum()))
    calls = total.trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in calls and "Backward" in calls


@pytest.mark.parametrize(("shape", "fits"), [((1, 6, 4, 64), True), ((1, 7, 4, 64), False), ((1, 6, 4, 60), False)])
def test_shapes_without_a_kernel_are_known(shape, fits):
    assert attention.fits_cudnn(jnp.zeros(shape)) is fits


def test_without_a_gpu_cudnn_is_refused_and_auto_is_plain(make, monkeypatch):
    model = make(head_dim=8, dtype="bfloat16")
    assert with_attention(model, ModelSource()).attention == "plain"
    with pytest.raises(ConfigError, match="model.attention is cudnn, which cannot be used: .*Use plain, or auto"):
        with_attention(model, ModelSource(attention="cudnn"))
    with pytest.raises(ConfigError, match="products are in float32"):
        with_attention(make(head_dim=8), ModelSource(attention="cudnn"))
    model = dataclasses.replace(model, platform="gpu")  # a card whose trial fails
    assert with_attention(model, ModelSource()).attention == "plain"
    monkeypatch.setattr(attention, "cudnn_attend", attention.attend)  # one whose trial agrees
    attention.cudnn_trouble.cache_clear()
    assert with_attention(model, ModelSource()).attention == "cudnn"
    capped = dataclasses.replace(model, attention_softcap=50.0)
    assert with_attention(capped, ModelSource()).attention == "plain"
    with pytest.raises(ConfigError, match="caps its attention logits"):
        with_attention(capped, ModelSource(attention="cudnn"))
    attention.cudnn_trouble.cache_clear()


def test_for_a_card_that_is_not_here_critics_are_compiled_with_cudnn_too(make):
    policy = make(head_dim=8, dtype="bfloat16", platform="gpu", attention="cudnn")
    reward = dataclasses.replace(policy, attention="plain", head="linear")
    for init in ("policy", "reward"):
        run = PPOConfig(critic=Critic(init=init), reward=RewardSource(model="a folder"))
        assert critic_model(run, policy, reward).attention == "plain", "a trial failed"
        with sharding.on_devices(["another device"]):
            assert critic_model(run, policy, reward).attention == "cudnn"
