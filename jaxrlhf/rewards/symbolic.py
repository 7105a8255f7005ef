"""Mathematical equality by math-verify: `jaxrlhf.rewards.symbolic:math_verify`. Needs the extra `math`.

Name it in a config, so that it runs in its own process: sympy may never finish on a short expression, and math-verify's
own time limit, an alarm signal, works in a main thread only.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.match import answer_in, score_rows

try:
    _library: Any = importlib.import_module("math_verify")
except ModuleNotFoundError as error:
    raise ConfigError('math_verify needs math-verify, which is not installed: pip install "jaxrlhf[math]"') from error


def math_verify(completions: Sequence[str], *, column: str = "answer", **columns: Sequence[Any]) -> list[float | None]:
    """1 if the completion's answer is mathematically equal to that in `column`, such as 1/2 and 0.5 or x(x+1) and
    x^2+x, else 0; None if math-verify finds no answer in the column.

    The column's answer is its last `\\boxed{...}`, or else the text after its last `####`, or else all of it. The
    completion's answer is what math-verify extracts: the last box, several boxes close together as one set, or else the
    last expression (https://github.com/huggingface/Math-Verify). Comparisons over 5 seconds score 0; one that cannot be
    interrupted ends by the component's `timeout`.
    """

    def correct(completion: str, expected: Any) -> bool | None:
        target = [] if expected is None else _library.parse(rf"\boxed{{{answer_in(str(expected))}}}")
        return _library.verify(target, _library.parse(completion)) if target else None

    return score_rows(completions, column, columns, correct)
