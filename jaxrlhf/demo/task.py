"""StrictBot in miniature: a task whose truth is known, so that learning can be proved and not only claimed.

People ask short questions of four categories; each category has one strictness level that suits it (`RIGHT_LEVEL`).
An answer is three sentences: an opening and a closing in the tone of one level, and between them a statement from a
closed table of facts. `judge` reads an answer by that table. No model is involved, and the reward model of the demo
never sees the judge: it learns from pairs.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

FACTUAL_ERROR, MISCONCEPTION, POOR_LOGIC, GOOD_QUESTION = (
    "factual error",
    "misconception",
    "poor logic",
    "good question",
)
RIGHT_LEVEL = {FACTUAL_ERROR: 3, MISCONCEPTION: 1, POOR_LOGIC: 2, GOOD_QUESTION: 1}
"""The hidden rule: strict with careless slips, firm with bad arguments, gentle with honest mistakes and curiosity."""
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


_SAID = (".", ", right?", ". Is that so?", ". Do you agree?")
_ASKED = ("?", "? I am curious.", "? I am not sure.", "? Please help me.")
_TOLD = (".", ". I am curious.", ". Can you help?", ". Do you know?")
_CLAIM_FRAMES = [
    *_frames(("I read that", "I am sure that", "My friend says that", "I think that"), _SAID),
    *_frames(("They say that", "We learned that", "Someone told me that", "I know that"), _SAID),
    *_frames(("Is it true that", "Am I right that", "Can it be that", "Do you agree that"), _ASKED),
]
_QUESTION_FRAMES = [
    *_frames(("Can you tell me", "Do you know", "Could you explain", "Can you explain"), _ASKED),
    *_frames(("Can you show me", "Do you understand"), _ASKED),
    *_frames(("I wonder", "I want to know", "We want to learn"), _TOLD),
    *_frames(("My friend asks", "Please tell me", "I ask myself"), _TOLD),
]
_HELD_OUT_SHARE = 4  # one phrasing of so many is kept from training


@dataclass(frozen=True)
class Fact:
    """What people say about it (`claim`, or what they ask), and the true statement: `subject` and `predicate`.

    Facts of one `group` can exchange predicates and still read as English; that is how a wrong statement is made.
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


def _capital(country: str, wrong: str, right: str) -> Fact:
    subject = f"the capital of {country} is"
    return Fact(FACTUAL_ERROR, "capital", f"{subject} {wrong}", _sentence(subject), right)


def _number(thing: str, unit: str, wrong: str, right: str) -> Fact:
    subject = f"{thing} has"
    return Fact(FACTUAL_ERROR, unit, f"{subject} {wrong} {unit}", _sentence(subject), f"{right} {unit}")


def _belief(thing: str, wrong: str, right: str) -> Fact:
    return Fact(MISCONCEPTION, "belief", f"{thing} {wrong}", _sentence(thing), right)


def _argument(things: str, trait: str, others: str) -> Fact:
    claim = f"{things} {trait}, so all that {trait} are {things}"
    return Fact(POOR_LOGIC, "argument", claim, _sentence(others), f"{trait} too")


def _reason(question: str, subject: str, predicate: str) -> Fact:
    return Fact(GOOD_QUESTION, "reason", question, subject, predicate)


FACTS = (
    _capital("Australia", "Sydney", "Canberra"),
    _capital("Turkey", "Istanbul", "Ankara"),
    _number("a spider", "legs", "six", "eight"),
    _number("an ant", "legs", "eight", "six"),
    _belief("bats", "are blind", "can see well"),
    _belief("goldfish", "forget everything", "remember for months"),
    _belief("glass", "flows slowly", "stays solid"),
    _belief("ostriches", "bury their heads", "run from danger"),
    _argument("birds", "lay eggs", "turtles"),
    _argument("cows", "eat grass", "horses"),
    _argument("trains", "run on rails", "trams"),
    _argument("doctors", "wear white", "cooks"),
    _reason("why the sky is blue", "Air", "scatters blue light"),
    _reason("why the sea is salty", "Rivers", "carry salt to it"),
    _reason("why iron rusts", "Iron", "reacts with oxygen"),
    _reason("why ice floats", "Ice", "is lighter than water"),
)

REJECTED = {"tone": 0.2, "fact": 0.4, "form": 0.4}
"""What is wrong with the rejected answers of the preference pairs, and how often."""


@dataclass(frozen=True)
class Verdict:
    """What an answer is. `level` is None where the tone is missing or mixed; `well_formed`: tone, statement, tone."""

    level: int | None
    right_level: bool
    fact_right: bool
    well_formed: bool


