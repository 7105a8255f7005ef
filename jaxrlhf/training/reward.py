"""A reward model from preferences: the chosen answer of a pair should score higher than the rejected one."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding, weights
from jaxrlhf.algorithms.reward import pairwise_loss
from jaxrlhf.config import RewardConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split, pair_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import pack
from jaxrlhf.logprobs import last_hidden
from jaxrlhf.models import ModelConfig, forward, scores
from jaxrlhf.programs import Ahead
from jaxrlhf.training import loop, setup
from jaxrlhf.training.optim import Optimizer, make_optimizer
from jaxrlhf.training.step import Metrics, apply, dropout_keys, gradients, one_role
from jaxrlhf.types import PackedPairs, Pairs, Params, TrainState


def pair_scores(
    params: Params, pairs: Pairs | PackedPairs, model: ModelConfig, keys: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected): [B] by one forward over 2B rows, of packed pairs [B, M] over B rows.

    `keys` [B] are for dropout, in training; each text has a key of its own for that of the head.
    """
    if isinstance(pairs, PackedPairs):
        hidden = _packed_hidden(params, pairs, model, keys)
        if keys is not None:
            texts = jnp.arange(hidden.shape[1])
            keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, texts))(keys)
    else:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs.chosen, pairs.rejected)
        if keys is not None:
            keys = jnp.concatenate([keys, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)])
        hidden = last_hidden(params, model, both.tokens, both.mask, keys)
    if keys is None or model.head != "mlp":
        values = scores(params, model, hidden)
    else:
        flat = hidden.reshape(-1, hidden.shape[-1])
        values = jax.vmap(lambda row, key: scores(params, model, row, key))(flat, keys.reshape(-1))
        values = values.reshape(hidden.shape[:-1])
    chosen, rejected = jnp.split(values, 2, axis=-1)
    return chosen, rejected


def _packed_hidden(params: Params, pairs: PackedPairs, model: ModelConfig, keys: jax.Array | None) -> jax.Array:
    """The hidden states [B, 2M, D] at the end of each chosen text and then of each rejected one."""
    texts = pairs.texts
    hidden = forward(params, model, texts.tokens, texts.mask, texts.positions, texts.segments, keys)
    ends = jnp.concatenate([pairs.chosen, pairs.rejected], axis=1)
    return jnp.take_along_axis(hidden, ends[..., None], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "num_micro", "mesh"), donate_argnames="state")
