import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data.batching import packed, packed_pairs
from jaxrlhf.data.datasets import PairRow, Report, SFTRow, Split
from jaxrlhf.data.packing import PackedRow, best_fit, pack

PAD = 7


def in_file_order(sizes, width):
    """Rows filled one after the other."""
    rows, room = 0, 0
    for size in sizes:
        rows, room = (rows, room - size) if size <= room else (rows + 1, width - size)
    return rows


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=80), extra=st.integers(0, 40))
def test_every_example_stands_once_in_few_rows_that_hold_it(sizes, extra):
    width = max(sizes) + extra
    rows = best_fit(sizes, width)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert max(filled) <= width
    assert len(rows) <= in_file_order(sorted(sizes, reverse=True), width)
    assert len(rows) <= 11 / 9 * in_file_order(sizes, width) + 1  # what is proven of it, against more than the fewest
    assert len(rows) == 1 or sum(sorted(filled)[:2]) > width  # else two rows would have been one


def test_the_rows_are_fixed_for_ever():
    """A run that resumes years later sees the same ones. Best fit: 2 goes beside both 4s, and not beside 7."""
    assert best_fit([2, 4, 7, 4, 1, 9], 10) == [[0, 1, 3], [2], [4, 5]]


def row(*tokens):
    return SFTRow(list(tokens), [False] + [True] * (len(tokens) - 1))


def test_a_split_is_packed_and_the_report_says_so():
    data = Split([row(1, 2, 3), row(4, 5, 6, 8), row(9, 3, 4)], [row(1, 2)], Report("f", "text", 4, notes=["plain"]))
    made = pack(data, lambda text: (text,), 6)
    both = PackedRow([1, 2, 3, 9, 3, 4], [False, True, True, False, True, True], [3, 3])
    assert made.train == [both, PackedRow([4, 5, 6, 8], [False, True, True, True], [4])]
    assert made.validation == [PackedRow([1, 2], [False, True], [2])]
    said = "packed: 3 examples in 2 rows of 6 tokens, 16.7% padding; 1 held-out examples in 1 rows"
    assert made.report.notes == ["plain", said] and data.report.notes == ["plain"]


def test_positions_start_anew_in_every_segment():
    made = packed([PackedRow([1, 2, 3, 9, PAD], [False, True, True, False, True], [3, 2])], PAD, 6)
    np.testing.assert_array_equal(made.tokens, [[1, 2, 3, 9, PAD, PAD]])
    np.testing.assert_array_equal(made.mask, [[1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(made.loss_mask, [[0, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(made.segments, [[0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(made.positions, [[0, 1, 2, 0, 1, 0]])


def test_both_texts_of_a_pair_share_a_row_and_end_where_it_says():
    short = [PairRow(row(1, 2, 3), row(1, 2)), PairRow(row(4, 5), row(4, 6))]
    data = Split([*short, PairRow(row(8, 9), row(8, 1, 2, 3, 4))], [], Report("f", "pairs", 3))
    rows = pack(data, lambda pair: (pair.chosen, pair.rejected), 10).train
    made = packed_pairs(rows, PAD, 10, 2)
    np.testing.assert_array_equal(made.valid, [[True, True], [True, False]])
    np.testing.assert_array_equal(made.texts.tokens, [[1, 2, 3, 1, 2, 4, 5, 4, 6, 7], [8, 9, 8, 1, 2, 3, 4, 7, 7, 7]])
    ends = [made.texts.tokens[0][made.chosen[0]], made.texts.tokens[0][made.rejected[0]]]
    np.testing.assert_array_equal(ends, [[3, 5], [2, 6]])
    assert (made.chosen[1, 0], made.rejected[1, 0]) == (1, 6)
