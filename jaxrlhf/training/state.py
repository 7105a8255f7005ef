"""The state that a run begins with, and where it is now."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.training.step import in_float32
from jaxrlhf.types import Params, TrainState


@functools.partial(jax.jit, static_argnames=("optimizers", "kl_coef", "mesh"), donate_argnames="params")
def _begin(
    params: dict[str, Params],
    *,
    optimizers: tuple[tuple[str, Optimizer], ...],
    kl_coef: float,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The state of step 0. One program makes it where it belongs; eager moments would all land on one device."""
    moments = {role: optimizer.chain.init(in_float32(params[role])) for role, optimizer in optimizers}
    state = TrainState(step=jnp.int32(0), params=params, opt_state=moments, kl_coef=jnp.float32(kl_coef))
    return sharding.constrain(state, mesh)


class State:
    """The state of a run, made from `params` on first use (which consumes them) unless a checkpoint takes their place.

    `more` are further fields of the state, arrays in their places. `template` has its shapes, dtypes and shardings
    without its memory; for it alone, `params` may be shapes too. With `offload` the moments of `value` lie in memory of
    the host, and an update takes `ready`.
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
        self._begin = functools.partial(_begin, optimizers=tuple(optimizers.items()), kl_coef=kl_coef, mesh=mesh)
        begun = jax.eval_shape(self._begin, params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), more)
        begun = dataclasses.replace(begun, **shapes)
        self.template: TrainState = sharding.with_shardings(begun, sharding.shardings(begun, mesh))
        self._params: dict[str, Params] | None = params
        self._more: dict[str, Any] = more
        self._offload = offload
        self._value: TrainState | None = None

    @property
    def value(self) -> TrainState:
        if self._value is None:
            assert self._params is not None
            self.value = dataclasses.replace(self._begin(self._params), **self._more)
        assert self._value is not None
        return self._value

    @value.setter
    def value(self, state: TrainState) -> None:
        self._value, self._params, self._more = None, None, {}  # the host does not hold the moments before and after
        if self._offload:
            state = dataclasses.replace(state, opt_state=sharding.to_host(state.opt_state))
        self._value = state

    @property
    def params(self) -> dict[str, Params]:
        """The parameters as they are now; of a state that was not made yet those it will be made from."""
        return self.value.params if self._params is None else self._params

    @property
    def ready(self) -> TrainState:
        """`value` with its moments on the device, for an update, whose result is the next `value`."""
        return dataclasses.replace(self.value, opt_state=sharding.to_device(self.value.opt_state))
