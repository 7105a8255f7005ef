"""Metrics and samples of a run as CSV files, for spreadsheets and pandas."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.files import write_whole

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *"＝＋－＠")  # noqa: RUF001
"""First characters that make a spreadsheet compute a cell (https://owasp.org/www-community/attacks/CSV_Injection)."""


def write_metrics(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write the records of a metrics.jsonl: a row per record, `step` first, the other columns by name."""
    columns = sorted({key for record in records for key in record}, key=lambda name: (name != "step", name))
    return write_whole(path, _csv(columns, records))


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the rows of a samples.jsonl: step, prompt, completion and score first, then the other columns as they come.

    Conversations, and other lists and mappings, are JSON. Text that a spreadsheet would take for a formula gets an
    apostrophe before it; samples.jsonl has it unchanged.
    """
    first = ("step", "prompt", "completion", "score")
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = [name for name in first if name in names] + [name for name in names if name not in first]
    return write_whole(path, _csv(columns, ({key: _cell(value) for key, value in row.items()} for row in rows)))


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if text.startswith(FORMULA) else text


def _csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return text.getvalue()
