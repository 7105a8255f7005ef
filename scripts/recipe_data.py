"""Write the data files of the recipes: questions for advice, with good and bad answers, in the layouts of public sets.

    python scripts/recipe_data.py KIND FILE [--rows N] [--seed N] [--held-out]

The answer to a question is good if it is polite and gives the tip that belongs to the question; a bad one is curt,
rude, or gives another tip. One question in four is held out: it occurs only in files written with `--held-out`.
The same arguments write the same file. `polite`, `right_tip` and `helpful` are reward functions that judge an answer
exactly.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TOPICS = {
    "keep bread fresh": "Wrap it in a cloth and keep it in a box.",
    "cook soft rice": "Wash it twice and leave the lid on the pot.",
    "clean a dirty window": "Use warm water and dry it with old paper.",
    "warm a cold room": "Close the curtains and shut every door at night.",
    "boil an egg": "Put it into hot water for seven minutes.",
    "store red apples": "Keep them in a cool cellar and away from pears.",
    "grow tomatoes": "Give them full sun and water the roots each morning.",
    "keep snails off the salad": "Put a ring of dry sand around the bed.",
    "plant a small tree": "Dig a wide hole and mix the earth with compost.",
    "feed birds in winter": "Hang seeds and fat in a quiet corner.",
    "save water in the garden": "Collect the rain in a barrel under the roof.",
    "cut a rose bush": "Wait for early spring and cut above a bud.",
    "sleep well": "Go to bed at the same hour and read a little.",
    "stop a nose bleed": "Lean forward and press the nose for ten minutes.",
    "rest my eyes": "Look at something far away for a short while.",
    "start to run": "Walk and run in turns and take a day off.",
    "treat a small burn": "Hold it under cool water for a quarter of an hour.",
    "sit without back pain": "Put both feet on the floor and stand up often.",
    "learn new words": "Write them on cards and test yourself every day.",
    "remember a speech": "Say it aloud and walk from one part to the next.",
    "write a clear letter": "Begin with what you want and use short lines.",
    "read a hard book": "Take ten pages a day and note one question.",
    "prepare for an exam": "Solve old tasks and explain each step to a friend.",
    "learn the guitar": "Play slowly with a beat and change one chord at a time.",
}
"""Subject of a question -> the tip of a good answer. Six each about the home, the garden, health and study."""
SUBJECTS = ("home", "garden", "health", "study")
QUESTIONS = (
    "How do I {}?",
    "How can I {}?",
    "What is the best way to {}?",
    "Can you tell me how to {}?",
    "Please explain how to {}.",
    "I want to {}. What should I do?",
    "I have never tried to {}. Any advice?",
    "Is there an easy way to {}?",
    "Do you know how to {}?",
    "Tell me how to {}, please.",
    "What do I need to {}?",
    "I would like to {}. Can you help?",
)
POLITE = ("Good question.", "Happy to help.", "Thank you for asking.", "I can help with that.")
RUDE = ("Not again.", "That is obvious.", "Everyone knows this.", "Stop asking me.")
CURT = ("I do not know.", "Look it up yourself.", "Who cares?", "No idea.", "That is not my problem.", "Just try it.")
CLOSINGS = ("I hope that helps.", "Good luck with it.", "Let me know how it goes.", "Enjoy it.")
SYSTEM = ("You are a helpful assistant.", "Answer in two or three short sentences.", "")
SCORES = {"good": (8, 10), "wrong": (4, 6), "rude": (2, 4), "curt": (1, 2)}
"""Kind of answer -> range of its score in the layout of UltraFeedback."""
FIVE_PAIRS = [
    {
        "prompt": "How do I keep bread fresh?",
        "accepted": "Happy to help. Wrap it in a cloth and keep it in a box.",
        "rejected": "Who cares?",
    },
    {
        "prompt": "Can you tell me how to sleep well?",
        "accepted": "Good question. Go to bed at the same hour and read a little.",
        "rejected": "That is not my problem.",
    },
    {
        "prompt": "Is there an easy way to grow tomatoes?",
        "accepted": "Thank you for asking. Give them full sun and water the roots each morning.",
        "rejected": "Look it up yourself.",
    },
    {
        "prompt": "I want to learn new words. What should I do?",
        "accepted": "I can help with that. Write them on cards and test yourself every day.",
        "rejected": "Everyone knows this. Just try it.",
    },
    {
        "prompt": "What is the best way to boil an egg?",
        "accepted": "Good question. Put it into hot water for seven minutes.",
        "rejected": "Stop asking me. No idea.",
    },
]
"""The smallest preference set: enough to see every part of a reward model's training."""


def questions(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, str]]:
    """Draw `n` pairs (question, topic), every question once before any is drawn again."""
    pool = [
        (frame.format(topic), topic)
        for i, topic in enumerate(TOPICS)
        for j, frame in enumerate(QUESTIONS)
        if ((i + j) % 4 == 0) == held_out
    ]
    drawn: list[tuple[str, str]] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    return drawn[:n]


def answer(topic: str, kind: str, rng: random.Random) -> str:
    """An answer of one of the kinds of `SCORES`."""
    if kind == "curt":
        return rng.choice(CURT)
    others = [tip for other, tip in TOPICS.items() if other != topic]
    tip = rng.choice(others) if kind == "wrong" else TOPICS[topic]
    return f"{rng.choice(RUDE if kind == 'rude' else POLITE)} {tip}"


