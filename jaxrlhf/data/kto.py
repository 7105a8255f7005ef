"""Prompts with answers to other prompts, over which the KL of KTO is estimated."""

from collections.abc import Sequence

from jaxrlhf.data.datasets import PairRow, SFTRow


def beside(rows: Sequence[SFTRow], limit: int) -> list[PairRow]:
    """Each row as `chosen`, and as `rejected` its prompt with the answer of the next row that has another prompt, cut
    to `limit` tokens. So what stands beside a row depends on no shuffling. After the last row comes the first; where
    all prompts are the same, the next row's answer is taken."""
    starts = [row.loss_mask.index(True) for row in rows]
    prompts = [tuple(row.tokens[:start]) for row, start in zip(rows, starts, strict=True)]
    count = len(rows)
    other = [(i + 1) % count for i in range(count)]
    if len(set(prompts)) > 1:
        for i in reversed(range(2 * count)):  # twice around: the first pass starts in the middle of a stretch
            here, following = i % count, (i + 1) % count
            other[here] = other[following] if prompts[here] == prompts[following] else following
    made = []
    for row, start, j in zip(rows, starts, other, strict=True):
        tokens = row.tokens[:start] + rows[j].tokens[starts[j] :]
        learnt = [False] * start + rows[j].loss_mask[starts[j] :]
        made.append(PairRow(row, SFTRow(tokens[:limit], learnt[:limit])))
    return made
