"""The panels of a plot, by method: which metrics are drawn together, and what the panel is called."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Panel(NamedTuple):
    """Metrics that are drawn on one pair of axes against the step, each with a short name for the legend.

    With `against`, the one metric is drawn against that one, coloured by the step. Without `noisy`, curves are drawn
    without a running mean.
    """

    title: str
    metrics: dict[str, str]
    against: str = ""
    noisy: bool = True


HISTOGRAM = "scores of held-out responses"
"""Title of the panel that is drawn from the evaluation.json of a reward model."""

_LEARNING_RATE = Panel("learning rate", {"learning_rate": "learning rate"}, noisy=False)
_GRADIENT = Panel(
    "gradient norm, before clipping",
    {"grad_norm": "gradient", "policy/grad_norm": "policy", "critic/grad_norm": "critic"},
)
_ROUTER = Panel("load-balancing loss of the router", {"loss/router_aux": "model", "loss/critic_router_aux": "critic"})
_LOSS = Panel("loss", {"loss": "training", "eval/loss": "held out"})
_ON_POLICY = (
    Panel(
        "score and reward",
        {"objective/scores": "score", "objective/rlhf_reward": "RLHF reward: score - coefficient x KL"},
    ),
    Panel("KL to the reference, nats per response", {"objective/kl": "training", "eval/kl": "held out"}),
    Panel("score against KL", {"objective/scores": "score"}, against="objective/kl"),
    Panel(
        "held-out score",
        {
            "eval/scores": "sampled",
            "eval/scores_greedy": "greedy",
            "eval/heldout_scores": "by validation.reward_model",
        },
    ),
    Panel("policy loss", {"loss/policy_avg": "policy loss"}),
    Panel("value loss", {"loss/value_avg": "value loss"}),
    Panel(
        "response length, tokens",
        {"tokens/mean_length": "mean", "tokens/min_length": "shortest", "tokens/max_length": "longest"},
    ),
    Panel("entropy, nats per token", {"objective/entropy_per_token": "entropy"}),
    _ROUTER,
    _LEARNING_RATE,
    Panel("learning rate of the critic", {"critic/learning_rate": "learning rate"}, noisy=False),
    _GRADIENT,
)
PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        _LOSS,
        Panel("entropy, nats per token", {"entropy": "training", "eval/entropy": "held out"}),
        _ROUTER,
        _LEARNING_RATE,
        _GRADIENT,
    ),
    "reward": (
        _LOSS,
        Panel("accuracy", {"accuracy": "training", "eval/accuracy": "held out"}),
        Panel("margin of chosen over rejected", {"margin": "training", "eval/margin": "held out"}),
        Panel("absolute error", {"absolute_error": "training", "eval/absolute_error": "held out"}),
        Panel("mean score", {"mean_reward": "training", "eval/mean_reward": "held out"}),
        Panel(HISTOGRAM, {}),
        _ROUTER,
        _LEARNING_RATE,
        _GRADIENT,
    ),
    "dpo": (
        _LOSS,
        Panel("accuracy", {"rewards/accuracies": "training", "eval/rewards/accuracies": "held out"}),
        Panel("margin of implicit rewards", {"rewards/margins": "training", "eval/rewards/margins": "held out"}),
        Panel("implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        Panel("log-probability, nats per response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
        Panel("KL to the reference, nats per response", {"kl": "KL"}),
        _ROUTER,
        _LEARNING_RATE,
        _GRADIENT,
    ),
    "ppo": _ON_POLICY,
    "grpo": _ON_POLICY,
    "distill": (
        _LOSS,
        Panel("forward KL, nats per token", {"distill/forward_kl": "training", "eval/distill/forward_kl": "held out"}),
        Panel("reverse KL, nats per token", {"distill/reverse_kl": "training", "eval/distill/reverse_kl": "held out"}),
        Panel("same most probable token", {"distill/agreement": "training", "eval/distill/agreement": "held out"}),
        Panel("entropy, nats per token", {"entropy": "student", "distill/teacher_entropy": "teacher"}),
        _ROUTER,
        _LEARNING_RATE,
        _GRADIENT,
    ),
}


def method_of(keys: set[str]) -> str:
    """The method whose panels draw most of these metrics, for a run without a run.json."""
    return max(PANELS, key=lambda method: len({key for panel in PANELS[method] for key in panel.metrics} & keys))


def panels_of(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[Panel]:
    """The panels of (method, records) of one or several runs: those of their methods that any of them has metrics for,
    in order; panels of one title are joined."""
    logged = {key for _, records in runs for record in records for key in record}
    joined: dict[str, Panel] = {}
    for method in dict.fromkeys(method for method, _ in runs):
        for panel in PANELS[method]:
            before = joined.get(panel.title, panel)
            metrics = {key: name for key, name in {**before.metrics, **panel.metrics}.items() if key in logged}
            joined[panel.title] = panel._replace(metrics=metrics)
    return [panel for panel in joined.values() if panel.metrics or panel.title == HISTOGRAM]
