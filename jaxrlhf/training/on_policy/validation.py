"""Validation of on-policy training on held-out prompts.

Every validation uses the same random keys, so that only the policy changes between them.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import distributed, sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.kl import k1
from jaxrlhf.config import GRPOConfig, PPOConfig, RewardSource
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.metrics.keys import METRICS
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.traced import Number
from jaxrlhf.training.facts import BASELINE
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.on_policy.update import sequence_logprobs
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.training.step import from_micro_batches, to_micro_batches
from jaxrlhf.types import Params, Rollout

VALIDATION = 2**30  # folded into the run's key in place of an update's number
Reference = Callable[[], Params | None]
"""Gives the reference when it is needed: an offloaded one is moved to the device."""


class Validator:
    """Completes and scores the first `validation.max_prompts` of the held-out prompts; does nothing if there are none.
    Raises ConfigError for a `validation.metric` that is not recorded."""

    def __init__(
        self,
        config: PPOConfig | GRPOConfig,
        rows: Sequence[PromptRow],
        sampler: Sampler,
        scorer: Scorer,
        key: Array,
        teacher: ModelConfig | None = None,
    ) -> None:
        self.config, self._settings = config, config.validation
        self.rows = rows[: self._settings.max_prompts]
        self._sampler, self._scorer = sampler, scorer
        self._models = sampler.model, teacher or sampler.model  # of the policy and of the reference
        self._micro_rows = config.settings.annotation_rows(sampler.batch)  # rows of a forward pass
        self._key = jax.random.fold_in(key, VALIDATION)
        self._second: Scorer | None = None
        self._baseline: dict[str, Any] = {}
        self._history: list[float] = []  # the metric at each validation
        if not rows:
            return
        metric, known = self._settings.metric, [*METRICS, *scorer.metric_keys()]
        if metric not in known:
            raise ConfigError(f"validation.metric: no record has '{metric}'{did_you_mean(metric, known)}")
        if metric.startswith("eval/heldout") and not self._settings.reward_model:
            raise ConfigError(f"validation.metric is '{metric}' but validation.reward_model is empty")
        if self._settings.reward_model:
            source = RewardSource(model=self._settings.reward_model)
            self._second = Scorer(source, sampler.tokenizer, mesh=sampler.mesh)

    def due(self, step: int, total: int) -> bool:
        """Return True if a validation follows update number `step` (from 1)."""
        every = self._settings.eval_steps
        return bool(self.rows) and (step == total or (every > 0 and step % every == 0))

    def start(self, session: Session, step: int, policy: Params, reference: Reference) -> None:
        """Measure the initial policy, which may turn out to be the best, or read its measurements when resuming at
        `step`."""
        file, metric = session.directory / BASELINE, self._settings.metric
        if step == 0:
            metrics, scores = self._measure(session, 0, policy, reference)
            self._baseline = {"scores": scores, "metrics": metrics}
            if distributed.is_primary():
                write_whole(file, json.dumps(self._baseline) + "\n")
            if session.best and metric in metrics:
                session.save(0, metrics[metric])
            kl = f", KL {metrics['eval/kl']:.3g}" if "eval/kl" in metrics else ""
            score = f", score {metrics['eval/scores']:.4g}" if "eval/scores" in metrics else ""
            session.note(f"before training: {len(self.rows)} held-out prompts{score}{kl}")
        elif stored := distributed.on_primary(lambda: _read_baseline(file)):
            self._baseline = stored
        else:
            session.note(f"{file} is missing or damaged: no win rate against the initial policy")
        records = [self.before, *(record for record in session.records() if "eval/scores" in record)]
        self._history = [record[metric] for record in records if metric in record]

    @property
    def before(self) -> dict[str, float]:
        """Metrics of the initial policy; empty if they are not known."""
        return self._baseline.get("metrics", {})

    def run(
        self,
        session: Session,
        step: int,
        record: Metrics,
        policy: Params,
        reference: Reference,
        samples: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Validate the policy after update number `step`, whose metrics are `record`, and log samples.

        Returns `record` with the metrics of the validation: any of them may be `validation.metric`. If the reward
        fails, the update is logged and saved first; so it is after a signal, with its `samples` (`Session.evaluating`).
        """
        with session.save_on_reward_error(step, record), session.evaluating(step, record, samples):
            metrics, scores = self._measure(session, step, policy, reference)
        if self._baseline:
            pairs = zip(self._baseline["scores"], scores, strict=True)
            wins = [(new > old) + 0.5 * (new == old) for old, new in pairs if None not in (old, new)]
            if wins:
                metrics["eval/win_rate"] = float(np.mean(wins))
            for name in ("", "heldout_"):
                score = f"eval/{name}scores"
                if score in metrics and score in self.before:
                    metrics[f"eval/{name}gain"] = metrics[score] - self.before[score]
        evaluation, metric = record | metrics, self._settings.metric
        if metric in evaluation:
            self._history.append(float(evaluation[metric]))
        else:
            session.note(f"validation.metric is '{metric}', which this run does not record: no state is the best")
        return evaluation

    def should_stop_early(self, session: Session) -> bool:
        """Return True if the last `validation.patience` validations did not improve on an earlier one."""
        patience, metric, history = self._settings.patience, self._settings.metric, self._history
        if not patience:
            return False
        sign = 1 if self._settings.mode == "max" else -1
        best = max(range(len(history)), key=lambda i: sign * history[i], default=0)
        since = len(history) - 1 - best
        if since < patience:
            return False
        session.note(
            f"stopping: {metric} has not improved on {history[best]:.4g} in {since} validations "
            f"(validation.patience is {patience})"
        )
        return True

    def _measure(
        self, session: Session, step: int, policy: Params, reference: Reference
    ) -> tuple[dict[str, float], list[float | None]]:
        """Metrics, and the score of each sampled completion, None if it has none. The mean score of completions that
        are all unscored is missing."""
        count = len(self.rows)
        decoder_params = self._sampler.inference_copy(policy)
        sampled, completions = self._generate(decoder_params, greedy=False)
        greedy, greedy_completions = self._generate(decoder_params, greedy=True)
        del decoder_params
        scores = self._score(session, self._scorer, completions, sampled)
        greedy_scores = self._score(session, self._scorer, greedy_completions, greedy)
        lengths = np.asarray(sampled.response_mask)[:count].sum(axis=1)
        metrics = {
            **_mean("eval/scores", scores),
            **_mean("eval/scores_greedy", greedy_scores),
            "eval/mean_length": float(np.mean(lengths)),
            "eval/finished": float(np.mean(np.asarray(sampled.finished)[:count])),
        }
        if (reference_params := reference()) is not None:
            metrics["eval/kl"] = float(np.mean(sharding.fetch(self._kl(policy, reference_params, sampled))[:count]))
            del reference_params
        if self._second:
            metrics |= _mean("eval/heldout_scores", self._score(session, self._second, completions, sampled))
        samples = [
            {"prompt": row.text, "completion": text, "greedy": other, "score": score, "held_out": True}
            for row, text, other, score in zip(self.rows, completions, greedy_completions, scores, strict=True)
        ]
        session.log_samples(step, samples[: self.config.logging.num_samples])
        return metrics, scores

    def _generate(self, decoder_params: Params, *, greedy: bool) -> tuple[Rollout, list[str]]:
        """Responses to all held-out prompts as host arrays, filled up with the last prompt to whole forward passes, and
        the completions."""
        rows = [*self.rows, *[self.rows[-1]] * (-len(self.rows) % self._micro_rows)]
        slots = self._sampler.slots or self._sampler.batch
        slots = 0 if len(rows) <= slots else slots  # all at once needs no programs for fewer slots
        rollout, completions = self._sampler.decode(decoder_params, rows, self._key, slots=slots, greedy=greedy)
        return sharding.fetch(rollout), completions[: len(self.rows)]

    def _score(self, session: Session, scorer: Scorer, completions: list[str], rollout: Rollout) -> list[float | None]:
        rollout = jax.tree.map(lambda x: x[: len(self.rows)], rollout)
        scored = scorer.score_rows(self.rows, completions, rollout)
        for note in scored.notes:
            session.note(f"validation: {note}")
        if scored.unscored.any():
            session.note(f"validation: {scored.unscored.sum()} of {len(completions)} completions have no score")
        return scored.as_list()

    def _kl(self, policy: Params, reference: Params, rollout: Rollout) -> Array:
        placed = sharding.put_rows(rollout, self._sampler.mesh)
        parts = rollout.tokens.shape[0] // self._micro_rows
        temperature = Number(self.config.sampling.temperature)
        return sequence_kl(policy, reference, placed, models=self._models, temperature=temperature, parts=parts)


