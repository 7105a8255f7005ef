"""scripts/recipe_modular.sh, a few steps of each stage."""

import json

import pytest

import jaxrlhf
from jaxrlhf.config.file import load_config, presets


@pytest.mark.long
def test_every_stage_leaves_what_the_page_says(run_recipe):
    folder = run_recipe("modular")
    assert (folder / "adapters" / "adapter_config.json").is_file()
    assert {*jaxrlhf.load(folder / "merged")[1]} == {*jaxrlhf.load(folder / "runs" / "modular" / "merged")[1]}
    steps = (folder / "ten_steps.txt").read_text()
    assert steps.count("prompt ") >= 1 and "td_error" in steps
    assert steps.splitlines()[-1].startswith("10 policy update")
    records = [json.loads(line) for line in (folder / "runs" / "modular" / "ppo" / "metrics.jsonl").open()]
    assert records[-1]["critic/learning_rate"] == pytest.approx(10 * records[-1]["learning_rate"])


def test_the_numbers_are_the_projects():
    config = load_config("ppo", presets()["recipes/modular/ppo"], partial=True)
    assert (config.lora.rank, config.lora.alpha) == (16, 32)
    assert (config.optim.learning_rate, config.critic.learning_rate) == (1e-5, 1e-4)
    assert (config.sampling.top_k, config.sampling.top_p, config.sampling.response_length) == (50, 0.95, 10)
    assert (config.ppo.gamma, config.ppo.lam, config.ppo.kl_coef, config.ppo.cliprange) == (0.99, 0.95, 0.1, 0.2)
