"""Main loop of the worker process of an environment. Imports neither jax nor numpy."""

from collections.abc import Callable
from typing import Any

from jaxrlhf.environments.episodes import Episodes
from jaxrlhf.errors import ConfigError, RewardError, kind_and_message
from jaxrlhf.rewards.functions import Signature, load_named, location
from jaxrlhf.workers.serve import Message, serve


def main(spec: str, options: dict[str, Any], parent: int) -> None:
    """Serve the environment that `spec` names: first the arguments of `reset`, then the answer to each request."""

    def start() -> tuple[Message, Callable[[Message], Message]]:
        episodes = Episodes(load(spec, options), spec)
        accepts, required, accepts_any = episodes.signature

        def answer(request: Message) -> Message:
            if "seeds" in request:
                episodes.reset(**request)
                return {"seconds": episodes.seconds}
            return {"replies": episodes.step(**request), "seconds": episodes.seconds}

        return {"accepts": sorted(accepts), "required": sorted(required), "accepts_any": accepts_any}, answer

    serve(start, parent)


def load(spec: str, options: dict[str, Any]) -> Any:
    """The environment that `path.py:Name` or `package.module:Name` names, made with `options`. Raises RewardError if it
    cannot be made, ConfigError for an option that its class does not have."""
    found = load_named(spec, "environment")
    if not callable(found):
        return found
    signature = Signature.of(found)
    for option in options:
        if not signature.wants(option):
            from jaxrlhf.config.spelling import did_you_mean

            raise ConfigError(
                f"environment.options: {spec} has no option '{option}'{did_you_mean(option, sorted(signature.accepts))}"
            )
    try:
        return found(**options)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"environment {spec!r}: making it raised {kind_and_message(error)}{location(error)}"
        ) from error
