"""Verdict on a run in sentences, and warnings to read before trusting it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.metrics.columns import Columns
from jaxrlhf.metrics.keys import METRICS, REWARDS
from jaxrlhf.metrics.statistics import wilson

MINUS = "\u2212"
LAST = 5
"""Records whose mean is the final value of a metric."""
ON_POLICY = ("ppo", "grpo")


class Change(NamedTuple):
    """A metric at the first record and at the end of a run."""

    first: float
    last: float
    """Mean of the last `window` records."""
    window: int
    noise: float
    """Standard error of last - first, from the scatter between neighbouring records; nan with fewer than 4."""

    @property
    def verb(self) -> str:
        """rose, fell, or stayed within noise."""
        difference = self.last - self.first
        if not math.isfinite(self.noise):
            return "went"
        return (
            "did not change beyond noise:" if abs(difference) < 2 * self.noise else "rose" if difference > 0 else "fell"
        )

    def __str__(self) -> str:
        way = f"{self.verb} from {show(self.first)} to {show(self.last)}"
        return f"{way} (one batch scatters by {show(self.scatter)})" if "noise" in self.verb else way

    @property
    def scatter(self) -> float:
        return self.noise / math.sqrt(1 + 1 / self.window)


def change(records: Columns, key: str) -> Change | None:
    """Change of a metric; None if fewer than two records have it."""
    _, values = records.arrays(key)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    last = window(len(values))
    # Neighbours differ by chance and a little by training: their differences have twice the variance of one record.
    scatter = float(np.std(np.diff(values)) / math.sqrt(2)) if len(values) > 3 else math.nan
    noise = scatter * math.sqrt(1 + 1 / last)
    return Change(float(values[0]), float(values[-last:].mean()), last, noise)


def window(records: int) -> int:
    """Number of last records whose mean is the final value of a metric: LAST, or a quarter of a short run's."""
    return max(1, min(LAST, records // 4))


def show(value: float) -> str:
    """A number for a sentence, with a real minus sign."""
    return f"{value:.3g}".replace("-", MINUS)


def verdict(method: str, records: Columns, baseline: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences about what training did, from its records; `baseline` is validation.json, `evaluation` evaluation.json,
    both perhaps empty."""
    if not records:
        return ["Nothing has been logged yet."]
    steps = len(records)
    unit = "update" if method in ON_POLICY else "step"
    span = f"{steps:,} {unit}{'s' if steps > 1 else ''}"
    if method in ON_POLICY:
        return _on_policy(records, baseline, span)
    if method == "reward":
        return _reward(records, evaluation, span)
    if method == "dpo":
        return _preferences(records, span)
    return _sft(records, span)


def _on_policy(records: Columns, baseline: Mapping[str, Any], span: str) -> list[str]:
    score, kl = change(records, "objective/scores"), change(records, "objective/kl")
    if score is None:
        only = records[-1].get("objective/scores")
        sentences = [
            f"One update is too few to tell anything; its score was {show(only)}."
            if only is not None
            else f"{span[:1].upper()}{span[1:]}, none with a score."
        ]
    else:
        distance = f", at a KL to the reference of {show(kl.last)} nats per response" if kl else ""
        sentences = [f"Score {score} over {span}{distance}."]
    before, after = baseline.get("metrics", {}), records.last_with("eval/scores")
    if after:
        prompts = [s for s in baseline.get("scores", []) if s is not None]
        number = f"{len(prompts)} held-out prompts" if prompts else "held-out prompts"
        start = f"went from {show(before['eval/scores'])} to" if "eval/scores" in before else "ended at"
        sentence = f"On {number} the score {start} {show(after['eval/scores'])}"
        if math.isfinite(rate := after.get("eval/win_rate", math.nan)):
            low, high = wilson(round(rate * len(prompts)), len(prompts))
            sentence += (
                f", and the policy wins {show(100 * rate)} % of them against its initial state "
                f"(95 % interval {show(100 * low)} to {show(100 * high)} %)"
            )
        sentences.append(sentence + ".")
        if {"eval/gain", "eval/heldout_gain"} <= after.keys():
            gain, other = after["eval/gain"], after["eval/heldout_gain"]
            agree = "agrees" if (gain > 0) == (other > 0) else "disagrees"
            sentences.append(f"The held-out reward model {agree}: its score changed by {show(other)}.")
    return sentences


def _reward(records: Columns, evaluation: Mapping[str, Any], span: str) -> list[str]:
    sentences = []
    accuracy, loss = change(records, "accuracy"), change(records, "loss")
    if accuracy:
        sentences.append(f"Training accuracy {accuracy} over {span}.")
    elif loss:
        sentences.append(f"Training loss {loss} over {span}.")
    else:
        sentences.append(f"{span} logged: too few to tell anything.")
    held_out = records.last_with("eval/accuracy")
    share = evaluation.get("accuracy", held_out.get("eval/accuracy"))
    unit = "pairs" if "pairs" in evaluation else "responses"
    if isinstance(share, float | int) and math.isfinite(share):
        sentence = f"It judges {show(100 * share)} % of the held-out rows right"
        if count := evaluation.get(unit, 0):
            low, high = wilson(round(share * count), count)
            sentence += f" ({count:,} {unit}, 95 % interval {show(100 * low)} to {show(100 * high)} %)"
        rule = evaluation.get("length_accuracy", held_out.get("eval/length_accuracy"))
        if isinstance(rule, float | int):
            name = evaluation.get("length_rule", "a rule of length alone")
            sentence += f'; the rule "{name}" judges {show(100 * rule)} % right'
        sentences.append(sentence + ".")
    elif correlation := records.last_with("eval/correlation"):
        sentences.append(f"On held-out rows score and target correlate at {show(correlation['eval/correlation'])}.")
    return sentences


def _preferences(records: Columns, span: str) -> list[str]:
    accuracy, margin = change(records, "rewards/accuracies"), change(records, "rewards/margins")
    loss = change(records, "loss")
    if accuracy and margin:
        sentences = [f"Accuracy of the implicit reward {accuracy} over {span}; its margin {margin}."]
    elif margin or loss:
        sentences = [f"{'Margin of the implicit reward' if margin else 'Loss'} {margin or loss} over {span}."]
    else:
        sentences = [f"{span} logged: too few to tell anything."]
    if after := records.last_with("eval/rewards/accuracies"):
        sentences.append(f"On held-out pairs its accuracy is {show(100 * after['eval/rewards/accuracies'])} %.")
    return sentences


def _sft(records: Columns, span: str) -> list[str]:
    loss = change(records, "loss")
    sentences = [f"Loss {loss} nats per token over {span}." if loss else f"{span} logged: too few to tell anything."]
    steps, losses = records.arrays("eval/loss")
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    if losses.size:
        last, best = losses[-1], losses.min()
        sentence = f"Held-out loss ended at {show(last)}"
        if last > 1.01 * best:
            sentence += f", above its best of {show(best)} at step {steps[losses.argmin()]}: the last steps overfit"
        sentences.append(sentence + ".")
    return sentences


def warnings(records: Columns) -> list[str]:
    """Lines about skipped updates, alarms, failed rewards and degenerate responses."""
    found, ends = [], records[-LAST:]

    def total(key: str) -> float:
        _, values = records.arrays(key)
        return float(values[np.isfinite(values)].sum())

    def on_at(key: str) -> np.ndarray:
        steps, values = records.arrays(key)
        return steps[values != 0]

    def last(key: str) -> float:
        values = [record[key] for record in ends if key in record]
        return float(np.mean(values)) if values else math.nan

    if skipped := total("skipped_updates"):
        steps = on_at("skipped_updates")
        found.append(
            f"{skipped:g} optimizer steps were skipped because loss or gradient was not finite (first at {steps[0]}, "
            f"last at {steps[-1]})."
        )
    for key in (key for key in METRICS if key.startswith("alarm/")):
        if len(on := on_at(key)):
            meaning = METRICS[key].removeprefix("1 if ").removesuffix(", else 0").removesuffix(", else missing")
            meaning = f"{meaning[0].upper()}{meaning[1:]}"
            still = "still on" if records[-1].get(key) else f"last at step {on[-1]}"
            found.append(
                f"Alarm: {meaning}. On in {len(on)} of {len(records)} records, first at step {on[0]}, {still}."
            )
    names = {key.split("/")[1] for key in records.metrics if key.startswith(REWARDS) and key.endswith("/errors")}
    for name in sorted(names):
        if errors := total(f"{REWARDS}{name}/errors"):
            found.append(f"The reward component {name} gave no usable answer to {errors:g} completions.")
    if (unscored := last("objective/unscored")) > 0:
        found.append(f"{100 * unscored:.3g} % of the last responses have no score and were not trained on.")
    if (finished := last("tokens/finished")) < 0.9:
        found.append(f"{100 * (1 - finished):.3g} % of the last responses were truncated at the length limit.")
    if (identical := last("tokens/identical")) > 0.5:
        found.append(f"{100 * identical:.3g} % of the last responses repeat another one of their batch.")
    if (flat := last("groups/flat") / last("groups/count")) > 0.5:
        found.append(f"In {100 * flat:.3g} % of the last groups all scores are equal: nothing is learned from them.")
    if (gap := last("val/sampler_logprob_gap")) > 0.1 and math.isnan(last("val/sampler_corrected")):
        found.append(f"Sampler and policy differ by {gap:.3g} nats per token: a sampler_correction is advised.")
    return found
