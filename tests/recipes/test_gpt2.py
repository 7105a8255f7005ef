"""scripts/recipe_gpt2.sh, a few steps of each stage."""

import csv
import json
import re

import pytest

import jaxrlhf

pytestmark = pytest.mark.long


def test_every_stage_leaves_what_the_page_says(run_recipe):
    folder = run_recipe("gpt2")
    printed = (folder / "printed.txt").read_text()
    runs = folder / "runs" / "gpt2"
    for model in ("ppo", "dpo", "online_dpo"):
        assert jaxrlhf.load(runs / model)[0].head == "lm"
    two_labels = jaxrlhf.load(runs / "reward")[0]
    assert two_labels.head == "linear" and two_labels.num_labels == 2
    assert "8 responses to train on: chosen ones are good, rejected ones are bad" in printed
    assert re.search(r"\d of 6 right", printed)
    assert "adapters of rank 8" in printed and (runs / "pairwise" / "plot.png").is_file()
    assert "no reward: every response is preferred to grpo.rejected_text" in printed
    rows = [json.loads(line) for line in (runs / "ppo" / "samples.jsonl").read_text().splitlines()]
    logged = list(csv.DictReader((runs / "ppo" / "samples.csv").open(newline="")))
    assert {row["step"] for row in rows} == {0, 1, 2, 3, 4} and len(logged) == len(rows)
    assert all({"prompt", "completion", "score"} <= {*row} for row in rows)
    bleu = json.loads((folder / "bleu" / "compare.json").read_text())
    assert len(bleu["models"]) == 4
    written = {path.name for path in (folder / "bleu").iterdir()}
    assert written == {"bleu.png", *(f"compare.{kind}" for kind in ("html", "json", "csv", "png"))}
    assert "right_tip (x 1)" in printed
