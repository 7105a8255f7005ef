"""The terminal of a chat: messages and commands in, replies out as they are generated."""

import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf import compilation
from jaxrlhf.chat.conversation import Conversation, Turn
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import JaxrlhfError, StorageError, visible

COMMANDS = {
    "/help": "show this list",
    "/reset": "forget the conversation; the system prompt stays",
    "/undo": "take back the last message and its reply",
    "/system": "/system TEXT sets the system prompt, /system alone shows it, /system none removes it",
    "/save": "/save FILE appends the conversation to a JSONL file that `jaxrlhf sft` reads",
    "/quit": "end the chat, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *(f"  {name:<8} {text}" for name, text in COMMANDS.items()),
        "  Ctrl-C stops a reply. A message that begins with a slash is sent if a space stands before it.",
    ]
)


class Terminal:
    """Reads a message or command per line from standard input, and writes to standard output."""

    def __init__(self, conversation: Conversation) -> None:
        self._chat = conversation
        self._interactive = sys.stdin.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then has history and editing
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def run(self) -> None:
        """Talk until the end of the input or /quit."""
        if self._interactive:
            self._print("/help lists the commands; Ctrl-C stops a reply, Ctrl-D ends the chat")
        for note in self._chat.notes():
            self._note(note)
        for line in self._lines():
            text = line.encode("utf-8", "replace").decode("utf-8")
            if not text.strip():
                continue
            if not text.startswith("/"):
                self._answer(text[1:] if text.startswith(" /") else text)
            elif text.split()[0] == "/quit":
                return
            else:
                self._obey(*text.split(maxsplit=1))

    def _lines(self) -> Iterator[str]:
        """Lines of the input. Those that no terminal has shown are printed."""
        if not self._interactive:
            for line in sys.stdin:
                line = line.rstrip("\r\n")
                if line.strip():
                    self._print(f"you: {visible(line)}")
                yield line
            return
        while True:
            try:
                yield input("you: ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                self._print("\nCtrl-D or /quit ends the chat")

    def _answer(self, message: str) -> None:
        """Print the reply to a message and its reward."""
        chat, before = self._chat, self._chat.forgotten
        try:
            with compilation.held_back(), _interrupts(chat):
                print("model:", end="", flush=True)
                first = True
                for piece in chat.reply(message):
                    space = " " * (first and not piece[:1].isspace())
                    print(space + visible(piece), end="", flush=True)
                    first = False
                print(flush=True)
        except JaxrlhfError as error:
            print(flush=True)
            self._note(str(error))
            return
        if facts := _facts(chat.turns[-1], chat.scorer is not None):
            self._print(f"[{facts}]")
        if chat.forgotten > before:
            self._note(
                f"the context of {chat.context} tokens is full: the model no longer sees the first {chat.forgotten} of "
                f"{len(chat.turns)} turns"
            )

    def _obey(self, command: str, argument: str = "") -> None:
        """Run a command other than /quit."""
        chat, argument = self._chat, argument.strip()
        try:
            match command:
                case "/help":
                    self._print(HELP)
                case "/reset":
                    chat.reset()
                    self._print("the conversation is empty")
                case "/undo":
                    turn = chat.undo()
                    self._print(f"taken back: {visible(turn.message)}" if turn else "there is nothing to undo")
                case "/system":
                    if argument:
                        chat.set_system("" if argument == "none" else argument)
                    self._print(f"system prompt: {visible(chat.system) or 'none'}")
                case "/save" if argument:
                    self._print(_save(chat, Path(argument).expanduser()))
                case "/save":
                    self._print("/save needs the name of a file")
                case _:
                    self._print(f"unknown command {visible(command)}{did_you_mean(command, list(COMMANDS))}; try /help")
        except JaxrlhfError as error:
            self._note(str(error))

    def _print(self, text: str) -> None:
        print(visible(text), flush=True)

    def _note(self, text: str) -> None:
        print(f"note: {visible(text)}", file=sys.stderr, flush=True)


def _facts(turn: Turn, scored: bool) -> str:
    """The reward of a turn, its components if there are several, and how the reply ended if not by itself."""
    facts = []
    if scored:
        facts.append("reward " + ("none" if turn.reward is None else f"{turn.reward:.4g}"))
        if len(turn.components) > 1:
            facts += [f"{name} {'none' if v is None else f'{v:.4g}'}" for name, v in turn.components.items()]
    if not turn.finished:
        facts.append(f"cut off after {turn.tokens} tokens")
    return ", ".join(facts)


def _save(chat: Conversation, path: Path) -> str:
    """Append the conversation to a JSONL file. Raises StorageError."""
    rows = chat.rows()
    if not rows:
        return "there is no finished reply to save"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    return f"added {len(rows)} {'row' if len(rows) == 1 else 'rows'} to {path}"


@contextlib.contextmanager
def _interrupts(chat: Conversation) -> Iterator[None]:
    """Ctrl-C ends the reply, not the program."""
    try:
        before = signal.signal(signal.SIGINT, lambda *_: chat.interrupt())
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
