"""Rewards from a server: prompts and completions go there as JSON, scores come back."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import RewardError, first_line, quoted
from jaxrlhf.rewards.functions import Late, within
from jaxrlhf.rewards.sources.answers import Answer, Request, check
from jaxrlhf.rewards.sources.worker import json_line

ATTEMPTS = 4
FIRST_PAUSE = 0.25  # seconds before the second attempt; then twice as long each time
LARGEST = 64 << 20  # bytes of an answer


class Endpoint:
    """POSTs `{"prompts": [...], "completions": [...], "columns": {...}}` to `url`; reads `{"scores": [...]}`.

    Where nobody answers, or the server has a problem of its own (5xx, 429), it is asked again, `ATTEMPTS` times and for
    `timeout` seconds at most. Redirections are not followed. What comes back is checked like a function's answer.
    """

    def __init__(self, url: str, *, timeout: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name, self._timeout, self._sleep = url, timeout, sleep

    def __call__(self, request: Request) -> Answer:
        """Raises RewardError if no usable answer comes in time."""
        where = request.about(self.name)
        body = json_line(request, where)
        deadline = time.monotonic() + self._timeout
        try:
            text = within(self._timeout, lambda: self._ask(body, deadline))
        except Late:
            raise RewardError(
                f"{where} did not answer {len(request.completions)} completions within {self._timeout:g} s; raise its "
                f"timeout, or look at the server{request.first}"
            ) from None
        except _Refused as error:
            raise RewardError(f"{where} {error}{request.first}") from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{where} answered with something other than JSON: {quoted(text)}") from error
        if not isinstance(answer, dict) or "scores" not in answer:
            raise RewardError(f'{where} answered without "scores": {quoted(answer)}; expected {{"scores": [...]}}')
        return check(answer["scores"], request, self.name)

    def _ask(self, body: bytes, deadline: float) -> bytes:
        for attempt in range(ATTEMPTS):
            left = deadline - time.monotonic()
            pause = FIRST_PAUSE * 2**attempt
            try:
                return _post(self.name, body, left)
            except urllib.error.HTTPError as error:
                reason = f"answered {error.code} {error.reason}: {quoted(_beginning(error))}"
                lasting = error.code < 500 and error.code != 429
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = f"cannot be reached: {first_line(getattr(error, 'reason', None) or error)}"  # type: ignore[arg-type]
                lasting = False
            if lasting or attempt + 1 == ATTEMPTS or time.monotonic() + pause >= deadline:
                raise _Refused(f"{reason} ({attempt + 1} attempts)" if attempt else reason)
            self._sleep(pause)
        raise AssertionError


class _Refused(Exception):
    """Why there is no answer."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Prompts go to the address that was given, and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_opener = urllib.request.build_opener(_Stay)


def _post(url: str, body: bytes, seconds: float) -> bytes:
    call = urllib.request.Request(url, body, {"Content-Type": "application/json", "Accept": "application/json"})
    with _opener.open(call, timeout=max(seconds, 0.01)) as response:
        text = response.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise _Refused(f"answered with more than {LARGEST >> 20} MiB")
    return text


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(400).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
