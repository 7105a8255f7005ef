"""What several reward models say together: a policy that pleases one by its mistakes seldom pleases all."""

import numpy as np
from jaxtyping import Float


def combined(scores: Float[np.ndarray, "K *shape"], combine: str, spread_coef: float) -> Float[np.ndarray, "*shape"]:
    """One score of those of K models: their mean, the least, or the mean less `spread_coef` times the standard
    deviation between the models.

    The latter two are the worst-case and the uncertainty-weighted objective of https://arxiv.org/abs/2310.02743, which
    has the variance in place of the deviation; that is in the unit of the scores.
    """
    if combine == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - np.float32(spread_coef) * scores.std(axis=0) if combine == "mean_minus_std" else mean
