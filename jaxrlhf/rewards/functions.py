"""Reward functions that people write: loaded by name, called with the columns they ask for, and checked."""

import importlib
import importlib.util
import inspect
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxrlhf.errors import RewardError, quoted
from jaxrlhf.spelling import did_you_mean


class RewardFunction:
    """A function `reward(prompts, completions, **columns) -> list[float | None]` and how to call it.

    It may name as many or as few of prompts, completions and the columns of the data as it needs.
    """

    def __init__(self, function: Callable[..., Any], name: str = "") -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            parameters = []
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._accepts = {p.name for p in parameters if p.kind in named} or {"prompts", "completions"}
        self._needs = {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}
        self._accepts_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @property
    def label(self) -> str:
        """The name as it stands in logs: without path and module."""
        label = self.name.rpartition(":")[2]
        return label if label.isidentifier() else "function"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], unanswered bool [B]); None, "no opinion", scores 0. `columns` hold one value per completion.

        Raises RewardError if the function raises, needs a column that is not there, or returns anything but B finite
        numbers or Nones.
        """
        where = f"reward {self.name}" + (f" (step {step})" if step is not None else "")
        given = {**columns, "prompts": list(prompts), "completions": list(completions)}
        if missing := self._needs - given.keys():
            raise RewardError(
                f"{where} needs {', '.join(map(repr, sorted(missing)))}, which the data does not have; "
                f"it has {', '.join(map(repr, sorted(given)))}"
            )
        wanted = given if self._accepts_all else {k: v for k, v in given.items() if k in self._accepts}
        try:
            answer = self.function(**wanted)
        except (Exception, SystemExit) as error:
            place = _place(error, self.function)
            raise RewardError(f"{where} raised {type(error).__name__}: {error}{place}") from error
        return _check(answer, completions, where)


def load(spec: str) -> RewardFunction:
    """The function that `path.py:name` or `package.module:name` names. Raises RewardError if there is none."""
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
    except (Exception, SystemExit) as error:
        message = f"loading it raised {type(error).__name__}: {error}{_place(error, None)}"
        raise RewardError(f"reward function {spec!r}: {message}") from error
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"reward function {spec!r}: {source} has no {name!r}{did_you_mean(name, names)}")
    if not callable(function):
        raise RewardError(f"reward function {spec!r}: {name!r} is a {type(function).__name__}, not a function")
    return RewardFunction(function, spec)


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


def _check(answer: Any, completions: Sequence[str], where: str) -> tuple[np.ndarray, np.ndarray]:
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, list | tuple):
        raise RewardError(f"{where} returned a {type(answer).__name__}; expected a list of {len(completions)} numbers")
    if len(values) != len(completions):
        first = f"; first completion: {quoted(completions[0])}" if completions else ""
        raise RewardError(f"{where} returned {len(values)} values for {len(completions)} completions{first}")
    scores, unanswered = np.zeros(len(values), np.float32), np.zeros(len(values), bool)
    for i, value in enumerate(values):
        if value is None:
            unanswered[i] = True
            continue
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        if not isinstance(number, numbers.Real):
            shown = f"{number!r} ({type(value).__name__}), not a number"
            raise RewardError(f"{where} returned {shown}, for completion {i}: {quoted(completions[i])}")
        with np.errstate(over="ignore"):
            try:
                scores[i] = np.float32(float(number))
            except OverflowError:  # an int may not even fit a float64
                scores[i] = np.inf
        if not np.isfinite(scores[i]):
            raise RewardError(
                f"{where} returned {number}, not a finite float32, for completion {i}: {quoted(completions[i])}"
            )
    return scores, unanswered
