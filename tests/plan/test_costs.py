"""The FLOPs and bytes of a program, counted in its trace."""

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.plan import costs


def total(program, *args, trips=1.0):
    found = list(costs.products(jax.jit(program).trace(*args).jaxpr, trips))
    return sum(p.flops * p.times for p in found), sum(p.bytes * p.times for p in found)


def test_a_product_is_two_operations_for_each_pair_and_moves_its_operands():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert total(jnp.matmul, a, b) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    batched = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
    assert total(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), *batched)[0] == 2 * 2 * 3 * 5 * 7
    half = total(jnp.matmul, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert half[1] == 2 * (15 + 35 + 21)


def test_products_in_loops_count_once_per_iteration():
    x = jnp.ones((4, 4))
    once = 2 * 4**3

    def scanned(x):
        return jax.lax.scan(lambda y, _: (jax.checkpoint(lambda y, x: jnp.tanh(y @ x))(y, x), None), x, length=6)[0]

    def until(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]

    def chosen(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)

    assert total(scanned, x)[0] == 6 * once
    assert total(until, x, trips=9)[0] == 9 * once
    assert total(chosen, x)[0] == 2 * once
    backward = total(jax.grad(lambda x: scanned(x).sum()), x)[0]
    assert backward == (6 + 3 * 6) * once, "forward, the rematerialised forward, and two products backward"


def test_minimum_time_is_the_larger_of_compute_and_memory_time():
    rates = costs.Rates({"float32": 100.0}, 10.0)
    heavy, wide = costs.Product(200.0, 10.0, "float32", 3), costs.Product(200.0, 50.0, "float32", 1)
    assert costs.least_seconds([heavy, wide], rates, 1) == pytest.approx(3 * 2 + 5)
    assert costs.least_seconds([heavy, wide], rates, 2) == pytest.approx(5.5)


def test_measured_rates_are_plausible():
    found = costs.measure({"float32", "int8"})
    assert found.bytes > 1e8 and all(1e8 < rate < 1e16 for rate in found.flops.values())


def test_live_bytes_are_those_of_results_in_memory_at_a_time():
    """Of x @ a, then @ b, then @ c, two results are alive at a time; what a scan stacks is alive after it; elementwise
    operations are fused."""
    x, w = jnp.zeros((64, 64)), jnp.zeros((3, 64, 64))
    one = 4 * 64 * 64

    def chain(x, w):
        return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]

    assert one <= costs.live_bytes(jax.make_jaxpr(chain)(x, w)) <= 3 * one

    def stacked(x, w):
        return jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), c @ k), x, w)[1].sum()

    assert 4 * one <= costs.live_bytes(jax.make_jaxpr(stacked)(x, w)) <= 7 * one
    assert costs.live_bytes(jax.make_jaxpr(lambda x: jnp.tanh(x) * 2 + 1)(x)) == 0
    solved = jax.make_jaxpr(lambda x: jax.lax.linalg.triangular_solve(x, x, left_side=True))(x)
    assert costs.live_bytes(solved) == one
