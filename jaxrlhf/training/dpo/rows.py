"""Rows of preference training with their labels and reference log-probs, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import DPOConfig
from jaxrlhf.data import batching, formats, kto, sources
from jaxrlhf.data.datasets import PairRow, Split, pair_rows
from jaxrlhf.data.labelled import LabelledRow, label_rows, labels_of_pairs
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.packing import PackedRow, pack
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig
from jaxrlhf.training import setup
from jaxrlhf.training.dpo.update import Preferences
from jaxrlhf.types import PackedPairs, Pairs


@dataclass
class Part:
    """The training rows, or the held-out ones."""

    rows: Sequence[PairRow | PackedRow]
    desirable: np.ndarray  # bool [N]   kto: the label; else true
    reference: np.ndarray  # f32 [N, 2], of packed rows [N, M, 2]   0 until the reference is scored


def read_rows(config: DPOConfig, tokenizer: Tokenizer) -> Split[PairRow] | Split[LabelledRow]:
    """Preference pairs; for kto labelled responses, to which a file of pairs is converted. Raises DataError and
    ConfigError."""
    if config.dpo.loss != "kto":
        return pair_rows(config.data, tokenizer)
    rows = sources.read_rows(config.data)
    paired = not formats.can_read(rows, "labels", config.data) and formats.can_read(rows, "pairs", config.data)
    return (labels_of_pairs if paired else label_rows)(config.data, tokenizer)


class PreferenceRows:
    """The rows of a split, batched for `model` on `mesh`. Raises ConfigError if they do not fit the model's context."""

    def __init__(
        self,
        split: Split[PairRow] | Split[LabelledRow],
        config: DPOConfig,
        tokenizer: Tokenizer,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._config, self._mesh, self._pad_id = config, mesh, tokenizer.pad_id
        self._context = model.max_positions  # limits a text; a packed row, whose positions restart, may be longer
        limit = min(config.data.max_length, self._context)
        rows: list[Any] = [*split.train, *split.validation]
        lengths = [len(text.tokens) for row in rows for text in batching.texts(row)]
        setup.check_context(lengths, model, "the longest row", "data.max_length")
        labels = np.array([getattr(row, "label", True) for row in rows])
        self.split: Split[Any] = split
        if config.dpo.loss == "kto":
            train, held_out = (kto.mismatched_pairs(part, limit) for part in (split.train, split.validation))  # type: ignore[arg-type]
            self.split = Split(train, held_out, split.report)
        longest = max(map(batching.row_length, (*self.split.train, *self.split.validation)))
        self.width = 2 * batching.bucket(limit if config.train.packing else longest, self._context)
        """Columns of the widest pair, or of every packed row."""
        if config.train.packing:
            self.split = pack(self.split, batching.texts, self.width, config.train.batch_size)
            self._max_pairs = max(len(row.lengths) // 2 for row in (*self.split.train, *self.split.validation))
        self.train = self._part(self.split.train, labels[: len(split.train)])
        self.held_out = self._part(self.split.validation, labels[len(split.train) :])

    def _part(self, rows: Sequence[Any], labels: np.ndarray) -> Part:
        packing = self._config.train.packing
        shape = (len(rows), self._max_pairs, 2) if packing else (len(rows), 2)
        return Part(rows, np.ones(len(rows), bool) if packing else labels, np.zeros(shape, np.float32))

    def pairs(self, rows: Sequence[Any]) -> Pairs | PackedPairs:
        """The rows as a batch on the mesh, as narrow as possible."""
        if self._config.train.packing:
            pairs: Pairs | PackedPairs = batching.packed_pairs(rows, self._pad_id, self.width, self._max_pairs)
        else:
            length = batching.bucket(max(map(batching.row_length, rows)), self._context)
            pairs = batching.pairs(rows, self._pad_id, length)
        return sharding.put_rows(pairs, self._mesh)

    def batch(self, part: Part, indices: Sequence[int]) -> Preferences:
        """The rows with these indices, with their reference log-probs and labels."""
        known = sharding.put_rows((part.reference[indices], part.desirable[indices]), self._mesh)
        return Preferences(self.pairs([part.rows[i] for i in indices]), *known)

    def batch_at(self, step: int) -> Preferences:
        """The training batch of an optimizer step."""
        config, number = self._config, len(self.train.rows)
        order = rows_at(step, config.train.batch_size, number, config.seed, config.data.shuffle)
        return self.batch(self.train, order.tolist())

    def longest(self, part: Part, count: int) -> Preferences:
        """A batch of the `count` longest rows, repeated if there are fewer."""
        order = sorted(range(len(part.rows)), key=lambda i: -batching.row_length(part.rows[i]))
        return self.batch(part, [order[i % len(order)] for i in range(count)])
