"""The commands of a page: those of its bash blocks, in order.

python tests/ux/commands.py README.md    prints the commands that can be run without a hub, a GPU, torch or an install
"""

import re
import sys
from pathlib import Path

NEEDS = re.compile(r"#.*\bneeds (a hub|a GPU|torch|several hosts)\b")
"""The comment of a command that no test runs."""
OWN = (
    "pip install",
    "source .venv",
    "bash scripts/test.sh",
    "bash tests/ux",
    "bash scripts/recipe_",
    "python scripts/recipe_",
    "python scripts/make_",
    ".ci/run",
    "ruff check",
    "mkdocs",
)
"""Commands that install this project or develop it, and the recipes, which tests/recipes runs."""
DEMO = "bash scripts/demo.sh"


def commands(page: Path) -> list[str]:
    """Commands, with their comments; lines that a backslash continues are one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def runnable(page: Path) -> list[str]:
    """The commands that a test runs."""
    return [line for line in commands(page) if not NEEDS.search(line) and not line.startswith(OWN)]


if __name__ == "__main__":
    print("\n".join(runnable(Path(sys.argv[1]))))
