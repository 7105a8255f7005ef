"""The command line. Importing it, `--help` and config errors do not import jax, transformers, datasets or numpy."""

import argparse
import datetime
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxrlhf import runtime
from jaxrlhf.cli.commands import COMMANDS, CONFIG_KEYS, USING_DEVICES, Command
from jaxrlhf.cli.models import Overrides
from jaxrlhf.cli.training import train_help
from jaxrlhf.config import trl
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.spelling import did_you_mean, suggestions
from jaxrlhf.errors import (
    ConfigError,
    Interrupted,
    JaxrlhfError,
    OutOfMemory,
    Preempted,
    StorageError,
    first_line,
    is_shortage,
    shortened,
    visible,
)
from jaxrlhf.files import write_whole
from jaxrlhf.secrets import redact

_OUT_OF_MEMORY = (
    "out of memory: {reason}\nTo use less memory with the same result: a smaller micro_batch_size of ppo, grpo, train "
    "or reward, fewer rollout.slots, model.remat=full, a larger mesh.fsdp.\nTo train with less memory: --use-lora, "
    "lora.quantize=nf4, optim.state_dtype=bfloat16, critic.trunk=frozen, model.compute_dtype=bfloat16, "
    "rollout.dtype=int8, a smaller data.max_length or sampling.response_length.\n"
    "`jaxrlhf plan` shows how much each of them saves"
)


_PACKAGE = Path(__file__).parents[1]
_format_warning = warnings.formatwarning
UNEXPECTED = 70
"""Exit code of an error that no part of the program expects (EX_SOFTWARE of sysexits.h)."""
MESSAGE = 20_000
"""Characters of an error message."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see errors.py; 2 for usage errors, 70 for unexpected ones, 130 if
    interrupted).

    Every error is a message on standard error. The traceback is in logs/error.txt of the run, if one was open, and that
    of an unexpected error without a run in the cache folder.
    """
    code = _run(list(sys.argv[1:] if arguments is None else arguments), of_process=arguments is None)
    precompile = sys.modules.get("jaxrlhf.training.on_policy.precompile")
    if arguments is None and precompile and precompile.unfinished():  # of a run that has ended before its first update
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str], *, of_process: bool) -> int:
    """`main`, but for its end. `of_process`: these are the arguments that the process was started with."""
    debug = "--debug" in argv
    if of_process:
        warnings.formatwarning = warning_line
    if of_process and argv and argv[0] in USING_DEVICES and not _asks_for_help(argv):
        runtime.restart_with_huge_pages()
    try:
        code = _dispatch([argument for argument in argv if argument != "--debug"])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed the error
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as error:
        return _end_all(error, _report("interrupted", 130, debug))
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        user_error = _as_user_error(error)
        if isinstance(user_error, Interrupted):
            return _end_all(user_error, _report(str(user_error), user_error.exit_code, debug))
        if isinstance(user_error, Preempted):
            return _report(str(user_error), user_error.exit_code, debug, once=True)
        kept = _keep_traceback(error, in_cache=user_error is None)
        if user_error is None:
            return _end_all(error, _report(_unexpected(error, kept), UNEXPECTED, debug))
        once = user_error.in_all_processes
        return _end_all(user_error, _report(f"error: {user_error}", user_error.exit_code, debug, once=once))


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """The text that a warning is printed as: of this package one like an error's, without a place in the code."""
    if category is UserWarning and _PACKAGE in Path(filename).parents:
        return f"jaxrlhf: {visible(redact(str(message)))}\n"
    return _format_warning(message, category, filename, lineno, line)


