"""Combine the scores of an ensemble of reward models into one conservative score."""

import numpy as np
from jaxtyping import Float


def combine_scores(
    scores: Float[np.ndarray, "K *shape"], combine: str, spread_coef: float
) -> Float[np.ndarray, "*shape"]:
    """Mean, minimum, or mean minus `spread_coef` standard deviations over the K models.

    The latter two are the worst-case and the uncertainty-weighted objective of https://arxiv.org/abs/2310.02743, which
    uses the variance; the standard deviation has the unit of the scores.
    """
    if combine == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - np.float32(spread_coef) * scores.std(axis=0) if combine == "mean_minus_std" else mean
