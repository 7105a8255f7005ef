"""Hooks of mkdocs.yml: the README is the site's first page, and links between it and docs/ work in both places."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

README = Path(__file__).resolve().parents[1] / "README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as index.md."""
    files.append(File.generated(config, "index.md", content=README.read_text(encoding="utf-8")))
    return files


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
    markdown = re.sub(r"\]\((?:\.\./)+README\.md", "](index.md", markdown)
    return re.sub(r"\[(?:docs/)?([\w/]+\.md)\]\(", named, markdown)
