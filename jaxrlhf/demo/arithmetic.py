"""Problems with verifiable answers, as rows of a data file: countdown and modular arithmetic.

For `jaxrlhf.rewards.countdown:countdown` and `jaxrlhf.rewards.match:numeric_match`.
"""

import operator
import random
from typing import Any


def countdown_problems(count: int, *, seed: int, numbers: int = 4, largest: int = 20) -> list[dict[str, Any]]:
    """Rows with `prompt`, `nums`, `target` and `solution`, an expression of `nums` that comes to `target`.

    `numbers` numbers from 1 to `largest` are drawn and joined two at a time, by + - * or /, until one is left, with
    nothing below zero and no remainders on the way: so there is a solution, which uses all of them. A seed's problems
    do not depend on how many are asked for.
    """
    if numbers < 2 or largest < 1:
        raise ValueError(f"numbers is {numbers} and largest {largest}; at least 2 and 1 are needed")
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        nums = [draw.randint(1, largest) for _ in range(numbers)]
        parts = [(n, str(n)) for n in nums]
        while len(parts) > 1:
            (a, left), (b, right) = sorted((parts.pop(draw.randrange(len(parts))) for _ in range(2)), reverse=True)
            signs = {"+": operator.add, "-": operator.sub, "*": operator.mul}
            if b and a % b == 0:
                signs["/"] = operator.floordiv
            sign = draw.choice([*signs])
            parts.append((signs[sign](a, b), f"({left} {sign} {right})"))
        (target, solution), *_ = parts
        shown = ", ".join(map(str, nums))
        prompt = f"Make {target} from the numbers {shown} with + - * / and brackets, each used at most once.\nAnswer: "
        rows.append({"prompt": prompt, "nums": nums, "target": target, "solution": solution[1:-1]})
    return rows


def modular_problems(count: int, *, seed: int, modulus: int = 97) -> list[dict[str, str]]:
    """Rows with `prompt`, "(12 * 90) mod 97 = ", and `answer`; the operation is +, - or *, its numbers below `modulus`.

    A seed's problems do not depend on how many are asked for.
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
