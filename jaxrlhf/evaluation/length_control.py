"""Win rate at equal length: Dubois et al. 2024 (https://arxiv.org/abs/2404.04475), as far as it applies to scores.

AlpacaEval asks a judge which of two answers is better and models the probability by a logistic regression on the
difference of their lengths; the length-controlled win rate is its prediction at length difference 0. Here a reward
judges. The term for the difficulty of an instruction, which is estimated from many models, is left out:

    p_i = sigmoid(theta + phi * tanh(d_i / std(d))),    length-controlled win rate = sigmoid(theta)

d_i is the difference in characters between the answers to prompt i, and the outcome of a prompt is 1 for a win, 0 for a
loss and 1/2 for a tie. theta and phi maximise the likelihood less PENALTY / 2 * phi^2, a normal prior of standard
deviation 10, which keeps phi finite where length alone separates wins from losses.
"""

import numpy as np

PENALTY = 0.01
_STEPS, _HALVINGS = 60, 20


def length_controlled_win_rate(
    outcomes: np.ndarray, differences: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Length-controlled win rate and the coefficient phi of each of R weightings of N prompts, both float64 [R].

    Args:
        outcomes: 1, 1/2 or 0 for each prompt, float64 [N].
        differences: length of the answer less that of its rival, float64 [N].
        counts: weight of each prompt in each weighting, float64 [R, N]; ones for the data themselves.

    Where all prompts of a weighting are won (or lost), the rate is 1 (or 0) and phi 0. Where lengths do not differ the
    rate is the mean outcome.
    """
    total = counts.sum(1)
    mean = counts @ differences / total
    variance = np.maximum(counts @ differences**2 / total - mean**2, 0)
    scale = np.where(variance > 1e-12 * (1 + mean**2), np.sqrt(variance), np.inf)  # inf: d / std counts as 0
    features = np.tanh(differences / scale[:, None])
    won = counts @ outcomes / total
    theta, phi = _fit(outcomes, features, counts)
    decided = (won <= 0) | (won >= 1)
    return np.where(decided, won, _sigmoid(theta)), np.where(decided, 0.0, phi)


def _fit(outcomes: np.ndarray, features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method, with steps halved until the likelihood does not fall, for all weightings at once."""
    theta, phi = np.zeros(len(counts)), np.zeros(len(counts))
    active = np.arange(len(counts))
    for _ in range(_STEPS):
        x, weight, start = features[active], counts[active], (theta[active], phi[active])
        p = _sigmoid(start[0][:, None] + start[1][:, None] * x)
        residual, curvature = weight * (outcomes - p), weight * p * (1 - p)
        gradient = residual.sum(1), (residual * x).sum(1) - PENALTY * start[1]
        a, b, c = curvature.sum(1), (curvature * x).sum(1), (curvature * x**2).sum(1) + PENALTY
        determinant = np.maximum(a * c - b * b, 1e-300)
        step = (c * gradient[0] - b * gradient[1]) / determinant, (a * gradient[1] - b * gradient[0]) / determinant
        least = _objective(*start, outcomes, x, weight)
        least -= 1e-12 * (1 + np.abs(least))  # rounding is no fall
        size, new = np.ones(len(active)), start
        for _ in range(_HALVINGS):  # the likelihood is concave: some shorter step in this direction raises it
            new = np.clip(start[0] + size * step[0], -50, 50), start[1] + size * step[1]
            worse = _objective(*new, outcomes, x, weight) < least
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        theta[active], phi[active] = new
        active = active[np.abs(new[0] - start[0]) + np.abs(new[1] - start[1]) > 1e-8]
        if not len(active):
            break
    return theta, phi


def _objective(
    theta: np.ndarray, phi: np.ndarray, outcomes: np.ndarray, features: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Log-likelihood less the penalty, [R]."""
    logits = theta[:, None] + phi[:, None] * features
    return (counts * (outcomes * logits - np.logaddexp(0, logits))).sum(1) - PENALTY / 2 * phi**2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
