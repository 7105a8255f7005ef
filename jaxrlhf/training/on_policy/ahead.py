"""Rollouts on devices of their own, one update ahead: while an update trains, the responses of the next are drawn.

The policy that draws them is the one before the update that trains meanwhile, so they are one update old when they are
trained on (one-step off-policy, https://arxiv.org/abs/2410.18252); `sampler_correction` weights them by pi_old /
pi_sampler. No rollout is drawn ahead across a checkpoint of the schedule: the update after it begins with fresh
responses, so that a run that resumes there goes on exactly as one that was not interrupted.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from jaxrlhf import sharding
from jaxrlhf.config import GRPOConfig, Mesh, PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.errors import ConfigError
from jaxrlhf.rollout.inference_copy import convert, copy_shardings
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.types import Params, Rollout


class Drawn(NamedTuple):
    """A rollout on the training mesh, its completions, and how it was drawn."""

    rollout: Rollout
    completions: list[str]
    seconds: float  # of generation on its devices
    staleness: int  # updates between the policy that sampled and the one to train


class _Waiting(NamedTuple):
    step: int  # number of the update that will train on it
    policy: int  # updates that its policy had seen
    rows: Sequence[PromptRow]
    future: Future[tuple[Rollout, float]]


def meshes(config: PPOConfig | GRPOConfig) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh | None]:
    """(mesh that trains, mesh that rolls out); None if they are the same.

    The last `rollout.devices` devices roll out, as data x tensor with the `tensor` of the mesh that trains. Raises
    ConfigError if they do not suffice or cannot be split so.
    """
    count = config.rollout.devices
    if not count:
        return sharding.make_mesh(config.mesh), None
    devices = sharding.available()
    if jax.process_count() > 1:
        raise ConfigError(f"rollout.devices is {count}, which works in a single process only; set it to 0")
    if count >= len(devices):
        raise ConfigError(
            f"rollout.devices is {count} and there are {len(devices)} devices, so none would be left to train; give "
            "fewer, or 0 to roll out on the devices that train"
        )
    mesh = sharding.make_mesh(config.mesh, devices[:-count])
    tensor = mesh.shape["tensor"]
    if count % tensor:
        raise ConfigError(f"rollout.devices ({count}) must be a multiple of mesh.tensor ({tensor})")
    return mesh, sharding.make_mesh(Mesh(data=count // tensor, tensor=tensor), devices[-count:])


class Ahead:
    """Draws responses on the mesh of `sampler`, in a thread; a single rollout waits at a time."""

    def __init__(self, sampler: Sampler, training: Sampler) -> None:
        self.sampler, self._training = sampler, training
        model, decoder, mesh, _ = training.conversion
        self.conversion = model, decoder, mesh, ("fsdp", "tensor")  # moved as it lies, without gathering
        """Arguments of `convert` besides the parameters: the copy as it is made on the devices that train."""
        sharding.check_rows(sampler.batch, sampler.mesh, "completions per update, with rollout.devices,")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._waiting: _Waiting | None = None

    def shardings(self, copy: Params) -> Any:
        """NamedShardings of the copy on the devices that roll out."""
        _, decoder, mesh, axes = self.sampler.conversion
        return copy_shardings(copy, decoder, mesh, axes)

    def start(self, params: Params, rows: Sequence[PromptRow], key: jax.Array, step: int, policy: int) -> None:
        """Begin to draw the responses of update number `step` from the parameters after `policy` updates, which may be
        donated once this returns."""
        copy = convert(params, *self.conversion)
        placed = jax.block_until_ready(jax.device_put(copy, self.shardings(copy)))

        def draw() -> tuple[Rollout, float]:
            started = time.monotonic()
            rollout = jax.block_until_ready(self.sampler.draw(placed, rows, jax.device_put(key, target_key)))
            return rollout, time.monotonic() - started

        target_key = jax.sharding.NamedSharding(self.sampler.mesh, jax.sharding.PartitionSpec())
        self._waiting = _Waiting(step, policy, rows, self._thread.submit(draw))

    def has(self, step: int) -> bool:
        """Return True if the responses of update number `step` are drawn, or being drawn."""
        return self._waiting is not None and self._waiting.step == step

    def take(self) -> Drawn:
        """Wait for the responses that were begun. Raises what drawing them raised."""
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        rollout, seconds = waiting.future.result()
        rollout, completions = self._training.finished(rollout)
        return Drawn(rollout, completions, seconds, waiting.step - waiting.policy)