def update(
    state: TrainState,
    frozen: Params,
    pairs: Pairs | PackedPairs,
    key: jax.Array,
    *,
    model: ModelConfig,
    optimizer: Optimizer,
    num_micro: int,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `pairs`. `frozen` holds the trunk where it does not train, or is under adapters.

    `key` is the run's; each step folds its number in.
    """
    count = jnp.sum(pairs.valid)
    row_keys = dropout_keys(model, key, state.step, rows=pairs.valid.shape[0])

    def loss(params: Params, rows: tuple[Pairs | PackedPairs, jax.Array | None]) -> tuple[jax.Array, Metrics]:
        chosen, rejected = pair_scores({**frozen, **params}, rows[0], model, rows[1])
        valid = rows[0].valid
        value, metrics = pairwise_loss(chosen, rejected, valid, count, 0.0)
        spread = {
            "max_reward_max": jnp.where(valid, jnp.maximum(chosen, rejected), -jnp.inf).max(),
            "min_reward_max": jnp.where(valid, -jnp.minimum(chosen, rejected), -jnp.inf).max(),
        }
        return value, metrics | spread

    grads, metrics = gradients(loss, state.params["reward"], (pairs, row_keys), num_micro)
    metrics["max_reward"], metrics["min_reward"] = metrics.pop("max_reward_max"), -metrics.pop("min_reward_max")
    state, norms = apply(state, {"reward": grads}, metrics["loss"], (("reward", optimizer),))
    state = dataclasses.replace(state, step=state.step + 1)
    return sharding.constrain(state, mesh), metrics | one_role(norms)


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, pairs: Pairs | PackedPairs, *, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Scores (chosen, rejected) of held-out pairs, as those of `pair_scores`, without dropout."""
    return pair_scores(params, pairs, model, None)


class RewardTrainer:
    """Train a reward model from `config.model` on the pairs of `config.data`: `.train()`, `.save_pretrained(folder)`.

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
        self.data = pair_rows(config.data, self.tokenizer)
        init_key, self._key, _, lora_key = setup.keys(config.seed)
        storage = setup.storage_of(config)
        self.model = setup.model_of(config.model, self.tokenizer, config.head, config.lora)
        frozen_trunk = config.frozen_trunk or config.lora.enabled
        rows = (*self.data.train, *self.data.validation)
        lengths = [len(row.tokens) for pair in rows for row in (pair.chosen, pair.rejected)]
        setup.check_context(lengths, self.model, "the longest row", "data.max_length")
        context = self.model.max_positions  # limits a text; a packed row, where positions start anew, may be longer
        self._width = 2 * batching.bucket(min(config.data.max_length, context), context)
        self._rows: Split[Any] = self.data
        if train.packing:
            self._rows = pack(self.data, lambda pair: (pair.chosen, pair.rejected), self._width, train.batch_size)
            self._most = max(len(row.lengths) // 2 for row in (*self._rows.train, *self._rows.validation))
        self.total_steps = loop.num_steps(
            len(self._rows.train), train.batch_size, train.num_train_epochs, train.max_steps
        )
        self._optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self._static: dict[str, Any] = {
            "model": self.model,
            "optimizer": self._optimizer,
            "num_micro": self._num_micro,
            "mesh": self.mesh,
        }
        self._programs, self._begun = Ahead(), ahead
        params = setup.shapes_of(self.model, storage, self.mesh, config.lora)
        if ahead:
            trained, frozen = setup.split(params, frozen_trunk)
            state = setup.State({"reward": trained}, {"reward": self._optimizer}, self.mesh).template
            self._compile(state, frozen, self._rows_of(0), self._rows.validation)
        if not abstract:
            params = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head=config.head, storage=storage
            )
            params = setup.adapted(params, self.model, config.lora, lora_key)
        trained, self.frozen = setup.split(params, frozen_trunk)
        self.state = setup.State({"reward": trained}, {"reward": self._optimizer}, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The parameters as they are now, trunk and head."""
        return {**self.frozen, **self.state.value.params["reward"]}

    def describe(self) -> str:
        """What `.train()` works with, and the first pair as the model sees it."""
        about = setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh)
        first = self.data.train[0]
        pair = (f"{side}: {self.tokenizer.decode(getattr(first, side).tokens)}" for side in ("chosen", "rejected"))
        return "\n".join((about, f"{self.total_steps} steps", *pair))

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
                metric="eval/accuracy",
                samples=None,
            )
            self._results = {k: float(v) for k, v in record.items()}
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return self._results

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the reward model as a sequence classification model in Hugging Face layout; adapters with their head
        alone unless `merge_lora`."""
        return setup.export(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="reward", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def _pairs(self, rows: Sequence[Any]) -> Pairs | PackedPairs:
        if self.config.train.packing:
            made = batching.packed_pairs(rows, self.tokenizer.pad_id, self._width, self._most)
            return sharding.put_rows(made, self.mesh)
        longest = max(len(row.tokens) for pair in rows for row in (pair.chosen, pair.rejected))
        length = batching.bucket(longest, self.model.max_positions)
        return sharding.put_rows(batching.pairs(rows, self.tokenizer.pad_id, length), self.mesh)

    def _rows_of(self, step: int) -> list[Any]:
        rows, size = self._rows.train, self.config.train.batch_size
        return [rows[i] for i in rows_at(step, size, len(rows), self.config.seed, self.config.data.shuffle)]

    def _compile(self, state: TrainState, frozen: Params, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Begin to compile a step on `train` and an evaluation of `held_out`; `state` and `frozen` may be shapes."""
        self._programs.compile(update, state, frozen, self._pairs(train), self._key, **self._static)
        for _, pairs in itertools.islice(self._held_out(held_out), 1):
            self._programs.compile(evaluate, {**frozen, **state.params["reward"]}, pairs, model=self.model)

    def compile_longest(self) -> None:
        """Compile a step and an evaluation of the longest rows there are; parameters may be shapes."""
        train, rows = self.config.train, batching.longest(self._rows.train, self.config.train.batch_size)
        held_out = batching.longest(self._rows.validation, train.eval_batch_size)
        self._compile(self.state.template, self.frozen, rows, held_out)
        self._programs.finish()

    def _update(self, step: int) -> Metrics:
        self._programs.wait(update)
        pairs = self._pairs(self._rows_of(step))
        self.state.value, metrics = update(self.state.value, self.frozen, pairs, self._key, **self._static)
        return metrics | {"epoch": (step + 1) * self.config.train.batch_size / len(self._rows.train)}

    def _held_out(self, rows: Sequence[Any]) -> Iterator[tuple[int, Pairs | PackedPairs]]:
        """(how many rows count, pairs) of held-out rows; the last batch is filled with copies of a row."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            yield len(part), self._pairs([*part, *[part[0]] * (size - len(part))])

    def _evaluate(self) -> Metrics:
        self._programs.wait(evaluate)
        records = []
        for count, pairs in self._held_out(self._rows.validation):
            found = jax.device_get((*evaluate(self.params, pairs, model=self.model), pairs.valid))
            chosen, rejected, valid = (jnp.asarray(x[:count]) for x in found)
            number = int(valid.sum())
            records.append((number, pairwise_loss(chosen, rejected, valid, number, 0.0)[1]))
        return {f"eval/{key}": value for key, value in loop.weighted_mean(records).items()}
