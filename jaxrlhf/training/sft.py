"""Supervised fine-tuning."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import sharding
from jaxrlhf.algorithms.sft import sft_loss
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split, sft_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import pack
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training.optim import Optimizer, make_optimizer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.session import check_metric, num_steps, open_session
from jaxrlhf.training.step import Metrics, apply, dropout_keys, gradients, one_role
from jaxrlhf.types import Batch, Params, TrainState


def loss(
    params: Params, batch: Batch, model: ModelConfig, count: jax.Array, keys: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the tokens under `loss_mask`, summed and divided by `count`; `keys` [B] are for dropout."""
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
    """One optimizer step on `batch`, in `num_micro` micro-batches. `frozen` is the base model under adapters, else
    empty; `key` is the run's, folded with the step for dropout."""
    tokens = jnp.sum(batch.loss_mask)
    count = jnp.maximum(tokens, 1)
    keys = dropout_keys(model, key, state.step, rows=batch.tokens.shape[0])

    def micro_loss(params: Params, part: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, Metrics]:
        return loss({**frozen, **params}, part[0], model, count, part[1])

    grads, metrics = gradients(micro_loss, state.params["policy"], (batch, keys), num_micro)
    state, norms = apply(state, {"policy": grads}, metrics["loss"], (("policy", optimizer),))
    state = dataclasses.replace(state, step=state.step + 1)
    return sharding.constrain(state, mesh), metrics | one_role(norms) | {"num_tokens": tokens}


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, batch: Batch, *, model: ModelConfig) -> tuple[jax.Array, Metrics]:
    """Number of tokens of a held-out batch, and its mean loss and entropy."""
    tokens = jnp.sum(batch.loss_mask)
    return tokens, loss(params, batch, model, jnp.maximum(tokens, 1))[1]


class SFTTrainer:
    """Fine-tune `config.model` on `config.data`: `.train()`, then `.save_pretrained(directory)`.

    Errors in the config, the data or the model are raised here, before training begins.
    """

    def __init__(self, config: SFTConfig, *, fresh: bool = False) -> None:
        self.config, self._fresh = config, fresh
        train = config.train
        parts = setup.supervised(config, "lm")
        self.mesh, self.tokenizer, self.model, self.key = parts.mesh, parts.tokenizer, parts.model, parts.key
        self.data = sft_rows(config.data, self.tokenizer, config.completion_only)
        check_metric(config, ("eval/loss", "eval/entropy"), bool(self.data.validation))
        lengths = [len(row.tokens) for row in (*self.data.train, *self.data.validation)]
        setup.check_context(lengths, self.model, "the longest row", "data.max_length")
        check_sampling(config.sampling, self.model.vocab_size)
        context = self.model.max_positions
        longest = min(config.data.max_length, context) if train.packing else max(lengths)
        self.width = batching.bucket(longest, context)
        """Columns of the widest batch, and of every packed row."""
        self.rows: Split[Any] = self.data
        if train.packing:
            self.rows = pack(self.data, lambda row: (row,), self.width, train.batch_size)
        self.total_steps = num_steps(len(self.rows.train), train.batch_size, train.num_train_epochs, train.max_steps)
        optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self.static: dict[str, Any] = {
            "model": self.model,
            "optimizer": optimizer,
            "num_micro": parts.num_micro,
            "mesh": self.mesh,
        }
        """Static arguments of `update`."""
        self.state, self.frozen = setup.load_state(config, parts, "policy", optimizer)
        examples = (self.data.validation or self.data.train)[: config.logging.num_samples]
        self.samples = Samples(examples, self.model, self.tokenizer, config.sampling, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The current parameters, base model and adapters."""
        return {**self.frozen, **self.state.value.params["policy"]}

    def describe(self) -> str:
        """Model, data and number of steps of `.train()`, and the first example as the model sees it."""
        row = self.data.train[0]
        pieces = zip(self.tokenizer.convert_ids_to_tokens(row.tokens), row.loss_mask, strict=True)
        example = "".join(f"[{piece}]" if trained else piece for piece, trained in pieces)
        return f"{self._about()}\n{self.total_steps} steps\nfirst example, tokens to learn in brackets:\n{example}"

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        config, size, num_rows = self.config, self.config.train.batch_size, len(self.rows.train)
        eval_every = config.train.eval_every or -(-num_rows // size)
        identity = setup.identity(self.rows, self.frozen)
        with open_session(config, "sft", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.note(self._about())
            session.resume()
            for step in session.steps():
                batch = self.batch(step)
                self.state.value, metrics = update(self.state.value, self.frozen, batch, self.key, **self.static)
                metrics |= {"epoch": (step + 1) * size / num_rows}
                evaluation = self._evaluate() if session.due(step + 1, eval_every) else {}
                session.log(step + 1, metrics | evaluation)
                if session.samples_due(step + 1):
                    session.flush()
                    session.log_samples(
                        step + 1, self.samples.draw(self.params, jax.random.fold_in(self.key, step + 1))
                    )
                session.save_if_due(step + 1, evaluation)
            self._results = session.finish()
            if session.restore_best():
                self._results |= self._evaluate()
            session.note(f"exported to {self.save_pretrained(session.directory / 'export')}")
        return self._results

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory,
            self.model,
            self.params,
            self.config,
            self.tokenizer,
            method="sft",
            step=int(self.state.value.step),
            results=self._results,
            merge_lora=merge_lora,
        )

    def batch(self, step: int) -> Batch:
        """The training batch of a step, on the mesh."""
        rows, size = self.rows.train, self.config.train.batch_size
        order = rows_at(step, size, len(rows), self.config.seed, self.config.data.shuffle)
        return self.collate([rows[i] for i in order])

    def collate(self, rows: Sequence[Any]) -> Batch:
        """A batch of these rows, on the mesh."""
        if self.config.train.packing:
            return sharding.put_rows(batching.packed(rows, self.tokenizer.pad_id, self.width), self.mesh)
        length = batching.bucket(max(len(row.tokens) for row in rows), self.model.max_positions)
        return sharding.put_rows(batching.batch(rows, self.tokenizer.pad_id, length), self.mesh)

    def eval_batches(self, rows: Sequence[Any]) -> Iterator[Batch]:
        """Batches of held-out rows, the last one filled up with rows without a loss mask."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            blank = dataclasses.replace(part[0], loss_mask=[False] * len(part[0].tokens))
            yield self.collate([*part, *[blank] * (size - len(part))])

    def _about(self) -> str:
        return setup.describe(self.config, self.model, self.tokenizer, self.rows.report, self.mesh)

    def _evaluate(self) -> dict[str, float]:
        """Token-weighted means of loss and entropy over the held-out rows; empty if there are none."""
        batches = self.eval_batches(self.rows.validation)
        counted = [evaluate(self.params, batch, model=self.model) for batch in batches]
        total = max(sum(float(tokens) for tokens, _ in counted), 1)
        keys = counted[0][1] if counted else ()
        return {f"eval/{k}": sum(float(n) * float(m[k]) for n, m in counted) / total for k in keys}
