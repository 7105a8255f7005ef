"""Section for an environment: what answers the policy in the middle of a response."""

from typing import Any, Literal

from pydantic import Field

from jaxrlhf.config.base import Count, FilePath, Positive, default_of, section


@section
class Environment:
    """An environment that the policy takes turns with: a game, tools, a simulated user. See docs/environments.md."""

    function: FilePath = ""
    """Class of the environment, `path.py:Name` or `package.module:Name`, with the methods reset(...) -> state and
    step(state, completion) -> (text or None, reward). It runs in a separate process without accelerators. `passed`: the
    object given to the trainer, run in the trainer's process. Empty: a response is a single turn."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class. `${NAME}` in a text is an environment variable, read when the run starts; only
    the reference is written down."""
    max_turns: Count = 8
    """Maximum number of turns of the policy in a response. `sampling.response_length` limits the tokens of all turns
    together, those of the environment included."""
    role: Literal["user", "tool"] = "user"
    """Role of the environment's texts in conversations, which the chat template renders. Plain text is continued by
    them as they are."""
    completion: Literal["all", "last"] = "all"
    """Text that the rewards of section `reward` read as the completion. all: all turns, with the environment's texts
    between them. last: the policy's last turn. Models that share the policy's tokenizer read the tokens of all."""
    timeout: Positive = 60.0
    """Seconds allowed for the steps of a batch."""

    def __post_init__(self) -> None:
        if self.function:
            if self.function != "passed" and not all(self.function.rpartition(":")[::2]):
                raise ValueError(
                    f"environment.function is '{self.function}'; write it as path.py:Name or package.module:Name"
                )
            return
        for key in ("options", "max_turns", "role", "completion", "timeout"):
            if getattr(self, key) != default_of(type(self), key):
                raise ValueError(f"environment.{key} is set but environment.function is empty; name a class there")
