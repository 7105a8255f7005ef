"""Rewards from an HTTP endpoint: prompts and completions are sent as JSON, scores come back."""

import json
import time
from collections.abc import Callable

from jaxrlhf.errors import RewardError, quoted
from jaxrlhf.rewards.functions import CallTimeout, call_with_timeout
from jaxrlhf.rewards.sources.http import HTTPFailure, post
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores, parse_scores
from jaxrlhf.rewards.sources.worker import to_json_line


class Endpoint:
    """POSTs `{"prompts": [...], "completions": [...], "columns": {...}}` to `url`; expects `{"scores": [...]}`.

    Failed requests are retried (`http.post`) within `timeout` seconds. Scores are validated like those of a function.
    """

    def __init__(self, url: str, *, timeout: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name, self._timeout, self._sleep = url, timeout, sleep

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Raises RewardError if no usable reply arrives in time."""
        prefix = request.error_prefix(self.name)
        body = to_json_line(request, prefix)
        deadline = time.monotonic() + self._timeout
        try:
            reply = call_with_timeout(self._timeout, lambda: post(self.name, body, deadline, sleep=self._sleep))
        except CallTimeout:
            raise RewardError(
                f"{prefix} did not answer {len(request.completions)} completions within {self._timeout:g} s; raise its "
                f"timeout, or check the server{request.error_suffix}"
            ) from None
        except HTTPFailure as error:
            raise RewardError(f"{prefix} {error}{request.error_suffix}") from error
        try:
            parsed = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{prefix} answered with something other than JSON: {quoted(reply)}") from error
        if not isinstance(parsed, dict) or "scores" not in parsed:
            raise RewardError(f'{prefix} answered without "scores": {quoted(parsed)}; expected {{"scores": [...]}}')
        return parse_scores(parsed["scores"], request, self.name)
