"""Reward functions that people write: loaded by name, called with the columns they ask for, and checked.

Plain Python, without numpy or jax: a function's worker process imports this and starts in a few hundredths of a second.
"""

import asyncio
import importlib
import importlib.util
import inspect
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.sources.answers import Answer, Request, check

T = TypeVar("T")
OURS = ("prompts", "completions", "tokens")
"""Arguments that are not columns of the data."""


class Signature(NamedTuple):
    """Which of prompts, completions, tokens and the columns of the data a function asks for."""

    accepts: Collection[str]
    needs: Collection[str]
    everything: bool
    """It takes whatever there is (`**columns`)."""

    def wants(self, name: str) -> bool:
        return self.everything or name in self.accepts

    def check(self, columns: Collection[str], where: str, *, per_token: bool) -> None:
        """RewardError if a column that the function cannot do without is not there."""
        given = {*columns, *(OURS if per_token else OURS[:2])}
        if missing := set(self.needs) - given:
            hint = "; for those of the response set per_token: true" if "tokens" in missing else ""
            raise RewardError(
                f"{where} needs {', '.join(map(repr, sorted(missing)))}, which the data does not have; "
                f"it has {', '.join(map(repr, sorted(given)))}{hint}"
            )


class RewardFunction:
    """A function `reward(prompts, completions, **columns) -> list[float | None]`, async or not, and how to call it.

    It may name as many or as few of prompts, completions and the columns of the data as it needs; `options` are given
    to it by keyword, before a column of the same name. It runs in this process, so nothing can end it: where there is a
    `timeout` (seconds), it runs in a thread, and one that is late is reported and left to itself. Raises ConfigError
    for options that it does not take.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "",
        *,
        options: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.function, self.timeout, self.options = function, timeout, dict(options or {})
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            parameters = []
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        accepts = {p.name for p in parameters if p.kind in named} or {"prompts", "completions"}
        needs = {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        for option in self.options:
            if option in OURS or (option not in accepts and not everything):
                free = sorted(accepts - {*OURS})
                raise ConfigError(
                    f"reward {self.name} has no option '{option}'{did_you_mean(option, free) if free else ''}"
                )
        self.signature = Signature(accepts - {*self.options}, needs - {*self.options}, everything)

    def __call__(self, request: Request) -> Answer:
        """Raises RewardError if the function raises, is late, needs a column that is not there, or does not return a
        list with a value for each completion. Values in it that are no rewards are marked in the answer."""
        where = request.about(self.name)
        self.signature.check(request.columns, where, per_token=request.tokens is not None)
        given = {**request.columns, "prompts": list(request.prompts), "completions": list(request.completions)}
        if request.tokens is not None:
            given["tokens"] = [list(texts) for texts in request.tokens]
        arguments = {k: v for k, v in given.items() if self.signature.wants(k)} | self.options
        try:
            if self.timeout is None:
                answer = _awaited(self.function(**arguments))
            else:
                answer = within(self.timeout, lambda: _awaited(self.function(**arguments)))
        except Late:
            raise RewardError(
                f"{where} has not answered within {self.timeout:g} s. It runs in this process and cannot be ended, so "
                f"it goes on in a thread; one that is named in the config runs in its own{request.first}"
            ) from None
        except (Exception, SystemExit) as error:
            place = _place(error, self.function)
            raise RewardError(f"{where} raised {type(error).__name__}: {error}{place}{request.first}") from error
        return check(answer, request, self.name)


class Late(Exception):
    """What should have ended by now has not."""


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """`call()`, made in a thread of its own. Raises Late after `seconds`; nothing can end the thread."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise Late from None
    if error is not None:
        raise error
    return value


def _awaited(answer: Any) -> Any:
    """What an async function comes to; any other answer as it is."""
    if not inspect.isawaitable(answer):
        return answer

    async def wait() -> Any:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    return within(None, lambda: asyncio.run(wait()))  # a notebook has a loop running in this thread


def load(spec: str, **how: Any) -> RewardFunction:
    """The function that `path.py:name` or `package.module:name` names; `how`: options and timeout of RewardFunction.

    Raises RewardError if there is none, and a ConfigError that its module raises when it is imported.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise RewardError(f"reward function {spec!r}: write it as path.py:name or package.module:name")
    if not source.endswith(".py") and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the console script, unlike python -m, does not look here
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError as error:
        if error.filename and Path(error.filename) == Path(source):
            raise RewardError(f"reward function {spec!r}: there is no file {source}") from error
        raise RewardError(f"reward function {spec!r}: loading it raised {error!r}{_place(error, None)}") from error
    except ConfigError as error:  # it knows what it lacks, and says what to do
        raise ConfigError(f"reward function {spec!r}: {error}") from error
    except (Exception, SystemExit) as error:
        message = f"loading it raised {type(error).__name__}: {error}{_place(error, None)}"
        raise RewardError(f"reward function {spec!r}: {message}") from error
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"reward function {spec!r}: {source} has no {name!r}{did_you_mean(name, names)}")
    if not callable(function):
        raise RewardError(f"reward function {spec!r}: {name!r} is a {type(function).__name__}, not a function")
    return RewardFunction(function, spec, **how)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    name = f"jaxrlhf_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # so that it can import its neighbours, as a script can
    spec.loader.exec_module(module)
    return module


def _place(error: BaseException, function: Callable[..., Any] | None) -> str:
    """` at file.py:12`: the last line of the person's own file in the traceback, failing that the last line."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if "importlib" not in f.filename]
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    own = [f for f in frames if code is not None and f.filename == code.co_filename]
    last = (own or frames or [None])[-1]
    return f" at {last.filename}:{last.lineno}" if last else ""
