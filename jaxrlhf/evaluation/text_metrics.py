"""Measures of texts as a whole, for reports: BLEU in two conventions, ROUGE-L, distinct-n, repetition, length.

Each takes texts, and references in the same order, one for each, and returns one number. Words are what white space
separates, except in sacrebleu's BLEU.
"""

import importlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards import text as rewards


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all the texts together, 0 to 100, as sacrebleu's `corpus_bleu` with its defaults (Post 2018,
    https://aclanthology.org/W18-6319): 13a tokens, capitals count, exponential smoothing.

    Raises ConfigError without sacrebleu.
    """
    _pairs(texts, references)
    return float(_sacrebleu().corpus_bleu(list(texts), [list(references)]).score)


def sentence_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """The mean of sacrebleu's `sentence_bleu` with its defaults, 0 to 100: as `corpus_bleu` of each text, but of short
    texts only the orders that they have (effective order). Raises ConfigError without sacrebleu.
    """
    library, pairs = _sacrebleu(), _pairs(texts, references)
    return _mean([library.sentence_bleu(text, [reference]).score for text, reference in pairs])


def plain_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """The mean of unsmoothed sentence BLEU, 0 to 1: words up to 4-grams, capitals count (Papineni et al. 2002,
    https://aclanthology.org/P02-1040).

    This is NLTK's `sentence_bleu([reference.split()], text.split())`, except that it is exactly 0 where some order has
    no match, as for every text of fewer than four words; NLTK warns and gives some 1e-78.
    """
    scores = []
    for text, reference in _pairs(texts, references):
        said, right = text.split(), reference.split()
        logs = 0.0
        for n in (1, 2, 3, 4):
            grams = _grams(said, n)
            matched = (grams & _grams(right, n)).total()
            logs += math.log(matched / grams.total()) / 4 if matched else -math.inf
        brevity = min(0.0, 1 - len(right) / len(said)) if said else 0.0
        scores.append(math.exp(brevity + logs))
    return _mean(scores)


def rouge_l(texts: Sequence[str], references: Sequence[str], *, case: bool = False) -> float:
    """The mean F1 of the longest common subsequence of words, 0 to 1 (Lin 2004, https://aclanthology.org/W04-1013,
    with beta = 1); capitals count if `case`.

    The package rouge-score also drops everything but ASCII letters and digits before it compares; here "mat." is not
    "mat".
    """
    scores = []
    for text, reference in _pairs(texts, references):
        said, right = ((s if case else s.casefold()).split() for s in (text, reference))
        total = len(said) + len(right)
        scores.append(2 * _common(said, right) / total if total else 0.0)
    return _mean(scores)


def distinct(texts: Sequence[str], n: int) -> float:
    """Different word n-grams as a share of all (Li et al. 2016, https://arxiv.org/abs/1510.03055); 0 if none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_grams(text.split(), n))
    return len(grams) / max(1, grams.total())


def repetition(texts: Sequence[str], *, n: int = 3) -> float:
    """The mean share of a text's word n-grams that came before in it, 0 to 1: minus the reward of that name."""
    return -_mean(rewards.repetition(texts, n=n))


def mean_length(texts: Sequence[str]) -> float:
    """Words of a text, on average."""
    return _mean([len(text.split()) for text in texts])


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one bit for each word of `a` (Hyyrö 2004, "Bit-parallel
    LCS-length computation revisited"): a zero in `row` marks where the length grows."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        shared = row & places.get(word, 0)
        row = ((row + shared) | (row - shared)) & full
    return len(a) - row.bit_count()


def _pairs(texts: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Raises ValueError unless there is a reference for each text."""
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts and {len(references)} references; one for each text is needed")
    return list(zip(texts, references, strict=True))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu")
    except ModuleNotFoundError as error:
        raise ConfigError('BLEU needs sacrebleu, which is not installed: pip install "jaxrlhf[eval]"') from error
