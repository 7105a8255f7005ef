"""Mathematical equality by math-verify: `jaxrlhf.rewards.symbolic:math_verify`. Needs the extra `math`.

Name it in a config, so that it runs in a process of its own: sympy can take for ever over a short line, and the limit
that math-verify has, an alarm, works in a main thread only.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.match import answer_in, column_of

try:
    _library: Any = importlib.import_module("math_verify")
except ModuleNotFoundError as error:
    raise ConfigError('math_verify needs math-verify, which is not installed: pip install "jaxrlhf[math]"') from error


def math_verify(completions: Sequence[str], *, column: str = "answer", **columns: Sequence[Any]) -> list[float | None]:
    """1 where the completion's answer equals that in `column` as mathematics, 1/2 and 0.5, x(x+1) and x^2+x, else 0;
    None where math-verify finds no answer in the column.

    Of the column is read its last `\\boxed{...}`, failing that what follows its last `####`, failing that all of it; of
    the completion what math-verify finds in it: the last box, boxes near each other as one set, failing them the last
    expression (https://github.com/huggingface/Math-Verify). What takes it more than 5 seconds counts as wrong; what
    cannot be interrupted is ended by the component's `timeout`.
    """
    scores: list[float | None] = []
    for text, expected in zip(completions, column_of(column, columns), strict=True):
        right = [] if expected is None else _library.parse(rf"\boxed{{{answer_in(str(expected))}}}")
        scores.append(float(_library.verify(right, _library.parse(text))) if right else None)
    return scores
