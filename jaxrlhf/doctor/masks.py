"""The masks of a rollout beside what they should be, read off the tokens once more and drawn for a person to see."""

from collections.abc import Collection, Sequence

import numpy as np

from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.types import Rollout

KINDS = {"-": "padding before the prompt", "P": "prompt", "R": "response", "E": "end", "_": "padding after"}
WIDTH = 100  # characters of a drawn line
SHOWN = {"-": (1, 1), "P": (3, 5), "R": (12, 4), "E": (1, 0), "_": (1, 1)}  # of a long stretch: first and last columns


def kinds(rollout: Rollout, row: int, prompt: int, stops: Collection[int]) -> str:
    """A letter of KINDS for each column of a row whose prompt has `prompt` tokens; any of `stops` ends a response.

    Padding after a response is what follows the first stop token, whatever its id is.
    """
    columns = rollout.response_mask.shape[1]
    width = rollout.tokens.shape[1] - columns
    response = ["R"] * columns
    for at, token in enumerate(np.asarray(rollout.tokens)[row, width:].tolist()):
        if token in stops:
            response[at:] = ["E", *"_" * (columns - at - 1)]
            break
    return "-" * (width - prompt) + "P" * prompt + "".join(response)


def audit(
    rollout: Rollout, rows: Sequence[PromptRow], stops: Collection[int], tokenizer: Tokenizer
) -> tuple[str, list[str]]:
    """(the first thing that is wrong, or "", and a row as lines): the row with it, else the one that shows most.

    `rollout` is on the host, one row for each of `rows`.
    """
    read = [kinds(rollout, i, len(row.tokens), stops) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if wrong := _mistake(rollout, i, row, read[i], tokenizer):
            return f"row {i + 1}: {wrong}", _picture(rollout, i, read[i], tokenizer)
    most = max(range(len(rows)), key=lambda i: len(set(read[i])))
    return "", _picture(rollout, most, read[most], tokenizer)


def _mistake(rollout: Rollout, i: int, row: PromptRow, letters: str, tokenizer: Tokenizer) -> str:
    width = len(letters) - rollout.response_mask.shape[1]
    if rollout.tokens[i][width - len(row.tokens) : width].tolist() != row.tokens:
        return "its prompt does not stand before its response"
    for name, mask, counted, first in (
        ("mask", rollout.mask[i], "PRE", 0),
        ("response mask", rollout.response_mask[i], "RE", width),
    ):
        for column, (inside, letter) in enumerate(zip(mask.tolist(), letters[first:], strict=True), first):
            if inside != (letter in counted):
                piece = tokenizer.convert_ids_to_tokens([int(rollout.tokens[i][column])])[0]
                return f"{piece!r} in column {column} ({KINDS[letter]}) is {'in' if inside else 'not in'} the {name}"
    if bool(rollout.finished[i]) != ("E" in letters):
        return f"it counts as {'finished' if rollout.finished[i] else 'cut off'}, and it is not"
    return ""


def _picture(rollout: Rollout, i: int, letters: str, tokenizer: Tokenizer) -> list[str]:
    """Tokens, what each is, and the two masks, one below the other; long stretches lose their middle."""
    pieces = [_printable(piece) for piece in tokenizer.convert_ids_to_tokens(rollout.tokens[i].tolist())]
    width = len(letters) - rollout.response_mask.shape[1]
    learnt = [False] * width + rollout.response_mask[i].tolist()
    names = "token", "is", "seen", "learnt"
    cells = [
        (piece, letter, ".1"[inside], ".1"[used])
        for piece, letter, inside, used in zip(pieces, letters, rollout.mask[i].tolist(), learnt, strict=True)
    ]
    shown: list[tuple[str, ...]] = []
    for letter, (head, tail) in SHOWN.items():
        part = [cell for cell in cells if cell[1] == letter]
        alike = len({cell[2:] for cell in part}) < 2  # what is wrong is never left out
        if len(part) > head + tail + 1 and alike:
            part = [*part[:head], ("...",) * 4, *part[len(part) - tail :]]
        shown += part
    blocks: list[list[str]] = [[]]
    for cell in shown:
        room = max(map(len, cell))
        if blocks[-1] and len(blocks[-1][0]) + room + 1 > WIDTH:
            blocks.append([])
        if not blocks[-1]:
            blocks[-1] = [f"{name:<6}" for name in names]
        blocks[-1] = [f"{line} {part:<{room}}" for line, part in zip(blocks[-1], cell, strict=True)]
    legend = ", ".join(f"{letter} {what}" for letter, what in KINDS.items())
    return [*(line.rstrip() for block in blocks for line in block), legend]


def _printable(piece: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece)
