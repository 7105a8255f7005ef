"""Hooks of mkdocs.yml: the README is the site's first page, links between it and docs/ work in both places, and a
notebook is a page.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

README = Path(__file__).resolve().parents[1] / "README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as index.md, and each notebook X.ipynb as X_run.md with its plots."""
    files.append(File.generated(config, "index.md", content=README.read_text(encoding="utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for name, content in _notebook_files(notebook.content_string, notebook.src_uri.removesuffix(".ipynb") + "_run"):
            files.append(File.generated(config, name, content=content))
    return files


def _notebook_files(notebook: str, name: str) -> Iterator[tuple[str, str | bytes]]:
    """(path, content) of a notebook's page `name`.md, and of its plots: cells and their outputs in order."""
    parts, plots = [], 0
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                plots += 1
                plot = f"{name}_{plots}.png"
                yield plot, base64.b64decode(data["image/png"])
                parts.append(f"![Plot {plots}]({plot.rpartition('/')[2]})")
            elif text := "".join(output.get("text") or data.get("text/plain", "")).rstrip():
                parts.append(f"```text\n{text}\n```")
    yield f"{name}.md", "\n\n".join([*parts, ""])


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Turn links between README and docs/ into links of the site, named by the title of their page instead of its file.

    A link of the README to another file of the repository, which the site does not have, becomes its text.
    """

    def named(link: re.Match[str]) -> str:
        target = files.get_file_from_path(link[1])
        return f"[{target.page.title}](" if target and target.page else link[0]

    if page.file.src_uri == "index.md":
        markdown = markdown.replace("](docs/", "](")
        markdown = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)(?![\w/]+\.(?:md|svg))[^)]*\)", r"\1", markdown)
    markdown = re.sub(r"\]\(([\w/]+)\.ipynb\)", r"](\1_run.md)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+README\.md", "](index.md", markdown)
    return re.sub(r"\[(?:docs/)?([\w/]+\.md)\]\(", named, markdown)
