"""Generators of problems with verifiable answers, as rows of a data file: countdown and modular arithmetic.

The rewards are `jaxrlhf.rewards.countdown:countdown` and `jaxrlhf.rewards.match:numeric_match`.
"""

import operator
import random
from typing import Any


def countdown_problems(count: int, *, seed: int, numbers: int = 4, largest: int = 20) -> list[dict[str, Any]]:
    """Generate rows with `prompt`, `nums`, `target` and `solution`, an expression of `nums` that equals `target`.

    `numbers` numbers from 1 to `largest` are drawn and combined two at a time by + - * or / until one is left, with no
    negative result and no remainder, so a solution that uses all of them exists. With the same seed, the first rows do
    not depend on `count`. Raises ValueError.
    """
    if numbers < 2 or largest < 1:
        raise ValueError(f"numbers is {numbers} and largest {largest}; at least 2 and 1 are needed")
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        nums = [draw.randint(1, largest) for _ in range(numbers)]
        terms = [(n, str(n)) for n in nums]  # value, expression
        while len(terms) > 1:
            (a, left), (b, right) = sorted((terms.pop(draw.randrange(len(terms))) for _ in range(2)), reverse=True)
            signs = {"+": operator.add, "-": operator.sub, "*": operator.mul}
            if b and a % b == 0:
                signs["/"] = operator.floordiv
            sign = draw.choice([*signs])
            terms.append((signs[sign](a, b), f"({left} {sign} {right})"))
        [(target, solution)] = terms
        shown = ", ".join(map(str, nums))
        prompt = f"Make {target} from the numbers {shown} with + - * / and brackets, each used at most once.\nAnswer: "
        rows.append({"prompt": prompt, "nums": nums, "target": target, "solution": solution[1:-1]})
    return rows


def modular_problems(count: int, *, seed: int, modulus: int = 97) -> list[dict[str, str]]:
    """Generate rows with `prompt`, "(12 * 90) mod 97 = ", and `answer`, for + - and * of numbers below `modulus`.

    With the same seed, the first rows do not depend on `count`. Raises ValueError.
    """
    if modulus < 2:
        raise ValueError(f"modulus is {modulus}; at least 2 is needed")
    draw = random.Random(seed)
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    rows = []
    for _ in range(count):
        a, b, sign = draw.randrange(modulus), draw.randrange(modulus), draw.choice([*operations])
        answer = operations[sign](a, b) % modulus
        rows.append({"prompt": f"({a} {sign} {b}) mod {modulus} = ", "answer": str(answer)})
    return rows
