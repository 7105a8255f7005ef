"""Supervised fine-tuning: learn to continue prompts the way the data does."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding, weights
from jaxrlhf.algorithms.sft import sft_loss
from jaxrlhf.compilation import Ahead
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split, sft_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import pack
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training import session as loop
from jaxrlhf.training.optim import Optimizer, make_optimizer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Metrics, apply, dropout_keys, gradients, one_role
from jaxrlhf.types import Batch, Params, TrainState


def loss(
    params: Params, batch: Batch, model: ModelConfig, count: jax.Array, keys: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of a batch's tokens to learn, summed and divided by `count`; `keys` [B] are for dropout."""
    hidden = forward(params, model, batch.tokens, batch.mask, batch.positions, batch.segments, keys)
    logprobs, entropy = token_logprobs(params, model, hidden[:, :-1], batch.tokens[:, 1:], 1.0)
    return sft_loss(logprobs, entropy, batch.loss_mask[:, 1:], count)


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "num_micro", "mesh"), donate_argnames="state")
def update(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: ModelConfig,
    optimizer: Optimizer,
    num_micro: int,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`, in `num_micro` slices. `frozen` is what lies under adapters, else nothing; `key`
    is the run's, into which each step folds its number."""
    tokens = jnp.sum(batch.loss_mask)
    count = jnp.maximum(tokens, 1)
    keys = dropout_keys(model, key, state.step, rows=batch.tokens.shape[0])

    def share(params: Params, part: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, Metrics]:
        return loss({**frozen, **params}, part[0], model, count, part[1])

    grads, metrics = gradients(share, state.params["policy"], (batch, keys), num_micro)
    state, norms = apply(state, {"policy": grads}, metrics["loss"], (("policy", optimizer),))
    state = dataclasses.replace(state, step=state.step + 1)
    return sharding.constrain(state, mesh), metrics | one_role(norms) | {"num_tokens": tokens}


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, batch: Batch, *, model: ModelConfig) -> tuple[jax.Array, Metrics]:
    """(tokens, mean loss and entropy) of a held-out batch."""
    tokens = jnp.sum(batch.loss_mask)
    return tokens, loss(params, batch, model, jnp.maximum(tokens, 1))[1]


class SFTTrainer:
    """Fine-tune `config.model` on `config.data`: `.train()`, then `.save_pretrained(directory)`.

    What can be wrong with the config, the data or the model is raised here, before training begins. With `ahead` the
    programs are compiled while the weights load, for a trainer that is sure to train; else when training begins. With
    `abstract` nothing is loaded and nothing can be trained: shapes stand for parameters, for `jaxrlhf plan`.
    """

    def __init__(self, config: SFTConfig, *, fresh: bool = False, ahead: bool = False, abstract: bool = False) -> None:
        self.config, self._fresh = config, fresh
        train = config.train
        self.mesh = sharding.make_mesh(config.mesh)
        micro = train.micro_batch_size or train.batch_size
        sharding.check_rows(micro, self.mesh, "train.micro_batch_size, or train.batch_size without it")
        sharding.check_rows(train.eval_batch_size, self.mesh, "train.eval_batch_size")
        self._num_micro = train.batch_size // micro
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = sft_rows(config.data, self.tokenizer, config.completion_only)
        loop.check_metric(config, ("eval/loss", "eval/entropy"), bool(self.data.validation))
        init_key, self._key, _, lora_key = setup.keys(config.seed)
        storage = setup.param_dtype(config)
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora)
        rows = (*self.data.train, *self.data.validation)
        setup.check_context([len(row.tokens) for row in rows], self.model, "the longest row", "data.max_length")
        check_sampling(config.sampling, self.model.vocab_size)
        context = self.model.max_positions
        most = min(config.data.max_length, context) if train.packing else max(len(row.tokens) for row in rows)
        self.width = batching.bucket(most, context)  # of the widest batch; all packed rows are as wide
        self._rows: Split[Any] = self.data
        if train.packing:
            self._rows = pack(self.data, lambda row: (row,), self.width, train.batch_size)
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
        params = setup.param_shapes(self.model, storage, self.mesh, config.lora)
        if ahead:
            trained, frozen = setup.split_trainable(params, config.lora.enabled)
            state = State({"policy": trained}, {"policy": self._optimizer}, self.mesh).template
            self._compile(state, frozen, self._rows_of(0), self._rows.validation)
        if not abstract:
            params = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head="lm", storage=storage
            )
            params = setup.add_adapters(params, self.model, config.lora, lora_key)
        trained, self.frozen = setup.split_trainable(params, config.lora.enabled)
        self.state = State({"policy": trained}, {"policy": self._optimizer}, self.mesh)
        shown = (self.data.validation or self.data.train)[: config.logging.num_samples]
        self.samples = Samples(shown, self.model, self.tokenizer, config.sampling, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The parameters as they are now, adapters and what is under them."""
        return {**self.frozen, **self.state.value.params["policy"]}

    def describe(self) -> str:
        """What `.train()` works with, and the first example as the model sees it."""
        row = self.data.train[0]
        pieces = zip(self.tokenizer.convert_ids_to_tokens(row.tokens), row.loss_mask, strict=True)
        example = "".join(f"[{piece}]" if learnt else piece for piece, learnt in pieces)
        about = setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh)
        return f"{about}\n{self.total_steps} steps\nfirst example, tokens to learn in brackets:\n{example}"

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        train, held_out = self.config.train, bool(self.data.validation)
        identity = {
            "data": setup.fingerprint((*self._rows.train, *self._rows.validation)),
            "frozen parameters": setup.params_fingerprint(self.frozen),
        }
        with loop.session(self.config, "sft", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.logger.note(setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh))
            if not self._begun:
                self._compile(self.state.template, self.frozen, self._rows_of(0), self._rows.validation)
            record = loop.fit(
                session,
                self.state,
                update=self._update,
                evaluate=self._evaluate if held_out else None,
                eval_every=train.eval_every or -(-len(self._rows.train) // train.batch_size),
                samples=self._samples,
            )
            self._results = {k: float(v) for k, v in record.items()}
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return self._results

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="sft", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def _batch(self, rows: Sequence[Any]) -> Batch:
        if self.config.train.packing:
            return sharding.put_rows(batching.packed(rows, self.tokenizer.pad_id, self.width), self.mesh)
        length = batching.bucket(max(len(row.tokens) for row in rows), self.model.max_positions)
        return sharding.put_rows(batching.batch(rows, self.tokenizer.pad_id, length), self.mesh)

    def _rows_of(self, step: int) -> list[Any]:
        rows, size = self._rows.train, self.config.train.batch_size
        return [rows[i] for i in rows_at(step, size, len(rows), self.config.seed, self.config.data.shuffle)]

    def _compile(self, state: TrainState, frozen: Params, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Begin to compile a step on `train` and an evaluation of `held_out`; `state` and `frozen` may be shapes."""
        self._programs.compile(update, state, frozen, self._batch(train), self._key, **self._static)
        for batch in itertools.islice(self._held_out(held_out), 1):
            self._programs.compile(evaluate, {**frozen, **state.params["policy"]}, batch, model=self.model)

    def compile_longest(self) -> None:
        """Compile a step and an evaluation of the longest rows there are, and a sample; parameters may be shapes."""
        state, train = self.state.template, self.config.train
        rows = batching.longest(self._rows.train, train.batch_size)
        self._compile(state, self.frozen, rows, batching.longest(self._rows.validation, train.eval_batch_size))
        params = {**self.frozen, **state.params["policy"]}
        self.samples.compile(self._programs, params, self._key)
        self._programs.finish()

    def _update(self, step: int) -> Metrics:
        self._programs.wait(update)
        batch = self._batch(self._rows_of(step))
        self.state.value, metrics = update(self.state.value, self.frozen, batch, self._key, **self._static)
        return metrics | {"epoch": (step + 1) * self.config.train.batch_size / len(self._rows.train)}

    def _held_out(self, rows: Sequence[Any]) -> Iterator[Batch]:
        """Batches of held-out rows, the last one filled with rows that count for nothing."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            blank = dataclasses.replace(part[0], loss_mask=[False] * len(part[0].tokens))
            yield self._batch([*part, *[blank] * (size - len(part))])

    def _evaluate(self) -> Metrics:
        self._programs.wait(evaluate)
        records = [evaluate(self.params, batch, model=self.model) for batch in self._held_out(self._rows.validation)]
        means = loop.weighted_mean([(float(count), metrics) for count, metrics in records])
        return {f"eval/{key}": value for key, value in means.items()}

    def _samples(self) -> list[dict[str, Any]]:
        return self.samples.draw(self.params, jax.random.fold_in(self._key, int(self.state.value.step)))
