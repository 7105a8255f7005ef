"""Check of the masks of a rollout against masks derived from its tokens, with one row drawn as text."""

from collections.abc import Collection, Sequence

import numpy as np

from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.types import Rollout

KINDS = {"-": "padding before the prompt", "P": "prompt", "R": "response", "E": "end", "_": "padding after"}
WIDTH = 100  # characters per drawn line
SHOWN = {"-": (1, 1), "P": (3, 5), "R": (12, 4), "E": (1, 0), "_": (1, 1)}  # first and last columns of a long stretch


def check_masks(
    rollout: Rollout, rows: Sequence[PromptRow], stops: Collection[int], tokenizer: Tokenizer
) -> tuple[str, list[str]]:
    """Return the first mistake ("" if none) and a drawing: of the row with the mistake, or of one with most kinds.

    `rollout` is on the host, with one row for each of `rows`; any token of `stops` ends a response.
    """
    expected = [_column_kinds(rollout, i, len(row.tokens), stops) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if mistake := _mistake(rollout, i, row, expected[i], tokenizer):
            return f"row {i + 1}: {mistake}", _drawing(rollout, i, expected[i], tokenizer)
    most = max(range(len(rows)), key=lambda i: len(set(expected[i])))
    return "", _drawing(rollout, most, expected[most], tokenizer)


def _column_kinds(rollout: Rollout, row: int, prompt_length: int, stops: Collection[int]) -> str:
    """A letter of KINDS for each column: padding is what follows the first stop token, whatever its id is."""
    columns = rollout.response_mask.shape[1]
    width = rollout.tokens.shape[1] - columns
    response = "R" * columns
    for column, token in enumerate(np.asarray(rollout.tokens)[row, width:].tolist()):
        if token in stops:
            response = "R" * column + "E" + "_" * (columns - column - 1)
            break
    return "-" * (width - prompt_length) + "P" * prompt_length + response


def _mistake(rollout: Rollout, i: int, row: PromptRow, kinds: str, tokenizer: Tokenizer) -> str:
    width = len(kinds) - rollout.response_mask.shape[1]
    if rollout.tokens[i][width - len(row.tokens) : width].tolist() != row.tokens:
        return "its prompt does not stand before its response"
    for name, mask, included, first in (
        ("mask", rollout.mask[i], "PRE", 0),
        ("response mask", rollout.response_mask[i], "RE", width),
    ):
        for column, (inside, kind) in enumerate(zip(mask.tolist(), kinds[first:], strict=True), first):
            if inside != (kind in included):
                piece = tokenizer.convert_ids_to_tokens([int(rollout.tokens[i][column])])[0]
                return f"{piece!r} in column {column} ({KINDS[kind]}) is {'in' if inside else 'not in'} the {name}"
    if bool(rollout.finished[i]) != ("E" in kinds):
        return f"it counts as {'finished' if rollout.finished[i] else 'cut off'}, and it is not"
    return ""


def _drawing(rollout: Rollout, i: int, kinds: str, tokenizer: Tokenizer) -> list[str]:
    """Lines with tokens, kinds and the two masks below each other; long stretches are shortened."""
    pieces = [_printable(piece) for piece in tokenizer.convert_ids_to_tokens(rollout.tokens[i].tolist())]
    width = len(kinds) - rollout.response_mask.shape[1]
    response_mask = [False] * width + rollout.response_mask[i].tolist()
    cells = [
        (piece, kind, ".1"[inside], ".1"[response])
        for piece, kind, inside, response in zip(pieces, kinds, rollout.mask[i].tolist(), response_mask, strict=True)
    ]
    shown: list[tuple[str, ...]] = []
    for kind, (head, tail) in SHOWN.items():
        stretch = [cell for cell in cells if cell[1] == kind]
        uniform = len({cell[2:] for cell in stretch}) < 2  # a stretch with a mistake is shown in full
        if len(stretch) > head + tail + 1 and uniform:
            stretch = [*stretch[:head], ("...",) * 4, *stretch[len(stretch) - tail :]]
        shown += stretch
    blocks: list[list[str]] = [[]]
    for cell in shown:
        cell_width = max(map(len, cell))
        if blocks[-1] and len(blocks[-1][0]) + cell_width + 1 > WIDTH:
            blocks.append([])
        if not blocks[-1]:
            blocks[-1] = [f"{name:<6}" for name in ("token", "kind", "mask", "train")]
        blocks[-1] = [f"{line} {text:<{cell_width}}" for line, text in zip(blocks[-1], cell, strict=True)]
    legend = ", ".join(f"{letter} {kind}" for letter, kind in KINDS.items())
    return [*(line.rstrip() for block in blocks for line in block), legend]


def _printable(piece: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece)
