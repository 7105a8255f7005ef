"""Text of a tokenised row with what is learnt marked: by colour on a terminal, else between [[ and ]]."""

import itertools
from collections.abc import Sequence

from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import visible

LEARNT, PLAIN = "\x1b[1;32m", "\x1b[0m"  # bold green


def legend(colour: bool) -> str:
    """Say how learnt tokens are marked."""
    return f"tokens trained on {LEARNT}in green{PLAIN}" if colour else "tokens trained on in [[ ]]"


def marked(tokens: Sequence[int], loss_mask: Sequence[bool], tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """Text of a row, with its control tokens; other control characters are spelt out."""
    begin, finish = (LEARNT, PLAIN) if colour else ("[[", "]]")
    control = {*tokenizer.control_tokens.values()}
    kinds = [(trained, token in control) for token, trained in zip(tokens, loss_mask, strict=True)]
    text, start, inside = "", 0, False
    for (trained, is_control), run in itertools.groupby(kinds):
        end = start + len(list(run))
        part = tokens[start:end]
        if trained != inside:
            text += begin if trained else finish
        plain = "".join(tokenizer.convert_ids_to_tokens(part)) if is_control else tokenizer.decode(part, tokens[:start])
        text += visible(plain)
        start, inside = end, trained
    return text + (finish if inside else "")


def token_lines(
    tokens: Sequence[int], loss_mask: Sequence[bool], tokenizer: Tokenizer, *, colour: bool = False
) -> list[str]:
    """A line for each token: its position, its id, a star if it is trained on, and its entry in the vocabulary."""
    lines = []
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    for i, (token, trained, piece) in enumerate(zip(tokens, loss_mask, pieces, strict=True)):
        line = f"{i:5} {token:7} {'*' if trained else ' '} {visible(piece)!r}"
        lines.append(f"{LEARNT}{line}{PLAIN}" if colour and trained else line)
    return lines
