"""Suggestions for misspelt names."""

import difflib
from collections.abc import Sequence


def suggestions(wrong: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` of the `known` names similar to `wrong`, best first.

    Compares the spelling of whole dotted keys and of their last parts; words and initials of the last part match too.
    """
    wrong_section, _, wrong_leaf = wrong.rpartition(".")

    def similarity(key: str) -> float:
        section, _, leaf = key.rpartition(".")
        whole, words = _ratio(wrong, key), leaf.split("_")
        best = max(whole, 0.97 * _ratio(wrong_leaf, leaf))
        if len(words) > 1 and (wrong_leaf in words or wrong_leaf == "".join(word[0] for word in words)):
            best = max(best, 0.85)
        return best + 0.05 * (section == wrong_section) + 0.01 * whole

    scores = {key: similarity(key) for key in known}
    ranked = sorted(known, key=lambda key: -scores[key])[:count]
    return [key for key in ranked if scores[key] >= max(0.55, scores[ranked[0]] - 0.15)]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def did_you_mean(wrong: str, known: Sequence[str], count: int = 3) -> str:
    """`; did you mean 'a', 'b' or 'c'?`, or an empty string if no known name is similar."""
    names = [f"'{key}'" for key in suggestions(wrong, known, count)]
    if not names:
        return ""
    *others, last = names
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"
