"""Main loop of the worker process of a reward function. Imports neither jax nor numpy."""

from collections.abc import Callable
from typing import Any

from jaxrlhf.rewards.functions import load
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.workers.serve import Message, serve


def main(spec: str, options: dict[str, Any], parent: int) -> None:
    """Serve the reward function that `spec` names: first its signature, then the scores of each request."""

    def start() -> tuple[Message, Callable[[Message], Message]]:
        function = load(spec, options=options)
        accepts, required, accepts_any = function.signature
        about = {"accepts": sorted(accepts), "required": sorted(required), "accepts_any": accepts_any}
        return about, lambda request: function(ScoreRequest(**request))._asdict()

    serve(start, parent)
