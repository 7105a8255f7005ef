"""What the loop of an on-policy run and its validation ask of that which learns."""

from concurrent.futures import Future
from typing import Protocol

import jax

from jaxrlhf.training import setup
from jaxrlhf.types import Params, Rollout


class Learner(Protocol):
    """What learns from scored rollouts."""

    state: setup.State
    identity: str  # a hash of what it uses and does not train

    @property
    def policy(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        ...

    @property
    def reference(self) -> Params:
        """The reference's parameters as they are now, on the device."""
        ...

    def compile(self, rollout: Future[Rollout], key: jax.Array, *, per_token: bool) -> None:
        """Begin to compile what learns from a rollout of full length, with rewards of single tokens or without."""
        ...
