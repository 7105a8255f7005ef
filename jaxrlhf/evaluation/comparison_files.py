"""Files of a comparison: compare.html, compare.json, compare.csv, compare.png, and with references bleu.png."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.errors import JaxrlhfError, StorageError
from jaxrlhf.evaluation import comparison_plot, completions
from jaxrlhf.files import write_whole
from jaxrlhf.report.page import page

Result = dict[str, Any]


def write(result: Result, output: Path) -> tuple[list[Path], list[str]]:
    """Write all files into the folder `output`, or only JSON if it is named *.json. Returns the paths written, and
    notes: the plot needs matplotlib. Raises StorageError."""
    if output.suffix == ".json":
        return [completions.write(result, output)], []
    title = "Comparison of " + ", ".join(model["model"] for model in result["models"])
    paths = [
        write_whole(output / "compare.html", page(title, "compare", result | {"title": title})),
        completions.write(result, output / "compare.json"),
        write_whole(output / "compare.csv", table(result)),
    ]
    try:
        return [*paths, *comparison_plot.draw(result, output)], []
    except StorageError:
        raise
    except JaxrlhfError as error:
        return paths, [f"no pictures are drawn: {error}"]


def table(result: Result) -> str:
    """CSV with a row for each prompt, model and completion; components of the reward have columns reward_NAME."""
    rows = list(_rows(result))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(result: Result) -> Iterator[dict[str, Any]]:
    for prompt in result["prompts"]:
        for answer, model in zip(prompt["answers"], result["models"], strict=True):
            for completion in sorted(answer["completions"], key=lambda c: c["sample"]):
                row = {
                    "file": prompt["file"],
                    "row": prompt["index"] + 1,
                    "category": prompt["category"],
                    "prompt": prompt["prompt"],
                    "reference": prompt["reference"],
                    "label": answer["label"],
                    "model": model["model"],
                    "sample": completion["sample"] + 1,
                    "completion": completion["text"],
                    "tokens": completion["tokens"],
                    "finished": completion["finished"],
                }
                measured = {name: completion.get(name) for name in ("score", "sentence_bleu", "rouge_l")}
                parts = {f"reward_{name}": value for name, value in completion.get("components", {}).items()}
                numbers = measured | parts | {"prompt_mean": answer.get("mean"), "improvement": answer["improvement"]}
                yield row | {name: value for name, value in numbers.items() if value is not None}
