"""The command line. Importing it, `--help` and config errors load none of jax, transformers, datasets and numpy."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from jaxrlhf import runtime
from jaxrlhf.cli.training import COMMANDS, COMPUTING, TOP_LEVEL, Command, Overrides, train_help
from jaxrlhf.config import file as config_file
from jaxrlhf.config.spelling import did_you_mean, suggestions
from jaxrlhf.errors import ConfigError, JaxrlhfError, OutOfMemory, Preempted, StorageError

_MEMORY = (
    "out of memory: {reason}\nThe same result in less memory: a smaller micro_batch_size of ppo, grpo, train "
    "or reward, fewer rollout.slots, model.remat=full, a larger mesh.fsdp.\nA smaller run: "
    "--use-lora, lora.quantize=nf4, optim.state_dtype=bfloat16, "
    "critic.trunk=frozen, model.compute_dtype=bfloat16, rollout.dtype=int8, data.max_length, "
    "sampling.response_length. `jaxrlhf plan` says what each of them would save"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see errors.py; 2 for usage, 130 when interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if arguments is None and given and given[0] in COMPUTING and not {"--help", "-h"} & set(given):
        runtime.restart_with_huge_pages()
    try:
        code = _dispatch([argument for argument in given if argument != "--debug"])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _complain("interrupted", 130, debug)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        return _complain(f"{'' if isinstance(known, Preempted) else 'error: '}{known}", known.exit_code, debug)


def _known(error: Exception) -> JaxrlhfError | None:
    """The error for people behind an exception, if it is one that a person can do something about."""
    if isinstance(error, JaxrlhfError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(_MEMORY.format(reason=error or "this computer has no more"))
    if "RESOURCE_EXHAUSTED" in str(error):
        return OutOfMemory(_MEMORY.format(reason=str(error).partition("\n")[0]))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left for {error.filename or 'what was to be written'}; free some and run again")
    return None


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"jaxrlhf: {message}", file=sys.stderr)
    return code


def _dispatch(given: list[str]) -> int:
    verb = given[0] if given else ""
    if verb and not verb.startswith("-") and verb not in COMMANDS:
        print(f"jaxrlhf: unknown command '{verb}'{did_you_mean(verb, list(COMMANDS))}", file=sys.stderr)
        print(f"commands: {' '.join(COMMANDS)}; `jaxrlhf --help` says more", file=sys.stderr)
        return 2
    if verb in config_file.METHODS and {"--help", "-h"} & set(given):
        return train_help(verb)
    overrides: Overrides = []
    rest = given
    if verb in COMMANDS:
        overrides, rest = _split(given, COMMANDS[verb])
    options = _parser().parse_args(rest)
    if options.verb is None:
        _parser().print_help()
        return 2
    return COMMANDS[options.verb].run(options, overrides) or 0


def _split(given: Sequence[str], command: Command) -> tuple[Overrides, list[str]]:
    """Separate `--section.key value` and `--section.key=value` from the arguments that argparse knows.

    Raises ConfigError for an override without a value; a misspelt option leaves with exit code 2, as argparse would.
    """
    overrides: Overrides = []
    rest: list[str] = []
    flags = [name for name in (*command.arguments, "--debug", "--help") if name.startswith("--")]
    waiting = iter(given)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        known = command.arguments.get(flag)
        if not flag.startswith("--") or flag in ("--help", "--"):
            rest.append(argument)
        elif known is not None:
            rest.append(argument)
            if not equals and "action" not in known and (text := next(waiting, None)) is not None:
                rest[-1] = f"{flag}={text}"  # so that a value may begin with a dash
        elif not command.overrides or ("." not in flag and flag[2:] not in TOP_LEVEL and suggestions(flag, flags)):
            print(f"jaxrlhf {given[0]}: unknown option '{flag}'{did_you_mean(flag, flags)}", file=sys.stderr)
            raise SystemExit(2)
        else:
            text = value if equals else next(waiting, None)
            if text is None or (not equals and text.startswith("--")):
                raise ConfigError(f"override {flag} has no value; write {flag} VALUE or {flag}=VALUE")
            overrides.append((flag[2:], text))
    return overrides, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf",
        description="RLHF in JAX: from a Hugging Face model to a Hugging Face model.",
        epilog="MODEL is a Hugging Face folder, a hub id or a run directory. --debug shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        note = "Any key of the config can be set too: --section.key value." if command.overrides else None
        sub = verbs.add_parser(name, help=command.help, description=command.help, epilog=note, allow_abbrev=False)
        for argument, keywords in command.arguments.items():
            sub.add_argument(argument, **keywords)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"jaxrlhf {version('jaxrlhf')}")
        except PackageNotFoundError:
            print("jaxrlhf, not installed: run from its source folder")
        parser.exit()
