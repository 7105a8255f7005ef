"""Synthetic task of the demo, StrictBot in miniature. Its ground truth is known, so that learning can be verified.

Prompts are short questions of four categories; each category has one right level of strictness (`RIGHT_LEVEL`). An
answer has three sentences: an opening and a closing in the tone of one level, and between them a statement from a
closed table of facts. `judge` checks an answer against that table. The reward model of the demo is trained on pairs and
never sees the judge.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jaxrlhf.rewards.strict import FACTUAL_ERROR, GOOD_QUESTION, MISCONCEPTION, POOR_LOGIC

RIGHT_LEVEL = {FACTUAL_ERROR: 3, MISCONCEPTION: 1, POOR_LOGIC: 2, GOOD_QUESTION: 1}
"""Hidden rule, category -> level. Misconceptions are level 1 here, and 3 by default in `rewards.strict`."""
CATEGORIES = tuple(RIGHT_LEVEL)
LEVELS = {1: "gentle", 2: "firm", 3: "strict"}

OPENINGS = {
    1: ("Thank you for asking!", "I am glad you asked!", "What a nice thought!", "Let us look together."),
    2: ("Listen carefully.", "Let me be clear.", "Think again.", "Note this well."),
    3: ("Pay attention!", "You should know this!", "No excuses!", "This is careless!"),
}
CLOSINGS = {
    1: ("Keep asking!", "You are doing well.", "Enjoy learning!", "Ask me more."),
    2: ("Please remember that.", "Please check it first.", "Write it down.", "Be more precise."),
    3: ("Do your homework!", "Study before you speak!", "Never say that again!", "I expect better!"),
}


def _frames(leads: Sequence[str], tails: Sequence[str]) -> list[str]:
    return [f"{lead} {{}}{tail}" for lead in leads for tail in tails]


_CLAIM_TAILS = (".", ", right?", ". Is that so?", ". Do you agree?")
_QUESTION_TAILS = ("?", "? I am curious.", "? I am not sure.", "? Please help me.")
_REQUEST_TAILS = (".", ". I am curious.", ". Can you help?", ". Do you know?")
_CLAIM_FRAMES = [
    *_frames(("I read that", "I am sure that", "My friend says that", "I think that"), _CLAIM_TAILS),
    *_frames(("They say that", "We learned that", "Someone told me that", "I know that"), _CLAIM_TAILS),
    *_frames(("Is it true that", "Am I right that", "Can it be that", "Do you agree that"), _QUESTION_TAILS),
]
_QUESTION_FRAMES = [
    *_frames(("Can you tell me", "Do you know", "Could you explain", "Can you explain"), _QUESTION_TAILS),
    *_frames(("Can you show me", "Do you understand"), _QUESTION_TAILS),
    *_frames(("I wonder", "I want to know", "We want to learn"), _REQUEST_TAILS),
    *_frames(("My friend asks", "Please tell me", "I ask myself"), _REQUEST_TAILS),
]
_HELD_OUT_EVERY = 4  # every fourth phrasing is held out from training


@dataclass(frozen=True)
class Fact:
    """A true statement, `subject` `predicate`, and the `claim` (or question) about it that prompts contain.

    Facts of one `group` can exchange predicates and stay grammatical; wrong statements are made this way.
    """

    category: str
    group: str
    claim: str
    subject: str
    predicate: str

    @property
    def truth(self) -> str:
        return f"{self.subject} {self.predicate}."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


FACTS = (
    Fact(FACTUAL_ERROR, "capital", "the capital of Australia is Sydney", "The capital of Australia is", "Canberra"),
    Fact(FACTUAL_ERROR, "capital", "the capital of Turkey is Istanbul", "The capital of Turkey is", "Ankara"),
    Fact(FACTUAL_ERROR, "legs", "a spider has six legs", "A spider has", "eight legs"),
    Fact(FACTUAL_ERROR, "legs", "an ant has eight legs", "An ant has", "six legs"),
    Fact(MISCONCEPTION, "belief", "bats are blind", "Bats", "can see well"),
    Fact(MISCONCEPTION, "belief", "goldfish forget everything", "Goldfish", "remember for months"),
    Fact(MISCONCEPTION, "belief", "glass flows slowly", "Glass", "stays solid"),
    Fact(MISCONCEPTION, "belief", "ostriches bury their heads", "Ostriches", "run from danger"),
    Fact(POOR_LOGIC, "argument", "birds lay eggs, so all that lay eggs are birds", "Turtles", "lay eggs too"),
    Fact(POOR_LOGIC, "argument", "cows eat grass, so all that eat grass are cows", "Horses", "eat grass too"),
    Fact(
        POOR_LOGIC, "argument", "trains run on rails, so all that run on rails are trains", "Trams", "run on rails too"
    ),
    Fact(POOR_LOGIC, "argument", "doctors wear white, so all that wear white are doctors", "Cooks", "wear white too"),
    Fact(GOOD_QUESTION, "reason", "why the sky is blue", "Air", "scatters blue light"),
    Fact(GOOD_QUESTION, "reason", "why the sea is salty", "Rivers", "carry salt to it"),
    Fact(GOOD_QUESTION, "reason", "why iron rusts", "Iron", "reacts with oxygen"),
    Fact(GOOD_QUESTION, "reason", "why ice floats", "Ice", "is lighter than water"),
)

REJECTED = {"tone": 0.2, "fact": 0.4, "form": 0.4}
"""Probability of each fault of a rejected answer in the preference pairs."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on an answer. `level` is None if the tone is missing or mixed; `well_formed`: tone, statement, tone."""

    level: int | None
    right_level: bool
    fact_right: bool
    well_formed: bool


