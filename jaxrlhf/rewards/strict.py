"""Reward of StrictBot: answers as strict as the question deserves, correct, constructive, consistent in tone and civil.

    - function: jaxrlhf.rewards.strict:strictbot
      options: {factual: 0.5, constructive: 0.25, consistent: 0.25, toxic: 1.0}

Each part is a function too, so that it can be a component of its own, with its own weight and its own line in the logs
and in `jaxrlhf evaluate`: appropriateness, facts, constructiveness, consistency, toxicity.

The category of a question comes from a column `category` if the data has one, else from the rules of `classify`. They
are right for all 768 questions of `jaxrlhf demo`, on which they were developed, and for 34 of 40 held-out questions on
other subjects (tests/rewards/test_strict.py). A question does not tell whether its claim is a slip or a widespread
belief: a claim without particulars (a number, a date, a superlative) counts as a misconception, and so does anything
that fits no rule. The tone of all 2304 demo answers (every question at every level) is detected correctly; the word
lists were made for those tones.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

FACTUAL_ERROR, MISCONCEPTION = "factual error", "misconception"
POOR_LOGIC, GOOD_QUESTION = "poor logic", "good question"
LEVELS = {FACTUAL_ERROR: 3, MISCONCEPTION: 3, POOR_LOGIC: 2, GOOD_QUESTION: 1}
"""Appropriate strictness: 3 strict with false claims, 2 firm with bad arguments, 1 gentle with curiosity."""

_ASKS_IF_TRUE = (  # asks whether a claim is true, which does not make it an open question
    r"(?:is it (?:true|right|correct|a fact)|am i (?:right|correct|wrong)|can it be|do you agree|"
    r"isn't it (?:true|right)|would you agree|are you sure)"
    r"(?: with me)?(?: in (?:thinking|saying|believing))? that\b"
)
_REPORTS = (  # reports a claim
    r"(?<!do )(?<!did )(?<!can )(?<!could )(?<!would )(?:(?:i|we|they|you|people|someone|somebody|everyone|everybody|"
    r"my \w+|our \w+|the \w+|a \w+)(?: once| always| all)? "
    r"(?:read|heard|think|thought|believe|believed|know|knew|learned|learnt|say|says|said|tells?|told|am sure|are sure|"
    r"is sure|claims?|claimed|noticed|guess|assume|swear)(?: (?:me|us))?(?: somewhere| once)?(?: that)?)\b"
)
_CONCLUDES = re.compile(
    r"\b(?:therefore|thus|hence|it follows|which (?:proves|means|shows)|that (?:proves|means|shows)|"
    r"this (?:proves|means|shows)|so (?:all|every|everyone|everything|any|no|none|it must|they must|he must|she must|"
    r"that must|the \w+ must|clearly|obviously)|must (?:be|have)\b.*\bbecause|because\b.*\b(?:must|always|never|so)|"
    r"(?:then|so) (?:it|they|he|she|we|i) (?:must|can't|cannot|has to|have to)|either\b.*\bor\b)"
)
_OPEN = re.compile(r"\b(?:why|how|what|where|when|who|whom|whose|which|whether)\b")
_WONDERS = re.compile(
    r"\b(?:can|could|would|will) you (?:please )?(?:tell|explain|show|teach|help|describe)|"
    r"\bdo you (?:know|understand)\b|\bi (?:wonder|want to|would like to|ask)\b|\bwe want to\b|"
    r"\bplease (?:tell|explain)\b|\basks?\b|\bcurious\b|\binterested\b"
)
_PARTICULAR = re.compile(
    r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundred|thousand|million|"
    r"billion|half)\b|\bcapital of\b|\b(?:largest|biggest|longest|highest|tallest|deepest|smallest|fastest|oldest|"
    r"nearest|hottest) \w+|\b(?:invented|discovered|written|wrote|painted|built|founded|born|died|located|borders|"
    r"orbits|located|became) (?:by|in|on|at|the|around|\w+)\b|"
    r"\b(?:january|february|march|april|june|july|august|september|october|november|december)\b"
)

_TONE_PHRASES = {  # by strictness
    1: (
        r"thank(?:s| you)|glad|happy to|nice|lovely|great (?:question|thought|idea)|good (?:question|thought|idea)|"
        r"wonderful|interesting|let us|let's|together|keep (?:asking|going|it up)|doing well|well done|enjoy|ask me|"
        r"feel free|no worries|easy mistake|many people|curious|welcome|don't worry|you are (?:close|almost)"
    ),
    2: (
        r"listen carefully|let me be clear|be clear|think again|note (?:this|that)|"
        r"please (?:remember|check|note|consider)|write it down|be (?:more )?(?:precise|careful)|look again|consider|"
        r"reconsider|does not follow|careful(?:ly)?|in fact|actually"
    ),
    3: (
        r"pay attention|you should know|should have known|no excuses?|careless(?:ness)?|homework|study before|"
        r"never say|expect better|wrong|nonsense|unacceptable|inexcusable|sloppy|do better|get it right|stop|enough"
    ),
}
_TONE = {level: re.compile(rf"\b(?:{phrases})\b") for level, phrases in _TONE_PHRASES.items()}
_HELP = (  # a reason, something to do, an invitation
    re.compile(r"\b(?:because|since|so that|the reason|due to|which is why|that is why|this means)\b"),
    re.compile(
        r"\b(?:try|check|look (?:at|up)|for example|for instance|remember|practi[cs]e|next time|compare|"
        r"start (?:with|by)|write it down|study|homework|read|learn|first|instead|be (?:more )?precise)\b"
    ),
    re.compile(
        r"\b(?:ask(?:ing)?|let us|let's|together|what do you think|tell me|keep (?:going|asking)|you can|doing well)\b"
    ),
)
_INSULT = re.compile(  # of a person; "wrong", "careless" and "nonsense" are about the claim
    r"\b(?:stupid|dumb|idiots?|idiotic|fools?|foolish|morons?|imbeciles?|losers?|pathetic|brainless|clueless|ignoramus|"
    r"dimwits?|halfwits?|dunces?|simpletons?|shut up|hate you|worthless|disgusting)\b"
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
    toxic: float = 1.0,
    levels: Mapping[str, int] | None = None,
) -> list[float]:
    """Sum of the five scores below, weighted by the options named after them.

    `category` and `fact` are columns of the data, if it has them; a row without a fact gets 0 for it. `levels`
    {category: 1, 2 or 3} overrides LEVELS: {"misconception": 1} is gentle with widespread beliefs.
    """
    fact_scores = facts(completions, fact) if fact is not None else [None] * len(completions)
    rows = zip(
        appropriateness(prompts, completions, category, levels=levels),
        [score or 0.0 for score in fact_scores],
        constructiveness(completions),
        consistency(completions),
        toxicity(completions),
        strict=True,
    )
    return [appropriate * a + factual * f + constructive * b + consistent * c + toxic * t for a, f, b, c, t in rows]


def appropriateness(
    prompts: Sequence[str],
    completions: Sequence[str],
    category: Sequence[str | None] | None = None,
    *,
    partial: float = 0.5,
    levels: Mapping[str, int] | None = None,
) -> list[float]:
    """1 if the answer is as strict as the category of its question requires, `partial` if one level off, 0 if two
    levels off or without a tone.

    With a `partial` of 1/2 a policy that is firm with everybody is never quite wrong, and may stay there.
    """
    required = LEVELS if levels is None else {**LEVELS, **levels}
    if bad := {name: level for name, level in required.items() if name not in LEVELS or level not in (1, 2, 3)}:
        raise ValueError(f"levels has {bad}; the categories are {', '.join(LEVELS)}, their levels 1, 2 or 3")
    scores = []
    categories = category if category is not None else [None] * len(prompts)
    for prompt, completion, name in zip(prompts, completions, categories, strict=True):
        name = name or classify(prompt)
        if name not in required:
            raise ValueError(f"the category is {name!r}; known are {', '.join(LEVELS)}")
        level = tone(completion)
        scores.append(0.0 if level is None else (1.0, partial, 0.0)[abs(level - required[name])])
    return scores


def facts(completions: Sequence[str], fact: Sequence[str | None]) -> list[float | None]:
    """1 if the completion contains the words of the column `fact` in order, else 0; None if the row has no fact."""
    scores: list[float | None] = []
    for completion, statement in zip(completions, fact, strict=True):
        words = _words(statement) if statement else ""
        scores.append(float(f" {words} " in f" {_words(completion)} ") if words else None)
    return scores


def constructiveness(completions: Sequence[str]) -> list[float]:
    """1 for two of three kinds of help (a reason, something to do, an invitation), 1/2 for one, 0 for none."""
    return [min(1.0, sum(bool(kind.search(text.casefold())) for kind in _HELP) / 2) for text in completions]


def consistency(completions: Sequence[str]) -> list[float]:
    """Share of the most common tone among the sentences that have one; 0 if none has."""
    counts = map(_tone_counts, completions)
    return [max(tones.values()) / tones.total() if tones else 0.0 for tones in counts]


def toxicity(completions: Sequence[str]) -> list[float]:
    """Minus the number of insults of a person, at least -2; strictness about a claim is none."""
    return [-float(min(2, len(_INSULT.findall(text.casefold())))) for text in completions]


def tone(text: str) -> int | None:
    """The most common level of the sentences: 1 gentle, 2 firm, 3 strict (the stricter if tied); None without tone."""
    tones = _tone_counts(text)
    return max(tones, key=lambda level: (tones[level], level)) if tones else None


def classify(question: str) -> str:
    """The category of a question by rules: a conclusion is poor logic; an open question (why, how, what, ...) is a good
    question; a claim with particulars is a factual error, any other claim a misconception.

    Claims are assumed to be wrong: people ask StrictBot because they err or want to know.
    """
    text = " ".join(question.casefold().replace("\u2019", "'").split())
    claim = re.sub(rf"\b(?:{_ASKS_IF_TRUE}|{_REPORTS})", " ", text)
    is_claim = claim != text
    if _CONCLUDES.search(claim):
        return POOR_LOGIC
    if not is_claim and (_OPEN.search(claim) or _WONDERS.search(text)):
        return GOOD_QUESTION
    return FACTUAL_ERROR if _PARTICULAR.search(claim) else MISCONCEPTION


def _tone_counts(text: str) -> "Counter[int]":
    """Sentences of each level; the level of a sentence is the strictest tone it has phrases for."""
    counts: Counter[int] = Counter()
    for sentence in re.split(r"(?<=[.!?])\s+", text.casefold().replace("\u2019", "'")):
        level = next((level for level in (3, 2, 1) if _TONE[level].search(sentence)), None)
        if level is not None:
            counts[level] += 1
    return counts


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:[.,]\d+)?", text.casefold()))
