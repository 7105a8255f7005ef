"""The teaching notebook: made of its script, and what it shows when it is run; the same stages by command line."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from make_notebook import NOTEBOOK, SCRIPT, cells, notebook, run

ROOT = Path(__file__).parents[2]


def text_of(cell) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def test_the_notebook_is_its_script():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == cells(SCRIPT.read_text(encoding="utf-8"))


def test_its_outputs_are_whole_and_hold_nothing_of_the_machine():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(map(text_of, code))
    assert not re.search(r"(?<![\w.])/\w|Warning|File \"", printed)
    assert NOTEBOOK.stat().st_size < 400_000


SEEN = """print(json.dumps({
    "untrained": float(before[1]), "held_out": history[-1][3], "named": [float(x) for x in good - bad],
    "again": float(np.abs(again - good).max()), "kl": float(np.abs(kl).max()),
    "first": [float(x) for x in (steps[0]["ratio"].min(), steps[0]["ratio"].max(), steps[0]["kl"])],
    "last": [float(x) for x in (steps[-1]["ratio"].min(), steps[-1]["ratio"].max(), steps[-1]["kl"])],
    "objectives": [step["objective"] for step in steps], "scores": curves["scores"], "kls": curves["kl"],
    "improvement": [float(x) for x in improvement], "tokens": len(table.rows),
}))"""


@pytest.mark.slow
def test_what_it_shows_holds_when_it_is_run(tmp_path, monkeypatch):
    for name, value in {"QUICK": "1", "OUTPUT": str(tmp_path), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}.items():
        monkeypatch.setenv(name, value)
    made = notebook(SCRIPT.read_text(encoding="utf-8"))
    made.cells.append(nbformat.v4.new_code_cell(SEEN, id="seen"))
    run(made, ROOT)
    seen = json.loads(text_of(made.cells[-1]))
    print(seen)
    assert seen["held_out"] > max(0.75, seen["untrained"] + 0.1)
    assert seen["named"][0] > 0 and seen["named"][1] > 0
    assert seen["again"] < 1e-4  # jaxrlhf.score on the exported model
    assert seen["kl"] == 0 and seen["first"] == [1, 1, 0]  # the policy is the reference and the sampler
    assert seen["last"][0] < 0.9 and seen["last"][1] > 1.1 and seen["last"][2] > 0
    assert seen["objectives"][-1] > seen["objectives"][0]
    assert sum(seen["scores"][-3:]) / 3 > seen["scores"][0] + 1 and seen["kls"][0] == 0 < seen["kls"][-1]
    assert sum(seen["improvement"]) / len(seen["improvement"]) > 0.5
    assert seen["tokens"] > 2 and {path.name for path in tmp_path.glob("*.png")} == {"reward_model.png", "ppo.png"}
    assert "recognised" in "".join(map(text_of, made.cells))


@pytest.mark.long
def test_every_stage_of_the_commands_leaves_what_the_page_says(run_recipe):
    folder = run_recipe("notebook")
    printed = (folder / "printed.txt").read_text()
    runs = folder / "runs" / "notebook"
    assert (runs / "reward" / "plot.png").is_file() and (runs / "ppo" / "plot.png").is_file()
    assert re.search(r"\d of 6 right", printed)
    comparison = json.loads((folder / "comparison" / "compare.json").read_text())
    assert len(comparison["models"]) == 2
    assert "polite" in printed and "right_tip" in printed
