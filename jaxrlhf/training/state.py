"""The training state of a run, created on first use or restored from a checkpoint."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.training.step import in_float32
from jaxrlhf.types import Params, TrainState


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="params")
def _create(
    params: dict[str, Params],
    *,
    optimizers: dict[str, Optimizer],
    kl_coef: float,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The state of step 0, created sharded by one program; moments created eagerly would all be on one device."""
    moments = {role: optimizer.chain.init(in_float32(params[role])) for role, optimizer in optimizers.items()}
    state = TrainState(step=jnp.int32(0), params=params, opt_state=moments, kl_coef=jnp.asarray(kl_coef, jnp.float32))
    return sharding.constrain(state, mesh)


class State:
    """Holds the TrainState of a run in `value`: created from `params` on first use, which consumes them, unless a
    checkpoint is assigned before.

    `more` are further fields of the state, placed on the mesh. `template` has the shapes, dtypes and shardings of the
    state; `params` may be shapes if nothing else is used. With `offload` the moments of `value` are in host memory, and
    an update takes `ready`.
    """

    def __init__(
        self,
        params: dict[str, Params],
        optimizers: dict[str, Optimizer],
        mesh: jax.sharding.Mesh,
        kl_coef: float = 0.0,
        offload: bool = False,
        **more: Any,
    ) -> None:
        self._create = functools.partial(_create, optimizers=optimizers, kl_coef=kl_coef, mesh=mesh)
        created = jax.eval_shape(self._create, params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), more)
        created = dataclasses.replace(created, **shapes)
        self.template: TrainState = sharding.with_shardings(created, sharding.shardings(created, mesh))
        self._params: dict[str, Params] | None = params
        self._more: dict[str, Any] = more
        self._offload = offload
        self._value: TrainState | None = None

    @property
    def value(self) -> TrainState:
        if self._value is None:
            assert self._params is not None
            self.value = dataclasses.replace(self._create(self._params), **self._more)
        assert self._value is not None
        return self._value

    @value.setter
    def value(self, state: TrainState) -> None:
        self._value, self._params, self._more = None, None, {}  # frees the old moments in host memory first
        if self._offload:
            state = dataclasses.replace(state, opt_state=sharding.to_host(state.opt_state))
        self._value = state

    @property
    def params(self) -> dict[str, Params]:
        """The current parameters; before `value` is created, those it will be created from."""
        return self.value.params if self._params is None else self._params

    @property
    def ready(self) -> TrainState:
        """`value` with its moments on the device, as the argument of an update."""
        return dataclasses.replace(self.value, opt_state=sharding.to_device(self.value.opt_state))
