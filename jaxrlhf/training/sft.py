"""Supervised fine-tuning."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import distributed, sharding
from jaxrlhf.algorithms.sft import dft_loss, sft_loss
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import sft_rows
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward_with_router
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.step import Metrics, Spec, supervised_step
from jaxrlhf.training.supervised import SupervisedTrainer
from jaxrlhf.types import Batch, Params, TrainState

LOSSES = {"nll": sft_loss, "dft": dft_loss}


def loss(
    params: Params, batch: Batch, keys: jax.Array | None, *, model: ModelConfig, count: jax.Array, name: str
) -> tuple[jax.Array, Metrics]:
    """The loss `name` of the tokens under `loss_mask`, summed and divided by `count`; `keys` [B] are for dropout."""
    texts = batch.tokens, batch.mask, batch.positions, batch.segments
    hidden, router = forward_with_router(params, model, *texts, keys)
    logprobs, entropy = token_logprobs(params, model, hidden[:, :-1], batch.tokens[:, 1:], 1.0)
    value, metrics = LOSSES[name](logprobs, entropy, batch.loss_mask[:, 1:], count)
    return value, metrics | router


@functools.partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, frozen: Params, batch: Batch, key: jax.Array, *, spec: Spec
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` is the base model under adapters, else empty; `key` is the run's."""
    tokens = jnp.sum(batch.loss_mask)
    mean_loss = functools.partial(loss, model=spec.model, count=jnp.maximum(tokens, 1), name=spec.objective)
    state, metrics = supervised_step(mean_loss, state, frozen, batch, key, spec)
    return state, metrics | {"num_tokens": tokens}


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: Params, batch: Batch, *, model: ModelConfig) -> tuple[jax.Array, Metrics]:
    """Number of tokens of a held-out batch, and its mean cross-entropy and entropy."""
    tokens = jnp.sum(batch.loss_mask)
    metrics = loss(params, batch, None, model=model, count=jnp.maximum(tokens, 1), name="nll")[1]
    return tokens, {"loss": metrics["loss"], "entropy": metrics["entropy"]}


class SFTTrainer(SupervisedTrainer[SFTConfig]):
    """Fine-tune `config.model` on `config.data`: `.train()`, then `.save_pretrained(directory)`.

    Errors in the config, the data or the model are raised here, before training begins.
    """

    def __init__(self, config: SFTConfig, *, fresh: bool = False) -> None:
        super().__init__(config, role="policy", head="lm", fresh=fresh)
        self.data = sft_rows(config.data, self.tokenizer, config.completion_only)
        self.use_rows(self.data, ("eval/loss", "eval/entropy"), texts=1)
        self.samples = Samples(self.data, config, self.model, self.tokenizer, self.mesh)
        self.load(config.loss_type)

    def _first_row(self) -> list[str]:
        row = self.data.train[0]
        pieces = zip(self.tokenizer.convert_ids_to_tokens(row.tokens), row.loss_mask, strict=True)
        example = "".join(f"[{piece}]" if trained else piece for piece, trained in pieces)
        return ["first example, tokens to learn in brackets:", example]

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
            session.export(self.save_pretrained)
        return self._results

    def batch(self, step: int) -> Batch:
        """The training batch of a step, on the mesh."""
        return self.collate([self.rows.train[i] for i in self.order(step)], self.columns)

    def collate(self, rows: Sequence[Any], columns: int | None = None) -> Batch:
        """A batch of these rows, on the mesh, as wide as the longest of them or `columns`."""
        if self.config.train.packing:
            return sharding.put_rows(batching.packed(rows, self.tokenizer.pad_id, self.width), self.mesh)
        length = columns or self.padded_length(rows)
        return sharding.put_rows(batching.batch(rows, self.tokenizer.pad_id, length), self.mesh)

    def eval_batches(self, rows: Sequence[Any]) -> Iterator[Batch]:
        """Batches of held-out rows, the last one filled up with rows without a loss mask."""
        size = self.config.train.eval_batch_size
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            distributed.check_stop()
            blank = dataclasses.replace(part[0], loss_mask=[False] * len(part[0].tokens))
            yield self.collate([*part, *[blank] * (size - len(part))])

    def _evaluate(self) -> dict[str, float]:
        """Token-weighted means of loss and entropy over the held-out rows; empty if there are none."""
        batches = self.eval_batches(self.rows.validation)
        counted = [evaluate(self.params, batch, model=self.model) for batch in batches]
        total = max(sum(float(tokens) for tokens, _ in counted), 1)
        keys = counted[0][1] if counted else ()
        return {f"eval/{k}": sum(float(n) * float(m[k]) for n, m in counted) / total for k in keys}
