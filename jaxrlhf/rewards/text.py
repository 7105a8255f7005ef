"""Reward functions of the text alone: sentiment, profanity, length, repetition and form.

Named in a config as `jaxrlhf.rewards.text:NAME`, with keyword arguments under `options`. Word lists are text files with
one entry per line (# starts a comment); the short built-in lists are for first experiments.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxrlhf.files import read_regular

POSITIVE = (
    "amazing awesome beautiful best better brilliant calm clear clever comfortable confident delicious delightful easy "
    "elegant enjoy enjoyed excellent fair fantastic favourite favorite fine fresh friend friendly fun funny generous "
    "gentle glad good great happy healthy helpful honest hope interesting joy kind laugh laughed like liked love loved "
    "lovely lucky nice perfect pleasant pleased polite proud rich safe smart smile smiled smooth strong success superb "
    "sweet thank thanks useful warm welcome well wise won wonderful worth"
)
NEGATIVE = (
    "afraid angry annoyed annoying awful bad bitter boring broken careless cold confusing cried cruel cry damage "
    "danger dangerous dead difficult dirty disappointed disappointing disaster disgusting dull error evil fail failed "
    "failure false fear fight hate hated horrible hurt ill jealous lazy lied lonely lost mean mess mistake nasty pain "
    "painful poor problem rude sad scared scary selfish shame sick slow sorry stupid terrible tired trouble ugly "
    "unfair unhappy unpleasant upset useless waste weak worse worst wrong"
)
PROFANE = "arse arsehole ass asshole bastard bitch bollocks bullshit crap cunt damn dick fuck piss prick shit slut"
NEGATORS = {"not", "no", "never", "hardly", "without", "isn't", "wasn't", "don't", "didn't", "doesn't", "can't"}


def sentiment(completions: Sequence[str], *, positive: str = "", negative: str = "") -> list[float]:
    """(positive - negative words) / (positive + negative words), in [-1, 1]; 0 if there are none.

    A word up to two words after a negator ("not good", "not a good") counts as its opposite. `positive` and `negative`
    are files; the defaults are English lists of some 70 words each, a practice signal rather than a sentiment model.
    """
    good, bad = _words(positive, POSITIVE), _words(negative, NEGATIVE)
    scores = []
    for text in completions:
        words = re.findall(r"\w+(?:'\w+)?", text.casefold().replace("\u2019", "'"))
        signs = []
        for i, word in enumerate(words):
            if sign := (word in good) - (word in bad):
                signs.append(-sign if NEGATORS & set(words[max(0, i - 2) : i]) else sign)
        scores.append(sum(signs) / len(signs) if signs else 0.0)
    return scores


def profanity(completions: Sequence[str], *, words: str = "", most: int = 3) -> list[float]:
    """-(number of listed words and phrases in the text) / `most`, clipped at -1.

    `words` is a file. Whole words match in any case, also with the endings "s", "ed", "er" and "ing"; disguised
    spellings (f*ck, sh1t) do not.
    """
    pattern = _profanity_pattern(words)
    return [-min(len(pattern.findall(text.casefold())), most) / most for text in completions]


def length_band(
    completions: Sequence[str], *, low: int, high: int, unit: Literal["words", "characters"] = "words"
) -> list[float]:
    """1 for a length from `low` to `high`, falling linearly to 0 at length 0 and at twice `high`."""
    if unit not in ("words", "characters"):
        raise ValueError(f"unit is {unit!r}; use words or characters")
    if not 0 <= low <= high or high == 0:
        raise ValueError(f"low is {low} and high {high}; 0 <= low <= high and high > 0 is needed")
    scores = []
    for text in completions:
        n = len(text.split()) if unit == "words" else len(text)
        scores.append(n / low if n < low else max(0.0, 2 - n / high) if n > high else 1.0)
    return scores


def repetition(completions: Sequence[str], *, n: int = 3) -> list[float]:
    """-(share of the word n-grams that repeat an earlier one), in (-1, 0]; 0 for fewer than n words."""
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 is needed")
    scores = []
    for text in completions:
        words = text.casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        scores.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
    return scores


def matches(completions: Sequence[str], *, pattern: str, whole: bool = True) -> list[float]:
    """1 if the whole text (`whole: false`: any part of it) matches a Python regular expression, else 0.

    `.` also matches line ends. A pattern that takes exponential time, such as (a+)+, is stopped by the component's
    `timeout`.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(text.strip()) is not None) for text in completions]


@functools.cache
def _words(path: str, built_in: str) -> frozenset[str]:
    """Entries of the word list file, or of `built_in` if there is no path."""
    if not path:
        return frozenset(built_in.split())
    lines = read_regular(Path(path).expanduser()).decode("utf-8").splitlines()
    entries = frozenset(filter(None, (line.partition("#")[0].strip().casefold() for line in lines)))
    if not entries:
        raise ValueError(f"the word list {path} has no entries")
    return entries


@functools.cache
def _profanity_pattern(path: str) -> re.Pattern[str]:
    entries = sorted(_words(path, PROFANE), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, entries))})(?:s|ed|er|ing)?(?!\w)")
