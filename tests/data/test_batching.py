import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data.batching import batch, bucket, pairs, prompts, widths
from jaxrlhf.data.datasets import PairRow, PromptRow, SFTRow

PAD = 7  # also a real token below: masks must come from lengths


def test_sequences_are_padded_on_the_right_and_a_real_pad_id_stays_real():
    made = batch([SFTRow([5, PAD], [False, True]), SFTRow([1, 2, 3], [False, False, True])], PAD, 4)
    np.testing.assert_array_equal(made.tokens, [[5, PAD, PAD, PAD], [1, 2, 3, PAD]])
    np.testing.assert_array_equal(made.mask, [[1, 1, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(made.loss_mask, [[0, 1, 0, 0], [0, 0, 1, 0]])
    assert (made.tokens.dtype, made.mask.dtype, made.loss_mask.dtype) == (np.int32, bool, bool)


def test_prompts_are_padded_on_the_left():
    rows = [PromptRow([PAD, 4], "", {}, 12), PromptRow([1, 2, 3], "", {}, 5)]
    made = prompts(rows, PAD, 4, samples=[0, 1])
    np.testing.assert_array_equal(made.tokens, [[PAD, PAD, PAD, 4], [PAD, 1, 2, 3]])
    np.testing.assert_array_equal(made.mask, [[0, 0, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(made.index, [12, 5])
    np.testing.assert_array_equal(made.sample, [0, 1])
    np.testing.assert_array_equal(prompts(rows, PAD, 4).sample, [0, 0])


def test_pairs_have_one_shape():
    row = PairRow(SFTRow([1, 2], [False, True]), SFTRow([1, 3, 4], [False, True, True]))
    made = pairs([row], PAD, 4)
    assert made.chosen.tokens.shape == made.rejected.tokens.shape == (1, 4)
    np.testing.assert_array_equal(made.rejected.tokens, [[1, 3, 4, PAD]])


def test_a_row_that_does_not_fit_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="3 tokens do not fit in 2"):
        batch([SFTRow([1, 2, 3], [False] * 3)], PAD, 2)


@settings(deadline=None)
@given(length=st.integers(1, 5000), extra=st.integers(0, 5000))
def test_buckets_hold_the_batch_waste_little_and_are_few(length, extra):
    limit = length + extra
    size = bucket(length, limit)
    assert length <= size <= limit
    assert size <= max(16, 1.5 * length)
    assert bucket(size, limit) == size


def test_two_sizes_per_doubling():
    assert sorted({bucket(n, 500) for n in range(1, 501)}) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 500]


@given(longest=st.lists(st.integers(1, 500), min_size=1, max_size=60), worth=st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_few_widths_each_of_which_saves_what_it_is_worth(longest, worth):
    def columns(chosen):
        return sum(min(width for width in chosen if width >= length) for length in longest)

    chosen, every = widths(longest, 500, worth), {bucket(length, 500) for length in longest}
    assert list(chosen) == sorted(chosen) and {max(every)} <= {*chosen} <= every
    assert widths(longest, 500, 0) == tuple(sorted(every))
    assert widths(longest, 500, float("inf")) == (max(every),)
    for width in every - {*chosen}:
        assert columns(chosen) - columns({*chosen, width}) < worth
    if len(chosen) > 1:
        assert columns({max(chosen)}) - columns(chosen) >= worth * (len(chosen) - 1)
