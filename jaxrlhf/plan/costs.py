"""What a program costs at the least: the FLOPs of its matrix products and the bytes they move, and the time of both.

XLA's own analysis counts the body of a loop once, and everything here is loops (layers, micro-batches, tokens); so the
products are counted in the traced program, where the lengths of its scans stand.
"""

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

SIDE = 1024  # of the square matrices that are multiplied to measure a device
BLOCK = 2**26  # bytes that are read


class Product(NamedTuple):
    """A matrix product, and how often it runs."""

    flops: float
    bytes: float
    dtype: str
    times: float


class Rates(NamedTuple):
    """What one device reaches: FLOPs per second of products by the dtype of their operands, and bytes per second."""

    flops: dict[str, float]
    bytes: float


def products(program: ClosedJaxpr, trips: float) -> Iterator[Product]:
    """The matrix products of a traced program that its results depend on. `trips` is how often the body of a `while`
    runs, which the trace does not say; of the branches of a `cond` the costliest counts."""
    needed, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    yield from _products(needed, trips, 1)


def _products(program: Jaxpr | ClosedJaxpr, trips: float, times: float) -> Iterator[Product]:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            yield _product(equation, times)
        elif name == "scan":
            yield from _products(given["jaxpr"], trips, times * given["length"])
        elif name == "while":
            yield from _products(given["body_jaxpr"], trips, times * trips)
        elif name == "cond":
            branches = [list(_products(branch, trips, times)) for branch in given["branches"]]
            yield from max(branches, key=lambda found: sum(p.flops * p.times for p in found))
        else:
            for value in given.values():
                if isinstance(value, Jaxpr | ClosedJaxpr):
                    yield from _products(value, trips, times)


def _product(equation: Any, times: float) -> Product:
    left, right = (operand.aval for operand in equation.invars)
    result = equation.outvars[0].aval
    contracted = math.prod(left.shape[axis] for axis in equation.params["dimension_numbers"][0][0])
    moved = sum(x.size * x.dtype.itemsize for x in (left, right, result))
    return Product(2.0 * result.size * contracted, moved, right.dtype.name, times)


def least_seconds(found: list[Product], rates: Rates, devices: int) -> float:
    """The time that a device takes at its best: of each product the longer of computing and moving, on `devices` that
    share the work evenly. Whatever is not a product counts for nothing."""
    return sum(p.times * max(p.flops / rates.flops[p.dtype], p.bytes / rates.bytes) for p in found) / devices


def measure(dtypes: set[str]) -> Rates:
    """The rates of this machine's device, measured in a second or two."""

    def rate(amount: float, work: Any, *args: Any) -> float:
        jax.block_until_ready(work(*args))
        spent = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(work(*args))
            spent.append(time.perf_counter() - started)
        return amount / statistics.median(spent)

    def product(dtype: str) -> float:
        kind = jnp.int32 if dtype == "int8" else jnp.float32
        x = jnp.ones((SIDE, SIDE), dtype)
        return rate(2.0 * SIDE**3, jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=kind)), x, x)

    block = jnp.ones((256, BLOCK // 1024), jnp.float32)
    read = rate(BLOCK, jax.jit(lambda x: jnp.max(x, axis=1)), block)
    return Rates({dtype: product(dtype) for dtype in dtypes}, read)
