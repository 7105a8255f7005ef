"""Errors that are a person's to mend. Each carries the exit code of the command line (0 done, 2 usage).

A message says what is wrong, where, why, and what to do. `jaxrlhf --debug` adds the traceback.
"""


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, for a place in a message: its first line, without a long middle."""
    line = (str(error).strip(" \n\"'") or type(error).__name__).splitlines()[0]
    return line if len(line) <= 240 else f"{line[:100]} ... {line[-140:]}"


def quoted(value: object, width: int = 80) -> str:
    """A value as Python spells it, without what goes beyond `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[:width] + "..."


class JaxrlhfError(Exception):
    """Base of every error that a person can mend; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(JaxrlhfError, ValueError):
    """A config file, an override or a combination of options that cannot work."""

    exit_code = 3


class DataError(JaxrlhfError, ValueError):
    """A data file, a tokenizer or a model folder that cannot be used as it is."""

    exit_code = 4


class RewardError(JaxrlhfError, RuntimeError):
    """A reward function or model that raised, or answered with something that is not a reward."""

    exit_code = 5


class NumericsError(JaxrlhfError, FloatingPointError):
    """Training met non-finite numbers and cannot go on."""

    exit_code = 6


class StorageError(JaxrlhfError, OSError):
    """A run directory, a checkpoint or an export that cannot be written, read or trusted."""

    exit_code = 7


class OutOfMemory(JaxrlhfError, MemoryError):
    """A device or the host has less memory than the run needs."""

    exit_code = 8


class Preempted(JaxrlhfError):
    """The run was asked to stop; it saved its state and the same command goes on from there."""

    exit_code = 75
