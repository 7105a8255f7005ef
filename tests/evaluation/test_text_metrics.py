"""Text metrics, against numbers recorded from NLTK 3.10.4 and rouge-score 0.1.2, sacrebleu itself, and by hand."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import text_metrics

GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
NEAR = "It is a guide to action that ensures that the military will forever heed Party commands"
FAR = "It is the guiding principle which guarantees the military forces always being under the command of the Party"
# text, reference, nltk's sentence_bleu of their words, rouge-score's rougeL (which reads the same words in these)
RECORDED = [
    (GUIDE, NEAR, 0.41180376356915777, 0.6470588235294118),
    (GUIDE, FAR, 8.129855005981316e-155, 0.5555555555555556),
    ("the cat is on the mat", "the cat sat on the mat", 7.262123179505913e-78, 0.8333333333333334),
    ("There is a cat on the red mat today", "There is a cat on the mat", 0.6104735835807844, 0.8750000000000001),
    ("a b c d", "a b c d", 1.0, 1.0),
    ("a b c d e f", "a b c d", 0.5081327481546147, 0.8),
    ("a b c d", "a b c d e f", 0.6065306597126334, 0.8),
    ("a b c", "a b c", 1.2213386697554703e-77, 1.0),
    ("a b c d a b c d a", "a b c d x a b c d", 0.5969491792019646, 0.8888888888888888),
    ("the the the the the the the", "the cat is on the mat", 1.331960397810445e-231, 0.30769230769230765),
]
WORDS = st.lists(st.sampled_from("abcd"), max_size=12)
TEXTS = [text for text, *_ in RECORDED]
REFERENCES = [reference for _, reference, *_ in RECORDED]


@pytest.mark.parametrize(("text", "reference", "bleu", "rouge"), RECORDED)
def test_recorded_values(text, reference, bleu, rouge):
    found = text_metrics.plain_bleu([text], [reference])
    assert found == pytest.approx(bleu, rel=1e-12, abs=1e-70)
    assert (found == 0) == (bleu < 1e-70)
    assert text_metrics.rouge_l([text], [reference]) == pytest.approx(rouge, rel=1e-12)


def test_values_computed_by_hand():
    # 4, 3, 2 and 1 of 5, 4, 3 and 2 n-grams match; one word fewer than the reference
    expected = math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert text_metrics.plain_bleu(["a b c d x"], ["a b c d e f"]) == pytest.approx(expected)
    assert text_metrics.plain_bleu(["a b c d", ""], ["a b c d", "a"]) == 0.5
    assert text_metrics.rouge_l(["A b"], ["a b"]) == 1
    assert text_metrics.rouge_l(["", "a"], ["", ""]) == 0
    assert text_metrics.distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert text_metrics.distinct(["a b c"], 1) == 1
    assert text_metrics.distinct(["", "a"], 2) == 0
    assert text_metrics.repetition(["a b c a b c", "a b c d"]) == pytest.approx(1 / 8)
    assert text_metrics.plain_bleu([], []) == text_metrics.repetition([]) == 0


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(row[-1], above[j + 1]))
    return row[-1]


@given(WORDS, WORDS)
def test_rouge_by_the_table(a, b):
    longest, found = common(a, b), text_metrics.rouge_l([" ".join(a)], [" ".join(b)])
    if longest:
        precision, recall = longest / len(a), longest / len(b)
        assert found == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert found == 0


def test_sacrebleu():
    library = pytest.importorskip("sacrebleu")
    assert text_metrics.corpus_bleu(TEXTS, REFERENCES) == pytest.approx(
        library.BLEU().corpus_score(TEXTS, [REFERENCES]).score
    )
    assert text_metrics.corpus_bleu(TEXTS, REFERENCES) == pytest.approx(39.849615553691876)  # sacrebleu 2.6.0


def test_plain_bleu_is_sacrebleus_without_smoothing():
    library = pytest.importorskip("sacrebleu")
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        score = library.sentence_bleu(text, [reference], smooth_method="none", use_effective_order=False).score
        assert 100 * text_metrics.plain_bleu([text], [reference]) == pytest.approx(score)


def test_errors_without_sacrebleu_and_without_a_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r'BLEU needs sacrebleu.*pip install "jaxrlhf\[eval\]"'):
        text_metrics.corpus_bleu(["a"], ["a"])
    for metric in (text_metrics.plain_bleu, text_metrics.rouge_l):
        with pytest.raises(ValueError, match="zip"):
            metric(["a"], ["a", "b"])
