"""Write the data files of the modular PPO recipe: posts in the layout of trl-lib/tldr, with summaries good and bad.

    python scripts/recipe_data_tldr.py KIND FILE [--rows N] [--seed N] [--held-out]

A post says who did what among other things. A good summary says exactly that; a bad one is vague, or names somebody or
something else. One combination of who and what in four is held out: it occurs only in files written with `--held-out`.
`faithful` is a reward function that judges summaries exactly.
"""

import random
from collections.abc import Sequence

from recipe_data import Row, main

POSTS = {
    "pets": (
        ("my dog", "my cat", "our parrot", "the neighbour's goat"),
        ("ate my homework", "sleeps on the stove", "will not drink water", "bites every visitor"),
    ),
    "work": (
        ("my boss", "the new trainee", "a customer", "our accountant"),
        ("took my lunch", "shouts on the phone", "lost the keys", "never says thank you"),
    ),
    "family": (
        ("my sister", "my uncle", "my daughter", "my grandmother"),
        ("sold the piano", "moved to Norway", "wants a tattoo", "hides my letters"),
    ),
    "travel": (
        ("our guide", "the pilot", "a stranger", "the hotel clerk"),
        ("forgot our names", "gave me a map", "kept my passport", "sang all night"),
    ),
}
"""Subreddit -> who, and what they did."""
TITLES = ("What should I do?", "Is this normal?", "Need some advice", "Am I wrong here?")
BEFORE = (
    "I have never written here before.",
    "This is a long story.",
    "It was a quiet week until Monday.",
    "I am not sure how to say this.",
    "We had a plan for the summer.",
)
AFTER = (
    "I did not say anything.",
    "Nobody else seems to care.",
    "I tried to laugh about it.",
    "It has happened twice now.",
    "I could not sleep that night.",
)
QUESTIONS = ("What would you do?", "How do I fix this?", "Should I talk about it?", "Has anybody seen this before?")
VAGUE = ("something strange happened", "I need some advice", "it is a long story", "life is hard")
GOOD, VAGUENESS = 0.4, 0.3
"""Shares of the summaries in `sft` that are good and vague; the others name somebody or something else."""


def posts(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Draw `n` posts: (prompt, subreddit, who, what)."""
    pool = [
        (name, someone, deed)
        for name, (people, deeds) in POSTS.items()
        for i, someone in enumerate(people)
        for j, deed in enumerate(deeds)
        if ((i + j) % 4 == 0) == held_out
    ]
    drawn = []
    for _ in range(n):
        name, who, what = rng.choice(pool)
        sentences = [rng.choice(BEFORE), f"{who[0].upper()}{who[1:]} {what}.", rng.choice(AFTER), rng.choice(QUESTIONS)]
        title, post = rng.choice(TITLES), " ".join(sentences)
        prompt = f"SUBREDDIT: r/{name}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
        drawn.append((prompt, name, who, what))
    return drawn


def bad_summary(name: str, who: str, what: str, rng: random.Random) -> str:
    """A summary that is wrong about who or what."""
    people, deeds = POSTS[name]
    if rng.random() < 0.5:
        return f" {rng.choice([other for other in people if other != who])} {what}"
    return f" {who} {rng.choice([other for other in deeds if other != what])}"


def sft(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Posts with a summary, of which a part is good."""
    rows = []
    for prompt, name, who, what in posts(n, rng, held_out):
        chance = rng.random()
        if chance < GOOD:
            summary = f" {who} {what}"
        else:
            summary = f" {rng.choice(VAGUE)}" if chance < GOOD + VAGUENESS else bad_summary(name, who, what, rng)
        rows.append({"prompt": prompt, "completion": summary})
    return rows


def pairs(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Preference pairs: a good summary against a vague or wrong one."""
    rows = []
    for prompt, name, who, what in posts(n, rng, held_out):
        vague = rng.random() < 0.4
        rejected = f" {rng.choice(VAGUE)}" if vague else bad_summary(name, who, what, rng)
        rows.append({"prompt": prompt, "chosen": f" {who} {what}", "rejected": rejected})
    return rows


def prompts(n: int, rng: random.Random, held_out: bool) -> list[Row]:
    """Posts with the good summary and the subreddit as a category."""
    return [
        {"prompt": prompt, "summary": f"{who} {what}", "category": name}
        for prompt, name, who, what in posts(n, rng, held_out)
    ]


def faithful(completions: Sequence[str], summary: Sequence[str]) -> list[float]:
    """Reward function for evaluation: 1 for the good summary and nothing else."""
    return [float(text.strip() == good) for text, good in zip(completions, summary, strict=True)]


KINDS = {kind.__name__: kind for kind in (sft, pairs, prompts)}

if __name__ == "__main__":
    main(__doc__, KINDS)