def _unexpected(error: Exception, kept: Path | None) -> str:
    """The message of an exception that no part of the program expects."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    at = f" at {Path(frames[-1].filename).relative_to(_PACKAGE.parent)}:{frames[-1].lineno}" if frames else ""
    where = f"is in {kept}" if kept else "is shown by --debug"
    return f"unexpected error: {type(error).__name__}: {first_line(error)}{at}; the traceback {where}"


def _keep_traceback(error: Exception, *, in_cache: bool) -> Path | None:
    """Write the traceback of an error to a file that only its owner reads: of the run if one was open, else, if asked
    for, of the cache folder. Returns its path; None if there is none."""
    runs = sys.modules.get("jaxrlhf.runs")
    run: Path | None = runs and runs.opened
    if run is None and not in_cache:
        return None
    number = processes.index() if (processes := _distributed()) else 0
    file = (run or runtime.cache_directory()) / "logs" / (f"error-{number}.txt" if number else "error.txt")
    text = visible("".join(traceback.format_exception(error)))
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_whole(file, f"{now}\n{redact(text)}", private=True)
    except OSError:
        return None
    return file


def _as_user_error(error: Exception) -> JaxrlhfError | None:
    """Convert an exception to the error shown to the user; None for bugs."""
    if isinstance(error, JaxrlhfError):
        return error
    if (processes := _distributed()) and (lost := processes.lost_peer(error)):
        return lost
    if is_shortage(error):
        return OutOfMemory(_OUT_OF_MEMORY.format(reason=str(error).partition("\n")[0] or "this computer has no more"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left to write {error.filename or 'a file'}; free some and run again")
    if isinstance(error, OSError) and error.filename is not None:
        return StorageError(f"{shortened(str(error.filename), 300)}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS, errno.EFBIG):
        return StorageError(f"a file cannot be written: {error.strerror}; see the log of the system for its disks")
    return None


def _distributed() -> Any:
    """The module `distributed`, if this is one of several processes."""
    module = sys.modules.get("jaxrlhf.distributed")
    return module if module is not None and module.count() > 1 else None


def _end_all(error: BaseException, code: int) -> int:
    """End the other processes of a run after this one has failed; returns its exit code if it is the only one."""
    if processes := _distributed():
        processes.end(error, code)
    return code


def _report(message: str, code: int, debug: bool, *, once: bool = False) -> int:
    """Print a message and return the exit code; with `once` only in process 0 of a run on several."""
    if debug:
        print(visible(redact(traceback.format_exc())), end="", file=sys.stderr)
    number = processes.index() if (processes := _distributed()) else 0
    if number == 0 or not once:
        text = visible(redact(shortened(message, MESSAGE)))
        print(f"jaxrlhf: {f'process {number}: ' if number else ''}{text}", file=sys.stderr)
    return code


def _asks_for_help(argv: Sequence[str]) -> bool:
    return not {"--help", "-h"}.isdisjoint(argv)


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    if verb and not verb.startswith("-") and verb not in COMMANDS:
        print(f"jaxrlhf: unknown command '{visible(verb)}'{did_you_mean(verb, list(COMMANDS))}", file=sys.stderr)
        others = " ".join(name for name in COMMANDS if name not in METHODS)
        print(f"commands that train: {' '.join(METHODS)}\nothers: {others}; see `jaxrlhf --help`", file=sys.stderr)
        return 2
    if verb in METHODS and _asks_for_help(argv):
        return train_help(verb)
    words, overrides = argv, []
    if verb in COMMANDS and verb != "launch":  # whose arguments are those of another command
        overrides, argv = _split_overrides(argv, COMMANDS[verb])
    options = _parser().parse_args(argv)
    if options.version:
        print(f"jaxrlhf {runtime.version('jaxrlhf') or '(not installed: running from its source folder)'}")
        return 0
    if options.verb is None:
        _parser().print_help()
        return 2
    options.words = words
    command = COMMANDS[options.verb]
    settable = [argument["dest"] for argument in command.arguments.values() if "dest" in argument]
    runtime.configure()
    given = [(key, str(getattr(options, key))) for key in settable if getattr(options, key) is not None]
    return command.run(options, [*given, *overrides]) or 0


def _split_overrides(argv: Sequence[str], command: Command) -> tuple[Overrides, list[str]]:
    """Separate overrides (`--section.key value`, `--section.key=value`) from the arguments for argparse.

    Raises ConfigError for an override without a value, and SystemExit(2) for a misspelt option.
    """
    overrides: Overrides = []
    rest: list[str] = []
    flags = [name for name in (*command.arguments, "--debug", "--help") if name.startswith("--")]
    options = [f"--{key}" for key in CONFIG_KEYS] if command.overrides else []
    remaining = iter(argv)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and flag.replace("_", "-") in flags:
            flag = flag.replace("_", "-")
            argument = f"{flag}{equals}{value}"
        keywords = command.arguments.get(flag)
        if not flag.startswith("--") or flag in ("--help", "--"):
            rest.append(argument)
        elif keywords is not None:
            rest.append(argument)
            takes_value = keywords.get("action", "append") == "append"
            if takes_value and not equals and (text := next(remaining, None)) is not None:
                rest[-1] = f"{flag}={text}"  # allows values that begin with a dash
        elif not command.overrides or ("." not in flag and _is_misspelt(flag, flags, options)):
            hint = did_you_mean(flag, flags)
            print(f"jaxrlhf {argv[0]}: unknown option '{visible(flag)}'{hint}", file=sys.stderr)
            raise SystemExit(2)
        else:
            text = value if equals else next(remaining, None)
            if (text is None or (not equals and text.startswith("--"))) and flag[2:] in trl.NAMES:
                text = ""  # the key is refused
            elif text is None or (not equals and text.startswith("--")):
                raise ConfigError(f"override {flag} has no value; write {flag} VALUE or {flag}=VALUE")
            overrides.append((flag[2:], text))
    return overrides, rest


def _is_misspelt(flag: str, flags: Sequence[str], options: Sequence[str]) -> bool:
    """True if an unknown flag is more like one of the command's `flags` than like any config option."""
    name = flag.replace("-", "_").replace("__", "--", 1)
    if name in options or name[2:] in trl.NAMES:
        return False
    closest = suggestions(name, [*(other.replace("_", "-") for other in flags), *options], 1)
    return bool(closest) and closest[0] in flags


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are not hidden under its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {visible(message)}; `{self.prog} --help` shows its use\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxrlhf",
        description="RLHF in JAX for causal language models in Hugging Face format.",
        epilog="MODEL is a Hugging Face model folder, a hub id or a run directory. --debug shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        note = "Any config option can be set with --section.key value." if command.overrides else None
        sub = commands.add_parser(name, help=command.help, description=command.help, epilog=note, allow_abbrev=False)
        for argument, keywords in command.arguments.items():
            sub.add_argument(argument, **keywords)
    return parser
