"""Matrix products of a program: dots, calls of a library, and the convolutions that a TPU makes of them."""

import math
import re

import numpy as np

from jaxrlhf.plan.costs import Product
from jaxrlhf.plan.hlo.collectives import COLLECTIVES
from jaxrlhf.plan.hlo.text import Array, Computation, Instruction, array_of, arrays, numbers, root_of

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "u8": "uint8"}


def _product(left: Array, right: Array, result: Array, contracted: float, times: float) -> Product:
    moved = sum(array.bytes for array in (left, right, result) if not array.on_chip)
    dtype = DTYPES.get(right.dtype, right.dtype)
    return Product(2.0 * math.prod(result.shape) * contracted, moved, dtype, times)


def dot(computation: Computation, one: Instruction, times: float) -> Product:
    """A dot of XLA itself."""
    left, right = (array_of(computation, name) for name in one.operands[:2])
    contracted = math.prod(left.shape[axis] for axis in numbers(one.rest, "lhs_contracting_dims"))
    return _product(left, right, arrays(one.shape)[0], contracted, times)


def gemm(computation: Computation, one: Instruction, times: float) -> Product:
    """A call of cuBLAS or oneDNN."""
    left, right = (array_of(computation, name) for name in one.operands[:2])
    contracted = math.prod(left.shape[axis] for axis in numbers(one.rest, "lhs_contracting_dimensions"))
    return _product(left, right, arrays(one.shape)[0], contracted, times)


def convolution(computation: Computation, one: Instruction, times: float, *, fused: bool) -> Product:
    """A TPU's form of a matrix product: batch dimensions are spatial ones, windows over zeros that dilate the input."""
    left, right = (array_of(computation, name) for name in one.operands[:2])
    result = arrays(one.shape)[0]
    if fused:
        left, right = (
            array._replace(on_chip=_from_chip(computation, name))
            for array, name in zip((left, right), one.operands, strict=False)
        )
        result = result._replace(on_chip=not _leaves_chip(computation, result))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None
    inputs, kernel, outputs = labels.groups()
    contracted = float(right.shape[kernel.index("i")])
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def values(key: str, default: str, spatial: int) -> list[str]:
        return options[key].split("x") if key in options else [default] * spatial

    digits = sorted(set(kernel) - set("io"))
    spatial = len(digits)
    settings = [values(key, "1", spatial) for key in ("stride", "lhs_dilate", "rhs_dilate")]
    for digit, stride, dilate, kernel_dilate, pad in zip(digits, *settings, values("pad", "0_0", spatial), strict=True):
        size, taps = left.shape[inputs.index(digit)], right.shape[kernel.index(digit)]
        places = result.shape[outputs.index(digit)]
        at = np.arange(places)[:, None] * int(stride) + np.arange(taps) * int(kernel_dilate) - int(pad.split("_")[0])
        valid = (at >= 0) & (at <= (size - 1) * int(dilate)) & (at % int(dilate) == 0)
        contracted *= valid.sum() / places  # of the places of the result, on average
    return _product(left, right, result, contracted, times)


def _from_chip(computation: Computation, name: str) -> bool:
    """True if a value of a fusion is computed from arrays on the chip alone."""
    one = computation[name]
    if one.opcode == "parameter":
        return arrays(one.shape)[0].on_chip
    return all(_from_chip(computation, operand) for operand in one.operands)


def _leaves_chip(computation: Computation, product: Array) -> bool:
    """True if a fusion writes an array of the size of its product, or a larger one, to the memory of the device."""
    root = root_of(computation)
    results = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = [arrays(one.shape)[0] for one in results if one.opcode not in ("parameter", *COLLECTIVES)]
    return any(not one.on_chip and math.prod(one.shape) >= math.prod(product.shape) for one in written)
