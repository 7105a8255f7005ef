"""Whether an answer is in the language of its prompt: `jaxrlhf.rewards.language:same_language`.

By script, and for the Latin script by the commonest words of seven languages. That tells German from English in a
sentence; it knows nothing of other languages in the Latin script (they read as unknown, or as a relative), nor does it
tell Russian from Ukrainian or Arabic from Persian. Of one or two words it says nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

COMMON = {
    "en": "the and of to is are was you that it for with this have not what how why does do can in i my your from by",
    "de": "der die das und ist nicht ein eine ich du sie er es wir zu den dem mit von auf für was wie warum wird sind",
    "fr": "le la les et est pas un une je tu il elle nous vous des du de que qui pour dans ce sur avec pourquoi sont",
    "es": "el la los las y es no un una yo tú de del que por para con en qué cómo se lo como más pero son está",
    "it": "il lo la gli e è non un una io tu di del che per con in cosa come si sono perché della nel anche più",
    "pt": "o a os as e é não um uma eu você de do da que por para com em se mais como são por quê está no na",
    "nl": "de het een en is niet ik je jij hij zij wij van dat voor met op te in wat hoe waarom zijn wordt er ook",
}
"""Words that stand in most sentences, by language; those of several count a share for each."""

_WORDS = {language: frozenset(words.split()) for language, words in COMMON.items()}
_SHARE = Counter(word for words in _WORDS.values() for word in words)
_SCRIPTS = {
    "HIRAGANA": "japanese",
    "KATAKANA": "japanese",
    "CJK": "chinese",
    "HANGUL": "korean",
}
LEAST_LETTERS = 4
"""Fewer say nothing about a script. (Of Chinese, Japanese and Korean one is enough.)"""
LEAST_MARGIN = 0.5
"""How far the best language's count of common words must be ahead of the next."""


def same_language(prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
    """1 where both are in the same language, 0 where not, None where one of them cannot be told."""
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        found = {language(prompt), language(completion)}
        vague = "latin" in found and found <= {"latin", *_WORDS}  # one of the Latin script, and who knows which
        scores.append(None if None in found or vague else float(len(found) == 1))
    return scores


def language(text: str) -> str | None:
    """en, de, fr, es, it, pt or nl; "latin" where it is none of these for certain; the script of other languages in
    lower case ("cyrillic", "greek", "japanese", ...); None where there is too little text."""
    found = script(text)
    if found != "latin":
        return found
    points: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", text.casefold()):
        for name, words in _WORDS.items():
            if word in words:
                points[name] += 1 / _SHARE[word]  # type: ignore[assignment]
    ranked = [*points.most_common(2), ("", 0.0), ("", 0.0)]
    return ranked[0][0] if ranked[0][1] - ranked[1][1] >= LEAST_MARGIN else "latin"


def script(text: str) -> str | None:
    """The script of most letters; None where there are too few. Kana among Chinese characters make it japanese."""
    letters: Counter[str] = Counter()
    for letter in text:
        if letter.isalpha():
            first = unicodedata.name(letter, "UNKNOWN").split()[0].removesuffix("-")
            letters[_SCRIPTS.get(first, first.lower())] += 1
    if letters["japanese"] and letters["chinese"]:
        letters["japanese"] += letters.pop("chinese")
    most = letters.most_common(1)
    if not most or (most[0][1] < LEAST_LETTERS and most[0][0] not in _SCRIPTS.values()):
        return None
    return most[0][0]
