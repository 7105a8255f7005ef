"""The order of rows: a function of (seed, epoch), so that a data position is one integer.

The random numbers are the raw output of a bit generator, whose stream numpy promises to keep; `Generator.permutation`
carries no such promise, and a resumed run must see the same order after an upgrade.
"""

import functools

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=4)
def permutation(size: int, *seed: int) -> NDArray[np.int64]:
    """A permutation of range(size) that depends on `seed` (one or more natural numbers) and `size` alone."""
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")
    order.setflags(write=False)
    return order


def rows_at(step: int, batch_size: int, num_rows: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """Row numbers of batch `step` of an endless stream, int64 [batch_size].

    The stream is epoch after epoch of all rows: each row once per epoch, in the order `permutation(num_rows, seed,
    epoch)`, or in file order without `shuffle`. A batch may straddle two epochs; none is ragged.
    """
    assert step >= 0 and batch_size > 0 and num_rows > 0, (step, batch_size, num_rows)
    position, parts, wanted = step * batch_size, [], batch_size
    while wanted:
        epoch, start = divmod(position, num_rows)
        order = permutation(num_rows, seed, epoch) if shuffle else np.arange(num_rows)
        part = order[start : start + wanted]
        parts.append(part)
        position, wanted = position + len(part), wanted - len(part)
    return np.concatenate(parts)
