"""Errors that a user can fix, each with the exit code of the command line (0: success, 2: usage error).

Messages say what is wrong, where, why, and how to fix it. `jaxrlhf --debug` adds the traceback. What comes from outside
(files, models, functions of the user) passes `visible` before it reaches a terminal.
"""

import re
import unicodedata

_NOT_ASCII = re.compile(r"[^ -~\n\t]")
_JOINERS = "\u200c\u200d"  # between letters of Persian and Indic scripts, and in emoji


def visible(text: str) -> str:
    """Spell out all characters that a terminal would obey or hide (escape sequences, directions of writing, carriage
    returns), but not line breaks and tabs."""
    return _NOT_ASCII.sub(lambda match: _spelt(match[0]), text)


def _spelt(c: str) -> str:
    shown = c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"
    return c if shown else c.encode("unicode_escape").decode()


def shortened(text: str, width: int) -> str:
    """`text` with its middle left out if it is longer than `width` characters."""
    return text if len(text) <= width else f"{text[: 2 * width // 5]} ... {text[-(3 * width // 5) :]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, `visible` and shortened in the middle if it is long, to quote in
    another message."""
    text = _text(error).strip()
    lines = (text.strip("\"'") if isinstance(error, KeyError) else text).splitlines()  # Python quotes the key
    return visible(shortened(lines[0] if lines else type(error).__name__, 240))


def kind_and_message(error: BaseException) -> str:
    """Kind and message of an exception ("ValueError: ..."), or its kind alone if it has no message. The message is
    `visible`, and shortened in the middle if it is longer than 2,000 characters."""
    kind, message = type(error).__name__, visible(shortened(_text(error), 2000))
    return f"{kind}: {message}" if message else kind


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a class of the user's
        return ""


_SHORTAGE = (
    "MemoryError",  # quoted in another message
    "RESOURCE_EXHAUSTED",  # XLA
    "can't start new thread",
    "Cannot allocate memory",
    "failed to map segment from shared object",  # the loader of a library
)
# TensorStore reports these as RESOURCE_EXHAUSTED, too
_OF_DISKS = ("No space left", "quota exceeded", "Too many open files")


def is_shortage(error: BaseException) -> bool:
    """Return True if an exception says that memory is short."""
    text = _text(error)
    if any(sign in text for sign in _OF_DISKS):
        return False
    return isinstance(error, MemoryError) or any(sign in text for sign in _SHORTAGE)


def quoted(value: object, width: int = 80) -> str:
    """The repr of a value, truncated to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[:width] + "..."


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class JaxrlhfError(Exception):
    """Base class of errors that a user can fix. `exit_code` is returned by the command line."""

    exit_code = 1
    in_all_processes = False
    """Raised by every process of a run on several, of which process 0 reports it."""

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message)))


class ConfigError(JaxrlhfError, ValueError):
    """Invalid config file, override or combination of options."""

    exit_code = 3


class DataError(JaxrlhfError, ValueError):
    """Invalid data file, tokenizer or model folder."""

    exit_code = 4


class RewardError(JaxrlhfError, RuntimeError):
    """A reward function or model raised an exception or returned an invalid score."""

    exit_code = 5


class NumericsError(JaxrlhfError, FloatingPointError):
    """Non-finite numbers in training."""

    exit_code = 6


class StorageError(JaxrlhfError, OSError):
    """A run directory, checkpoint or export cannot be written or read, or is corrupt."""

    exit_code = 7


class DamagedCheckpoint(StorageError):
    """A checkpoint that cannot be read or differs from what was written."""


class OutOfMemory(JaxrlhfError, MemoryError):
    """The device or the host is out of memory."""

    exit_code = 8


class Preempted(JaxrlhfError):
    """The run was asked to stop and saved its state. Run the same command again to resume."""

    exit_code = 75


class Interrupted(JaxrlhfError):
    """A signal asked the program to stop, in the middle of a step or before the first one."""

    exit_code = 75

    def __init__(self, message: str = "stopped before anything was to save; run the same command again") -> None:
        super().__init__(message)


class PeerLost(JaxrlhfError):
    """Another process of a run on several is gone. Run the same command in all of them again to resume."""

    exit_code = 9
