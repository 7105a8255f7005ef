"""Make docs/recipes/notebook.ipynb from scripts/recipe_notebook.py, and run it for its outputs.

    python scripts/make_notebook.py [--output FILE]      (needs the extra `notebook`)

The script's cells begin with `# %%`, those of text with `# %% [markdown]`. The notebook is run in a Jupyter kernel of
this Python, without a network; the environment variables of the script (QUICK, OUTPUT) apply. It is written only if
every cell has run without an error.
"""

import argparse
import re
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, NOTEBOOK = ROOT / "scripts" / "recipe_notebook.py", ROOT / "docs" / "recipes" / "notebook.ipynb"


def cells(script: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a script: "markdown", with the comment signs removed, or "code"."""
    found = []
    for header, source in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, re.M):
        kind = "markdown" if "[markdown]" in header else "code"
        if kind == "markdown":
            source = re.sub(r"^# ?", "", source, flags=re.M)
        found.append((kind, source.strip("\n")))
    return found


def notebook(script: str) -> NotebookNode:
    """The notebook of a script, without outputs."""
    made = {"markdown": v4.new_markdown_cell, "code": v4.new_code_cell}
    content = [made[kind](source, id=f"cell-{i}") for i, (kind, source) in enumerate(cells(script))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=content, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def run(content: NotebookNode, folder: Path) -> NotebookNode:
    """Run a notebook with `folder` as its working directory, which fills in its outputs.

    Raises nbclient.exceptions.CellExecutionError for a cell that fails.
    """
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        content, kernel_name="python3", timeout=None, record_timing=False, coalesce_streams=True, resources=where
    )
    client.execute()
    content.metadata["language_info"] = {"name": "python"}  # not the version of this machine
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=NOTEBOOK)
    options = parser.parse_args()
    content = run(notebook(SCRIPT.read_text(encoding="utf-8")), ROOT)
    nbformat.write(content, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
