"""Tables and columns of text for the console."""

import textwrap
from collections.abc import Sequence

from jaxrlhf.errors import visible

WIDTH = 100
LINES = 8
"""Lines of a text in columns; longer ones are cut."""


def one_line(text: str, width: int) -> str:
    """`text` without line breaks, repeated spaces and control characters, truncated to `width` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."


def text_table(rows: Sequence[list[str]], width: int = WIDTH) -> list[str]:
    """Lines of a table whose first row is the head. The first column is aligned to the left, the others to the right.

    Columns beyond `width` characters follow in further blocks, each with the first column.
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks, block, used = [], [], sizes[0]
    for i, size in enumerate(sizes[1:], 1):
        if block and used + 2 + size > width:
            blocks.append(block)
            block, used = [], sizes[0]
        block.append(i)
        used += 2 + size
    lines: list[str] = []
    for number, columns in enumerate([*blocks, block]):
        lines += [""] * bool(number)
        for row in rows:
            cells = [row[i].rjust(sizes[i]) for i in columns]
            lines.append("  ".join([row[0].ljust(sizes[0]), *cells]))
    return [line.rstrip() for line in lines]


def side_by_side(heads: Sequence[str], texts: Sequence[str], width: int = WIDTH, at_most: int = 3) -> list[str]:
    """Lines of texts in columns with heads, `at_most` columns next to each other. A text is cut after LINES lines."""
    lines: list[str] = []
    for start in range(0, len(texts), at_most):
        group = range(start, min(start + at_most, len(texts)))
        size = (width - 3 * (len(group) - 1)) // len(group)
        above = [wrapped(heads[i], size) for i in group]
        most = max(map(len, above))
        columns = [
            [*head, *[""] * (most - len(head)), *wrapped(texts[i], size)] for i, head in zip(group, above, strict=True)
        ]
        for k in range(max(map(len, columns))):
            cells = [(column[k] if k < len(column) else "").ljust(size) for column in columns]
            lines.append(" | ".join(cells).rstrip())
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text of at most `width` characters, cut after LINES lines, without control characters."""
    paragraphs = visible(text).strip().split("\n")
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, width) or [""]]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... ({len(lines) - LINES + 1} more lines)"]
    return lines if any(lines) else ["(empty)"]
