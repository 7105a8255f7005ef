"""Rewards from an HTTP endpoint: prompts and completions are sent as JSON, scores come back."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import RewardError, first_line, quoted
from jaxrlhf.rewards.functions import CallTimeout, call_with_timeout
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores, parse_scores
from jaxrlhf.rewards.sources.worker import to_json_line

ATTEMPTS = 4
FIRST_PAUSE = 0.25  # seconds before the second attempt; doubled each time
LARGEST = 64 << 20  # bytes of a reply


class Endpoint:
    """POSTs `{"prompts": [...], "completions": [...], "columns": {...}}` to `url`; expects `{"scores": [...]}`.

    Connection errors and status 5xx and 429 are retried, up to `ATTEMPTS` attempts within `timeout` seconds. Redirects
    are not followed. Scores are validated like those of a function.
    """

    def __init__(self, url: str, *, timeout: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name, self._timeout, self._sleep = url, timeout, sleep

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Raises RewardError if no usable reply arrives in time."""
        prefix = request.error_prefix(self.name)
        body = to_json_line(request, prefix)
        deadline = time.monotonic() + self._timeout
        try:
            reply = call_with_timeout(self._timeout, lambda: self._post_with_retries(body, deadline))
        except CallTimeout:
            raise RewardError(
                f"{prefix} did not answer {len(request.completions)} completions within {self._timeout:g} s; raise its "
                f"timeout, or check the server{request.error_suffix}"
            ) from None
        except _EndpointError as error:
            raise RewardError(f"{prefix} {error}{request.error_suffix}") from error
        try:
            parsed = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{prefix} answered with something other than JSON: {quoted(reply)}") from error
        if not isinstance(parsed, dict) or "scores" not in parsed:
            raise RewardError(f'{prefix} answered without "scores": {quoted(parsed)}; expected {{"scores": [...]}}')
        return parse_scores(parsed["scores"], request, self.name)

    def _post_with_retries(self, body: bytes, deadline: float) -> bytes:
        for attempt in range(ATTEMPTS):
            pause = FIRST_PAUSE * 2**attempt
            try:
                return _post(self.name, body, deadline - time.monotonic())
            except urllib.error.HTTPError as error:
                reason = f"answered {error.code} {error.reason}: {quoted(_error_text(error))}"
                permanent = error.code < 500 and error.code != 429
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = f"cannot be reached: {first_line(getattr(error, 'reason', None) or error)}"  # type: ignore[arg-type]
                permanent = False
            if permanent or attempt + 1 == ATTEMPTS or time.monotonic() + pause >= deadline:
                raise _EndpointError(f"{reason} ({attempt + 1} attempts)" if attempt else reason)
            self._sleep(pause)
        raise AssertionError


class _EndpointError(Exception):
    """The endpoint gave no usable reply; the message says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Send prompts to the configured address only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _post(url: str, body: bytes, seconds: float) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", "Accept": "application/json"})
    with _opener.open(request, timeout=max(seconds, 0.01)) as response:
        reply = response.read(LARGEST + 1)
    if len(reply) > LARGEST:
        raise _EndpointError(f"answered with more than {LARGEST >> 20} MiB")
    return reply


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(400).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
