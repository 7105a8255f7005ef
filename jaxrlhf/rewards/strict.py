"""StrictBot's reward: answers as strict as the question deserves, right, constructive and of one tone.

    - function: jaxrlhf.rewards.strict:strictbot
      options: {factual: 0.5, constructive: 0.25, consistent: 0.25}

The category of a question comes from a column `category` if the data has one, else from `classify`, a few rules about
how a question is put. They are right for all 768 questions of `jaxrlhf demo`, whose phrasings they were checked
against, and for 34 of 40 others, on other subjects, that were written before they were tried (tests/rewards/
test_strict.py). Whether a claim is a slip or a widespread belief is not in its words: without particulars (a number, a
date, a superlative) it counts as a misconception, and so does what fits no rule. The tone of all 2304 answers of the
demo (every question at every level) is read right; those tones were known when the word lists were made.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

FACTUAL_ERROR, MISCONCEPTION, POOR_LOGIC, GOOD_QUESTION = (
    "factual error",
    "misconception",
    "poor logic",
    "good question",
)
LEVELS = {FACTUAL_ERROR: 3, MISCONCEPTION: 1, POOR_LOGIC: 2, GOOD_QUESTION: 1}
"""The strictness that suits each category: 3 strict with careless slips, 2 firm with bad arguments, 1 gentle with
honest mistakes and curiosity."""

_ASKED = (  # how somebody asks whether a claim is true; not a question in itself
    r"(?:is it (?:true|right|correct|a fact)|am i (?:right|correct|wrong)|can it be|do you agree|"
    r"isn't it (?:true|right)|"
    r"would you agree|are you sure)(?: with me)?(?: in (?:thinking|saying|believing))? that\b"
)
_SAID = (
    r"(?<!do )(?<!did )(?<!can )(?<!could )(?<!would )(?:(?:i|we|they|you|people|someone|somebody|"
    r"everyone|everybody|my \w+|our \w+|the \w+|a \w+)(?: once| always| all)? "
    r"(?:read|heard|think|thought|believe|believed|know|knew|learned|learnt|say|says|said|tells?|told|"
    r"am sure|are sure|is "
    r"sure|claims?|claimed|noticed|guess|assume|swear)(?: (?:me|us))?(?: somewhere| once)?(?: that)?)\b"
)
_LOGIC = re.compile(
    r"\b(?:therefore|thus|hence|it follows|which (?:proves|means|shows)|that (?:proves|means|shows)|"
    r"this (?:proves|means|shows)"
    r"|so (?:all|every|everyone|everything|any|no|none|it must|they must|he must|she must|that must|"
    r"the \w+ must|clearly|"
    r"obviously)|must (?:be|have)\b.*\bbecause|because\b.*\b(?:must|always|never|so)|(?:then|so) (?:it|"
    r"they|he|she|we|i) "
    r"(?:must|can't|cannot|has to|have to)|either\b.*\bor\b)"
)
_OPEN = re.compile(r"\b(?:why|how|what|where|when|who|whom|whose|which|whether)\b")
_WONDERING = re.compile(
    r"\b(?:can|could|would|will) you (?:please )?(?:tell|explain|show|teach|help|describe)|"
    r"\bdo you (?:know|understand)\b|\bi "
    r"(?:wonder|want to|would like to|ask)\b|\bwe want to\b|\bplease (?:tell|explain)\b|\basks?\b|"
    r"\bcurious\b|\binterested\b"
)
_PARTICULAR = re.compile(
    r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundred|"
    r"thousand|million|billion|half)\b"
    r"|\bcapital of\b|\b(?:largest|biggest|longest|highest|tallest|deepest|smallest|fastest|oldest|"
    r"nearest|hottest) \w+|\b(?:"
    r"invented|discovered|written|wrote|painted|built|founded|born|died|located|borders|orbits|located|"
    r"became) (?:by|in|on|"
    r"at|the|around|\w+)\b|\b(?:january|february|march|april|june|july|august|september|october|november|"
    r"december)\b"
)

_TONES = {  # words and phrases by the level whose tone they give a sentence
    1: (
        r"thank(?:s| you)|glad|happy to|nice|lovely|great (?:question|thought|idea)|good (?:question|"
        r"thought|idea)|wonderful|"
        r"interesting|let us|let's|together|keep (?:asking|going|it up)|doing well|well done|enjoy|ask me|"
        r"feel free|no "
        r"worries|easy mistake|many people|curious|welcome|don't worry|you are (?:close|almost)"
    ),
    2: (
        r"listen carefully|let me be clear|be clear|think again|note (?:this|that)|please (?:remember|"
        r"check|note|consider)|"
        r"write it down|be (?:more )?(?:precise|careful)|look again|consider|reconsider|does not follow|"
        r"careful(?:ly)?|"
        r"in fact|actually"
    ),
    3: (
        r"pay attention|you should know|should have known|no excuses?|careless(?:ness)?|homework|"
        r"study before|never say|"
        r"expect better|wrong|nonsense|unacceptable|inexcusable|sloppy|do better|get it right|stop|enough"
    ),
}
_TONE = {level: re.compile(rf"\b(?:{words})\b") for level, words in _TONES.items()}
_HELP = (  # three kinds of help; an answer with two of them is as constructive as it gets
    re.compile(r"\b(?:because|since|so that|the reason|due to|which is why|that is why|this means)\b"),
    re.compile(
        r"\b(?:try|check|look (?:at|up)|for example|for instance|remember|practi[cs]e|next time|compare|"
        r"start (?:with|by)|write it "
        r"down|study|homework|read|learn|first|instead|be (?:more )?precise)\b"
    ),
    re.compile(
        r"\b(?:ask(?:ing)?|let us|let's|together|what do you think|tell me|keep (?:going|asking)|you can|"
        r"doing well)\b"
    ),
)


def strictbot(
    prompts: Sequence[str],
    completions: Sequence[str],
    category: Sequence[str | None] | None = None,
    fact: Sequence[str | None] | None = None,
    *,
    appropriate: float = 1.0,
    factual: float = 0.5,
    constructive: float = 0.25,
    consistent: float = 0.25,
    levels: Mapping[str, int] | None = None,
) -> list[float]:
    """The weighted sum of the four parts below, by which its options are called.

    `category` and `fact` are columns of the data, if it has them. `levels` {category: 1, 2 or 3} goes before LEVELS:
    with 1 throughout, StrictBot is never more than gentle. A row without a fact has no bonus to win.
    """
    right = facts(completions, fact) if fact is not None else [None] * len(completions)
    parts = zip(
        appropriateness(prompts, completions, category, levels=levels),
        [value or 0.0 for value in right],
        constructiveness(completions),
        consistency(completions),
        strict=True,
    )
    return [appropriate * a + factual * f + constructive * b + consistent * c for a, f, b, c in parts]


def appropriateness(
    prompts: Sequence[str],
    completions: Sequence[str],
    category: Sequence[str | None] | None = None,
    *,
    levels: Mapping[str, int] | None = None,
) -> list[float]:
    """1 where the answer is as strict as its question's category wants, 1/2 one level off, 0 two off or toneless."""
    wanted = LEVELS if levels is None else {**LEVELS, **levels}
    if bad := {name: level for name, level in wanted.items() if name not in LEVELS or level not in (1, 2, 3)}:
        raise ValueError(f"levels has {bad}; the categories are {', '.join(LEVELS)}, their levels 1, 2 or 3")
    scores = []
    given = category if category is not None else [None] * len(prompts)
    for prompt, completion, kind in zip(prompts, completions, given, strict=True):
        kind = kind or classify(prompt)
        if kind not in wanted:
            raise ValueError(f"the category is {kind!r}; known are {', '.join(LEVELS)}")
        level = tone(completion)
        scores.append(0.0 if level is None else 1 - abs(level - wanted[kind]) / 2)
    return scores