def _mean(key: str, scores: Sequence[float | None]) -> dict[str, float]:
    """The mean of the scores under `key`; nothing if there are none."""
    known = [score for score in scores if score is not None]
    return {key: float(np.mean(known, dtype=np.float32))} if known else {}


@functools.partial(jax.jit, static_argnames=("models", "parts"))
def sequence_kl(
    policy: Params,
    reference: Params,
    rollout: Rollout,
    *,
    models: tuple[ModelConfig, ModelConfig],
    temperature: Number,
    parts: int,
) -> Array:
    """The k1 estimate of KL(policy, reference) of each response, f32 [B], in nats, over `parts` micro-batches."""

    def kl(part: Rollout) -> Array:
        logprobs, ref_logprobs = (
            sequence_logprobs(params, model, part, temperature.value)[0]
            for params, model in zip((policy, reference), models, strict=True)
        )
        return jnp.sum(masked.keep(k1(logprobs, ref_logprobs), part.response_mask), axis=1)

    return from_micro_batches(jax.lax.map(kl, to_micro_batches(rollout, parts)))


def _read_baseline(file: Path) -> dict[str, Any]:
    """The metrics and scores of the initial policy; empty if the file is missing or has anything else."""
    try:
        stored = read_json(file)
    except DataError:
        return {}
    return stored if isinstance(stored.get("metrics"), dict) and isinstance(stored.get("scores"), list) else {}
