"""Mismatched prompts and completions, on which KTO estimates its KL baseline."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from jaxrlhf.data.datasets import PairRow, SFTRow
from jaxrlhf.data.held_out import Lazy


def mismatched_pairs(rows: Sequence[SFTRow], limit: int) -> Sequence[PairRow]:
    """Pair each row (`chosen`) with its prompt and the completion of the next row that has another prompt, cut to
    `limit` tokens (`rejected`). A pair is made when it is asked for.

    The first row follows the last. If all prompts are the same, the completion of the next row is used. The pairs
    depend on the order of `rows` alone, not on shuffling.
    """
    prompts = [blake2b(array("q", _prompt(row)), digest_size=8).digest() for row in rows]
    count = len(prompts)
    partners = [(i + 1) % count for i in range(count)]
    if len(set(prompts)) > 1:
        for k in reversed(range(2 * count)):  # twice: the first pass may start within a run of equal prompts
            i, following = k % count, (k + 1) % count
            partners[i] = partners[following] if prompts[i] == prompts[following] else following

    def pair(i: int) -> PairRow:
        row, partner = rows[i], rows[partners[i]]
        prompt, start = _prompt(row), partner.loss_mask.index(True)
        tokens = prompt + partner.tokens[start:]
        loss_mask = [False] * len(prompt) + partner.loss_mask[start:]
        return PairRow(row, SFTRow(tokens[:limit], loss_mask[:limit]))

    return Lazy(count, pair)


def _prompt(row: SFTRow) -> list[int]:
    return row.tokens[: row.loss_mask.index(True)]
