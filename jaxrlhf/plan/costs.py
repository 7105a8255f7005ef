"""Minimum time of a program, from the FLOPs of its matrix products and the bytes that they move.

The products are counted in the traced program, whose scans have known lengths. XLA's own cost analysis counts the body
of a loop once, and these programs consist of loops (layers, micro-batches, tokens).
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

MATRIX_SIZE = 1024  # rows and columns of the matrices multiplied to measure FLOPs per second
BLOCK_BYTES = 2**26  # bytes read to measure the memory bandwidth


class Product(NamedTuple):
    """A matrix product and the number of times it runs."""

    flops: float
    bytes: float
    dtype: str
    times: float


class Rates(NamedTuple):
    """Measured speed of one device: FLOPs per second by operand dtype, and bytes per second."""

    flops: dict[str, float]
    bytes: float


def products(program: ClosedJaxpr, trips: float) -> Iterator[Product]:
    """The matrix products of a traced program that its results depend on.

    `trips` is the number of iterations of each `while` loop, which the trace does not contain. Of the branches of a
    `cond`, the most expensive one counts.
    """
    needed, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    yield from _products(needed, trips, 1)


def _products(program: Jaxpr | ClosedJaxpr, trips: float, times: float) -> Iterator[Product]:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            yield _product(equation, times)
        elif name == "scan":
            yield from _products(params["jaxpr"], trips, times * params["length"])
        elif name == "while":
            yield from _products(params["body_jaxpr"], trips, times * trips)
        elif name == "cond":
            branches = [list(_products(branch, trips, times)) for branch in params["branches"]]
            yield from max(branches, key=lambda branch: sum(p.flops * p.times for p in branch))
        else:
            for value in params.values():
                if isinstance(value, Jaxpr | ClosedJaxpr):
                    yield from _products(value, trips, times)


def _product(equation: Any, times: float) -> Product:
    left, right = (operand.aval for operand in equation.invars)
    result = equation.outvars[0].aval
    contracted = math.prod(left.shape[axis] for axis in equation.params["dimension_numbers"][0][0])
    moved = sum(x.size * x.dtype.itemsize for x in (left, right, result))
    return Product(2.0 * result.size * contracted, moved, right.dtype.name, times)


def live_bytes(program: ClosedJaxpr) -> int:
    """Estimate the largest memory that intermediate results of a traced program take, on all devices together.

    Results of matrix products, reductions, gathers and loops are taken to be in memory from the operation that computes
    them to the last that reads them, elementwise operations to be fused into those that read their results.
    """
    needed, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _live(needed)[0]


_FREE = ("pjit", "jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "core_call")
_IN_MEMORY = ("dot_general", "gather", "dynamic_update_slice", "sort", "concatenate", "scan", "while", "cond", "cumsum")
_IN_MEMORY_TOO = ("reduce", "scatter", "arg", "conv", "triangular_solve")  # beginnings of names


def _live(jaxpr: Jaxpr) -> tuple[int, list[int]]:
    """The most bytes alive at a time, and the bytes of each result (0 for one that is fused into its readers)."""
    last = {}
    for i, equation in enumerate(jaxpr.eqns):
        last |= {var: i for var in equation.invars if not isinstance(var, Literal)}
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}
    sizes: dict[Any, int] = {}
    dying: dict[int, list[Any]] = {}
    alive = most = 0
    for i, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        inner = [_live(getattr(v, "jaxpr", v)) for v in _inner(equation.params)]
        within = max((peak for peak, _ in inner), default=0)
        if inner and name in _FREE:
            results = inner[0][1]
        elif name in _IN_MEMORY or name.startswith(_IN_MEMORY_TOO):
            results = [_bytes(var.aval) for var in equation.outvars]
        else:
            results = [0] * len(equation.outvars)
        for var, size in zip(equation.outvars, results, strict=False):
            sizes[var] = size
            alive += size
            dying.setdefault(last.get(var, i), []).append(var)
        most = max(most, alive + within)
        alive -= sum(sizes[var] for var in dying.get(i, ()))
    return most, [sizes.get(var, 0) if not isinstance(var, Literal) else 0 for var in jaxpr.outvars]


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Jaxpr | ClosedJaxpr):
                yield one


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)


def least_seconds(products: Iterable[Product], rates: Rates, devices: int) -> float:
    """Minimum time of the products on `devices` that share them evenly: for each, its compute time or the time to move
    its bytes, whichever is longer. Other operations are not counted."""
    return sum(p.times * max(p.flops / rates.flops[p.dtype], p.bytes / rates.bytes) for p in products) / devices


def measure(dtypes: set[str]) -> Rates:
    """Measure the rates of this machine's device, in a second or two."""

    def rate(amount: float, function: Any, *args: Any) -> float:
        jax.block_until_ready(function(*args))  # compile
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds.append(time.perf_counter() - start)
        return amount / statistics.median(seconds)

    def flops(dtype: str) -> float:
        accumulator = jnp.int32 if dtype == "int8" else jnp.float32
        x = jnp.ones((MATRIX_SIZE, MATRIX_SIZE), dtype)
        matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=accumulator))
        return rate(2.0 * MATRIX_SIZE**3, matmul, x, x)

    block = jnp.ones((256, BLOCK_BYTES // 1024), jnp.float32)
    bandwidth = rate(BLOCK_BYTES, jax.jit(lambda x: jnp.max(x, axis=1)), block)
    return Rates({dtype: flops(dtype) for dtype in dtypes}, bandwidth)
