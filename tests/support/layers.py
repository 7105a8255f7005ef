"""The gradients of four layers on eight devices (`fsdp`), and the bytes that they need to exchange, counted by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DEVICES, LAYERS, ROWS, TOKENS, HIDDEN, INNER = 8, 4, 8, 1024, 1024, 4096
# matrices of float32, and the axis that is split over the devices
WEIGHTS = {"q": (HIDDEN, HIDDEN), "gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
SPLIT = {"q": 1, "gate": 1, "up": 1, "down": 2}


def lowered(devices: list[Any]) -> Any:
    """The program, in which bfloat16 weights multiply, the forward pass is recomputed and gradients are float32."""
    mesh = Mesh(np.asarray(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def times(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = jnp.tanh(times(x, w["q"]))
        x += times(jax.nn.gelu(times(y, w["gate"])) * times(y, w["up"]), w["down"])
        return jax.lax.with_sharding_constraint(x, by_rows), None

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32)).mean()

    def split(axis: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    weights = {
        name: jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32, sharding=split(SPLIT[name]))
        for name, shape in WEIGHTS.items()
    }
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, HIDDEN), jnp.bfloat16, sharding=by_rows)
    out = {name: split(axis) for name, axis in SPLIT.items()}
    return jax.jit(jax.grad(loss), out_shardings=out).lower(weights, x)


def bytes_exchanged() -> int:
    """Bytes of the whole arrays: weights are gathered forward, and but for the last product, whose result nobody needs,
    to recompute it; backward `down` once more, the others are still there. Gradients are scattered."""
    square, wide = HIDDEN * HIDDEN, HIDDEN * INNER
    forward, recomputed, backward = 2 * (square + 3 * wide), 2 * (square + 2 * wide), 2 * wide
    return LAYERS * (forward + recomputed + backward + 4 * (square + 3 * wide))
