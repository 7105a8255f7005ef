"""Section for a component of the reward that a language model gives, behind an OpenAI-style server."""

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from jaxrlhf.config.base import Address, Bool, Count, Natural, NonNegative, Positive, Real, Text, section
from jaxrlhf.secrets import redact_value

SCORE_REGEX = r"""(?i)\bscore\b[\s*_`"']*[:=][\s*_`"']*([-+]?\d+(?:\.\d+)?)"""
_ASKED_BY_INSTRUCTION = ("messages", "model", "temperature", "max_tokens", "stream", "n")


def check_headers(headers: Mapping[str, str], url: str, other: str = "") -> None:
    """Raise ValueError for names that no header has, two of the same name, and for an Authorization beside a user name
    in `url` or `other`, words on what else authenticates."""
    names = [name.lower() for name in headers]
    for name in headers:
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or names.count(name.lower()) > 1:
            reason = "given twice" if names.count(name.lower()) > 1 else "not the name of a header"
            raise ValueError(f"headers: {name!r} is {reason}")
    other = "url has a user name" if "@" in urllib.parse.urlsplit(url).netloc else other
    if "authorization" in names and other:
        raise ValueError(f"headers has an Authorization and {other}: both authenticate; leave one of them out")


@section
class Criterion:
    """One criterion of a judge, which is asked about it in a request of its own."""

    question: Text = ""
    """Question for the judge, e.g. "Is every fact in the completion correct?" Required."""
    weight: Positive = 1.0
    """Weight of the criterion in the mean over the rubric."""
    name: str = ""
    """Name in the logs, after that of the component and an underscore. Empty: the number, from 1."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question is empty; say what the judge is to grade")
        if not re.fullmatch(r"\w*", self.name, re.ASCII):
            raise ValueError(f"name is '{self.name}'; use letters, digits and underscores")


@section
class Judge:
    """A language model that grades completions, behind a server with OpenAI's chat completions API (vLLM, llama.cpp,
    Ollama, hosted models)."""

    url: Address = ""
    """Address of the chat completions API, e.g. http://127.0.0.1:8000/v1/chat/completions. Empty: no judge. Secrets in
    it are treated as in the `url` of a component."""
    model: str = ""
    """Name of the model on the server. Empty: none is sent, for servers with one model."""
    rubric: tuple[Criterion, ...] = ()
    """Criteria. The score is their weighted mean. Empty: how well the completion answers the prompt. Keys of a
    criterion:"""
    system: Text = ""
    """System message. Empty: tells the judge that the texts to grade contain no instructions to it."""
    instructions: Text = ""
    """Last part of the question, with the range and the form of the reply. Empty: asks for a number from `minimum` to
    `maximum` in the form that `score_json` or the default of `score_regex` reads."""
    score_regex: str = SCORE_REGEX
    """Regular expression for the score in the reply: the first group of its last match."""
    score_json: str = ""
    """Place of the score in a JSON object in the reply, e.g. score, or grades.0.value. Empty: `score_regex`."""
    minimum: Real = 0.0
    """Lowest score that the judge may give. A score outside the range is an error (`on_error`)."""
    maximum: Real = 10.0
    """Highest score that the judge may give."""
    normalise: Bool = True
    """Map [minimum, maximum] to [0, 1]."""
    temperature: NonNegative | None = 0.0
    """Sampling temperature. null: the server's."""
    max_tokens: Count | None = 512
    """Maximum tokens of a reply. null: the server's."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the request, e.g. {response_format: {type: json_object}}. `${NAME}` in a text is an environment
    variable."""
    api_key_env: str = ""
    """Environment variable that holds the API key. The key itself is written nowhere."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further headers of the requests, treated as the `headers` of a component."""
    concurrency: Count = 8
    """Requests under way at a time, in each process."""
    request_timeout: Positive = 60.0
    """Seconds allowed for one attempt of a request. `timeout` of the component limits those of a batch together."""
    retries: Natural = 3
    """Attempts after the first, for connection errors and status 429 and 5xx, with growing pauses or the server's
    Retry-After."""
    input_price: NonNegative = 0.0
    """Price of a million prompt tokens, for the metric of the cost."""
    output_price: NonNegative = 0.0
    """Price of a million generated tokens."""

    def __post_init__(self) -> None:
        if not self.url:
            return
        address = urllib.parse.urlsplit(self.url)
        if (address.scheme not in ("http", "https") or not address.hostname) and not self.url.startswith("${"):
            raise ValueError(f"url is '{redact_value(self.url)}'; it must begin with http:// or https:// and a host")
        if address.username is not None and self.api_key_env:
            raise ValueError("url has a user name and api_key_env is set: both authenticate; leave one of them out")
        check_headers(self.headers, self.url, f"api_key_env is {self.api_key_env}" if self.api_key_env else "")
        if not re.fullmatch(r"|[A-Za-z_]\w*", self.api_key_env, re.ASCII):
            raise ValueError(
                "api_key_env is not the name of an environment variable; if it is the key, put it into one"
            )
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum ({self.minimum:g}) must be less than maximum ({self.maximum:g})")
        try:
            groups = re.compile(self.score_regex).groups
        except re.error as error:
            raise ValueError(f"score_regex is not a regular expression: {error}") from None
        if not groups:
            raise ValueError("score_regex has no group; put the number into parentheses")
        if self.score_json and self.score_regex != SCORE_REGEX:
            raise ValueError("score_json and score_regex are both set; leave one of them out")
        if self.score_regex != SCORE_REGEX and not self.instructions:
            raise ValueError("score_regex is set, so instructions must ask for a reply that it finds a score in")
        if reserved := sorted({*self.extra_body} & {*_ASKED_BY_INSTRUCTION}):
            raise ValueError(f"extra_body has {', '.join(reserved)}, which jaxrlhf sets; use the option of that name")
        names = [criterion.name for criterion in self.rubric if criterion.name]
        if len(set(names)) < len(names):
            raise ValueError("two criteria of the rubric have the same name; give each its own")
