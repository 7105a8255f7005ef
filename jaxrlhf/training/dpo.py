"""Learning from preferences without a reward model: DPO and its relatives."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import sharding, weights
from jaxrlhf.config import DPO, DPOConfig
from jaxrlhf.config.dpo import REFERENCE_FREE
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, Split, pair_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import PackedRow, pack
from jaxrlhf.errors import Preempted
from jaxrlhf.programs import Ahead
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.training import loop, reference, setup
from jaxrlhf.training.dpo_update import Preferences, Responses, evaluate, score, update
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import PackedPairs, Pairs, Params, TrainState

PROGRESS = 10.0
"""Seconds between two lines on how far the reference has been scored."""


@dataclass
class Part:
    """Rows to train on, or those held out, and what is known of each."""

    rows: Sequence[PairRow | PackedRow]
    desirable: np.ndarray  # bool [N]   kto: the label; else true
    reference: np.ndarray  # f32 [N, 2], of packed rows [N, M, 2]   0 before the reference was scored, or without one


def beta_schedule(settings: DPO, total_steps: int) -> optax.Schedule:
    """beta by optimizer step: constant, or on a line or half a cosine to `beta_final` at the last step."""
    steps = max(total_steps - 1, 1)
    if settings.beta_final is None:
        return optax.constant_schedule(settings.beta)
    if settings.beta_schedule == "linear":
        return optax.linear_schedule(settings.beta, settings.beta_final, steps)
    return optax.cosine_decay_schedule(settings.beta, steps, settings.beta_final / settings.beta)


class DPOTrainer:
    """Train `config.model` on the preferences of `config.data`: `.train()`, then `.save_pretrained(folder)`.

    What can be wrong with the config, the data or the model is raised here, before training begins. With `ahead` the
    programs are compiled while the weights load, for a trainer that is sure to train; else when training begins. With
    `abstract` nothing is loaded and nothing can be trained: shapes stand for parameters, for `jaxrlhf plan`.
    """

    def __init__(self, config: DPOConfig, *, fresh: bool = False, ahead: bool = False, abstract: bool = False) -> None:
        self.config, self._fresh = config, fresh
        train = config.train
        self.mesh = sharding.make_mesh(config.mesh)
        micro = train.micro_batch_size or train.batch_size
        sharding.check_rows(micro, self.mesh, "train.micro_batch_size, or train.batch_size without it")
        sharding.check_rows(train.eval_batch_size, self.mesh, "train.eval_batch_size")
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = pair_rows(config.data, self.tokenizer)
        init_key, self._key, _, lora_key = setup.keys(config.seed)
        storage = setup.storage_of(config)
        self.model = setup.model_of(config.model, self.tokenizer, "lm", config.lora)
        pairs = (*self.data.train, *self.data.validation)
        lengths = [len(text.tokens) for pair in pairs for text in (pair.chosen, pair.rejected)]
        setup.check_context(lengths, self.model, "the longest row", "data.max_length")
        check_sampling(config.sampling, self.model.vocab_size)
        context = self.model.max_positions  # limits a text; a packed row, where positions start anew, may be longer
        rows: Split[Any] = self.data
        if train.packing:
            self.width = 2 * batching.bucket(min(config.data.max_length, context), context)
            rows = pack(self.data, lambda pair: (pair.chosen, pair.rejected), self.width, train.batch_size)
            self._most = max(len(row.lengths) // 2 for row in (*rows.train, *rows.validation))
        else:
            self.width = 2 * batching.bucket(max(lengths), context)  # of the widest pair
        self._report, self._known = rows.report, config.dpo.loss in REFERENCE_FREE
        self._train, self._held_out = self._part(rows.train), self._part(rows.validation)
        self.total_steps = loop.num_steps(len(rows.train), train.batch_size, train.num_train_epochs, train.max_steps)
        self._optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self._beta = beta_schedule(config.dpo, self.total_steps)
        self._static: dict[str, Any] = {
            "model": self.model,
            "optimizer": self._optimizer,
            "settings": config.dpo,
            "num_micro": train.batch_size // micro,
            "mesh": self.mesh,
        }
        shown = (self.data.validation or self.data.train)[: config.logging.num_samples]
        texts = [pair.chosen for pair in shown]
        self._samples = Samples(texts, self.model, self.tokenizer, config.sampling, self.mesh)
        self._programs, self._begun = Ahead(), ahead
        params = setup.shapes_of(self.model, storage, self.mesh, config.lora)
        if ahead:
            trained, frozen = setup.split(params, config.lora.enabled)
            state = setup.State({"policy": trained}, {"policy": self._optimizer}, self.mesh).template
            self._compile(state, frozen, self._numbers(0))
        if not abstract:
            params = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head="lm", storage=storage
            )
            params = setup.adapted(params, self.model, config.lora, lora_key)
        trained, self.frozen = setup.split(params, config.lora.enabled)
        self.state = setup.State({"policy": trained}, {"policy": self._optimizer}, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The parameters as they are now, adapters and what is under them."""
        return {**self.frozen, **self.state.value.params["policy"]}

    def describe(self) -> str:
        """What `.train()` works with, and the first pair as the model sees it."""
        first = self.data.train[0]
        pair = (f"{side}: {self.tokenizer.decode(getattr(first, side).tokens)}" for side in ("chosen", "rejected"))
        return "\n".join((self._about(), f"{self.total_steps} steps", *pair))

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        train, held_out = self.config.train, bool(self._held_out.rows)
        identity = {
            "data": setup.fingerprint((*self._train.rows, *self._held_out.rows)),
            "frozen parameters": setup.params_fingerprint(self.frozen),
        }
        if not self._known:
            identity["reference"] = self._origin
        with loop.session(self.config, "dpo", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.logger.note(self._about())
            self.score_reference(session.logger.note, lambda: session.run.stopping)
            if not self._begun:
                self._compile(self.state.template, self.frozen, self._numbers(0))
            record = loop.fit(
                session,
                self.state,
                update=self._update,
                evaluate=self._evaluate if held_out else None,
                eval_every=train.eval_every or -(-len(self._train.rows) // train.batch_size),
                metric="eval/rewards/margins" if self.config.dpo.loss == "kto" else "eval/rewards/accuracies",
                samples=lambda: self._samples.draw(
                    self.params, jax.random.fold_in(self._key, int(self.state.value.step))
                ),
            )
            self._results = {k: float(v) for k, v in record.items()}
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return self._results

    def score_reference(self, say: Callable[[str], None], stopping: Callable[[], bool] = lambda: False) -> None:
        """Find the log-probs of the reference, unless they are known or the loss needs none: those of the model before
        the first step, kept in a file by the content of model and rows. `say` hears how far it is; raises Preempted
        once `stopping`."""
        if self._known:
            return
        parts = [part for part in (self._train, self._held_out) if part.rows]
        rows = [row for part in parts for row in part.rows]
        alone = dataclasses.replace(self.model, adapters=None, remat="none")
        about = f"{self._origin} {setup.fingerprint(rows)} {alone}"

        def compute() -> np.ndarray:
            say(f"log-probs of the reference: {len(rows)} rows, once for this model and these rows")
            return np.concatenate([self._responses(self._before, part.rows, say, stopping).logprobs for part in parts])

        found = reference.kept(
            Path(self.config.dpo.reference_folder or Path(self.config.run_dir) / "reference"),
            hashlib.sha256(about.encode()).hexdigest()[:32],
            (len(rows), *self._train.reference.shape[1:]),
            compute,
            say,
        )
        self._train.reference, self._held_out.reference = np.split(found, [len(self._train.rows)])
        self._known = True

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return setup.export(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="dpo", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def compile_longest(self) -> None:
        """Compile a step and a scoring of the longest rows there are, and a sample; parameters may be shapes."""
        state = self.state.template
        self._compile(state, self.frozen, self._longest(self._train, self.config.train.batch_size))
        self._samples.compile(self._programs, {**self.frozen, **state.params["policy"]}, self._key)
        self._programs.finish()

    @property
    def _before(self) -> Params:
        """The reference: what lies under adapters, or the parameters before the first step."""
        return self.frozen or self.state.params["policy"]

    @functools.cached_property
    def _origin(self) -> str:
        """A hash of the reference's parameters."""
        return setup.params_fingerprint(self._before)

    def _about(self) -> str:
        return setup.describe(self.config, self.model, self.tokenizer, self._report, self.mesh)

    def _part(self, rows: Sequence[Any]) -> Part:
        shape = (len(rows), self._most, 2) if self.config.train.packing else (len(rows), 2)
        return Part(rows, np.ones(len(rows), bool), np.zeros(shape, np.float32))

    def _pairs(self, rows: Sequence[Any]) -> Pairs | PackedPairs:
        if self.config.train.packing:
            return batching.packed_pairs(rows, self.tokenizer.pad_id, self.width, self._most)
        length = batching.bucket(max(map(batching.longer, rows)), self.model.max_positions)
        return batching.pairs(rows, self.tokenizer.pad_id, length)

    def _batch(self, part: Part, numbers: np.ndarray) -> Preferences:
        pairs = self._pairs([part.rows[i] for i in numbers])
        rows = Preferences(pairs, part.reference[numbers], part.desirable[numbers])  # type: ignore[arg-type]
        return sharding.put_rows(rows, self.mesh)

    def _numbers(self, step: int) -> np.ndarray:
        """Rows of the batch of a step."""
        size, config = self.config.train.batch_size, self.config
        return rows_at(step, size, len(self._train.rows), config.seed, config.data.shuffle)

    def _longest(self, part: Part, count: int) -> np.ndarray:
        """The rows that are longest, again and again if there are fewer."""
        return np.resize(np.argsort([-batching.longer(row) for row in part.rows], kind="stable"), count)

    def _beta_at(self, step: int) -> jax.Array:
        return jnp.asarray(self._beta(step), jnp.float32)

    def _compile(self, state: TrainState, frozen: Params, numbers: np.ndarray) -> None:
        """Begin to compile a step on these rows, and the scoring of the longest; `state` and `frozen` may be shapes."""
        batch, beta = self._batch(self._train, numbers), self._beta_at(0)
        self._programs.compile(update, state, frozen, batch, beta, self._key, **self._static)
        policy, size = {**frozen, **state.params["policy"]}, self.config.train.eval_batch_size
        for params, part in ((frozen or policy, self._train), (policy, self._held_out)):
            if part.rows and (part is self._held_out or not self._known):
                pairs = self._batch(part, self._longest(part, size)).pairs
                self._programs.compile(score, params, pairs, model=self.model)

    def _update(self, step: int) -> Metrics:
        self._programs.wait(update)
        batch, beta = self._batch(self._train, self._numbers(step)), self._beta_at(step)
        self.state.value, metrics = update(self.state.value, self.frozen, batch, beta, self._key, **self._static)
        return metrics | {"epoch": (step + 1) * self.config.train.batch_size / len(self._train.rows)}

    def _responses(
        self,
        params: Params,
        rows: Sequence[Any],
        say: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Responses:
        """`score` of all rows, in their order, on the host. Rows of like length go together."""
        self._programs.wait(score)
        size, found, told = self.config.train.eval_batch_size, [], time.monotonic()
        order = sorted(range(len(rows)), key=lambda i: batching.longer(rows[i]))
        for start in range(0, len(rows), size):
            if stopping():
                raise Preempted("stopped before the first step; the same command begins again")
            here = [rows[i] for i in order[start : start + size]]
            here += here[:1] * (size - len(here))  # counts for nothing
            pairs = sharding.put_rows(self._pairs(here), self.mesh)
            found.append(jax.device_get(score(params, pairs, model=self.model)))
            if time.monotonic() - told > PROGRESS:
                told = time.monotonic()
                say(f"log-probs of the reference: {start + size} of {len(rows)} rows")
        back = np.argsort(order)  # which leaves out what counts for nothing: it comes last
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)

    def _evaluate(self) -> Metrics:
        part, beta = self._held_out, self._beta_at(max(int(self.state.value.step) - 1, 0))
        found = self._responses(self.params, part.rows)
        metrics = evaluate(found, part.reference, part.desirable, beta, settings=self.config.dpo)
        return {f"eval/{key}": value for key, value in metrics.items()}
