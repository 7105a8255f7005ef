"""docs/rewards.md: its YAML is read, its functions exist and take the options that it shows."""

import re
from pathlib import Path

import pytest

from jaxrlhf.config import RewardSource
from jaxrlhf.config.file import load_config
from jaxrlhf.rewards.functions import load
from jaxrlhf.rewards.sources.protocol import ScoreRequest

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
ROWS = re.findall(r"^\| `(jaxrlhf\.rewards\.\S+)` \| (.*?) \|", PAGE, re.M)
NEEDED = {"length_band": {"low": 1, "high": 2}, "matches": {"pattern": "x"}}
COLUMNS = {"answer": ["2"] * 2, "target": [2] * 2, "nums": [[1, 1]] * 2}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_a_config(block, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(block)
    source: RewardSource = load_config("ppo", file, partial=True).reward
    assert source.parts()
    for part in source.parts():
        if part.function.startswith("jaxrlhf."):
            load(part.function, options=part.options)


@pytest.mark.parametrize(("spec", "options"), ROWS)
def test_every_function_takes_its_options_and_answers(spec, options):
    names = re.findall(r"`(\w+)(?:: [^`]*)?`", options)
    if "symbolic" in spec:
        pytest.importorskip("math_verify")
    load(spec, options=dict.fromkeys(names))
    answer = load(spec, options=NEEDED.get(spec.partition(":")[2]))(ScoreRequest(["why?"] * 2, ["2", ""], COLUMNS))
    assert len(answer.values) == 2
    assert not answer.problem


def test_there_is_something_to_check():
    assert len(BLOCKS) >= 3
    assert len(ROWS) == 13
