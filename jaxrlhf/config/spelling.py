"""The nearest known names to a misspelt one."""

import difflib
from collections.abc import Sequence


def suggestions(wrong: str, known: Sequence[str], count: int = 3) -> list[str]:
    """The `count` nearest of `known`, best first: by spelling of the whole key or of its last part, or by initials."""

    def similarity(key: str) -> float:
        (section, _, leaf), (given, _, last) = key.rpartition("."), wrong.rpartition(".")
        whole, words = _ratio(wrong, key), leaf.split("_")
        near = max(whole, 0.97 * _ratio(last, leaf))
        if len(words) > 1 and (last in words or last == "".join(word[0] for word in words)):
            near = max(near, 0.85)
        return near + 0.05 * (section == given) + 0.01 * whole

    scores = {key: similarity(key) for key in known}
    ranked = sorted(known, key=lambda key: -scores[key])[:count]
    return [key for key in ranked if scores[key] >= max(0.55, scores[ranked[0]] - 0.15)]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def did_you_mean(wrong: str, known: Sequence[str], count: int = 3) -> str:
    """`; did you mean 'a', 'b' or 'c'?`, or nothing where nothing is near."""
    found = [f"'{key}'" for key in suggestions(wrong, known, count)]
    return f"; did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?" if found else ""
