"""Held-out prompts in an on-policy run: what the policy answers, what that is worth, and whether it still gets better.

The random keys are the same at every validation, so what changes is the policy.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.kl import k1
from jaxrlhf.config import GRPOConfig, PPOConfig, RewardSource
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.data.datasets import PromptRow, columns
from jaxrlhf.errors import ConfigError
from jaxrlhf.files import write_whole
from jaxrlhf.metrics.keys import METRICS
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.training.on_policy.learner import Learner
from jaxrlhf.training.on_policy.policy import sequence_logprobs
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.training.step import from_micro_batches, to_micro_batches
from jaxrlhf.types import Params, Rollout

VALIDATION = 2**30  # folded into the run's key in place of an update's number
BASELINE = "validation.json"  # what the policy of step 0 scored


class Validator:
    """The held-out prompts of a run, scored `at_once` rows at a time. Raises ConfigError for a metric that no record
    has."""

    def __init__(
        self, config: PPOConfig | GRPOConfig, rows: Sequence[PromptRow], at_once: int, sampler: Sampler, scorer: Scorer
    ) -> None:
        self.config, self.sampler, self.scorer, self._at_once = config, sampler, scorer, at_once
        self.rows = rows[: config.validation.max_prompts]
        metric = config.validation.metric
        known = [*METRICS, *scorer.metrics()]
        if metric not in known:
            raise ConfigError(f"validation.metric: no record has '{metric}'{did_you_mean(metric, known)}")
        if metric.startswith("eval/heldout") and not config.validation.reward_model:
            raise ConfigError(f"validation.metric is '{metric}' but validation.reward_model is empty")
        self.second: Scorer | None = None
        if config.validation.reward_model:
            source = RewardSource(model=config.validation.reward_model)
            self.second = Scorer(source, sampler.tokenizer, mesh=sampler.mesh)
        self._baseline: dict[str, Any] = {}
        self._seen: list[float] = []  # the metric at each validation

    def due(self, step: int, total: int) -> bool:
        """Whether a validation follows update number `step` (from 1)."""
        every = self.config.validation.eval_steps
        return step == total or (every > 0 and step % every == 0)

    def begin(self, session: Session, learner: Learner, key: Array) -> None:
        """Measure the policy of step 0, which may turn out to be the best; or read what was measured then."""
        file, metric = session.run.directory / BASELINE, self.config.validation.metric
        if int(learner.state.value.step) == 0:
            metrics, scores = self._measure(session, 0, learner, key)
            self._baseline = {"scores": scores, "metrics": metrics}
            write_whole(file, json.dumps(self._baseline) + "\n")
            if session.best and metric in metrics:
                session.save(0, learner.state.value, metrics[metric])
            kl = f", KL {metrics['eval/kl']:.3g}" if "eval/kl" in metrics else ""
            score = f"score {metrics['eval/scores']:.4g}"
            session.logger.note(f"before training: {len(self.rows)} held-out prompts, {score}{kl}")
        elif file.is_file():
            self._baseline = json.loads(file.read_text(encoding="utf-8"))
        else:
            session.logger.note(f"{file} is gone: no win rate against step 0")
        records = [self.before, *(record for record in session.records() if "eval/scores" in record)]
        self._seen = [record[metric] for record in records if metric in record]

    @property
    def before(self) -> dict[str, float]:
        """What was measured at step 0; empty where that is not known."""
        return self._baseline.get("metrics", {})

    def run(self, session: Session, step: int, learner: Learner, key: Array) -> dict[str, float]:
        """Answer the held-out prompts, log samples, and return the record of this validation."""
        metrics, scores = self._measure(session, step, learner, key)
        if self._baseline:
            before = np.asarray(self._baseline["scores"])
            wins = (np.asarray(scores) > before) + 0.5 * (np.asarray(scores) == before)
            metrics["eval/win_rate"] = float(np.mean(wins))
            metrics["eval/gain"] = metrics["eval/scores"] - self.before["eval/scores"]
            if self.second and "eval/heldout_scores" in self.before:
                metrics["eval/heldout_gain"] = metrics["eval/heldout_scores"] - self.before["eval/heldout_scores"]
        return metrics

    def worth(self, session: Session, metrics: Metrics) -> float | None:
        """What the state of this validation is worth; None, and a word about it, where nothing says so."""
        metric = self.config.validation.metric
        if metric in metrics:
            self._seen.append(float(metrics[metric]))
            return self._seen[-1]
        session.logger.note(
            f"validation.metric is '{metric}', which the records of this run do not have: nothing is best"
        )
        return None

    def patience_is_over(self, session: Session) -> bool:
        """Whether the last `patience` validations were no better than one before them."""
        patience, metric, seen = self.config.validation.patience, self.config.validation.metric, self._seen
        if not patience:
            return False
        sign = 1 if self.config.validation.mode == "max" else -1
        best = max(range(len(seen)), key=lambda i: sign * seen[i], default=0)
        if len(seen) - 1 - best < patience:
            return False
        session.logger.note(
            f"stopping: {metric} has not improved on {seen[best]:.4g} in {len(seen) - 1 - best} validations "
            f"(validation.patience is {patience})"
        )
        return True

    def _measure(
        self, session: Session, step: int, learner: Learner, key: Array
    ) -> tuple[dict[str, float], list[float]]:
        """(the record, the score of each sampled answer)."""
        rows, texts, n = self.rows, [row.text for row in self.rows], len(self.rows)
        made = self.sampler.copy(learner.policy)
        sampled, said = self._answer(*made, key, greedy=False)
        best, best_said = self._answer(*made, key, greedy=True)
        del made
        scores = self._score(session, self.scorer, texts, said, sampled)
        greedy = self._score(session, self.scorer, texts, best_said, best)
        lengths = np.asarray(sampled.response_mask)[:n].sum(axis=1)
        metrics = {
            "eval/scores": float(np.mean(scores)),
            "eval/scores_greedy": float(np.mean(greedy)),
            "eval/mean_length": float(np.mean(lengths)),
            "eval/finished": float(np.mean(np.asarray(sampled.finished)[:n])),
        }
        if learner.reference is not None:
            metrics["eval/kl"] = float(np.mean(np.asarray(self._kl(learner.policy, learner.reference, sampled))[:n]))
        if self.second:
            metrics["eval/heldout_scores"] = float(np.mean(self._score(session, self.second, texts, said, sampled)))
        shown = zip(rows, said, best_said, scores, strict=True)
        session.logger.samples(
            step,
            [
                {"prompt": row.text, "completion": text, "greedy": plain, "score": float(score), "held_out": True}
                for row, text, plain, score in list(shown)[: self.config.logging.num_samples]
            ],
        )
        return metrics, [float(score) for score in scores]

    def _answer(self, model: ModelConfig, copy: Params, key: Array, *, greedy: bool) -> tuple[Rollout, list[str]]:
        """The whole of the held-out prompts, filled up with the last one to whole forward passes, on the host."""
        rows = [*self.rows, *[self.rows[-1]] * (-len(self.rows) % self._at_once)]
        sampling = dataclasses.replace(self.config.sampling, greedy=greedy)
        tokenizer = self.sampler.tokenizer
        made = engine.generate_in_slots(
            copy, model, self.sampler.prompts(rows), jax.random.fold_in(key, VALIDATION), sampling,
            tokenizer.stop_ids, tokenizer.pad_id,
            slots=min(len(rows), self.sampler.slots or self.sampler.batch),
            columns=self.sampler.columns, mesh=self.sampler.mesh,
        )  # fmt: skip
        made, texts = decode_completions(made, tokenizer, sampling.stop_strings)
        return made, texts[: len(self.rows)]

    def _score(
        self, session: Session, scorer: Scorer, prompts: list[str], texts: list[str], rollout: Rollout
    ) -> np.ndarray:
        real = jax.tree.map(lambda x: x[: len(self.rows)], rollout)
        scored = scorer.score(prompts, texts, real, columns(self.rows), messages=[row.messages for row in self.rows])
        for note in scored.notes:
            session.logger.note(f"validation: {note}")
        return scored.totals

    def _kl(self, policy: Params, reference: Params, rollout: Rollout) -> Array:
        placed = sharding.put_rows(rollout, self.sampler.mesh)
        parts = rollout.tokens.shape[0] // self._at_once
        temperature = self.config.sampling.temperature
        return sequence_kl(policy, reference, placed, model=self.sampler.model, temperature=temperature, parts=parts)


@functools.partial(jax.jit, static_argnames=("model", "temperature", "parts"))
def sequence_kl(
    policy: Params, reference: Params, rollout: Rollout, *, model: ModelConfig, temperature: float, parts: int
) -> Array:
    """k1 of each response, f32 [B], in nats, by forward passes over `parts` slices."""

    def rows(part: Rollout) -> Array:
        both = [sequence_logprobs(params, model, part, temperature)[0] for params in (policy, reference)]
        return jnp.sum(masked.keep(k1(*both), part.response_mask), axis=1)

    return from_micro_batches(jax.lax.map(rows, to_micro_batches(rollout, parts)))
