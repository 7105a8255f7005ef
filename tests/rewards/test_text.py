"""Reward functions of the text alone, against truths made by hand and properties that hold for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.rewards import text

TEXTS = st.lists(st.text(alphabet=st.sampled_from("ab good bad damn\n.é"), max_size=40), max_size=5)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("What a lovely day, I love it!", 1),
        ("This is terrible.", -1),
        ("good and bad", 0),
        ("good, nice but awful", 1 / 3),
        ("It is not good", -1),
        ("It isn\u2019t a bad film", 1),
        ("The table has four legs", 0),
        ("GOOD", 1),
        ("goodness", 0),
        ("", 0),
    ],
)
def test_sentiment(said, score):
    assert text.sentiment([said]) == [pytest.approx(score)]


def test_word_lists_come_from_files(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("# mine\nZebra # striped\n\ncafé\n", encoding="utf-8")
    bad.write_text("good\n")
    assert text.sentiment(["zebra Café good", "lovely"], positive=str(good), negative=str(bad)) == [
        pytest.approx(1 / 3),
        0,
    ]
    words = tmp_path / "words.txt"
    words.write_text("darn\nson of a gun\n")
    assert text.profanity(["Darn! You son of a gun.", "damn"], words=str(words), most=2) == [-1, 0]
    words.with_name("none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="none.txt has no entries"):
        text.profanity(["x"], words=str(words.with_name("none.txt")))


@pytest.mark.parametrize(
    ("said", "score"),
    [("Damn it", -1 / 3), ("damn, damned DAMN! crap", -1), ("classic assassin passes", 0), ("shits", -1 / 3), ("", 0)],
)
def test_profanity(said, score):
    assert text.profanity([said]) == [pytest.approx(score)]


def test_length_band():
    texts = ["", "a", "a b", "a b c", "a b c d", "a b c d e f", "a " * 8, "a " * 50]
    assert text.length_band(texts, low=2, high=4) == [0, 0.5, 1, 1, 1, 0.5, 0, 0]
    assert text.length_band(["abc"], low=0, high=2, unit="characters") == [0.5]
    for bad, message in [({"low": 3, "high": 2}, "low is 3 and high 2"), ({"low": 0, "high": 0}, "high > 0")]:
        with pytest.raises(ValueError, match=message):
            text.length_band(["x"], **bad)
    with pytest.raises(ValueError, match="unit is 'tokens'; use words or characters"):
        text.length_band(["x"], low=1, high=2, unit="tokens")  # type: ignore[arg-type]


def test_repetition():
    assert text.repetition(["a b c d", "a b", "", "a a a a a", "a b c a b c"]) == pytest.approx(
        [0, 0, 0, -2 / 3, -1 / 4]
    )
    assert text.repetition(["x X y"], n=1) == [pytest.approx(-1 / 3)]
    with pytest.raises(ValueError, match="n is 0"):
        text.repetition(["x"], n=0)


def test_form():
    pattern = r"<think>.*</think>\s*<answer>\d+</answer>"
    texts = ["<think>a\nb</think> <answer>12</answer>\n", "<answer>12</answer>", "so <think></think><answer>1</answer>"]
    assert text.matches(texts, pattern=pattern) == [1, 0, 0]
    assert text.matches(texts, pattern=pattern, whole=False) == [1, 0, 1]
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression: missing \)"):
        text.matches(["x"], pattern="(")


@given(TEXTS)
def test_ranges(texts):
    assert all(-1 <= score <= 1 for score in text.sentiment(texts))
    assert all(-1 <= score <= 0 for score in text.profanity(texts))
    assert all(0 <= score <= 1 for score in text.length_band(texts, low=2, high=3))
    assert all(-1 < score <= 0 for score in text.repetition(texts, n=2))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=12), st.integers(2, 4))
def test_saying_it_again_is_more_repetition(words, times):
    once, again = " ".join(words), " ".join(words * times)
    assert text.repetition([again]) < text.repetition([once]) or text.repetition([once])[0] < -0.5
