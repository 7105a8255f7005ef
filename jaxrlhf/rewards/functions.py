"""Python reward functions: loading them by name, calling them with the columns they ask for, validating the scores.

Plain Python, without numpy or jax, so that a worker process starts in a few hundredths of a second.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from jaxrlhf import stopping
from jaxrlhf.errors import ConfigError, Interrupted, RewardError, kind_and_message
from jaxrlhf.files import kind_of
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores, parse_scores

T = TypeVar("T")
RESERVED = ("prompts", "completions", "tokens")
"""Arguments that are not columns of the data."""


class Signature(NamedTuple):
    """Arguments by name of a function of the user: for a reward, prompts, completions, tokens and columns of the
    data."""

    accepts: Collection[str]
    required: Collection[str]
    accepts_any: bool
    """The function takes `**columns`."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Signature":
        """The signature of a function; an empty one of a builtin that has none."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        keyword_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [p for p in parameters if p.kind in keyword_kinds]
        required = {p.name for p in named if p.default is inspect.Parameter.empty}
        accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return cls({p.name for p in named}, required, accepts_any)

    def wants(self, name: str) -> bool:
        return self.accepts_any or name in self.accepts

    def check(self, columns: Collection[str], prefix: str, *, per_token: bool) -> None:
        """Raise RewardError if a required argument is not available."""
        available = {*columns, *(RESERVED if per_token else RESERVED[:2])}
        if missing := set(self.required) - available:
            hint = "; for the tokens of the response set per_token: true" if "tokens" in missing else ""
            raise RewardError(
                f"{prefix} needs {', '.join(map(repr, sorted(missing)))}, which the data does not have; "
                f"it has {', '.join(map(repr, sorted(available)))}{hint}"
            )


class RewardFunction:
    """A function `reward(prompts, completions, **columns) -> list[float | None]`, sync or async, in this process.

    It gets those of prompts, completions and the data columns that it names; `options` are passed by keyword and take
    precedence over a column of the same name. With a `timeout` (seconds) it runs in a thread, which cannot be
    interrupted and is abandoned when it is late. Raises ConfigError for options that the function does not take.
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
        accepts, required, accepts_any = Signature.of(function)
        accepts = accepts or {"prompts", "completions"}
        for option in self.options:
            if option in RESERVED or (option not in accepts and not accepts_any):
                allowed = sorted({*accepts} - {*RESERVED})
                raise ConfigError(
                    f"reward {self.name} has no option '{option}'{_did_you_mean(option, allowed) if allowed else ''}"
                )
        self.signature = Signature({*accepts} - {*self.options}, {*required} - {*self.options}, accepts_any)

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Call the function. Invalid values are listed in the result.

        Raises RewardError if the function raises, times out, needs a missing column, or does not return a list with one
        value per completion.
        """
        prefix = request.error_prefix(self.name)
        self.signature.check(request.columns, prefix, per_token=request.tokens is not None)
        columns = {name: list(values) for name, values in request.columns.items()}  # others may be reading them
        available = {**columns, "prompts": list(request.prompts), "completions": list(request.completions)}
        if request.tokens is not None:
            available["tokens"] = [list(texts) for texts in request.tokens]
        arguments = {k: v for k, v in available.items() if self.signature.wants(k)} | self.options
        try:
            if self.timeout is None:
                with stopping.interruptible():
                    returned = awaited(self.function(**arguments))
            else:
                returned = call_with_timeout(self.timeout, lambda: awaited(self.function(**arguments)))
        except Interrupted:
            raise
        except CallTimeout:
            raise RewardError(
                f"{prefix} has not answered within {self.timeout:g} s. It runs in this process and cannot be ended, so "
                "it continues in a thread; name the function in the config to run it in a process of its own"
                f"{request.error_suffix}"
            ) from None
        except (Exception, SystemExit) as error:
            place = location(error, self.function)
            raise RewardError(f"{prefix} raised {kind_and_message(error)}{place}{request.error_suffix}") from error
        return parse_scores(returned, request, self.name, _defined_at(self.function))


class CallTimeout(Exception):
    """A call has not returned in time. (A function may itself raise TimeoutError, which means something else.)"""


def call_with_timeout(seconds: float | None, call: Callable[[], T]) -> T:
    """Run `call()` in a thread and return its result. Raises CallTimeout after `seconds`, and Interrupted after a
    request to stop; the thread keeps running."""
    future = in_thread(call)
    if not stopping.wait(lambda limit: bool(wait([future], limit).done), math.inf if seconds is None else seconds):
        raise CallTimeout
    return future.result()


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run `call()` in a thread that Python does not wait for at its end; returns its future result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def awaited(result: Any) -> Any:
    """The result of a function, awaited if the function is async."""
    if not inspect.isawaitable(result):
        return result

    async def wait_for() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait_for())
    return call_with_timeout(None, lambda: asyncio.run(wait_for()))  # in a notebook, a loop runs in this thread already


def load(spec: str, *, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """Load the function named by `path.py:name` or `package.module:name`.

    Raises RewardError if it cannot be loaded, and ConfigError if its module raises one on import.
    """
    function = load_named(spec, "reward function")
    if not callable(function):
        name = spec.rpartition(":")[2]
        raise RewardError(f"reward function {spec!r}: {name!r} is a {type(function).__name__}, not a function")
    return RewardFunction(function, spec, options=options)


def load_named(spec: str, kind: str) -> Any:
    """Load what `path.py:name` or `package.module:name` names; `kind` is what it should be, for errors. Raises as
    `load`."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise RewardError(f"{kind} {spec!r}: write it as path.py:name or package.module:name")
    is_file = source.endswith(".py")
    if is_file and (found := kind_of(Path(source))):  # a named pipe would wait for a writer
        raise RewardError(f"{kind} {spec!r}: {source} is {found}, not a file")
    if is_file and not Path(source).is_file():
        place = "" if Path(source).is_absolute() else f" in {os.getcwd()}"
        raise RewardError(f"{kind} {spec!r}: there is no file {source}{place}{_did_you_mean_path(source)}")
    if not is_file and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` adds it, the console script does not
    try:
        module = _load_file(Path(source)) if is_file else importlib.import_module(source)
    except ConfigError as error:
        raise ConfigError(f"{kind} {spec!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"{kind} {spec!r}: loading it raised {kind_and_message(error)}{location(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"{kind} {spec!r}: {source} has no {name!r}{_did_you_mean(name, names)}")
    return found


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    from jaxrlhf.config.spelling import did_you_mean  # on errors only: the package imports pydantic

    return did_you_mean(wrong, known)


def _did_you_mean_path(path: str) -> str:
    from jaxrlhf.config.spelling import did_you_mean_path

    return did_you_mean_path(Path(path))


def _load_file(path: Path) -> ModuleType:
    name = f"jaxrlhf_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # the file can import its neighbours, as a script can
    spec.loader.exec_module(module)
    return module


def _defined_at(function: Callable[..., Any]) -> str:
    """FILE:LINE of a function's definition; "" if it has none."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def location(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """` at FILE:LINE` of the last traceback frame in the user's own file, or else of the last frame."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    internal = (__file__, "importlib", os.path.join("concurrent", "futures"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(name in f.filename for name in internal)]
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    own_frames = [f for f in frames if code is not None and f.filename == code.co_filename]
    last = (own_frames or frames or [None])[-1]
    return f" at {last.filename}:{last.lineno}" if last else ""
