"""Bootstrap intervals over the prompts of an evaluation (Efron 1979, https://doi.org/10.1214/aos/1176344552)."""

from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 2000
SEED = 0
_ALIVE = 2_000_000  # counts in memory at once


def bootstrap_interval(statistic: Callable[[np.ndarray], np.ndarray], prompts: int) -> list[float] | None:
    """95 % percentile interval of a statistic over RESAMPLES resamples of `prompts` prompts, drawn with SEED.

    `statistic` maps counts, float64 [R, N], of how often each of N prompts was drawn in each of R resamples to the
    values of the statistic [R]. None for fewer than two prompts, which say nothing about others.
    """
    if prompts < 2:
        return None
    values = np.concatenate([statistic(counts) for counts in _resamples(prompts)])
    return np.quantile(values, [0.025, 0.975]).tolist()


def _resamples(prompts: int) -> Iterator[np.ndarray]:
    rng, size = np.random.default_rng(SEED), max(1, _ALIVE // prompts)
    for start in range(0, RESAMPLES, size):
        number = min(size, RESAMPLES - start)
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), number).astype(np.float64)
