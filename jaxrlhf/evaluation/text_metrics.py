"""Metrics of texts for reports: BLEU in two conventions, ROUGE-L, distinct-n, repetition.

Each function takes texts, and references in the same order, one per text, and returns one number. Words are separated
by white space, except in sacrebleu's BLEU.
"""

import importlib
import math
from collections import Counter
from collections.abc import Sequence

import jaxrlhf.rewards.text
from jaxrlhf.errors import ConfigError


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100: sacrebleu's `corpus_bleu` with its defaults (Post 2018, https://aclanthology.org/W18-6319),
    which are 13a tokens, case-sensitive, exponential smoothing.

    Raises ConfigError without sacrebleu.
    """
    try:
        sacrebleu = importlib.import_module("sacrebleu")
    except ModuleNotFoundError as error:
        raise ConfigError('BLEU needs sacrebleu, which is not installed: pip install "jaxrlhf[eval]"') from error
    return float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score)


def plain_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean unsmoothed sentence BLEU, 0 to 1: words up to 4-grams, case-sensitive (Papineni et al. 2002,
    https://aclanthology.org/P02-1040).

    Equals NLTK's `sentence_bleu([reference.split()], text.split())`, except that it is exactly 0 if some order has no
    match, as for every text of fewer than four words; NLTK warns and returns about 1e-78.
    """
    scores = []
    for text, reference in zip(texts, references, strict=True):
        words, reference_words = text.split(), reference.split()
        logs = 0.0
        for n in (1, 2, 3, 4):
            grams = _ngrams(words, n)
            matched = (grams & _ngrams(reference_words, n)).total()
            logs += math.log(matched / grams.total()) / 4 if matched else -math.inf
        brevity = min(0.0, 1 - len(reference_words) / len(words)) if words else 0.0
        scores.append(math.exp(brevity + logs))
    return _mean(scores)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of words, 0 to 1, ignoring case (Lin 2004,
    https://aclanthology.org/W04-1013, with beta = 1).

    Unlike the package rouge-score, which keeps only ASCII letters and digits, "mat." here differs from "mat".
    """
    scores = []
    for text, reference in zip(texts, references, strict=True):
        a, b = text.casefold().split(), reference.casefold().split()
        total = len(a) + len(b)
        scores.append(2 * _longest_common_subsequence(a, b) / total if total else 0.0)
    return _mean(scores)


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among all (Li et al. 2016, https://arxiv.org/abs/1510.03055); 0 if none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_ngrams(text.split(), n))
    return len(grams) / max(1, grams.total())


def repetition(texts: Sequence[str], *, n: int = 3) -> float:
    """Mean share of a text's word n-grams that occurred earlier in it, 0 to 1: minus the reward of that name."""
    return -_mean(jaxrlhf.rewards.text.repetition(texts, n=n))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one bit per word of `a` (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"): a zero in `row` marks where the length grows."""
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
