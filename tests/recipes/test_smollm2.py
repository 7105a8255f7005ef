"""scripts/recipe_smollm2.sh, a few steps of each stage."""

import json

import pytest

import jaxrlhf

pytestmark = pytest.mark.long


def test_every_stage_leaves_what_the_page_says(run_recipe):
    folder = run_recipe("smollm2")
    printed = (folder / "printed.txt").read_text()
    runs = folder / "runs" / "smollm2"
    for run in ("sft", "ppo", "ppo-lora", "grpo"):
        model, _ = jaxrlhf.load(runs / run)
        assert (model.family, model.head) == ("llama", "lm")
    assert (runs / "ppo-lora" / "export" / "adapter_config.json").is_file()
    assert len([path for path in (runs / "ppo" / "checkpoints").iterdir() if path.name.isdigit()]) == 1
    generations = json.loads((folder / "generations.json").read_text())
    ranked = generations["prompts"]
    assert len(ranked) == 3
    for word in ("BEST", "MEDIUM", "WORST", "per prompt    best minus worst"):
        assert word in printed
    comparison = json.loads((folder / "comparison" / "compare.json").read_text())
    assert len(comparison["models"]) == 4
    for word in ("peak memory", "tokens generated", "length-controlled", "KL to A", "polite (x 1)"):
        assert word in printed
    assert (folder / "training.png").is_file() and (runs / "ppo" / "metrics.csv").is_file()
