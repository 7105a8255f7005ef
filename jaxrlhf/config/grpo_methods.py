"""The methods of `grpo.method`: the components of each, and the options that only some of them use."""

import math
from typing import Literal, NamedTuple

Method = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "luspo",
    "gmpo",
    "cispo",
    "sapo",
    "clip_cov",
    "kl_cov",
    "gdpo",
    "pass_at_k",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "gpg",
    "online_dpo",
]


class Recipe(NamedTuple):
    """The components of a method. Numbers are defaults, from the method's paper where it gives them."""

    advantage: Literal[
        "scaled",
        "centred",
        "leave_one_out",
        "gpg",
        "decoupled",
        "pass_at_k",
        "greedy",
        "whitened_tokens",
        "whitened_group",
        "pairs",
    ]
    """Advantage estimator (algorithms/groups.py). pairs: none; best and worst response of a group are a DPO pair."""
    loss: Literal["clip", "gspo", "gmpo", "cispo", "sapo", "clip_cov", "kl_cov", "reinforce", "dpo"]
    """clip: PPO's. reinforce: -A log pi, with one optimizer step per rollout."""
    normalise: Literal["sequence", "constant", "token", "sum"]
    """Loss aggregation (`algorithms.grpo.token_weights`). sum: sum over tokens, mean over responses."""
    cliprange: float | None
    cliprange_high: float | None
    kl_coef: float
    kl_in: Literal["loss", "reward"] = "loss"
    max_refills: int = 0

    @property
    def needs_group(self) -> bool:
        """True if a response is compared with other responses to its prompt."""
        return self.advantage not in ("greedy", "whitened_tokens")


RECIPES: dict[Method, Recipe] = {
    "grpo": Recipe("scaled", "clip", "sequence", 0.2, 0.2, 0.04),
    "dr_grpo": Recipe("centred", "clip", "constant", 0.2, 0.2, 0.0),
    "dapo": Recipe("scaled", "clip", "token", 0.2, 0.28, 0.0, max_refills=3),
    "bnpo": Recipe("scaled", "clip", "token", 0.2, 0.2, 0.0),
    "gspo": Recipe("scaled", "gspo", "sequence", 3e-4, 4e-4, 0.0),
    "luspo": Recipe("scaled", "gspo", "sum", 3e-4, 4e-4, 0.0),
    "gmpo": Recipe("scaled", "gmpo", "sequence", 1 - math.exp(-0.4), math.exp(0.4) - 1, 0.0),
    "cispo": Recipe("scaled", "cispo", "token", 1.0, 4.0, 0.0),  # weights up to 5 (https://arxiv.org/abs/2510.13786)
    "sapo": Recipe("scaled", "sapo", "sequence", None, None, 0.0),
    "clip_cov": Recipe("scaled", "clip_cov", "token", 0.2, 0.2, 0.0),
    "kl_cov": Recipe("scaled", "kl_cov", "token", None, None, 0.0),
    "gdpo": Recipe("decoupled", "clip", "sequence", 0.2, 0.2, 0.04),
    "pass_at_k": Recipe("pass_at_k", "clip", "token", 0.2, 0.28, 0.0),
    "rloo": Recipe("leave_one_out", "reinforce", "sum", None, None, 0.05, "reward"),
    "reinforce_pp": Recipe("whitened_tokens", "clip", "token", 0.2, 0.2, 0.01, "reward"),
    "reinforce_pp_baseline": Recipe("whitened_group", "clip", "token", 0.2, 0.2, 0.01),
    "remax": Recipe("greedy", "reinforce", "sum", None, None, 0.0),
    "gpg": Recipe("gpg", "reinforce", "token", None, None, 0.0),
    "online_dpo": Recipe("pairs", "dpo", "sequence", None, None, 0.0),
}
"""Components of each method; docs/grpo.md helps to choose one."""

_SAMPLED = tuple(name for name, recipe in RECIPES.items() if recipe.loss != "dpo")
USED_BY: dict[str, tuple[str, ...]] = {
    "beta": ("online_dpo",),
    "dpo_loss": ("online_dpo",),
    "rejected_text": ("online_dpo",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "cov_ratio": ("clip_cov", "kl_cov"),
    "clip_cov_low": ("clip_cov",),
    "clip_cov_high": ("clip_cov",),
    "kl_cov_coef": ("kl_cov",),
    "pass_k": ("pass_at_k",),
    "mask_truncated_completions": _SAMPLED,
    "entropy_coef": _SAMPLED,
    "entropy_target": _SAMPLED,
    "top_entropy_quantile": tuple(name for name in _SAMPLED if name != "gmpo"),
}
"""Options that only some methods use; all use the others, as far as their checks do not say otherwise."""
