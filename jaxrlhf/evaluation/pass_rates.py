"""pass@k: the probability that at least one of k completions of a prompt passes."""

import math
from collections.abc import Sequence


def pass_at_k(completions: int, passed: int, k: int) -> float:
    """Unbiased estimate of pass@k from `passed` of `completions` completions: 1 - C(n - c, k) / C(n, k) (Chen et al.
    2021, https://arxiv.org/abs/2107.03374, eq. 1), the share of all k-subsets with a completion that passes.

    Raises ValueError unless 1 <= k <= completions.
    """
    if not 1 <= k <= completions:
        raise ValueError(f"pass@{k} cannot be estimated from {completions} completions")
    return 1 - math.comb(completions - passed, k) / math.comb(completions, k)


def numbers(completions: int) -> Sequence[int]:
    """The k to report: the powers of two up to the number of completions, and that number."""
    return sorted({2**i for i in range(completions.bit_length())} | {completions})
