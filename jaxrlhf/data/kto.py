"""Mismatched prompts and completions, on which KTO estimates its KL baseline."""

from collections.abc import Sequence

from jaxrlhf.data.datasets import PairRow, SFTRow


def mismatched_pairs(rows: Sequence[SFTRow], limit: int) -> list[PairRow]:
    """Pair each row (`chosen`) with its prompt and the completion of the next row that has another prompt, cut to
    `limit` tokens (`rejected`).

    The first row follows the last. If all prompts are the same, the completion of the next row is used. The pairs
    depend on the order of `rows` alone, not on shuffling.
    """
    starts = [row.loss_mask.index(True) for row in rows]
    prompts = [tuple(row.tokens[:start]) for row, start in zip(rows, starts, strict=True)]
    count = len(rows)
    partners = [(i + 1) % count for i in range(count)]
    if len(set(prompts)) > 1:
        for k in reversed(range(2 * count)):  # twice: the first pass may start within a run of equal prompts
            i, following = k % count, (k + 1) % count
            partners[i] = partners[following] if prompts[i] == prompts[following] else following
    pairs = []
    for row, start, partner in zip(rows, starts, partners, strict=True):
        tokens = row.tokens[:start] + rows[partner].tokens[starts[partner] :]
        loss_mask = [False] * start + rows[partner].loss_mask[starts[partner] :]
        pairs.append(PairRow(row, SFTRow(tokens[:limit], loss_mask[:limit])))
    return pairs
