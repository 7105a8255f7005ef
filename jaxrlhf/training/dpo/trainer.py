"""Preference optimization without a reward model: DPO and related losses."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import DPOConfig
from jaxrlhf.config.dpo import REFERENCE_FREE
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow
from jaxrlhf.errors import Preempted
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training.dpo import reference
from jaxrlhf.training.dpo.rows import PreferenceRows, read_rows
from jaxrlhf.training.dpo.update import PairLogprobs, evaluate, evaluation_keys, score, update
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.session import check_metric, num_steps, open_session
from jaxrlhf.types import Params

PROGRESS = 10.0
"""Seconds between two progress lines while the reference is scored."""


class DPOTrainer:
    """Train `config.model` on the preferences of `config.data`: `.train()`, then `.save_pretrained(folder)`.

    Errors in the config, the data or the model are raised here, before training begins.
    """

    def __init__(self, config: DPOConfig, *, fresh: bool = False) -> None:
        self.config, self._fresh = config, fresh
        train = config.train
        parts = setup.supervised(config, "lm")
        self.mesh, self.tokenizer, self.model, self.key = parts.mesh, parts.tokenizer, parts.model, parts.key
        self.data = read_rows(config, self.tokenizer)
        check_sampling(config.sampling, self.model.vocab_size)
        self.rows = PreferenceRows(self.data, config, self.tokenizer, self.model, self.mesh)
        self.width = self.rows.width
        self.reference_known = config.dpo.loss in REFERENCE_FREE
        """True once the reference log-probs are known, or if the loss needs none."""
        known = [f"eval/{key}" for key in evaluation_keys(config.dpo)]
        check_metric(config, known, bool(self.rows.held_out.rows))
        number = len(self.rows.train.rows)
        self.total_steps = num_steps(number, train.batch_size, train.num_train_epochs, train.max_steps)
        optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        self.static: dict[str, Any] = {
            "model": self.model,
            "optimizer": optimizer,
            "settings": config.dpo,
            "total_steps": self.total_steps,
            "num_micro": parts.num_micro,
            "mesh": self.mesh,
        }
        """Static arguments of `update`."""
        self.state, self.frozen = setup.load_state(config, parts, "policy", optimizer)
        examples = (self.data.validation or self.data.train)[: config.logging.num_samples]
        chosen = [batching.texts(row)[0] for row in examples]
        self.samples = Samples(chosen, self.model, self.tokenizer, config.sampling, self.mesh)
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The current parameters, base model and adapters."""
        return {**self.frozen, **self.state.value.params["policy"]}

    def describe(self) -> str:
        """Model, data and number of steps of `.train()`, and the first pair as the model sees it."""
        first = self.data.train[0]
        sides = ("chosen", "rejected") if isinstance(first, PairRow) else (("good" if first.label else "bad"),)
        texts = (
            f"{side}: {self.tokenizer.decode(text.tokens)}"
            for side, text in zip(sides, batching.texts(first), strict=True)
        )
        return "\n".join((self._about(), f"{self.total_steps} steps", *texts))

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        config, size, num_rows = self.config, self.config.train.batch_size, len(self.rows.train.rows)
        eval_every = config.train.eval_every or -(-num_rows // size)
        with open_session(config, "dpo", self.total_steps, self.state, self._identity(), fresh=self._fresh) as session:
            session.note(self._about())
            self.score_reference(session.note, lambda: session.run.stopping)
            session.resume()
            for step in session.steps():
                batch = self.rows.batch_at(step)
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

    def score_reference(self, note: Callable[[str], None], stopping: Callable[[], bool] = lambda: False) -> None:
        """Compute the log-probs of the reference, the model before the first step, unless they are known.

        They are kept in a file named by a hash of the model and the rows. `note` prints progress. Raises Preempted once
        `stopping()`.
        """
        if self.reference_known:
            return
        parts = [part for part in (self.rows.train, self.rows.held_out) if part.rows]
        rows = [row for part in parts for row in part.rows]
        model = dataclasses.replace(self.model, adapters=None, remat="none")
        content = f"{self._reference_hash} {setup.fingerprint(rows)} {model}"

        def compute() -> np.ndarray:
            counts = " and ".join(str(len(part.rows)) for part in parts)
            note(f"log-probs of the reference: {counts} rows, once for this model and these rows")
            return np.concatenate(
                [self._logprobs(self._reference, part.rows, note, stopping).logprobs for part in parts]
            )

        logprobs = reference.cached_logprobs(
            Path(self.config.dpo.reference_folder or Path(self.config.run_dir) / "reference"),
            hashlib.sha256(content.encode()).hexdigest()[:32],
            (len(rows), *self.rows.train.reference.shape[1:]),
            compute,
            note,
        )
        self.rows.train.reference, self.rows.held_out.reference = np.split(logprobs, [len(self.rows.train.rows)])
        self.reference_known = True

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory,
            self.model,
            self.params,
            self.config,
            self.tokenizer,
            method="dpo",
            step=int(self.state.value.step),
            results=self._results,
            merge_lora=merge_lora,
        )

    def _identity(self) -> dict[str, str]:
        identity = setup.identity(self.rows.split, self.frozen)
        return identity if self.reference_known else identity | {"reference": self._reference_hash}

    @property
    def _reference(self) -> Params:
        """The reference before the first step: the base model under adapters, or the initial parameters."""
        return self.frozen or self.state.params["policy"]

    @functools.cached_property
    def _reference_hash(self) -> str:
        return setup.params_fingerprint(self._reference)

    def _about(self) -> str:
        return setup.describe(self.config, self.model, self.tokenizer, self.rows.split.report, self.mesh)

    def _logprobs(
        self,
        params: Params,
        rows: Sequence[Any],
        note: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> PairLogprobs:
        """`score` of all rows in their order, on the host. Rows of similar length are batched together."""
        size, parts, last_note = self.config.train.eval_batch_size, [], time.monotonic()
        order = sorted(range(len(rows)), key=lambda i: batching.row_length(rows[i]))
        for start in range(0, len(rows), size):
            if stopping():
                raise Preempted("stopped before the first step; run the same command again to start over")
            batch = [rows[i] for i in order[start : start + size]]
            batch += batch[:1] * (size - len(batch))  # filled up; cut off below
            parts.append(jax.device_get(score(params, self.rows.pairs(batch), model=self.model)))
            if time.monotonic() - last_note > PROGRESS:
                last_note = time.monotonic()
                note(f"log-probs of the reference: {start + size} of {len(rows)} rows")
        inverse = np.argsort(order)  # leaves out the rows that fill up the last batch: they come last
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[inverse], *parts)

    def _evaluate(self) -> dict[str, float]:
        """Loss and metrics of the held-out rows; empty if there are none."""
        part, static = self.rows.held_out, {key: self.static[key] for key in ("settings", "total_steps")}
        if not part.rows:
            return {}
        logprobs = self._logprobs(self.params, part.rows)
        metrics = evaluate(logprobs, part.reference, part.desirable, self.state.value.step, **static)
        return {f"eval/{key}": float(value) for key, value in metrics.items()}
