"""scripts/recipe_strictbot.sh, a few steps of each stage."""

import json

import pytest

import jaxrlhf
from jaxrlhf.config.file import load_config, presets


@pytest.mark.long
def test_every_stage_leaves_what_the_page_says(run_recipe):
    folder = run_recipe("strictbot")
    runs = folder / "runs" / "strictbot"
    assert (runs / "sft" / "export" / "adapter_config.json").is_file()
    merged, exported = ({*jaxrlhf.load(path)[1]} for path in (runs / "merged", folder / "strictbot"))
    assert merged == exported, "merged, and exported whole"
    records = [json.loads(line) for line in (runs / "ppo" / "metrics.jsonl").read_text().splitlines()]
    parts = ("judge", "appropriateness", "facts", "constructiveness", "consistency", "toxicity")
    assert {f"rewards/{name}/mean" for name in parts} <= {*records[-1]}
    best = [json.loads(line) for line in (folder / "best.jsonl").read_text().splitlines()]
    assert len(best) == 8 and all(row["category"] and row["score"] is not None for row in best)
    printed = (folder / "printed.txt").read_text()
    assert "rm.pt is left out" in printed or (folder / "converted").is_dir()
    assert "poor logic" in printed and "toxicity" in printed, "tables by category and by part of the reward"
    assert (folder / "comparison" / "compare.json").is_file() and (runs / "ppo" / "metrics.csv").is_file()


def test_the_short_run_has_the_settings_of_the_first_script():
    config = load_config("ppo", presets()["recipes/strictbot/ppo_short"], partial=True)
    assert (config.ppo.batch_size, config.ppo.total_episodes, config.data.max_rows) == (2, 24, 16)
    assert (config.ppo.kl_coef, config.optim.learning_rate, config.sampling.response_length) == (0.03, 1e-5, 32)
