"""The command `completion`: scripts that complete commands, options, config keys and their values in a shell.

They hold all words, so that completing starts no Python: the commands of commands.py, their flags, and the config keys
of every method with the choices of their values. Values of other options are completed as file names.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from jaxrlhf.cli.models import Options, Overrides
from jaxrlhf.config.file import METHODS, presets
from jaxrlhf.config.schema import key_doc, keys

SHELLS = ("bash", "zsh", "fish")
_READS = {"data": "sft", "doctor": "ppo", "generate": "ppo", "chat": "ppo", "evaluate": "ppo", "compare": "ppo"}


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag: the words its value may be (none: a file name, or text), and whether it has a value."""

    flag: str
    help: str
    choices: tuple[str, ...] = ()
    takes_value: bool = True


def completion(options: Options, overrides: Overrides) -> None:
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](), end="")


def table() -> dict[str, tuple[str, list[Option], list[str], bool]]:
    """For each command its help, its options, the words that its arguments without a flag may be, and whether they may
    be files."""
    from jaxrlhf.cli.commands import COMMANDS

    methods = {"plan": [*METHODS], **{name: [name] for name in METHODS}, **{k: [v] for k, v in _READS.items()}}
    found = {}
    for name, command in COMMANDS.items():
        options = [
            Option("--help", "show help", takes_value=False),
            Option("--debug", "show tracebacks", takes_value=False),
        ]
        words: list[str] = []
        files = False
        for argument, keywords in command.arguments.items():
            choices = tuple(map(str, keywords.get("choices", ())))
            if argument.startswith("--"):
                options.append(
                    Option(argument, keywords.get("help", ""), choices, keywords.get("action", "append") == "append")
                )
            else:
                words += choices
                words += sorted(presets()) if argument == "config" else []
                files |= not choices
        if command.overrides:
            options += _config_options(methods.get(name, [*METHODS]))
        found[name] = command.help, options, words, files
    return found


def _config_options(methods: list[str]) -> Iterator[Option]:
    """The config keys of methods as options."""
    seen = set()
    for method in methods:
        for key, annotation in keys(METHODS[method]):
            if key not in seen and not dataclasses.is_dataclass(annotation):
                seen.add(key)
                yield Option(f"--{key}", key_doc(METHODS[method], key), _choices(annotation))


def _choices(annotation: Any) -> tuple[str, ...]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _choices(args[0])
    if origin is typing.Literal:
        return tuple(map(str, filter(None, args)))
    return ("true", "false") if annotation is bool else ()


def bash() -> str:
    """The script for bash (4 or newer)."""
    return _BASH.format(verbs=_verbs(), cases="".join(_cases("$verb", "$before", "$word")))


def zsh() -> str:
    """The script for zsh."""
    cases = "".join(_cases("$verb", "$before", "$PREFIX")).replace(
        "words='", "candidates='"
    )  # zsh has an array `words`
    return _ZSH.format(verbs=_verbs(), cases=cases)


_BASH = """\
# jaxrlhf completion for bash: put `source <(jaxrlhf completion bash)` into ~/.bashrc
_jaxrlhf() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
  local words='' files='' line
  [[ $word == = ]] && word=''  # bash divides --section.key=value into three words
  [[ $before == = ]] && before=${{COMP_WORDS[COMP_CWORD-2]}}
  if ((COMP_CWORD == 1)); then verb=; words='{verbs}'; fi
{cases}\
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  if [[ $files ]]; then
    while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word")
    compopt -o filenames 2> /dev/null
  fi
}}
complete -F _jaxrlhf jaxrlhf
"""
_ZSH = """\
#compdef jaxrlhf
# jaxrlhf completion for zsh: put `source <(jaxrlhf completion zsh)` into ~/.zshrc, after compinit
_jaxrlhf() {{
  local verb=$words[2] before=$words[CURRENT-1] candidates='' files=''
  [[ $PREFIX == --*=* ]] && before=${{PREFIX%%=*}} && compset -P '*='
  if ((CURRENT == 2)); then verb=; candidates='{verbs}'; fi
{cases}\
  compadd -- ${{=candidates}}
  [[ -n $files ]] && _files
}}
compdef _jaxrlhf jaxrlhf
"""


def _verbs() -> str:
    return " ".join([*table(), "--help", "--version"])


def _cases(verb: str, before: str, word: str) -> Iterator[str]:
    """Shell code that sets `words` to what may follow, and `files` if it may be a file: the choices of the flag before,
    else flags of the command if the word begins like one, else its other arguments."""
    yield f"  case {verb} in\n"
    for name, (_, options, words, files) in table().items():
        yield f"  {name})\n    case {before} in\n"
        by_choices: dict[tuple[str, ...], list[str]] = {}
        for option in options:
            if option.takes_value:
                by_choices.setdefault(option.choices, []).append(option.flag)
        for choices, flags in by_choices.items():
            effect = f"words='{' '.join(choices)}'" if choices else "files=1"
            yield f"    {'|'.join(flags)}) {effect} ;;\n"
        flags = " ".join(option.flag for option in options)
        others = f"words='{' '.join(words)}'" + " files=1" * files
        yield f"    *) if [[ {word} == -* ]]; then words='{flags}'; else {others}; fi ;;\n"
        yield "    esac ;;\n"
    yield "  esac\n"


def fish() -> str:
    """The script for fish."""
    lines = ["# jaxrlhf completion for fish: jaxrlhf completion fish > ~/.config/fish/completions/jaxrlhf.fish"]
    for name, (help, options, words, files) in table().items():
        lines.append(f"complete -c jaxrlhf -n __fish_use_subcommand -f -a {name} -d {_quoted(help)}")
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        if words or not files:
            lines.append(f"complete -c jaxrlhf {condition}{'' if files else ' -f'} -a '{' '.join(words)}'")
        for option in options:
            value = f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r" * option.takes_value
            flag = option.flag.removeprefix("--")
            lines.append(f"complete -c jaxrlhf {condition} -l {flag}{value} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """The first sentence of a text, quoted for fish."""
    first = re.split(r"(?<=[.:;]) ", text, maxsplit=1)[0].rstrip(".:;")
    return "'" + first.replace("\\", "\\\\").replace("'", "\\'") + "'"
