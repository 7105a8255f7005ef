"""Divergences of teacher and student: their definition in float64, what TRL computes, and their limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import recorded

from jaxrlhf.algorithms.distillation import token_divergences

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
CASE = recorded.load("distillation")


def masked_mean(student, teacher, mask, beta, temperature):
    return jnp.sum(jnp.where(mask, token_divergences(student, teacher, beta, temperature)["loss"], 0)) / jnp.sum(mask)


@pytest.mark.parametrize("name", CASE.about["cases"])
def test_loss_and_gradient_are_those_of_trl(name):
    settings = CASE.about["cases"][name]
    arrays = (jnp.asarray(CASE[key], jnp.float32) for key in ("student", "teacher"))
    function = functools.partial(masked_mean, mask=CASE["mask"], **settings)
    loss, gradient = jax.value_and_grad(function)(*arrays)
    close(loss, CASE[f"loss/{name}"])
    close(gradient, CASE[f"gradient/{name}"], atol=2e-6)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(x):
    odds = [math.exp(value) for value in x]
    return [value / sum(odds) for value in odds]


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_each_number_is_its_definition(beta, temperature):
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(2, 3, 7)) for _ in range(2))
    found = token_divergences(jnp.asarray(student), jnp.asarray(teacher), beta, temperature)
    for i, j in np.ndindex(2, 3):
        q, p = (softmax(x[i, j] / temperature) for x in (student, teacher))
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
        close(found["loss"][i, j], expected)
        close(found["forward_kl"][i, j], kl(p, q))
        close(found["reverse_kl"][i, j], kl(q, p))
        close(found["entropy"][i, j], -sum(a * math.log(a) for a in q))
        close(found["teacher_entropy"][i, j], -sum(a * math.log(a) for a in p))
        assert found["agreement"][i, j] == float(np.argmax(q) == np.argmax(p))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_models_have_no_loss_and_the_teacher_no_gradient(beta):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 9)), jnp.float32)
    total = lambda s, t: jnp.sum(token_divergences(s, t, beta, 1.0)["loss"])  # noqa: E731
    value, (student, teacher) = jax.value_and_grad(total, argnums=(0, 1))(logits, logits + 3.0)
    close(value, 0, atol=1e-6)
    close(student, 0, atol=1e-6)
    _, teacher = jax.grad(total, argnums=(0, 1))(logits, 2 * logits)
    assert not teacher.any()


def test_the_ends_of_the_jensen_shannon_divergence():
    """A small beta gives beta times the forward KL, one near 1 gives 1 - beta times the reverse KL."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 6))) for i in (3, 4))
        small, large = (token_divergences(student, teacher, beta) for beta in (1e-4, 1 - 1e-4))
        np.testing.assert_allclose(small["loss"] / 1e-4, small["forward_kl"], rtol=1e-3)
        np.testing.assert_allclose(large["loss"] / 1e-4, large["reverse_kl"], rtol=1e-3)


def test_logits_far_apart_stay_finite():
    student, teacher = jnp.asarray([[1e4, 0.0, -1e4]]), jnp.asarray([[-1e4, 0.0, 1e4]])
    for beta in (0.0, 0.5, 1.0):
        total = lambda s, beta=beta: jnp.sum(token_divergences(s, teacher, beta)["loss"])  # noqa: E731
        value, gradient = jax.value_and_grad(total)(student)
        assert np.isfinite(value) and np.isfinite(gradient).all()
