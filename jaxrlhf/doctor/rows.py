"""Checks of the rows of a data set: duplicates, lengths, and what often goes wrong in training on them."""

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.data import checks, formats, held_out, tokenise
from jaxrlhf.data.checks import text_of
from jaxrlhf.data.examples import Example, to_examples
from jaxrlhf.data.omissions import first_few
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenizer import Tokenizer

BARS = 8  # lines of a histogram
WIDTH = 40  # characters of its longest bar
MANY = 0.8  # share of pairs with the longer response chosen, and of equal completions, that is worth a warning
ENOUGH = 10  # rows below which shares say nothing
Sequences = list[tuple[str, Sequence[int], Sequence[bool]]]


@dataclass(frozen=True)
class TokenisedRow:
    """A usable row: where it is, its example, and (name, tokens, loss mask) of its sequences."""

    location: str
    example: Example
    sequences: Sequences


def read_examples(rows: Rows, found: formats.Format, config: Data) -> list[tuple[str, Example]]:
    """(location, example) of every row that has one, without a tokenizer. Raises DataError."""
    read = []
    for i, location in enumerate(rows.locations):
        examples, _ = to_examples(rows, i, found, config, True, str, Counter())
        read += [(location.short, example) for example in examples]
    return read


def duplicates(rows: Rows, examples: Sequence[tuple[str, Example]]) -> list[str]:
    """A line about rows that are equal in every column, and one about equal prompts."""
    contents = (json.dumps(row, sort_keys=True, default=str) for row in rows.rows)
    lines = [_repeated("rows", zip((location.short for location in rows.locations), contents, strict=True))]
    prompts = [(where, example) for where, example in examples if example.prompt is not None]
    lines.append(_repeated("prompts", ((where, held_out.digests(e)[0]) for where, e in prompts)))
    return list(filter(None, lines))


def _repeated(what: str, items: Iterable[tuple[str, Hashable]]) -> str:
    """Say how many items occur before, and where the most frequent one is; "" for no items."""
    places: dict[Hashable, list[str]] = defaultdict(list)
    repeats = []
    for where, item in items:
        repeats += [where] * (item in places)
        places[item].append(where)
    if not places:
        return ""
    if not repeats:
        return f"duplicate {what}: none"
    most = max(places.values(), key=len)
    return (
        f"duplicate {what}: {len(repeats)} of {len(places) + len(repeats)} repeat an earlier one "
        f"({first_few(repeats)}); the most frequent occurs {len(most)} times ({first_few(most)})"
    )


def character_lengths(examples: Sequence[tuple[str, Example]]) -> list[int]:
    """Characters of each example, with its longest completion."""
    return [
        len(text_of(example.prompt or "")) + max((len(text_of(content)) for content in example.completions), default=0)
        for _, example in examples
    ]


def summary(lengths: Sequence[int], unit: str) -> str:
    """Smallest, median, 95th percentile and largest of lengths."""
    low, median, high, top = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest")
    return f"{unit} per row: {low} to {top}, median {median}, 95th percentile {high}"


def histogram(lengths: Sequence[int]) -> list[str]:
    """A bar for each of at most BARS ranges of equal width; none for lengths that are all equal."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BARS)
    if low == high:
        return []
    counts = np.bincount([(length - low) // width for length in lengths])
    edges = [(low + i * width, min(low + (i + 1) * width - 1, high)) for i in range(len(counts))]
    digits = len(str(high))
    return [
        f"  {a:{digits}} - {b:{digits}}  {'#' * max(round(WIDTH * n / counts.max()), n > 0)} {n}"
        for (a, b), n in zip(edges, counts.tolist(), strict=True)
    ]


def warnings(task: formats.Task, examples: Sequence[tuple[str, Example]]) -> list[str]:
    """Warnings about the texts of examples for `task`."""
    lines = []
    dropped: dict[str, list[str]] = defaultdict(list)
    for where, example in examples:
        dropped[tokenise.drop_reason(example, task, has_bos=True)].append(where)
    lines += [f"{len(at)} rows cannot be used: {reason} ({first_few(at)})" for reason, at in dropped.items() if reason]
    scores = [example.scores[0] for _, example in examples if example.scores]
    if task in ("labels", "scores") and len(set(scores)) == 1:
        lines.append(f"all {len(scores)} {task} are {scores[0]:g}: there is nothing to tell apart")
    if task == "prompts":
        return lines
    first = [(where, example, text_of(example.completions[0])) for where, example in examples if example.completions]
    text, count = Counter(text for *_, text in first).most_common(1)[0] if first else ("", 0)
    if len(first) >= ENOUGH and count >= MANY * len(first):
        lines.append(f"{count} of {len(first)} rows have the same completion: {text[:60]!r}")
    lines += checks.missing_space(checks.glued(examples))
    if task == "pairs":
        longer = sum(len(text_of(e.completions[0])) > len(text_of(e.completions[1])) for _, e in examples)
        if len(examples) >= ENOUGH and longer >= MANY * len(examples):
            lines.append(
                f"chosen is longer than rejected in {longer} of {len(examples)} pairs: a model trained on them may "
                "learn length alone"
            )
    return lines


def token_warnings(rows: Sequence[TokenisedRow], tokenizer: Tokenizer, *, learns: bool) -> list[str]:
    """Warnings about the tokens of rows. `learns`: the task trains on their tokens."""
    lines = []
    if learns:
        endless = [row.location for row in rows if not all(_learns_to_stop(s, tokenizer) for s in row.sequences)]
        if endless:
            lines.append(
                f"in {len(endless)} rows no stop token is trained on at the end ({first_few(endless)}): the model does "
                "not learn to stop there"
            )
    return lines + checks.unknown_words([(row.location, row.example) for row in rows], tokenizer)


def _learns_to_stop(sequence: tuple[str, Sequence[int], Sequence[bool]], tokenizer: Tokenizer) -> bool:
    _, tokens, mask = sequence
    last = max((i for i, trained in enumerate(mask) if trained), default=None)
    return last is None or tokens[last] in tokenizer.stop_ids