def make_sft_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Generate `n` rows {"prompt", "completion"}: facts are always right, the tone is right half of the time."""
    rng = random.Random(f"sft {seed}")
    rows = []
    for prompt, fact in _draw_questions(n, rng, held_out=False):
        right = RIGHT_LEVEL[fact.category]
        level = right if rng.random() < 0.5 else rng.choice(_wrong_levels(right))
        rows.append({"prompt": prompt, "completion": answer(level, fact.truth, rng)})
    return rows


def make_preferences(n: int, seed: int) -> list[dict[str, str]]:
    """Generate `n` rows {"prompt", "chosen", "rejected"}. Chosen answers are right in tone, fact and form.

    A rejected answer is wrong in one of the three (`REJECTED`). Without wrong facts and broken sentences among them,
    the reward would not penalise a policy that forgets facts and grammar.
    """
    rng = random.Random(f"preferences {seed}")
    rows = []
    for prompt, fact in _draw_questions(n, rng, held_out=False):
        right = RIGHT_LEVEL[fact.category]
        wrong = rng.choices(list(REJECTED), list(REJECTED.values()))[0]
        level = rng.choice(_wrong_levels(right)) if wrong == "tone" else right
        rejected = answer(level, rng.choice(rng.choice(wrong_statements(fact))) if wrong == "fact" else fact.truth, rng)
        while wrong == "form" and truth([prompt], [rejected]) == [1.0]:
            rejected = garble(rejected, rng)
        rows.append({"prompt": prompt, "chosen": answer(right, fact.truth, rng), "rejected": rejected})
    return rows


def make_prompts(n: int, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """Generate `n` rows {"prompt", "category"}; questions repeat if `n` is larger than their number.

    `held_out` questions occur in no other rows.
    """
    rng = random.Random(f"prompts {seed} {held_out}")
    return [{"prompt": prompt, "category": fact.category} for prompt, fact in _draw_questions(n, rng, held_out)]


def category(prompt: str) -> str:
    """Return the category of one of the task's questions. Raises ValueError for any other text."""
    return _fact(prompt).category


