"""Secrets, which a run uses and never writes: hidden in configs, commands and messages, read from the environment at
use.

Hidden are the user name and password of a URL, the values of its query but those of HARMLESS, its fragment, the value
of an option or keyword that is named like a secret, those of `headers` but HARMLESS_HEADERS, and everything that
`remember` was given. A reference `${NAME}` to an environment variable is kept as it is: it is no secret.
"""

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.errors import ConfigError

HIDDEN = "***"
HARMLESS = (
    *("api-version", "api_version", "version", "v", "model", "deployment", "engine", "task", "mode", "format", "lang"),
    *("seed", "timeout", "limit", "batch_size", "revision"),
)
"""Parameters of a URL's query whose values are no secrets."""
HEADERS = "headers"
"""Option with headers of requests, by name."""
HARMLESS_HEADERS = ("accept", "accept-language", "content-type", "user-agent")
_REFERENCE = re.compile(r"\$(\$?)\{([A-Za-z_]\w*)\}")
_SCHEME = re.compile(r"(?i)(?:Bearer|Basic|Token) +")
_IS_REFERENCE = re.compile(r"(?:(?:Bearer|Basic|Token) )?\$\{[A-Za-z_]\w*\}")
_SECRET_WORDS = (
    *("secret", "password", "passwd", "passphrase", "pwd", "auth", "authorization", "credential", "credentials"),
    *("cookie", "bearer", "signature", "sig", "apikey", "accesskey", "secretkey", "privatekey", "token"),
)
_KEY_OF = ("api", "access", "secret", "private", "auth", "signing", "encryption", "subscription")
_TEXT_TOKENS = (
    *("eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "start", "end", "begin", "first", "last", "special"),
    *("image", "think", "per"),
)
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>\\`]+)")
_ASSIGNMENT = re.compile(
    r"""(?ix) \b (?P<name> (?:api|access|secret|private)[_-]?key | (?:access|auth|bearer|refresh|api)[_-]?token
    | password | passwd | passphrase | secret | (?:x-)?(?:proxy-)?authorization )
    (?P<mark> ["']? \s* [:=] \s* ["']? ) (?P<value> (?:(?:bearer|basic|token) \s+)? [^\s"',;}\]]+ )"""
)
_KNOWN_FORMS = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}"
    r"|(?<=Bearer )[\w.~+/=-]{8,})"
)
_SHORTEST = 6  # characters of a remembered secret; shorter ones would hide parts of other words
_remembered: set[str] = set()


def remember(*secrets: str) -> None:
    """Hide these values, where `redact` finds them, for as long as this process lives."""
    _remembered.update(secret for secret in secrets if len(secret) >= _SHORTEST and secret != HIDDEN)


def redact(text: str) -> str:
    """A message or line of a command without its secrets."""
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL.sub(lambda match: match[1] + _hidden_address(match[2]), text)
    text = _ASSIGNMENT.sub(lambda match: match["name"] + match["mark"] + _hide(match["value"]), text)
    return _KNOWN_FORMS.sub(HIDDEN, text)


def redact_value(value: Any, name: str = "") -> Any:
    """A value of a config without its secrets, whose key is `name`: text, or a mapping or sequence of values."""
    if isinstance(value, Mapping):
        return {key: redact_value(item, _name_of(key, name)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_value(item, name) for item in value)
    if not isinstance(value, str) or not value:
        return value
    if is_secret_name(name):
        return _hide(value)
    scheme, mark, rest = value.partition("://")
    if mark and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):  # the whole of it, blanks and quotes included
        return scheme + mark + _hidden_address(rest)
    return redact(value)


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command without the secrets among its options: `--NAME=VALUE` and `--NAME VALUE`."""
    shown, name = [], ""
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            *_, parent, name = ("", *flag.removeprefix("--").split("."))
            name = _name_of(name, parent)
            shown.append(f"{flag}={redact_value(value, name)}" if equals else flag)
            name = "" if equals else name
        else:
            shown.append(redact_value(word, name))
            name = ""
    return shown


def is_secret_name(name: str) -> bool:
    """Return True for the name of an option or header that holds a secret: api_key, X-Auth-Token, password, headers."""
    if name == HEADERS:
        return True
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    if words[-1] == "env":  # the name of a variable
        return False
    for before, word in zip(["", *words], words, strict=False):
        if word == "token" and before in _TEXT_TOKENS:
            continue
        if word in _SECRET_WORDS or (word == "key" and before in _KEY_OF):
            return True
    return False


def _name_of(key: Any, parent: str) -> str:
    """The name of an option in the mapping `parent`, by which it is judged: a header may be a secret under any name."""
    return parent if parent == HEADERS and str(key).lower() not in HARMLESS_HEADERS else str(key)


def resolve(value: Any, place: str, name: str = "") -> Any:
    """The value of an option for its use: `${NAME}` in its texts is the environment variable, `$${NAME}` the text
    `${NAME}`. What is secret in it is remembered. `place` is the option, for errors.

    Raises ConfigError, which names it, for a variable that is not set, and for a secret that was left out of the
    config of a run.
    """
    if isinstance(value, Mapping):
        return {key: resolve(item, f"{place}.{key}", _name_of(key, name)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolve(item, f"{place}.{i}", name) for i, item in enumerate(value))
    if not isinstance(value, str):
        return value
    address = "://" in value
    if HIDDEN in value and (address or is_secret_name(name)):
        raise ConfigError(
            f"{place} is '{redact_value(value, name)}': a run does not keep secrets in its config.yaml. Give this "
            "option again, or write ${NAME} in it and set the environment variable NAME, which is then all that is kept"
        )

    def variable(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        found = os.environ.get(match[2], "").strip()
        if not found:
            raise ConfigError(
                f"{place} has ${{{match[2]}}}, and there is no environment variable {match[2]}; export "
                f"{match[2]}=... before the command, or write $${{{match[2]}}} for this text itself"
            )
        if address and (match.start() > value.find("?") >= 0 or match.end() <= userinfo_end):
            remember(found)
            return urllib.parse.quote(found, safe="")
        return found

    start = value.find("://") + 3
    userinfo_end = start + _authority(value[start:])[0].rfind("@")
    text = _REFERENCE.sub(variable, value)
    if is_secret_name(name):
        remember(text, _SCHEME.sub("", text, count=1))
    if "://" in text:
        remember(*_secrets_of(text))
    return text


def escape(text: str) -> str:
    """A text that `resolve` makes this one."""
    return _REFERENCE.sub(lambda match: f"${match[0]}", text)


def same(key: str, old: Any, new: Any) -> bool:
    """Return True if two values of the option `key`, as they are kept, are the same but for their secrets."""
    if old == new:
        return True
    *_, parent, name = ("", *key.split("."))
    name = _name_of(name, parent)
    if not all(isinstance(value, str) and (is_secret_name(name) or _URL.match(value)) for value in (old, new)):
        return False
    texts = (_IS_REFERENCE.sub(HIDDEN, redact_value(value, name)) for value in (old, new))
    return len({re.sub(r"\*{3}(:\*{3})?@", f"{HIDDEN}@", text) for text in texts}) == 1


def split_userinfo(url: str) -> tuple[str, tuple[str, str] | None]:
    """(the URL without user name and password, these two, decoded, or None)."""
    scheme, mark, rest = url.partition("://")
    authority, slash, path = _authority(rest)
    userinfo, at, host = authority.rpartition("@")
    if not at:
        return url, None
    user, _, password = userinfo.partition(":")
    return scheme + mark + host + slash + path, (urllib.parse.unquote(user), urllib.parse.unquote(password))


def _authority(rest: str) -> tuple[str, str, str]:
    """Split the part of a URL after `://`: (authority, the first of / ? #, the rest)."""
    end = min((i for i in map(rest.find, "/?#") if i >= 0), default=len(rest))
    return rest[:end], rest[end : end + 1], rest[end + 1 :]


def _hide(value: str) -> str:
    return value if _IS_REFERENCE.fullmatch(value) else HIDDEN


def _hidden_address(rest: str) -> str:
    """The part of a URL after `://`, with user name, password, query values and fragment hidden."""
    authority, mark, path = _authority(rest)
    userinfo, at, host = authority.rpartition("@")
    if at:
        parts = userinfo.split(":", 1)
        userinfo = ":".join(map(_hide, parts)) if any(_IS_REFERENCE.fullmatch(p) for p in parts) else HIDDEN
    tail = mark + path
    before, question, query = tail.partition("?")
    query, hash_, fragment = query.partition("#") if question else ("", *before.partition("#")[1:])
    before = before if question else before.partition("#")[0]
    if question:
        query = "".join(part if part in "&;" else _hidden_parameter(part) for part in re.split("([&;])", query))
    return userinfo + at + host + before + question + query + hash_ + (_hide(fragment) if fragment else "")


def _hidden_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    if not text or (equals and (not value or urllib.parse.unquote(name).lower() in HARMLESS)):
        return text
    return f"{name}={_hide(value)}" if equals else _hide(text)


def _secrets_of(url: str) -> list[str]:
    """The secrets in a URL, each as written and decoded."""
    plain, userinfo = split_userinfo(url)
    found = [*userinfo] if userinfo else []
    _, _, query = plain.partition("?")
    for part in re.split("[&;#]", query):
        name, equals, value = part.partition("=")
        if urllib.parse.unquote(name).lower() not in HARMLESS or not equals:
            found += [value if equals else name]
    return [text for secret in found for text in (secret, urllib.parse.unquote(secret)) if text]
