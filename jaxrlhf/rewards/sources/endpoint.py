"""Rewards from an HTTP endpoint: prompts and completions are sent as JSON, scores come back."""

import json
import time
from collections.abc import Callable, Mapping

from jaxrlhf.errors import RewardError, quoted
from jaxrlhf.rewards.functions import CallTimeout, call_with_timeout
from jaxrlhf.rewards.sources.http import Address, HTTPFailure, connect, post
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores, parse_scores
from jaxrlhf.rewards.sources.worker import to_json_line
from jaxrlhf.secrets import redact

CONNECT_SECONDS = 10.0
"""Most seconds that a server may take to accept a connection before a run begins."""


class Endpoint:
    """POSTs `{"prompts": [...], "completions": [...], "columns": {...}}` to `url`; expects `{"scores": [...]}`.

    Failed requests are retried (`http.post`) within `timeout` seconds. Scores are validated like those of a function.
    Raises ConfigError for a `url` or `headers` that cannot be used (`http.Address.of`).
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = Address.of(url, "url of a component of the reward", headers)
        self.name, self._timeout, self._sleep = self._address.shown, timeout, sleep

    def check(self) -> None:
        """Raise RewardError if the server cannot be connected to. Nothing is sent to it."""
        try:
            connect(self._address.url, min(self._timeout, CONNECT_SECONDS), sleep=self._sleep)
        except HTTPFailure as error:
            raise RewardError(
                f"reward {self.name} {error}. The run has not begun; start the server, or correct reward.components"
            ) from error

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Raises RewardError if no usable reply arrives in time."""
        prefix = request.error_prefix(self.name)
        body = to_json_line(request, prefix)
        deadline = time.monotonic() + self._timeout
        try:
            reply = call_with_timeout(self._timeout, lambda: self._post(body, deadline))
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
            raise RewardError(f"{prefix} answered with something other than JSON: {redact(quoted(reply))}") from error
        if not isinstance(parsed, dict) or "scores" not in parsed:
            raise RewardError(
                f'{prefix} answered without "scores": {redact(quoted(parsed))}; expected {{"scores": [...]}}'
            )
        return parse_scores(parsed["scores"], request, self.name)

    def _post(self, body: bytes, deadline: float) -> bytes:
        return post(self._address.url, body, deadline, headers=self._address.headers, sleep=self._sleep)
