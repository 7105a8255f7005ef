"""The rows of preference training: which there are, what is known of each, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import DPOConfig
from jaxrlhf.data import batching, kto, sources
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
    """Rows to train on, or those held out."""

    rows: Sequence[PairRow | PackedRow]
    desirable: np.ndarray  # bool [N]   kto: the label; else true
    reference: np.ndarray  # f32 [N, 2], of packed rows [N, M, 2]   0 before the reference was scored, or without one


def read(config: DPOConfig, tokenizer: Tokenizer) -> Split[PairRow] | Split[LabelledRow]:
    """Pairs, or for kto responses with a label, which of a file of pairs are those of the pairs. Raises DataError and
    ConfigError."""
    if config.dpo.loss != "kto":
        return pair_rows(config.data, tokenizer)
    columns = sources.read_rows(config.data).columns
    paired = "rejected" in columns and "label" not in columns
    return (labels_of_pairs if paired else label_rows)(config.data, tokenizer)


class Rows:
    """What was read, for `model` on `mesh`. Raises ConfigError where it does not fit the model's context."""

    def __init__(
        self,
        split: Split[PairRow] | Split[LabelledRow],
        config: DPOConfig,
        tokenizer: Tokenizer,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._config, self._mesh, self._pad_id = config, mesh, tokenizer.pad_id
        self._context = model.max_positions  # limits a text; a packed row, where positions start anew, may be longer
        limit = min(config.data.max_length, self._context)
        read: list[Any] = [*split.train, *split.validation]
        labels = np.array([getattr(row, "label", True) for row in read])
        lengths = [len(text.tokens) for row in read for text in batching.texts(row)]
        setup.check_context(lengths, model, "the longest row", "data.max_length")
        rows: Split[Any] = split
        if config.dpo.loss == "kto":
            train, held_out = (kto.mismatched_pairs(part, limit) for part in (split.train, split.validation))  # type: ignore[arg-type]
            rows = Split(train, held_out, split.report)
        widest = limit if config.train.packing else max(map(batching.row_length, (*rows.train, *rows.validation)))
        self.width = 2 * batching.bucket(widest, self._context)
        """Columns of the widest pair, or of all packed rows."""
        if config.train.packing:
            rows = pack(rows, batching.texts, self.width, config.train.batch_size)
            self._most = max(len(row.lengths) // 2 for row in (*rows.train, *rows.validation))
        self.report = rows.report
        self.train, self.held_out = (
            self._part(part, labels[begin : begin + len(part)])
            for part, begin in ((rows.train, 0), (rows.validation, len(split.train)))
        )

    def _part(self, rows: Sequence[Any], labels: np.ndarray) -> Part:
        packing = self._config.train.packing
        shape = (len(rows), self._most, 2) if packing else (len(rows), 2)
        return Part(rows, np.ones(len(rows), bool) if packing else labels, np.zeros(shape, np.float32))

    def pairs(self, rows: Sequence[Any]) -> Pairs | PackedPairs:
        """In place, as wide as they need to be."""
        if self._config.train.packing:
            made: Pairs | PackedPairs = batching.packed_pairs(rows, self._pad_id, self.width, self._most)
        else:
            length = batching.bucket(max(map(batching.row_length, rows)), self._context)
            made = batching.pairs(rows, self._pad_id, length)
        return sharding.put_rows(made, self._mesh)

    def batch(self, part: Part, numbers: Sequence[int]) -> Preferences:
        """Rows by their numbers, with what is known of them."""
        known = sharding.put_rows((part.reference[numbers], part.desirable[numbers]), self._mesh)
        return Preferences(self.pairs([part.rows[i] for i in numbers]), *known)

    def of_step(self, step: int) -> Preferences:
        """The batch of an optimizer step."""
        config, number = self._config, len(self.train.rows)
        numbers = rows_at(step, config.train.batch_size, number, config.seed, config.data.shuffle)
        return self.batch(self.train, numbers.tolist())

    def longest(self, part: Part, count: int) -> Preferences:
        """A batch of the longest rows, which come again and again if there are fewer."""
        order = sorted(range(len(part.rows)), key=lambda i: -batching.row_length(part.rows[i]))
        return self.batch(part, [order[i % len(order)] for i in range(count)])
