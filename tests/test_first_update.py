"""scripts/first_update.py: a real command is timed to the end of its first update, and phases add up to the whole."""

import json
import os
import re

import first_update
import pytest
from bench_shapes import SHAPES, write_model

ROWS = 4


@pytest.fixture
def config(tmp_path):
    write_model(tmp_path / "model", SHAPES["T"])
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w7 w8"}) + "\n")
    (tmp_path / "score.py").write_text("def score(prompts, completions, **columns): return [0.0] * len(prompts)\n")
    chosen = {
        "model": {"path": str(tmp_path / "model"), "init": "random"},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "validation_fraction": 0.0},
        "reward": {"function": f"{tmp_path / 'score.py'}:score"},
        "sampling": {"response_length": 4},
        "ppo": {"batch_size": ROWS, "total_episodes": 100 * ROWS},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(chosen))  # JSON is YAML
    return str(file)


def test_a_run_is_timed_to_its_first_update(config):
    """Up to eight processor seconds: it starts the command."""
    times = first_update.measured("ppo", config, os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert tuple(times) == first_update.PHASES
    for ends in zip(*times.values(), strict=True):
        assert 0 < ends[0] <= ends[1] <= ends[2] <= ends[3]


def test_phases_are_differences_of_their_ends(config, monkeypatch, capsys):
    ends = {"imports": [1.0, 1.5], "loading": [3.0, 4.5], "rollout": [6.0, 9.5], "update": [10.0, 20.5]}
    caches = []

    def measured(method, config, cache):
        assert os.path.isdir(cache)
        caches.append(cache)
        return ends

    monkeypatch.setattr(first_update, "measured", measured)
    monkeypatch.setattr("sys.argv", ["first_update.py", "ppo", config, "--times", "2"])
    first_update.run()
    phases = "imports 1.0 (1.5), loading 2.0 (3.0), rollout 3.0 (5.0), update 4.0 (11.0)"
    expected = f"10.0 s (20.5 s of the processor): {phases}"
    assert re.findall(r"^(cold|warm): (.*)$", capsys.readouterr().out, re.MULTILINE) == [
        (name, expected) for name in ("cold", "warm") * 2
    ]
    first, again, second, _ = caches
    assert first == again != second and not os.path.exists(first)  # warm has the cache that cold has left