def subject(topic: str) -> str:
    return SUBJECTS[list(TOPICS).index(topic) * len(SUBJECTS) // len(TOPICS)]


def polite(completions: Sequence[str]) -> list[float]:
    """Reward function for evaluation: 1 for an answer that begins politely and is neither rude nor curt, else 0."""
    rude = (*RUDE, *CURT)
    return [float(text.strip().startswith(POLITE) and not any(part in text for part in rude)) for text in completions]


def right_tip(completions: Sequence[str], tip: Sequence[str]) -> list[float]:
    """Reward function for evaluation: 1 for an answer that gives the tip that belongs to its question, else 0."""
    return [float(right in text) for text, right in zip(completions, tip, strict=True)]


def helpful(completions: Sequence[str], tip: Sequence[str]) -> list[float]:
    """Reward function for evaluation: 1 for an answer that is polite and gives the right tip, else 0."""
    return [a * b for a, b in zip(polite(completions), right_tip(completions, tip), strict=True)]


def five_pairs(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    return FIVE_PAIRS[:n]


def examples(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """A good and a bad answer to each question, for `jaxrlhf evaluate --examples`."""
    return [
        {"name": topic, "prompt": prompt, "good": answer(topic, "good", rng), "bad": answer(topic, "curt", rng)}
        for prompt, topic in questions(n, rng, held_out)
    ]


def prompts(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Plain-text prompts with a reference answer, and the columns that `right_tip` and `--by` need."""
    return [
        {"prompt": prompt, "answer": answer(topic, "good", rng), "tip": TOPICS[topic], "category": subject(topic)}
        for prompt, topic in questions(n, rng, held_out)
    ]


def text(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Questions with answers of which half are good, to train a language model on."""
    return [
        {"prompt": prompt, "completion": f" {answer(topic, _mixed(rng), rng)}"}
        for prompt, topic in questions(n, rng, held_out)
    ]


def every_tone(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """The same, with answers of all four kinds equally often: a model trained on them answers in any tone."""
    return [
        {"prompt": prompt, "completion": f" {answer(topic, rng.choice([*SCORES]), rng)}"}
        for prompt, topic in questions(n, rng, held_out)
    ]


def chats(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Conversations, half of them with good answers; half of the answers have a closing."""
    rows = []
    for prompt, topic in questions(n, rng, held_out):
        content, system = _closed(answer(topic, _mixed(rng), rng), rng), rng.choice(SYSTEM)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": content}]
        rows.append({"messages": [{"role": "system", "content": system}, *turns] if system else turns})
    return rows


def pairs(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Plain-text preference pairs, with the columns that `helpful` and `--by` need."""
    rows = []
    for prompt, topic in questions(n, rng, held_out):
        chosen, rejected = answer(topic, "good", rng), answer(topic, rng.choice(["wrong", "rude", "curt"]), rng)
        row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        rows.append(row | {"tip": TOPICS[topic], "category": subject(topic)})
    return rows


def ultrafeedback(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Pairs in the layout of trl-lib/ultrafeedback_binarized: conversations with scores."""
    rows = []
    for prompt, topic in questions(n, rng, held_out):
        row: Row = {}
        for side, kind in (("chosen", "good"), ("rejected", rng.choice(["wrong", "rude", "curt"]))):
            said = {"role": "assistant", "content": answer(topic, kind, rng)}
            row |= {
                side: [{"role": "user", "content": prompt}, said],
                f"score_{side}": float(rng.randint(*SCORES[kind])),
            }
        rows.append(row)
    return rows


def orca(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Pairs in the layout of Intel/orca_dpo_pairs, with the columns that `helpful` and `--by` need."""
    rows = []
    for prompt, topic in questions(n, rng, held_out):
        rejected = answer(topic, rng.choice(["wrong", "rude", "curt"]), rng)
        chosen, rejected = (_closed(text, rng) for text in (answer(topic, "good", rng), rejected))
        row = {"system": rng.choice(SYSTEM), "question": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(row | {"tip": TOPICS[topic], "category": subject(topic)})
    return rows


def _closed(text: str, rng: random.Random) -> str:
    """`text` with a closing, or as it is."""
    return rng.choice([text, f"{text} {rng.choice(CLOSINGS)}"])


def _mixed(rng: random.Random) -> str:
    return rng.choice(["good", "good", "good", "wrong", "rude", "curt"])


Kinds = Mapping[str, Callable[[int, random.Random, bool], list[Row]]]
KINDS: Kinds = {
    kind.__name__: kind for kind in (five_pairs, examples, prompts, text, every_tone, chats, pairs, ultrafeedback, orca)
}


def write(kind: str, file: Path, rows: int, seed: int = 0, held_out: bool = False, kinds: Kinds = KINDS) -> None:
    """Write rows of a kind as JSON lines, or as one JSON list if the file's name ends in .json."""
    made = kinds[kind](rows, random.Random(f"{kind} {seed} {held_out}"), held_out)
    lines = [json.dumps(row, ensure_ascii=False) for row in made]
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = "[\n" + ",\n".join(lines) + "\n]\n" if file.suffix == ".json" else "\n".join([*lines, ""])
    file.write_text(whole, encoding="utf-8")


def main(description: str | None = __doc__, kinds: Kinds = KINDS) -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="questions that occur in no other file")
    options = parser.parse_args()
    write(options.kind, options.file, options.rows, options.seed, options.held_out, kinds)


if __name__ == "__main__":
    main()
