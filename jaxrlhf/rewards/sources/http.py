"""HTTP with retries, for the servers that give scores."""

import base64
import datetime
import email.utils
import http.client
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrlhf import secrets
from jaxrlhf.errors import ConfigError, first_line, quoted

ATTEMPTS = 4
FIRST_PAUSE = 0.25  # seconds before the second attempt; doubled each time
LARGEST = 64 << 20  # bytes of a reply


class HTTPFailure(Exception):
    """The server gave no usable reply; the message says why. `about_request`: it refused this request (status 4xx), and
    may accept another."""

    def __init__(self, message: str, *, about_request: bool = False) -> None:
        super().__init__(message)
        self.about_request = about_request


class Address(NamedTuple):
    """The address of a server."""

    shown: str  # without secrets, for messages
    url: str
    headers: Mapping[str, str]  # those of the option, and basic authentication, if the URL has a user name

    @classmethod
    def of(cls, url: str, place: str, headers: Mapping[str, str] | None = None) -> "Address":
        """Read the `url` of an option, whose name is `place`, and the `headers` beside it. Raises ConfigError for a URL
        that is none of HTTP, a variable that is not set, and a header that cannot be sent."""
        shown = secrets.redact_value(url)
        plain, userinfo = secrets.split_userinfo(secrets.resolve(url, place))
        try:
            parts = urllib.parse.urlsplit(plain)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
        except ValueError:
            usable = False
        if not usable or any(c.isspace() or not c.isprintable() for c in plain):
            raise ConfigError(
                f"{place} is '{shown}'; it must begin with http:// or https:// and a host, and have no blanks (write "
                "%20)"
            )
        found = secrets.resolve(headers or {}, f"headers beside {place}", secrets.HEADERS)
        for name, value in found.items():
            if not re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value):
                raise ConfigError(
                    f"headers beside {place}: the value of {name} has characters that no header can have, such as line "
                    "breaks; correct it, or the environment variable in it"
                )
        if userinfo is None:
            return cls(shown, plain, found)
        code = base64.b64encode(":".join(userinfo).encode()).decode()
        secrets.remember(code)
        return cls(shown, plain, {**found, "Authorization": f"Basic {code}"})


def post(
    url: str,
    body: bytes,
    deadline: float,
    *,
    headers: Mapping[str, str] | None = None,
    attempts: int = ATTEMPTS,
    attempt_timeout: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """The reply to JSON sent by POST, before `deadline` (`time.monotonic`).

    Connection errors and status 5xx and 429 are retried up to `attempts` attempts in all, after pauses that double, or
    as long as the server's Retry-After says. An attempt may take `attempt_timeout` seconds. Redirects are not followed.
    Raises HTTPFailure.
    """
    for attempt in range(attempts):
        pause = FIRST_PAUSE * 2**attempt
        seconds = max(deadline - time.monotonic(), 0.01)
        try:
            return _post(url, body, min(seconds, attempt_timeout or seconds), headers or {})
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}: {quoted(_error_text(error))}"
            permanent, about_request = error.code < 500 and error.code != 429, error.code in (400, 413, 422)
            pause = max(pause, _retry_after(error.headers.get("Retry-After")))
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = f"cannot be reached: {first_line(getattr(error, 'reason', None) or error)}"  # type: ignore[arg-type]
            permanent = about_request = False
        if permanent or attempt + 1 == attempts or time.monotonic() + pause >= deadline:
            reason = f"{reason} ({attempt + 1} attempts)" if attempt else reason
            raise HTTPFailure(secrets.redact(reason), about_request=about_request)
        sleep(pause)
    raise AssertionError


def connect(url: str, seconds: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Connect to the server of a URL, or to the proxy for it, and hang up; nothing is sent. Retried like `post`, within
    `seconds`. Raises HTTPFailure."""
    parts, deadline = urllib.parse.urlsplit(url), time.monotonic() + seconds
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    for attempt in range(ATTEMPTS):
        pause = FIRST_PAUSE * 2**attempt
        try:
            socket.create_connection((parts.hostname or "", port), max(deadline - time.monotonic(), 0.01)).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none
            if attempt + 1 == ATTEMPTS or time.monotonic() + pause >= deadline:
                raise HTTPFailure(secrets.redact(f"cannot be reached: {first_line(error)}")) from error
        sleep(pause)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Send prompts, and keys, to the configured address only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _post(url: str, body: bytes, seconds: float, headers: Mapping[str, str]) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    with _opener.open(urllib.request.Request(url, body, headers), timeout=seconds) as response:
        reply = response.read(LARGEST + 1)
    if len(reply) > LARGEST:
        raise HTTPFailure(f"answered with more than {LARGEST >> 20} MiB")
    return reply


def _retry_after(text: str | None) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; 0 for none, or for anything else."""
    try:
        return float(text or 0)
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(text or "")
        return (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(400).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
