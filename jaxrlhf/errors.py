"""Errors that a user can fix, each with the exit code of the command line (0: success, 2: usage error).

Messages say what is wrong, where, why, and how to fix it. `jaxrlhf --debug` adds the traceback.
"""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened in the middle if it is long, to quote in another message."""
    line = (str(error).strip(" \n\"'") or type(error).__name__).splitlines()[0]
    return line if len(line) <= 240 else f"{line[:100]} ... {line[-140:]}"


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


class PeerLost(JaxrlhfError):
    """Another process of a run on several is gone. Run the same command in all of them again to resume."""

    exit_code = 9
