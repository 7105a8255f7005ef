"""Run the script of a recipe with a few steps of each stage."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Run scripts/recipe_NAME.sh with QUICK=1 in the environment of the tests; return its output folder and print what
    it printed. `prepare` of scripts/env.sh finds that environment installed."""

    def run(name: str) -> Path:
        venv = tmp_path / "venv"
        if not venv.exists():
            venv.mkdir()
            for part in ("bin", "lib", "pyvenv.cfg"):  # python finds its packages by all three
                if (Path(sys.prefix) / part).exists():
                    (venv / part).symlink_to(Path(sys.prefix) / part)
            sums = subprocess.run(["cksum", ROOT / "pyproject.toml"], capture_output=True, text=True, check=True)
            (venv / f".jaxrlhf-plots-{sums.stdout.split()[0]}").touch()
        environment = os.environ | {"QUICK": "1", "JAXRLHF_VENV": str(venv), "PYTHONPATH": str(ROOT)}
        script = ["bash", str(ROOT / "scripts" / f"recipe_{name}.sh"), str(tmp_path / name)]
        done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-2000:]
        (tmp_path / name / "printed.txt").write_text(done.stdout)
        return tmp_path / name

    return run