def facts(completions: Sequence[str], fact: Sequence[str | None]) -> list[float | None]:
    """1 where the true statement in the column `fact` is said, in these words, and not denied in the same breath; else
    0. None where the row has none."""
    scores: list[float | None] = []
    for text, truth in zip(completions, fact, strict=True):
        words = _flat(truth) if truth else ""
        scores.append(float(f" {words} " in f" {_flat(text)} ") if words else None)
    return scores


def constructiveness(completions: Sequence[str]) -> list[float]:
    """Of three kinds of help (a reason, something to do, an invitation) those in the text, two being enough."""
    return [min(1.0, sum(bool(kind.search(text.casefold())) for kind in _HELP) / 2) for text in completions]


def consistency(completions: Sequence[str]) -> list[float]:
    """Of the sentences with a tone, the share that has the commonest one; 0 where none has a tone."""
    scores = []
    for text in completions:
        tones = Counter(level for level in map(_sentence_tone, _sentences(text)) if level is not None)
        scores.append(max(tones.values()) / tones.total() if tones else 0.0)
    return scores


def tone(text: str) -> int | None:
    """The level that most sentences have, 1 gentle, 2 firm, 3 strict (of two as common the stricter); None without."""
    tones = Counter(level for level in map(_sentence_tone, _sentences(text)) if level is not None)
    return max(tones, key=lambda level: (tones[level], level)) if tones else None


def classify(question: str) -> str:
    """The category of a question, by rules: a conclusion drawn is poor logic; an open question (why, how, what, ...) is
    a good question; a claim with particulars in it is a factual error, any other claim a misconception.

    It trusts that claims are wrong: StrictBot is asked by people who err or who want to know.
    """
    text = " ".join(question.casefold().replace("\u2019", "'").split())
    claim = re.sub(rf"\b(?:{_ASKED}|{_SAID})", " ", text)
    stated = claim != text
    if _LOGIC.search(claim):
        return POOR_LOGIC
    if _OPEN.search(claim) and not stated:
        return GOOD_QUESTION
    if not stated and _WONDERING.search(text):
        return GOOD_QUESTION
    return FACTUAL_ERROR if _PARTICULAR.search(claim) else MISCONCEPTION


def _sentence_tone(sentence: str) -> int | None:
    """The strictest tone that a sentence has words for."""
    text = sentence.casefold().replace("\u2019", "'")
    return next((level for level in (3, 2, 1) if _TONE[level].search(text)), None)


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def _flat(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:[.,]\d+)?", text.casefold()))
