"""Replies of a judge: the text in an answer of the API, and the number in that text."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.config.judge import SCORE_REGEX
from jaxrlhf.errors import quoted
from jaxrlhf.rewards.sources.http import HTTPFailure


def content(received: bytes) -> tuple[str, Mapping[str, Any]]:
    """(text, usage) of a reply of the API. Raises HTTPFailure for anything else."""
    try:
        reply = json.loads(received)
    except (ValueError, RecursionError):
        raise HTTPFailure(f"answered with something other than JSON: {quoted(received)}") from None
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise HTTPFailure(f"answered without choices[0].message.content: {quoted(reply)}") from None
    if not isinstance(text, str) or not text.strip():
        why = f"finish_reason {choice.get('finish_reason')!r}; if it is 'length', raise max_tokens"
        raise HTTPFailure(f"answered without text ({why})", about_request=True)
    usage = reply.get("usage")
    return text, usage if isinstance(usage, dict) else {}


def last_number(reply: str, pattern: str) -> float:
    """The number in the first group of the last match. Raises ValueError."""
    matches = [match for match in re.finditer(pattern, reply) if match[1]]
    if not matches:
        asked = '"Score: NUMBER"' if pattern == SCORE_REGEX else f"a match of {pattern!r}"
        raise ValueError(f"answered without {asked}")
    return _number(matches[-1][1])


def number_in_json(reply: str, path: str) -> float:
    """The number at the dotted `path` of the last JSON object in a reply that has it. Raises ValueError."""
    decoder, found, start = json.JSONDecoder(), None, reply.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(reply, start)
            found = _at(value, path.split("."), found)
        except (ValueError, RecursionError):
            end = start + 1
        start = reply.find("{", end)
    if found is None:
        raise ValueError(f"answered without a JSON object that has '{path}'")
    return _number(found)


def _at(value: Any, path: Sequence[str], missing: Any) -> Any:
    for part in path:
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return missing
    return value


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"answered {quoted(value)} where a number should be")
    return number
