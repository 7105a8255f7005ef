"""Episodes of an environment: calls its methods with the arguments they name and checks what they return.

Plain Python, without numpy or jax, so that a worker process starts in a few hundredths of a second.
"""

import asyncio
import inspect
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxrlhf import stopping
from jaxrlhf.errors import Interrupted, RewardError, kind_and_message, quoted
from jaxrlhf.rewards.functions import Signature, awaited, location
from jaxrlhf.rewards.sources.protocol import to_float32

GIVEN = ("prompt", "seed")
"""Arguments of `reset` that are not columns of the data."""


@runtime_checkable
class Environment(Protocol):
    """A tool or game that answers the completions of the policy.

    Both methods may be async: those of a batch then run concurrently.
    """

    def reset(self, **arguments: Any) -> Any:
        """Begin an episode and return its state, any object, which `step` may change.

        It gets those of `prompt` (text), `seed` (an integer of 32 bits) and the columns of the row that it names. The
        seed depends on the run's seed, the update and the row, and is the same for all responses of a group: all
        randomness has to come from it, so that a run that resumes repeats its episodes.
        """

    def step(self, state: Any, completion: str) -> tuple[str | None, float]:
        """Answer a turn of the policy: the text that follows it, or None to end the episode, and the turn's reward."""
        ...


class Reply(NamedTuple):
    """Answer of an environment to one turn."""

    text: str | None
    """None: the episode has ended."""
    reward: float


class Episodes:
    """Episodes of `environment`, numbered by the rows of a batch.

    Raises RewardError if it lacks a method, or if a method raises or returns something else than it should.

    Attributes:
        signature: the arguments of `reset`.
        seconds: time spent in the environment since the last `reset`.
    """

    def __init__(self, environment: Any, name: str = "") -> None:
        self.name = name or type(environment).__name__
        for method in ("reset", "step"):
            if not callable(getattr(environment, method, None)):
                raise RewardError(
                    f"environment {self.name} has no method '{method}'; it needs reset(...) -> state and step(state, "
                    "completion) -> (text or None, reward)"
                )
        self._environment, self._states = environment, []
        self.signature = Signature.of(environment.reset)
        self.seconds = 0.0

    def reset(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> None:
        """Begin an episode for each prompt; those before are forgotten. `columns` hold one value per prompt."""
        self.seconds = 0.0
        check_columns(self.signature, columns, self.name)
        available = {**columns, "prompt": prompts, "seed": seeds}
        wanted = {name: values for name, values in available.items() if self.signature.wants(name)}
        rows = [{name: values[i] for name, values in wanted.items()} for i in range(len(prompts))]
        self._states = self._call("reset", [((), row) for row in rows], [f"prompt {quoted(text)}" for text in prompts])

    def step(self, rows: Sequence[int], completions: Sequence[str]) -> list[Reply]:
        """The replies to a turn of each of the episodes `rows`."""
        about = [f"completion {quoted(text)}" for text in completions]
        turns = [((self._states[row], text), {}) for row, text in zip(rows, completions, strict=True)]
        returned = self._call("step", turns, about)
        return [self._reply(value, turn) for value, turn in zip(returned, about, strict=True)]

    def _call(self, method: str, arguments: Sequence[tuple[tuple, dict]], about: Sequence[str]) -> list[Any]:
        """Call a method of the environment for each of the arguments, and return its results."""
        function, started = getattr(self._environment, method), time.monotonic()
        results: list[Any] = []
        for positional, named in arguments:
            try:
                with stopping.interruptible():
                    results.append(function(*positional, **named))
            except Interrupted:
                raise
            except (Exception, SystemExit) as error:
                raise self._raised(method, error, about[len(results)]) from error
        if any(map(inspect.isawaitable, results)):
            with stopping.interruptible():
                results = awaited(_gather(results))
        self.seconds += time.monotonic() - started
        for result, what in zip(results, about, strict=True):
            if isinstance(result, BaseException):
                raise self._raised(method, result, what) from result
        return results

    def _raised(self, method: str, error: BaseException, about: str) -> RewardError:
        place = location(error, getattr(self._environment, method))
        return RewardError(f"environment {self.name}: {method} raised {kind_and_message(error)}{place}; for {about}")

    def _reply(self, value: Any, about: str) -> Reply:
        prefix = f"environment {self.name}: step returned"
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise RewardError(
                f"{prefix} {quoted(value)} ({type(value).__name__}), for {about}. It must return the text that "
                "follows, or None to end the episode, and a number, the reward of the turn"
            )
        text, reward = value
        if not isinstance(text, str | None):
            raise RewardError(f"{prefix} {quoted(text)} ({type(text).__name__}), not a text or None, for {about}")
        try:
            (text or "").encode()
            return Reply(text, to_float32(reward))
        except UnicodeEncodeError as error:
            raise RewardError(f"{prefix} a text that is not valid Unicode ({error}), for {about}") from error
        except ValueError as error:
            raise RewardError(f"{prefix} the reward {error}, for {about}") from error


def check_columns(signature: Signature, columns: Collection[str], name: str) -> None:
    """Raise RewardError if `reset` requires an argument that is not among the columns of the data."""
    if missing := {*signature.required} - {*columns, *GIVEN}:
        raise RewardError(
            f"environment {name}: reset needs {', '.join(map(repr, sorted(missing)))}, which the data does not have; "
            f"it can have {', '.join(map(repr, sorted({*columns, *GIVEN})))}"
        )


async def _gather(results: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*results, return_exceptions=True)
