"""Episodes of an environment in a worker process, so that one that hangs or crashes does not take the run with it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.config.environment import Environment
from jaxrlhf.environments.episodes import Episodes, Reply, check_columns
from jaxrlhf.errors import ConfigError, RewardError, counted, first_line
from jaxrlhf.rewards.functions import Signature
from jaxrlhf.rewards.sources.worker import to_json
from jaxrlhf.secrets import resolve
from jaxrlhf.workers import WorkerProcess


def open_environment(config: Environment, passed: Any = None) -> "Episodes | WorkerEpisodes | None":
    """The environment of a run, None if it has none. `passed` is the object given to the trainer, if any. Raises
    ConfigError or RewardError if it cannot be loaded."""
    if passed is not None:
        if config.function not in ("", "passed"):
            raise ConfigError(f"two environments: a Python object and environment.function '{config.function}'")
        return Episodes(passed)
    if config.function == "passed":
        raise ConfigError("environment.function is passed, and no object was given to the trainer as environment")
    return WorkerEpisodes(config) if config.function else None


class WorkerEpisodes:
    """`Episodes` of the environment of a config, in its own process. Raises RewardError if the environment does, if it
    takes longer than `timeout`, or if its process ends; the next `reset` starts a new one."""

    def __init__(self, config: Environment) -> None:
        self.name, self._timeout, self.seconds = config.function, config.timeout, 0.0
        subject = f"environment '{config.function}'"
        options = resolve(config.options, "environment.options")
        self._process = WorkerProcess("jaxrlhf.environments.serve", config.function, subject, options)
        self.signature = Signature(**self._process.first)

    def close(self) -> None:
        self._process.close()

    def reset(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> None:
        """See `Episodes.reset`."""
        check_columns(self.signature, columns, self.name)
        if self._process.ended:
            self._process.start()
        wanted = {name: values for name, values in columns.items() if self.signature.wants(name)}
        self._ask({"prompts": prompts, "columns": wanted, "seeds": seeds}, f"reset of {len(prompts)} episodes")

    def step(self, rows: Sequence[int], completions: Sequence[str]) -> list[Reply]:
        """See `Episodes.step`."""
        reply = self._ask({"rows": rows, "completions": completions}, f"step of {counted(len(rows), 'episode')}")
        return [Reply(*values) for values in reply["replies"]]

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        prefix = f"environment {self.name}: {what}"
        try:
            line = json.dumps(request, default=to_json).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"{prefix}: a column of the data cannot be written as JSON ({first_line(error)}); let reset name the "
                "columns that it needs instead of taking all, or drop the column from the data"
            ) from error
        try:
            reply = self._process.exchange(line, self._timeout)
        except TimeoutError:
            raise RewardError(
                f"{prefix} took longer than {self._timeout:g} s and was killed; raise environment.timeout, or make it "
                "faster"
            ) from None
        except EOFError:
            raise RewardError(f"{prefix} {self._process.exit_reason()}") from None
        if "error" in reply:
            raise RewardError(reply["error"])
        self.seconds = reply["seconds"]
        return reply
