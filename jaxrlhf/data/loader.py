"""Row order as a function of (seed, epoch), so that one integer is the position in the data.

Random numbers are the raw output of a bit generator, a stream that numpy keeps stable. `Generator.permutation` is not
guaranteed to be, and a resumed run must see the same order after an upgrade.
"""

import functools

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=4)
def permutation(size: int, *seed: int) -> NDArray[np.int64]:
    """Permute range(size), determined by `size` and `seed` (one or more natural numbers); read-only."""
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")
    order.setflags(write=False)
    return order


def rows_at(step: int, batch_size: int, num_rows: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """Row numbers of the batch of `step`, int64 [batch_size].

    Batches are cut from an endless stream of epochs, each with every row once: in the order `permutation(num_rows,
    seed, epoch)`, or in file order without `shuffle`. A batch may straddle two epochs and is always full.
    """
    assert step >= 0 and batch_size > 0 and num_rows > 0, (step, batch_size, num_rows)
    position, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, start = divmod(position, num_rows)
        order = permutation(num_rows, seed, epoch) if shuffle else np.arange(num_rows)
        parts.append(order[start : start + missing])
        position, missing = position + len(parts[-1]), missing - len(parts[-1])
    return np.concatenate(parts)
