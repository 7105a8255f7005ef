"""Suggestions for misspelt names."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

LONGEST = 100
"""Characters of a name that suggestions are looked for."""


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

    if len(wrong) > LONGEST:
        return []
    scores = {key: similarity(key) for key in known}
    ranked = sorted(known, key=lambda key: -scores[key])[:count]
    return [key for key in ranked if scores[key] >= max(0.55, scores[ranked[0]] - 0.15)]


def _ratio(a: str, b: str) -> float:
    """Similarity from 0 to 1; letters in another order are closer than other letters."""
    if a != b and sorted(a) == sorted(b):
        return 0.9
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def did_you_mean(wrong: str, known: Sequence[str], count: int = 3) -> str:
    """`; did you mean 'a', 'b' or 'c'?`, or an empty string if no known name is similar."""
    return _question(suggestions(wrong, known, count))


def did_you_mean_path(path: Path) -> str:
    """`; did you mean 'mine/a.jsonl'?` with what is spelt like a path that does not exist, or an empty string."""
    rest: list[str] = []
    while not path.parent.is_dir() and path.parent != path:
        rest.insert(0, path.name)
        path = path.parent
    try:
        names = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.7)
    except OSError:
        return ""
    found = [path.with_name(name).joinpath(*rest) for name in names]
    return _question([str(place) for place in found if place.exists()])


def _question(names: Sequence[str]) -> str:
    names = [f"'{name}'" for name in names]
    if not names:
        return ""
    *others, last = names
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"
