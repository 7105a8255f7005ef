"""Reward models, trained on preferences, rankings, labels or scores."""

import functools
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import distributed, sharding
from jaxrlhf.config import RewardConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split, pair_rows
from jaxrlhf.data.labelled import label_rows, ranking_rows, score_rows
from jaxrlhf.data.packing import PackedRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import NumericsError
from jaxrlhf.evaluation.reward_metrics import KEYS, HeldOut, evaluation, summary
from jaxrlhf.files import write_whole
from jaxrlhf.models import ModelConfig
from jaxrlhf.training import pretrained
from jaxrlhf.training.facts import EVALUATION
from jaxrlhf.training.reward.loss import Objective, objective_of, response_loss, response_scores, scores_with_router
from jaxrlhf.training.session import Session
from jaxrlhf.training.step import Metrics, Spec, supervised_step
from jaxrlhf.training.supervised import SupervisedTrainer
from jaxrlhf.types import PackedPairs, Params, Responses, TrainState


@functools.partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, frozen: Params, batch: Responses | PackedPairs, key: jax.Array, *, spec: Spec
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` is the trunk if it is frozen or under adapters; `key` is the run's."""
    count = jnp.sum(batch.real[..., 0])

    def loss(params: Params, rows: Responses | PackedPairs, keys: jax.Array | None) -> tuple[jax.Array, Metrics]:
        scores, router = scores_with_router(params, rows, spec.model, keys)
        value, metrics = response_loss(scores, rows.real, rows.target, count, spec.objective)
        extremes = {
            "max_reward_max": jnp.where(rows.real, scores, -jnp.inf).max(),
            "min_reward_max": jnp.where(rows.real, -scores, -jnp.inf).max(),
        }
        return value, metrics | extremes | router

    state, metrics = supervised_step(loss, state, frozen, batch, key, spec)
    metrics["max_reward"], metrics["min_reward"] = metrics.pop("max_reward_max"), -metrics.pop("min_reward_max")
    return state, metrics


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, batch: Responses | PackedPairs, *, model: ModelConfig) -> jax.Array:
    """`response_scores` of held-out responses, without dropout."""
    return response_scores(params, batch, model, None)


TARGETS = {"pairwise": "margin", "ties": "tied", "classification": "label", "regression": "score"}
"""The field of a row that a loss trains on, as `Responses.target`."""


class RewardTrainer(SupervisedTrainer[RewardConfig]):
    """Train a reward model from `config.model` on the rows of `config.data`: `.train()`, `.save_pretrained(folder)`.

    Errors in the config, the data or the model are raised here, before training begins.
    """

    def __init__(self, config: RewardConfig, *, fresh: bool = False) -> None:
        super().__init__(config, role="reward", head=config.head, fresh=fresh)
        self.data = _rows(config, self.tokenizer)
        objective = objective_of(config)
        self.use_rows(self.data, _evaluation_keys(objective), texts=2)
        self._group = max(len(batching.texts(row)) for row in chain(self.data.train, self.data.validation))
        self.load(objective, frozen_trunk=config.frozen_trunk)
        self.evaluation: dict[str, Any] = {}
        """The newest evaluation in full; empty before the first."""

    def about(self) -> str:
        """Model, precision, devices, tokenizer and data, and the format of prompts to score if it is not the
        tokenizer's."""
        lines = [super().about()]
        if any(source.template for source in self.config.data.sources) and self.tokenizer.has_chat:
            lines.append(
                "data.template makes plain text of the rows: the model is exported without the tokenizer's chat "
                "template, and reads the prompts that it scores as plain text"
            )
        return "\n".join(lines)

    def _first_row(self) -> list[str]:
        first = batching.texts(self.data.train[0])
        names = {1: ["response"], 2: ["chosen", "rejected"]}.get(len(first))
        names = names or [f"rank {k + 1}" for k in range(len(first))]
        return [f"{name}: {self.tokenizer.decode(text.tokens)}" for name, text in zip(names, first, strict=True)]

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        with self.session() as session:
            self._resume(session)
            for step in session.steps():
                batch = self.batch(step)
                self.state.value, metrics = update(self.state.value, self.frozen, batch, self.key, spec=self.spec)
                self._end_step(session, step + 1, metrics | self.epochs(step + 1))
            self._results = session.finish()
            if session.restore_best():
                self._results |= self._evaluate()
            self._write_evaluation(session)
            folder = session.export(self.save_pretrained)
            if note := distributed.on_primary(lambda: pretrained.padding_note(folder)):
                session.note(note)
        return self._results

    def batch(self, step: int) -> Responses | PackedPairs:
        """The training batch of a step, on the mesh."""
        return self.collate([self.rows.train[i] for i in self.order(step)], self.columns)

    def collate(self, rows: Sequence[Any], columns: int | None = None) -> Responses | PackedPairs:
        """A batch of these rows, on the mesh, as wide as the longest of them or `columns`."""
        if self.config.train.packing:
            pairs = batching.packed_pairs(rows, self.tokenizer.pad_id, self.width, self._max_pairs)
            return sharding.put_rows(pairs, self.mesh)
        field = TARGETS.get(self.config.loss)
        targets = [float(getattr(row, field)) if field else 0.0 for row in rows]
        length = columns or self.padded_length(rows)
        responses = batching.responses(rows, targets, self.tokenizer.pad_id, length, self._group)
        return sharding.put_rows(responses, self.mesh)

    def eval_batches(self, rows: Sequence[Any]) -> Iterator[Responses | PackedPairs]:
        """Batches of held-out rows, the last one filled up with copies of a row."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            yield self.collate([*part, *[part[0]] * (size - len(part))])

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows; empty if there are none. Raises NumericsError for scores that are not
        finite."""
        rows, size = self.rows.validation, self.config.train.eval_batch_size
        if not rows:
            return {}
        parts: list[tuple[np.ndarray, ...]] = []
        for start, batch in zip(range(0, len(rows), size), self.eval_batches(rows), strict=True):
            distributed.check_stop()
            count = len(rows[start : start + size])
            arrays = evaluate(self.params, batch, model=self.model).astype(np.float32), batch.real, batch.target
            scores, real, target = (array[:count] for array in sharding.fetch(arrays))
            valid = real[..., 0]
            parts.append((scores[valid], real[valid], target[valid]))
        scores, real, target = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not np.isfinite(scores).all():
            raise NumericsError(
                "the reward model's scores of held-out rows are not finite; start over with --fresh and a lower "
                "optim.learning_rate"
            )
        arrays = jnp.asarray(scores), jnp.asarray(real), jnp.asarray(target)
        metrics = response_loss(*arrays, len(scores), self.spec.objective)[1]
        lengths = [lengths for row in rows for lengths in _response_lengths(row, self._group)]
        held_out = HeldOut(scores, real, target, np.asarray(lengths))
        self.evaluation = evaluation(held_out, self.config.loss)
        metrics |= {key: self.evaluation[key] for key in KEYS[self.config.loss]}
        return {f"eval/{key}": float(value) for key, value in metrics.items()}

    def _write_evaluation(self, session: Session) -> None:
        """Write evaluation.json and print its summary, if rows are held out."""
        if not self.rows.validation:
            return
        if not self.evaluation:  # the run was already complete
            self._evaluate()
        path = session.directory / EVALUATION
        if distributed.is_primary():
            write_whole(path, json.dumps(self.evaluation, indent=2) + "\n")
        for line in [*summary(self.evaluation), f"wrote {path}"]:
            session.note(line)


def _rows(config: RewardConfig, tokenizer: Tokenizer) -> Split[Any]:
    """The rows that the loss trains on. Raises DataError and ConfigError."""
    if config.loss in ("pairwise", "ties"):
        return pair_rows(config.data, tokenizer, margins=config.margins, ties=config.loss == "ties")
    read = {"ranking": ranking_rows, "classification": label_rows, "regression": score_rows}[config.loss]
    return read(config.data, tokenizer)


def _evaluation_keys(objective: Objective) -> list[str]:
    scores = jnp.zeros((2, 2))
    metrics = jax.eval_shape(lambda: response_loss(scores, scores == 0, scores[:, 0], 2, objective))[1]
    return [f"eval/{key}" for key in (*metrics, *KEYS[objective.loss])]


def _response_lengths(row: Any, group: int) -> list[list[int]]:
    """Response tokens of each text of a row, 0 where there is none; of a packed row, those of each pair."""
    if isinstance(row, PackedRow):
        starts = np.cumsum([0, *row.lengths[:-1]])
        return np.add.reduceat(np.array(row.loss_mask, int), starts).reshape(-1, 2).tolist()
    sizes = [sum(text.loss_mask) for text in batching.texts(row)]
    return [sizes + [0] * (group - len(sizes))]
