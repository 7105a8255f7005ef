"""Token records of a run, made small enough for a page."""

import base64
import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.files import read_lines

SERIES = ("kl", "advantage", "value", "reward", "logprob", "entropy", "ratio", "ref_logprob", "td_error", "return")
"""Lists of a record with a number for each token, those that colour the text first."""
SEQUENCES = 64
TOKENS = 64 * 256
"""Tokens of all sequences together."""
LONGEST = 1024  # tokens of a sequence
LINE = 1 << 26  # characters of a record, which has about a hundred for each token


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of token records, except an incomplete last line. Raises ValueError, OSError,
    EOFError or zlib.error if it cannot be read."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in read_lines(file, LINE) if line.endswith("\n")]
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("pieces"), list):
            raise ValueError("a line is no token record")
    return records


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` positions, the first and the last among them, evenly spread."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)}) if limit > 1 else [count - 1]


def choose(records: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` records of a step: the best and the worst by score, and others in their order."""
    if len(records) <= limit:
        return list(records)
    scored = [i for i, record in enumerate(records) if isinstance(record.get("score"), float | int)]
    by_score = sorted(scored, key=lambda i: records[i]["score"])
    wanted = [*by_score[-1:], *by_score[:1], *range(len(records))]
    return [records[i] for i in sorted(list(dict.fromkeys(wanted))[:limit])]


def pack(records: Sequence[dict[str, Any]], cut: Callable[[str], str] = str) -> dict[str, Any]:
    """The records as {"words": [...], "records": [...]}: pieces and alternatives by their number in `words`, lists of
    numbers as base64 of 3 bytes a number (`whole24`, `floats24`), `top` as two of these with `ranks` entries a token.
    `cut` shortens a prompt."""
    words: dict[str, int] = {}

    def number_of(text: str) -> int:
        return words.setdefault(text, len(words))

    packed = []
    for record in records:
        length = min(len(record["pieces"]), LONGEST)
        kept = [name for name in SERIES if isinstance(record.get(name), list)]
        rows = (record.get("top") or [])[:length]
        ranks = min(map(len, rows), default=0)
        top = [item for row in rows for item in row[:ranks]]
        packed.append(
            {key: record.get(key) for key in ("step", "index", "sample", "score", "finished")}
            | {
                "prompt": cut(record.get("prompt") or ""),
                "length": len(record["pieces"]),
                "ids": whole24((record.get("tokens") or [])[:length]),
                "environment": [i for i, own in enumerate((record.get("sampled") or [])[:length]) if not own],
                "pieces": whole24([number_of(piece) for piece in record["pieces"][:length]]),
                "series": {name: floats24(record[name][:length]) for name in kept},
                "ranks": ranks,
                "top": [whole24([number_of(piece) for piece, _ in top]), floats24([logprob for _, logprob in top])],
            }
        )
    return {"words": list(words), "records": packed}


def whole24(values: Sequence[int]) -> str:
    """Numbers from 0 to 2^24 - 1 as base64 of 3 bytes each, the low one first."""
    return base64.b64encode(np.array(values, "<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()).decode()


def floats24(values: Sequence[float | None]) -> str:
    """Numbers as base64 of the upper 3 bytes of their float32, rounded: 16 significant bits. None is nan."""
    bits = np.array([np.nan if v is None else v for v in values], np.float32)
    upper = np.where(np.isnan(bits), 0x7FC00000, bits.view(np.uint32).astype(np.uint64) + 0x80) >> 8
    return whole24(upper.tolist())


def sample(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Records of a run's folder `tokens`: of steps evenly spread, the first and the last among them, the best, the
    worst and some others of each, up to SEQUENCES and TOKENS. Names files that cannot be read in `problems`."""
    paths = sorted(folder.glob("step-*.jsonl.gz"))
    steps = []
    for i in spread(len(paths), SEQUENCES // 4):
        try:
            steps.append(read(paths[i]))
        except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
            problems.append(f"{paths[i].name} cannot be read: {error}")
    steps = [records for records in steps if records]
    if not steps:
        return []
    limit = SEQUENCES // len(steps)
    while True:
        chosen = [record for records in steps for record in choose(records, limit)]
        if sum(min(len(record["pieces"]), LONGEST) for record in chosen) <= TOKENS:
            return chosen
        if limit > 1:
            limit -= 1
        else:  # very long responses: fewer steps
            steps = [steps[i] for i in spread(len(steps), len(steps) - 1)]