def make_sft_rows(n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows {"prompt", "completion"}: facts always right, the tone right half of the time."""
    rng = random.Random(f"sft {seed}")
    rows = []
    for prompt, fact in _draw(n, rng, held_out=False):
        right = RIGHT_LEVEL[fact.category]
        level = right if rng.random() < 0.5 else rng.choice(_wrong_levels(right))
        rows.append({"prompt": prompt, "completion": answer(level, fact.truth, rng)})
    return rows


def make_preferences(n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows {"prompt", "chosen", "rejected"}. Chosen answers are right in tone, fact and form.

    A rejected answer is wrong in one of these (`REJECTED`): without wrong facts and broken sentences among them, a
    policy that follows the reward could forget its facts and its grammar at no cost.
    """
    rng = random.Random(f"preferences {seed}")
    rows = []
    for prompt, fact in _draw(n, rng, held_out=False):
        right = RIGHT_LEVEL[fact.category]
        wrong = rng.choices(list(REJECTED), list(REJECTED.values()))[0]
        level = rng.choice(_wrong_levels(right)) if wrong == "tone" else right
        rejected = answer(level, rng.choice(rng.choice(wrong_statements(fact))) if wrong == "fact" else fact.truth, rng)
        while wrong == "form" and truth([prompt], [rejected]) == [1.0]:
            rejected = garble(rejected, rng)
        rows.append({"prompt": prompt, "chosen": answer(right, fact.truth, rng), "rejected": rejected})
    return rows


def make_prompts(n: int, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """`n` rows {"prompt", "category"}, repeating when questions run out. `held_out` ones occur in no other rows."""
    rng = random.Random(f"prompts {seed} {held_out}")
    return [{"prompt": prompt, "category": fact.category} for prompt, fact in _draw(n, rng, held_out)]


def category(prompt: str) -> str:
    """The category of one of the task's questions; ValueError for any other text."""
    return _fact(prompt).category


def judge(prompt: str, completion: str) -> Verdict:
    """Reads an answer to one of the task's questions by the tables above; ValueError if the question is not one.

    Tone and fact are judged apart. The tone counts if the first sentence opens and the last closes at the same level;
    the fact is right if the true statement is there and nothing else but tone.
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
    """The judge as a reward function: 1 for an answer right in tone, fact and form, else 0. Not used in training."""
    verdicts = [judge(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return [float(v.right_level and v.fact_right and v.well_formed) for v in verdicts]


def answer(level: int, statement: str, rng: random.Random) -> str:
    """An answer at `level` around `statement`."""
    return f"{rng.choice(OPENINGS[level])} {statement} {rng.choice(CLOSINGS[level])}"


def garble(text: str, rng: random.Random) -> str:
    """An answer with a word or a sentence left out, said twice, or exchanged for one from elsewhere."""
    if rng.random() < 0.5:
        parts, elsewhere = text.split(" "), rng.choice(sentences()).split(" ")
    else:
        parts, elsewhere = _sentences(text), sentences()
    i = rng.randrange(len(parts))
    change = rng.choice([[], [parts[i]] * 2, [rng.choice(elsewhere)]])
    return " ".join([*parts[:i], *change, *parts[i + 1 :]])


def wrong_statements(fact: Fact) -> list[list[str]]:
    """Statements to be wrong with, by kind: the claim itself, another fact's predicate, a true one beside the point."""
    agreeing = [] if fact.category == GOOD_QUESTION else [f"{_sentence(fact.claim)}."]
    swapped = [f"{fact.subject} {other.predicate}." for other in FACTS if other.group == fact.group and other != fact]
    close = [other.truth for other in FACTS if other.category == fact.category and other != fact]
    far = [other.truth for other in FACTS if other.category != fact.category]
    return [kind for kind in (agreeing, swapped, close, far) if kind]


@cache
def questions() -> dict[str, tuple[Fact, bool]]:
    """Every question of the task -> (its fact, whether the question is held out). All facts occur on both sides."""
    table = {}
    for i, fact in enumerate(FACTS):
        frames = _QUESTION_FRAMES if fact.category == GOOD_QUESTION else _CLAIM_FRAMES
        for j, frame in enumerate(frames):  # four tails to a lead: the held-out tail moves on with fact and lead
            table[frame.format(fact.claim)] = (fact, (i + j + j // 4) % _HELD_OUT_SHARE == 0)
    return table


@cache
def sentences() -> list[str]:
    """Every sentence an answer can be made of, with right facts and wrong ones."""
    return sorted(_tones() | _statements())


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]?|[.!?]", text) if part.strip()]


def _fact(prompt: str) -> Fact:
    try:
        return questions()[prompt.strip()][0]
    except KeyError:
        raise ValueError(f"not a question of the demo's task: {prompt!r}") from None


def _draw(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, Fact]]:
    """`n` questions of one side: all of them in random order, then all again in another."""
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
