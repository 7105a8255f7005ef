"""Preference optimization without a reward model: DPO and related losses."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import distributed, sharding
from jaxrlhf.algorithms.dpo import RunningMean
from jaxrlhf.config import DPOConfig
from jaxrlhf.config.dpo import REFERENCE_FREE
from jaxrlhf.data import batching, kto
from jaxrlhf.data.datasets import PairRow, Split, pair_rows
from jaxrlhf.data.labelled import LabelledRow, label_rows
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import Preempted
from jaxrlhf.training import setup
from jaxrlhf.training.dpo import reference
from jaxrlhf.training.dpo.update import (
    PairLogprobs,
    Preferences,
    beta_schedule,
    evaluate,
    evaluation_keys,
    score,
    update,
)
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.supervised import SupervisedTrainer
from jaxrlhf.types import PackedPairs, Pairs, Params

PROGRESS = 10.0
"""Seconds between two progress lines while the reference is scored."""


def read_rows(config: DPOConfig, tokenizer: Tokenizer) -> Split[PairRow] | Split[LabelledRow]:
    """Preference pairs; for kto labelled responses. Raises DataError and ConfigError."""
    return (label_rows if config.dpo.loss == "kto" else pair_rows)(config.data, tokenizer)


class DPOTrainer(SupervisedTrainer[DPOConfig]):
    """Train `config.model` on the preferences of `config.data`: `.train()`, then `.save_pretrained(folder)`.

    Errors in the config, the data or the model are raised here, before training begins.
    """

    def __init__(self, config: DPOConfig, *, fresh: bool = False) -> None:
        super().__init__(config, role="policy", head="lm", fresh=fresh)
        self.data: Split[Any] = read_rows(config, self.tokenizer)
        rows = self.data
        if config.dpo.loss == "kto":
            limit = min(config.data.max_length, self.model.max_positions)
            train, held_out = (kto.mismatched_pairs(part, limit) for part in (rows.train, rows.validation))
            rows = Split(train, held_out, rows.report, rows.parts)
        self.use_rows(rows, [f"eval/{key}" for key in evaluation_keys(config.dpo)], texts=2)
        number = len(self.rows.train) + len(self.rows.validation)
        pairs = (self._max_pairs, 2) if config.train.packing else (2,)
        self.reference = np.zeros((number, *pairs), np.float32)
        """Log-probs of the reference, f32 [N, 2], of packed rows [N, M, 2], for the training rows and then the held-out
        ones; 0 until the reference is scored."""
        self.reference_known = config.dpo.loss in REFERENCE_FREE
        """True once the reference log-probs are known, or if the loss needs none."""
        self.samples = Samples(self.data, config, self.model, self.tokenizer, self.mesh)
        running = RunningMean(jnp.float32(0), jnp.float32(0)) if "bco_pair" in config.dpo.losses else None
        objective = config.dpo, beta_schedule(config.dpo, self.total_steps)
        self.load(objective, score_stats=sharding.put_whole(running, self.mesh))

    def _first_row(self) -> list[str]:
        first = self.data.train[0]
        sides = ("chosen", "rejected") if isinstance(first, PairRow) else (("good" if first.label else "bad"),)
        texts = zip(sides, batching.texts(first), strict=True)
        return [f"{side}: {self.tokenizer.decode(text.tokens)}" for side, text in texts]

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        with self.session(**{} if self.reference_known else {"reference": self._reference_hash}) as session:
            self.score_reference(session.note, session.stopping)
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

    def batch(self, step: int) -> Preferences:
        """The training batch of a step, on the mesh."""
        order = self.order(step)
        return self.preferences([self.rows.train[i] for i in order], self.reference[order], self.columns)

    def preferences(self, rows: Sequence[Any], reference: np.ndarray, columns: int | None = None) -> Preferences:
        """A batch of these rows with their labels and their log-probs under the reference, on the mesh."""
        return Preferences(self.collate(rows, columns), *sharding.put_rows((reference, _desirable(rows)), self.mesh))

    def collate(self, rows: Sequence[Any], columns: int | None = None) -> Pairs | PackedPairs:
        """The texts of these rows, on the mesh, as wide as the longest of them or `columns`."""
        if self.config.train.packing:
            pairs = batching.packed_pairs(rows, self.tokenizer.pad_id, self.width, self._max_pairs)
        else:
            pairs = batching.pairs(rows, self.tokenizer.pad_id, columns or self.padded_length(rows))
        return sharding.put_rows(pairs, self.mesh)

    def score_reference(self, note: Callable[[str], None], stopping: Callable[[], bool] = lambda: False) -> None:
        """Compute the log-probs of the reference, the model before the first step, unless they are known.

        They are kept in a file named by a hash of the model and the rows, for any mesh. `note` prints progress. Raises
        Preempted once `stopping()`.
        """
        if self.reference_known:
            return
        parts = [part for part in (self.rows.train, self.rows.validation) if part]
        # on another mesh the values differ by rounding alone
        model = dataclasses.replace(self.model, adapters=None, remat="none", mesh=None)
        content = f"{self._reference_hash} {setup.fingerprint(chain(*parts))} {model}"
        if self.config.dpo.ld_alpha is not None:
            content += f" {self.config.dpo.ld_alpha}"

        def compute() -> np.ndarray:
            note(f"log-probs of the reference: {counts} rows, once for this model and these rows")
            return np.concatenate([self._logprobs(self._reference, part, note, stopping).logprobs for part in parts])

        counts = " and ".join(str(len(part)) for part in parts)
        self.reference = reference.cached_logprobs(
            Path(self.config.dpo.reference_folder or Path(self.config.run_dir) / "reference"),
            hashlib.sha256(content.encode()).hexdigest()[:32],
            self.reference.shape,
            compute,
            note,
        )
        self.reference_known = True

    @property
    def _reference(self) -> Params:
        """The reference before the first step: the base model under adapters, or the initial parameters."""
        return self.frozen or self.state.params["policy"]

    @functools.cached_property
    def _reference_hash(self) -> str:
        return setup.params_fingerprint(self._reference)

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
            distributed.check_stop()
            if stopping():
                raise Preempted("stopped before the first step; run the same command again to start over")
            batch = [rows[i] for i in order[start : start + size]]
            batch += batch[:1] * (size - len(batch))  # filled up; cut off below
            parts.append(sharding.fetch(score(params, self.collate(batch), model=self.model, settings=self.config.dpo)))
            if time.monotonic() - last_note > PROGRESS:
                last_note = time.monotonic()
                note(f"log-probs of the reference: {start + size} of {len(rows)} rows")
        inverse = np.argsort(order)  # leaves out the rows that fill up the last batch: they come last
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[inverse], *parts)

    def _evaluate(self) -> dict[str, float]:
        """Loss and metrics of the held-out rows; empty if there are none."""
        rows, (settings, schedule) = self.rows.validation, self.spec.objective
        if not rows:
            return {}
        state = self.state.value
        baseline = 0.0 if state.score_stats is None else state.score_stats.mean
        known = self.reference[len(self.rows.train) :], _desirable(rows), state.step, baseline
        metrics = evaluate(self._logprobs(self.params, rows), *known, settings=settings, schedule=schedule)
        return {f"eval/{key}": float(value) for key, value in metrics.items()}


def _desirable(rows: Sequence[Any]) -> np.ndarray:
    """bool [B]. kto: the label of each row; else true."""
    return np.array([getattr(batching.texts(row)[0], "label", True) for row in rows])
