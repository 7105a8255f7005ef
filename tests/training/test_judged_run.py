"""A run whose reward is a judge: refused if it is down at the start, saved if it fails, and asked nothing twice."""

import json

import pytest
from support.runs import equal, records

from jaxrlhf import config
from jaxrlhf.errors import RewardError
from jaxrlhf.training.grpo.trainer import GRPOTrainer


def test_a_run_whose_judge_fails_goes_on_and_asks_nothing_twice(parts, tmp_path, serve):
    """Three updates of eight completions; the judge fails in the second and is down at the first start."""
    down, asked = [True], []

    def answer(body):
        text = body["messages"][1]["content"]
        asked.append(text)
        if down and (len(down) == 1 or len(asked) > down[1]):
            return 503, "overloaded"
        reply = {"choices": [{"message": {"content": f"Score: {len(text) % 7}"}}]}
        return 200, json.dumps(reply)

    url, _ = serve(answer)
    judge = {"url": url, "retries": 0, "concurrency": 2}
    options = parts | {
        "grpo": config.GRPO(batch_size=8, num_generations=2, total_episodes=24),
        "sampling": config.Sampling(response_length=8),
        "data": config.replace(parts["data"], validation_fraction=0.0),
        "reward": config.RewardSource(components=({"judge": judge},)),  # type: ignore[arg-type]
    }

    def make(name):
        return GRPOTrainer(config.GRPOConfig(run_dir=str(tmp_path / name), **options))

    with pytest.raises(RewardError, match="cannot judge: it answered 503"):
        make("parts")
    assert not (tmp_path / "parts").exists()
    down[:] = []
    whole = make("whole")
    assert f"\n{url} is asked about completions: 8 in each of 3 updates; once each" in whole.describe()
    whole.train()
    needed = len(asked) - 2 + 1  # the first two are those of `check`
    asked.clear()
    down[:] = [True, 12]  # the first is that of `check`
    with pytest.raises(RewardError, match=r"\(step 2\) answered 503 .*'overloaded'"):
        make("parts").train()
    assert len(records(tmp_path / "parts")) == 1, "the finished update is saved"
    kept = (tmp_path / "parts" / "judge.jsonl").read_text().splitlines()
    assert len(kept) == 11
    down[:] = []
    asked.clear()
    resumed = make("parts")
    resumed.train()
    assert len(asked) == needed - 11, "one for `check`, and those without an answer"
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(resumed.state.value, whole.state.value)
    log = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["perf/judge/judge/requests"] <= 8
    assert log[1]["perf/judge/judge/cached"] >= 1
