"""Statistics in NumPy: deviation, Pearson correlation, standard error of a mean, Wilson interval of a share."""

from collections.abc import Iterable

import numpy as np

Z95 = 1.959964  # two-sided 95 % quantile of the standard normal distribution


def deviation(a: np.ndarray) -> np.ndarray:
    """Standard deviation over the first axis, divided by n, in the dtype of `a`. The squares are of float64, in which
    those of float32 do not overflow."""
    return a.std(axis=0, dtype=np.float64).astype(a.dtype)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two arrays [N], in float64; 0 if either does not vary."""
    if len(a) < 2 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms > 0 else 0.0


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n) with the n - 1 variance; the error of a single value is 0."""
    data = np.asarray(list(values), np.float64)
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(len(data))) if len(data) > 1 else 0.0


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share (1927, https://doi.org/10.1080/01621459.1927.10502953); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share, z = successes / total, Z95
    centre = share + z * z / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return min(max(0.0, low), share), max(min(1.0, high), share)  # rounding must not exclude the share
