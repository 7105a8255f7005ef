"""A reward model from preferences, rankings, labels or scores: a better answer should score higher than a worse one."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding, weights
from jaxrlhf.compilation import Ahead
from jaxrlhf.config import RewardConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split, pair_rows
from jaxrlhf.data.labelled import label_rows, ranking_rows, score_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import PackedRow, pack
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import NumericsError
from jaxrlhf.evaluation.reward_metrics import KEYS, HeldOut, evaluation, summary
from jaxrlhf.files import write_whole
from jaxrlhf.models import ModelConfig
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training import session as loop
from jaxrlhf.training.optim import Optimizer, make_optimizer
from jaxrlhf.training.reward.loss import Objective, objective_of, response_loss, response_scores
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Metrics, apply, dropout_keys, gradients, one_role
from jaxrlhf.types import PackedPairs, Params, Responses, TrainState


@functools.partial(
    jax.jit, static_argnames=("model", "objective", "optimizer", "num_micro", "mesh"), donate_argnames="state"
)
def update(
    state: TrainState,
    frozen: Params,
    batch: Responses | PackedPairs,
    key: jax.Array,
    *,
    model: ModelConfig,
    objective: Objective,
    optimizer: Optimizer,
    num_micro: int,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` holds the trunk where it does not train, or is under adapters.

    `key` is the run's; each step folds its number in.
    """
    count = jnp.sum(batch.real[..., 0])
    row_keys = dropout_keys(model, key, state.step, rows=batch.real.shape[0])

    def loss(params: Params, rows: tuple[Responses | PackedPairs, jax.Array | None]) -> tuple[jax.Array, Metrics]:
        part = rows[0]
        found = response_scores({**frozen, **params}, part, model, rows[1])
        value, metrics = response_loss(found, part.real, part.target, count, objective)
        spread = {
            "max_reward_max": jnp.where(part.real, found, -jnp.inf).max(),
            "min_reward_max": jnp.where(part.real, -found, -jnp.inf).max(),
        }
        return value, metrics | spread

    grads, metrics = gradients(loss, state.params["reward"], (batch, row_keys), num_micro)
    metrics["max_reward"], metrics["min_reward"] = metrics.pop("max_reward_max"), -metrics.pop("min_reward_max")
    state, norms = apply(state, {"reward": grads}, metrics["loss"], (("reward", optimizer),))
    state = dataclasses.replace(state, step=state.step + 1)
    return sharding.constrain(state, mesh), metrics | one_role(norms)


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, batch: Responses | PackedPairs, *, model: ModelConfig) -> jax.Array:
    """Scores of held-out responses, as those of `response_scores`, without dropout."""
    return response_scores(params, batch, model, None)


