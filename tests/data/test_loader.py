import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data.loader import permutation, rows_at

sizes = st.integers(1, 40)


def stream(steps, batch_size, num_rows, seed, shuffle=True):
    return np.concatenate([rows_at(step, batch_size, num_rows, seed, shuffle) for step in range(steps)])


@settings(deadline=None)
@given(batch_size=sizes, num_rows=sizes, seed=st.integers(0, 2**63))
def test_every_row_once_per_epoch_whatever_the_batch_size(batch_size, num_rows, seed):
    rows = stream(-(-3 * num_rows // batch_size), batch_size, num_rows, seed)
    for epoch in range(3):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@settings(deadline=None)
@given(batch_size=sizes, other=sizes, num_rows=sizes, seed=st.integers(0, 9))
def test_the_order_does_not_depend_on_the_batch_size(batch_size, other, num_rows, seed):
    one, two = stream(9, batch_size, num_rows, seed), stream(9, other, num_rows, seed)
    shared = min(len(one), len(two))
    np.testing.assert_array_equal(one[:shared], two[:shared])


def test_a_step_is_all_that_resuming_needs():
    permutation.cache_clear()
    later = rows_at(123, 7, 50, 3, True)
    np.testing.assert_array_equal(later, stream(124, 7, 50, 3)[123 * 7 :])


def test_epochs_and_seeds_differ_and_without_shuffle_the_file_order_stays():
    epochs = [tuple(rows_at(e, 100, 100, s, True)) for e in range(3) for s in range(3)]
    assert len(set(epochs)) == 9
    np.testing.assert_array_equal(rows_at(1, 6, 4, 0, False), [2, 3, 0, 1, 2, 3])


def test_the_order_is_fixed_for_ever():
    """A run that resumes years later, on another numpy, sees the same order."""
    assert permutation(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
