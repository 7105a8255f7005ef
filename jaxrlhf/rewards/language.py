"""Reward for answering in the language of the prompt: `jaxrlhf.rewards.language:same_language`.

Detects the script, and in the Latin script seven languages by their most common words. One sentence is enough to tell
German from English. Other languages in the Latin script count as unknown, or as a related language; Russian and
Ukrainian, or Arabic and Persian, are not told apart. One or two words are too short.
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
"""Common words by language; a word of several languages counts as a fraction for each."""

_WORDS = {language: frozenset(words.split()) for language, words in COMMON.items()}
_LANGUAGES_OF = Counter(word for words in _WORDS.values() for word in words)
_SCRIPTS = {"HIRAGANA": "japanese", "KATAKANA": "japanese", "CJK": "chinese", "HANGUL": "korean"}
LEAST_LETTERS = 4
"""Letters needed to detect a script; Chinese, Japanese and Korean need one."""
LEAST_MARGIN = 0.5
"""Minimum lead of the best language's word count over the next."""


def same_language(prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
    """1 if prompt and completion are in the same language, 0 if not, None if either cannot be detected."""
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        languages = {language(prompt), language(completion)}
        ambiguous = "latin" in languages and languages <= {"latin", *_WORDS}
        scores.append(None if None in languages or ambiguous else float(len(languages) == 1))
    return scores


def language(text: str) -> str | None:
    """en, de, fr, es, it, pt or nl; "latin" if it is none of these with certainty; for other scripts the script in
    lower case ("cyrillic", "greek", "japanese", ...); None if the text is too short."""
    text_script = script(text)
    if text_script != "latin":
        return text_script
    points: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", text.casefold()):
        for name, words in _WORDS.items():
            if word in words:
                points[name] += 1 / _LANGUAGES_OF[word]  # type: ignore[assignment]
    (best, lead), (_, next_lead) = [*points.most_common(2), ("", 0.0), ("", 0.0)][:2]
    return best if lead - next_lead >= LEAST_MARGIN else "latin"


def script(text: str) -> str | None:
    """The script of most letters; None if there are too few. Chinese characters count as japanese beside kana."""
    letters: Counter[str] = Counter()
    for letter in text:
        if letter.isalpha():
            first = unicodedata.name(letter, "UNKNOWN").split()[0].removesuffix("-")
            letters[_SCRIPTS.get(first, first.lower())] += 1
    if letters["japanese"] and letters["chinese"]:
        letters["japanese"] += letters.pop("chinese")
    for name, count in letters.most_common(1):
        if count >= LEAST_LETTERS or name in _SCRIPTS.values():
            return name
    return None