class RewardTrainer:
    """Train a reward model from `config.model` on the rows of `config.data`: `.train()`, `.save_pretrained(folder)`.

    What can be wrong with the config, the data or the model is raised here, before training begins. With `ahead` the
    programs are compiled while the weights load, for a trainer that is sure to train; else when training begins. With
    `abstract` nothing is loaded and nothing can be trained: shapes stand for parameters, for `jaxrlhf plan`.
    """

    def __init__(
        self, config: RewardConfig, *, fresh: bool = False, ahead: bool = False, abstract: bool = False
    ) -> None:
        self.config, self._fresh = config, fresh
        train = config.train
        self.mesh = sharding.make_mesh(config.mesh)
        micro = train.micro_batch_size or train.batch_size
        sharding.check_rows(micro, self.mesh, "train.micro_batch_size, or train.batch_size without it")
        sharding.check_rows(train.eval_batch_size, self.mesh, "train.eval_batch_size")
        self._num_micro = train.batch_size // micro
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = _rows(config, self.tokenizer)
        self._objective = objective_of(config)
        loop.check_metric(config, _evaluated(self._objective), bool(self.data.validation))
        init_key, self._key, _, lora_key = setup.keys(config.seed)
        storage = setup.param_dtype(config)
        self.model = setup.model_config(config.model, self.tokenizer, config.head, config.lora)
        frozen_trunk = config.frozen_trunk or config.lora.enabled
        rows = (*self.data.train, *self.data.validation)
        lengths = [len(text.tokens) for row in rows for text in batching.texts(row)]
        self._group = max(len(batching.texts(row)) for row in rows)
        setup.check_context(lengths, self.model, "the longest row", "data.max_length")
        context = self.model.max_positions  # limits a text; a packed row, where positions start anew, may be longer
        self._width = 2 * batching.bucket(min(config.data.max_length, context), context)
        self._rows: Split[Any] = self.data
        if train.packing:
            self._rows = pack(self.data, batching.texts, self._width, train.batch_size)
            self._most = max(len(row.lengths) // 2 for row in (*self._rows.train, *self._rows.validation))
        self.total_steps = loop.num_steps(
            len(self._rows.train), train.batch_size, train.num_train_epochs, train.max_steps
        )
        self._optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self._static: dict[str, Any] = {
            "model": self.model,
            "objective": self._objective,
            "optimizer": self._optimizer,
            "num_micro": self._num_micro,
            "mesh": self.mesh,
        }
        self._programs, self._begun = Ahead(), ahead
        params = setup.param_shapes(self.model, storage, self.mesh, config.lora)
        if ahead:
            trained, frozen = setup.split_trainable(params, frozen_trunk)
            state = State({"reward": trained}, {"reward": self._optimizer}, self.mesh).template
            self._compile(state, frozen, self._rows_of(0), self._rows.validation)
        if not abstract:
            params = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head=config.head, storage=storage
            )
            params = setup.add_adapters(params, self.model, config.lora, lora_key)
        trained, self.frozen = setup.split_trainable(params, frozen_trunk)
        self.state = State({"reward": trained}, {"reward": self._optimizer}, self.mesh)
        self._results: dict[str, float] = {}
        self.evaluation: dict[str, Any] = {}
        """What the newest evaluation found, in full; empty before the first."""

    @property
    def params(self) -> Params:
        """The parameters as they are now, trunk and head."""
        return {**self.frozen, **self.state.value.params["reward"]}

    def describe(self) -> str:
        """What `.train()` works with, and the first row as the model sees it."""
        about = setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh)
        first = batching.texts(self.data.train[0])
        names = [f"rank {k + 1}" for k in range(len(first))] if len(first) != 2 else ["chosen", "rejected"]
        names = names if len(first) > 1 else ["response"]
        said = (f"{name}: {self.tokenizer.decode(text.tokens)}" for name, text in zip(names, first, strict=True))
        return "\n".join((about, f"{self.total_steps} steps", *said))

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        train, held_out = self.config.train, bool(self.data.validation)
        identity = {
            "data": setup.fingerprint((*self._rows.train, *self._rows.validation)),
            "frozen parameters": setup.params_fingerprint(self.frozen),
        }
        with loop.session(self.config, "reward", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.logger.note(setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh))
            if not self._begun:
                self._compile(self.state.template, self.frozen, self._rows_of(0), self._rows.validation)
            record = loop.fit(
                session,
                self.state,
                update=self._update,
                evaluate=self._evaluate if held_out else None,
                eval_every=train.eval_every or -(-len(self._rows.train) // train.batch_size),
                samples=None,
            )
            self._results = {k: float(v) for k, v in record.items()}
            if held_out:
                self._write_evaluation(session)
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return self._results

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the reward model as a sequence classification model in Hugging Face layout; adapters with their head
        alone unless `merge_lora`."""
        return pretrained.save(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="reward", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def _batch(self, rows: Sequence[Any]) -> Responses | PackedPairs:
        if self.config.train.packing:
            made = batching.packed_pairs(rows, self.tokenizer.pad_id, self._width, self._most)
            return sharding.put_rows(made, self.mesh)
        longest = max(len(text.tokens) for row in rows for text in batching.texts(row))
        length, targets = batching.bucket(longest, self.model.max_positions), [self._target(row) for row in rows]
        made = batching.responses(rows, targets, self.tokenizer.pad_id, length, self._group)
        return sharding.put_rows(made, self.mesh)

    def _target(self, row: Any) -> float:
        """What is said of a row, as `Responses.target` has it."""
        said = {"pairwise": "margin", "ties": "tied", "classification": "label", "regression": "score"}
        return float(getattr(row, said[self.config.loss])) if self.config.loss in said else 0.0

    def _rows_of(self, step: int) -> list[Any]:
        rows, size = self._rows.train, self.config.train.batch_size
        return [rows[i] for i in rows_at(step, size, len(rows), self.config.seed, self.config.data.shuffle)]

    def _compile(self, state: TrainState, frozen: Params, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Begin to compile a step on `train` and an evaluation of `held_out`; `state` and `frozen` may be shapes."""
        self._programs.compile(update, state, frozen, self._batch(train), self._key, **self._static)
        for _, batch in itertools.islice(self._held_out(held_out), 1):
            self._programs.compile(evaluate, {**frozen, **state.params["reward"]}, batch, model=self.model)

    def compile_longest(self) -> None:
        """Compile a step and an evaluation of the longest rows there are; parameters may be shapes."""
        train, rows = self.config.train, batching.longest(self._rows.train, self.config.train.batch_size)
        held_out = batching.longest(self._rows.validation, train.eval_batch_size)
        self._compile(self.state.template, self.frozen, rows, held_out)
        self._programs.finish()

    def _update(self, step: int) -> Metrics:
        self._programs.wait(update)
        batch = self._batch(self._rows_of(step))
        self.state.value, metrics = update(self.state.value, self.frozen, batch, self._key, **self._static)
        return metrics | {"epoch": (step + 1) * self.config.train.batch_size / len(self._rows.train)}

    def _held_out(self, rows: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Responses | PackedPairs]]:
        """(rows, batch) of held-out rows; the last batch is filled with copies of a row."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            yield part, self._batch([*part, *[part[0]] * (size - len(part))])

    def _evaluate(self) -> Metrics:
        self._programs.wait(evaluate)
        found, real, targets, lengths = [], [], [], []
        for rows, batch in self._held_out(self._rows.validation):
            scores = np.asarray(evaluate(self.params, batch, model=self.model), np.float32)[: len(rows)]
            mask, target = (np.asarray(x)[: len(rows)] for x in (batch.real, batch.target))
            valid = mask[..., 0]
            found.append(scores[valid])
            real.append(mask[valid])
            targets.append(target[valid])
            for row in rows:
                lengths += _response_lengths(row, self._group)
        scores, real, target = (jnp.concatenate(parts) for parts in (found, real, targets))
        if not jnp.isfinite(scores).all():
            raise NumericsError(
                "the reward model's scores of held-out rows are not finite; start over with --fresh and a lower "
                "optim.learning_rate"
            )
        metrics = response_loss(scores, real, target, len(scores), self._objective)[1]
        held_out = HeldOut(*map(np.asarray, (scores, real, target, lengths)))
        self.evaluation = evaluation(held_out, self.config.loss)
        measured = {key: self.evaluation[key] for key in KEYS[self.config.loss]}
        return {f"eval/{key}": value for key, value in (metrics | measured).items()}

    def _write_evaluation(self, session: loop.Session) -> None:
        if not self.evaluation:  # a run that had nothing left to do
            self._evaluate()
        path = write_whole(session.run.directory / "evaluation.json", json.dumps(self.evaluation, indent=2) + "\n")
        for line in [*summary(self.evaluation), f"wrote {path}"]:
            session.logger.note(line)


def _rows(config: RewardConfig, tokenizer: Tokenizer) -> Split[Any]:
    """The rows that the loss learns from. Raises DataError and ConfigError."""
    if config.loss == "ranking":
        return ranking_rows(config.data, tokenizer)
    if config.loss == "classification":
        return label_rows(config.data, tokenizer)
    if config.loss == "regression":
        return score_rows(config.data, tokenizer)
    return pair_rows(config.data, tokenizer, margins=config.margins, ties=config.loss == "ties")


def _evaluated(objective: Objective) -> list[str]:
    """The keys of an evaluation's record."""
    scores = jnp.zeros((2, 2))
    metrics = jax.eval_shape(lambda: response_loss(scores, scores == 0, scores[:, 0], 2, objective))[1]
    return [f"eval/{key}" for key in (*metrics, *KEYS[objective.loss])]


def _response_lengths(row: Any, group: int) -> list[list[int]]:
    """Tokens of a row's responses without the prompt, 0 where there is none; of a packed row, those of each pair."""
    if isinstance(row, PackedRow):
        starts = np.cumsum([0, *row.lengths[:-1]])
        return np.add.reduceat(np.array(row.loss_mask, int), starts).reshape(-1, 2).tolist()
    sizes = [sum(text.loss_mask) for text in batching.texts(row)]
    return [sizes + [0] * (group - len(sizes))]
