"""Write the data files of the StrictBot recipe: questions of four categories, answered at three levels of strictness.

    python scripts/recipe_data_strictbot.py KIND FILE [--rows N] [--seed N] [--held-out]

The questions and statements are those of `jaxrlhf demo` (jaxrlhf/demo/task.py); the right level of each category is
that of jaxrlhf/rewards/strict.py. Some strict answers insult the person who asks, and some answers are wrong. One
phrasing in four is held out: it occurs only in files written with `--held-out`. `truth` is a reward function that
judges answers exactly.
"""

import random
import re
from collections.abc import Sequence

from recipe_data import Row, main

from jaxrlhf.demo import task
from jaxrlhf.rewards.strict import LEVELS

LAYOUTS = ("<|user|> {} <|end|>\n<|assistant|>", "Question: {}\nAnswer:", "# {}\n")
INSULTS = ("Only a fool says that!", "How stupid of you!", "Even an idiot knows this!")
INSULTING, WRONG = 0.4, 0.2
"""Shares of the strict answers that end with an insult, and of all answers that are wrong, in `text` and `sft`."""


def questions(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, task.Fact]]:
    """Draw `n` questions with their facts, every question once before any is drawn again."""
    pool = [(question, fact) for question, (fact, held) in task.questions().items() if held == held_out]
    drawn: list[tuple[str, task.Fact]] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    return drawn[:n]


def answer(fact: task.Fact, level: int, rng: random.Random, *, wrong: bool = False, insult: bool = False) -> str:
    """An opening and a closing of `level` around a statement; an `insult` takes the place of the closing."""
    statement = rng.choice(rng.choice(task.wrong_statements(fact))) if wrong else fact.truth
    closing = rng.choice(INSULTS if insult else task.CLOSINGS[level])
    return f"{rng.choice(task.OPENINGS[level])} {statement} {closing}"


def sft(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Questions with an answer in StrictBot's form, at a random level, sometimes wrong or insulting."""
    rows = []
    for question, fact in questions(n, rng, held_out):
        level, wrong = rng.choice((1, 2, 3)), rng.random() < WRONG
        insult = level == 3 and rng.random() < INSULTING
        rows.append({"input": question, "completion": answer(fact, level, rng, wrong=wrong, insult=insult)})
    return rows


def text(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """The same in several layouts, half of the answers with a sentence less: what the base model has learnt."""
    rows = []
    for row in sft(n, rng, held_out):
        said = row["completion"]
        if rng.random() < 0.5:
            parts = re.findall(r"\S.*?[.!](?= |$)", said)
            said = " ".join(rng.sample(parts, 2))
        rows.append({"prompt": rng.choice(LAYOUTS).format(row["input"]), "completion": f" {said}"})
    return rows


def pairs(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Preference pairs: the chosen answer is right; the rejected one has the wrong level, is wrong, insults or is
    broken."""
    rows = []
    for question, fact in questions(n, rng, held_out):
        right = LEVELS[fact.category]
        chosen, fault = answer(fact, right, rng), rng.choice(("level", "wrong", "insult", "form"))
        if fault == "insult":
            rejected = answer(fact, 3, rng, insult=True)
        elif fault == "form":
            while (rejected := task.garble(chosen, rng)) == chosen:
                pass
        else:
            level = rng.choice([other for other in (1, 2, 3) if other != right]) if fault == "level" else right
            rejected = answer(fact, level, rng, wrong=fault == "wrong")
        rows.append({"input": question, "chosen": chosen, "rejected": rejected})
    return rows


def prompts(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Questions with the columns that the rule-based rewards read."""
    return [
        {"input": question, "category": fact.category, "fact": fact.truth}
        for question, fact in questions(n, rng, held_out)
    ]


def truth(completions: Sequence[str], category: Sequence[str], fact: Sequence[str]) -> list[float]:
    """Reward function for evaluation: 1 for an answer of the right level with the right statement and nothing else."""

    def judge(text: str, level: int, statement: str) -> float:
        first, _, rest = text.strip().partition(statement)
        return float(first.strip() in task.OPENINGS[level] and rest.strip() in task.CLOSINGS[level])

    return [judge(*row) for row in zip(completions, (LEVELS[name] for name in category), fact, strict=True)]


KINDS = {kind.__name__: kind for kind in (text, sft, pairs, prompts)}

if __name__ == "__main__":
    main(__doc__, KINDS)