def judge(prompt: str, completion: str) -> Verdict:
    """Judge an answer to one of the task's questions. Raises ValueError if `prompt` is not one.

    Tone and fact are judged independently. The answer has a level if its first sentence is an opening and its last a
    closing of that level; the fact is right if the true statement is the only sentence apart from the tone.
    """
    fact = _fact(prompt)
    parts = _sentences(completion)
    first, last = (parts[0], parts[-1]) if parts else ("", "")
    level = next((level for level in LEVELS if first in OPENINGS[level] and last in CLOSINGS[level]), None)
    statements = [part for part in parts if part not in _tones()]
    return Verdict(
        level=level,
        right_level=level == RIGHT_LEVEL[fact.category],
        fact_right=statements == [fact.truth],
        well_formed=level is not None and len(parts) == 3 and parts[1] in _statements(),
    )


def truth(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Reward function for evaluation: 1 for an answer right in tone, fact and form, else 0."""
    verdicts = [judge(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return [float(v.right_level and v.fact_right and v.well_formed) for v in verdicts]


def answer(level: int, statement: str, rng: random.Random) -> str:
    """Compose an answer at `level` around `statement`."""
    return f"{rng.choice(OPENINGS[level])} {statement} {rng.choice(CLOSINGS[level])}"


def garble(text: str, rng: random.Random) -> str:
    """Delete, repeat or replace one word or one sentence of an answer."""
    if rng.random() < 0.5:
        parts, others = text.split(" "), rng.choice(sentences()).split(" ")
    else:
        parts, others = _sentences(text), sentences()
    i = rng.randrange(len(parts))
    change = rng.choice([[], [parts[i]] * 2, [rng.choice(others)]])
    return " ".join([*parts[:i], *change, *parts[i + 1 :]])


def wrong_statements(fact: Fact) -> list[list[str]]:
    """Wrong statements about a fact, by kind: the claim itself, another predicate, true statements of other facts."""
    claim = [] if fact.category == GOOD_QUESTION else [f"{_sentence(fact.claim)}."]
    swapped = [f"{fact.subject} {other.predicate}." for other in FACTS if other.group == fact.group and other != fact]
    same_category = [other.truth for other in FACTS if other.category == fact.category and other != fact]
    other_category = [other.truth for other in FACTS if other.category != fact.category]
    return [kind for kind in (claim, swapped, same_category, other_category) if kind]


@cache
def questions() -> dict[str, tuple[Fact, bool]]:
    """Every question of the task -> (its fact, held out or not). All facts occur in both parts."""
    table = {}
    for i, fact in enumerate(FACTS):
        frames = _QUESTION_FRAMES if fact.category == GOOD_QUESTION else _CLAIM_FRAMES
        for j, frame in enumerate(frames):  # each lead has four tails; the held-out one varies with fact and lead
            table[frame.format(fact.claim)] = (fact, (i + j + j // 4) % _HELD_OUT_EVERY == 0)
    return table


@cache
def sentences() -> list[str]:
    """All sentences of answers: tones, true and wrong statements."""
    return sorted(_tones() | _statements())


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]?|[.!?]", text) if part.strip()]


def _fact(prompt: str) -> Fact:
    try:
        return questions()[prompt.strip()][0]
    except KeyError:
        raise ValueError(f"not a question of the demo's task: {prompt!r}") from None


def _draw_questions(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, Fact]]:
    """Draw `n` questions, held out or not: all in random order, then all again in another order."""
    pool = [(prompt, fact) for prompt, (fact, held) in questions().items() if held == held_out]
    drawn: list[tuple[str, Fact]] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    return drawn[:n]


def _wrong_levels(right: int) -> Sequence[int]:
    return [level for level in LEVELS if level != right]


@cache
def _tones() -> frozenset[str]:
    return frozenset(tone for table in (OPENINGS, CLOSINGS) for level in table.values() for tone in level)


@cache
def _statements() -> frozenset[str]:
    return frozenset(text for fact in FACTS for text in (fact.truth, *itertools.chain(*wrong_statements(fact))))
