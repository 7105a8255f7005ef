"""Learning from preferences without a reward model: DPO and its relatives."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding, weights
from jaxrlhf.compilation import Ahead
from jaxrlhf.config import DPOConfig
from jaxrlhf.config.dpo import REFERENCE_FREE
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow
from jaxrlhf.errors import Preempted
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training import session as loop
from jaxrlhf.training.dpo import reference
from jaxrlhf.training.dpo.rows import Rows, read
from jaxrlhf.training.dpo.update import PairLogprobs, Preferences, evaluate, evaluated, score, update
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import Params, TrainState

PROGRESS = 10.0
"""Seconds between two lines on how far the reference has been scored."""


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
        self.data = read(config, self.tokenizer)
        init_key, self._key, _, lora_key = setup.keys(config.seed)
        storage = setup.param_dtype(config)
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora)
        check_sampling(config.sampling, self.model.vocab_size)
        self._rows = Rows(self.data, config, self.tokenizer, self.model, self.mesh)
        self.width, self._known = self._rows.width, config.dpo.loss in REFERENCE_FREE
        number = len(self._rows.train.rows)
        known = [f"eval/{key}" for key in evaluated(config.dpo)]
        loop.check_metric(config, known, bool(self._rows.held_out.rows))
        self.total_steps = loop.num_steps(number, train.batch_size, train.num_train_epochs, train.max_steps)
        self._optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self._static: dict[str, Any] = {
            "model": self.model,
            "optimizer": self._optimizer,
            "settings": config.dpo,
            "total_steps": self.total_steps,
            "num_micro": train.batch_size // micro,
            "mesh": self.mesh,
        }
        shown = (self.data.validation or self.data.train)[: config.logging.num_samples]
        self._samples = Samples(
            [batching.texts(row)[0] for row in shown], self.model, self.tokenizer, config.sampling, self.mesh
        )
        self._programs, self._begun = Ahead(), ahead
        params = setup.param_shapes(self.model, storage, self.mesh, config.lora)
        if ahead:
            trained, frozen = setup.split_trainable(params, config.lora.enabled)
            state = State({"policy": trained}, {"policy": self._optimizer}, self.mesh).template
            self._compile(state, frozen, self._rows.of_step(0))
        if not abstract:
            params = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head="lm", storage=storage
            )
            params = setup.add_adapters(params, self.model, config.lora, lora_key)
        trained, self.frozen = setup.split_trainable(params, config.lora.enabled)
        self.state = State({"policy": trained}, {"policy": self._optimizer}, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The parameters as they are now, adapters and what is under them."""
        return {**self.frozen, **self.state.value.params["policy"]}

    def describe(self) -> str:
        """What `.train()` works with, and the first pair as the model sees it."""
        first = self.data.train[0]
        sides = ("chosen", "rejected") if isinstance(first, PairRow) else (("good" if first.label else "bad"),)
        shown = (
            f"{side}: {self.tokenizer.decode(text.tokens)}"
            for side, text in zip(sides, batching.texts(first), strict=True)
        )
        return "\n".join((self._about(), f"{self.total_steps} steps", *shown))

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        train, rows = self.config.train, self._rows
        identity = {
            "data": setup.fingerprint((*rows.train.rows, *rows.held_out.rows)),
            "frozen parameters": setup.params_fingerprint(self.frozen),
        }
        if not self._known:
            identity["reference"] = self._origin
        with loop.session(self.config, "dpo", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.logger.note(self._about())
            self.score_reference(session.logger.note, lambda: session.run.stopping)
            if not self._begun:
                self._compile(self.state.template, self.frozen, self._rows.of_step(0))
            record = loop.fit(
                session,
                self.state,
                update=self._update,
                evaluate=self._evaluate if rows.held_out.rows else None,
                eval_every=train.eval_every or -(-len(rows.train.rows) // train.batch_size),
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
        parts = [part for part in (self._rows.train, self._rows.held_out) if part.rows]
        rows = [row for part in parts for row in part.rows]
        alone = dataclasses.replace(self.model, adapters=None, remat="none")
        about = f"{self._origin} {setup.fingerprint(rows)} {alone}"

        def compute() -> np.ndarray:
            counts = " and ".join(str(len(part.rows)) for part in parts)
            say(f"log-probs of the reference: {counts} rows, once for this model and these rows")
            return np.concatenate([self._scored(self._before, part.rows, say, stopping).logprobs for part in parts])

        found = reference.kept(
            Path(self.config.dpo.reference_folder or Path(self.config.run_dir) / "reference"),
            hashlib.sha256(about.encode()).hexdigest()[:32],
            (len(rows), *self._rows.train.reference.shape[1:]),
            compute,
            say,
        )
        self._rows.train.reference, self._rows.held_out.reference = np.split(found, [len(self._rows.train.rows)])
        self._known = True

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="dpo", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def compile_longest(self) -> None:
        """Compile a step and a scoring of the longest rows there are, and a sample; parameters may be shapes."""
        state = self.state.template
        self._compile(state, self.frozen, self._rows.longest(self._rows.train, self.config.train.batch_size))
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
        return setup.describe(self.config, self.model, self.tokenizer, self._rows.report, self.mesh)

    def _compile(self, state: TrainState, frozen: Params, batch: Preferences) -> None:
        """Begin to compile a step on `batch` and the scoring of the longest rows; `state`, `frozen` may be shapes."""
        self._programs.compile(update, state, frozen, batch, self._key, **self._static)
        policy, size = {**frozen, **state.params["policy"]}, self.config.train.eval_batch_size
        wanted = [(frozen or policy, self._rows.train)] * (not self._known) + [(policy, self._rows.held_out)]
        for params, part in wanted:
            if part.rows:
                self._programs.compile(score, params, self._rows.longest(part, size).pairs, model=self.model)

    def _update(self, step: int) -> Metrics:
        self._programs.wait(update)
        batch = self._rows.of_step(step)
        self.state.value, metrics = update(self.state.value, self.frozen, batch, self._key, **self._static)
        return metrics | {"epoch": (step + 1) * self.config.train.batch_size / len(self._rows.train.rows)}

    def _scored(
        self,
        params: Params,
        rows: Sequence[Any],
        say: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> PairLogprobs:
        """`score` of all rows, in their order, on the host. Rows of like length go together."""
        self._programs.wait(score)
        size, found, told = self.config.train.eval_batch_size, [], time.monotonic()
        order = sorted(range(len(rows)), key=lambda i: batching.row_length(rows[i]))
        for start in range(0, len(rows), size):
            if stopping():
                raise Preempted("stopped before the first step; the same command begins again")
            here = [rows[i] for i in order[start : start + size]]
            here += here[:1] * (size - len(here))  # counts for nothing
            found.append(jax.device_get(score(params, self._rows.pairs(here), model=self.model)))
            if time.monotonic() - told > PROGRESS:
                told = time.monotonic()
                say(f"log-probs of the reference: {start + size} of {len(rows)} rows")
        back = np.argsort(order)  # which leaves out what counts for nothing: it comes last
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)

    def _evaluate(self) -> Metrics:
        part, told = self._rows.held_out, {key: self._static[key] for key in ("settings", "total_steps")}
        found = self._scored(self.params, part.rows)
        metrics = evaluate(found, part.reference, part.desirable, self.state.value.step, **told)
        return {f"eval/{key}": value for key, value in metrics.items()}
