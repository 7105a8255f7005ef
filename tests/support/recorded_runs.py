"""Run directories as training leaves them, written without training."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

from jaxrlhf.config import text
from jaxrlhf.config.file import METHODS

PPO_KEYS = (
    "objective/rlhf_reward",
    "objective/scores_std",
    "objective/entropy_per_token",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/clipfrac_avg",
    "policy/approxkl_avg",
    "policy/grad_norm",
    "val/ratio",
    "val/explained_variance",
    "learning_rate",
    "perf/response_tokens_per_second",
)


def record(method: str, step: int, total: int, chance: random.Random) -> dict[str, Any]:
    """A plausible record: whatever training improves, improves along a straight line with noise."""
    part, noise = step / total, lambda size=0.05: chance.gauss(0, size)
    base = {"step": step, "learning_rate": 1e-4 * (1 - part), "skipped_updates": 0.0}
    match method:
        case "sft":
            return base | {"loss": 4 - 3 * part + noise(), "grad_norm": 1 + noise(), "num_tokens": 900.0, "epoch": part}
        case "reward":
            return base | {
                "loss": 0.7 - 0.6 * part,
                "accuracy": 0.5 + 0.4 * part + noise(),
                "margin": 3 * part + noise(),
            }
        case "dpo":
            rewards = {"rewards/accuracies": 0.5 + 0.3 * part + noise(), "rewards/margins": part + noise()}
            return base | {"loss": 0.69 - 0.2 * part + noise()} | rewards
    values = {key: 1 - part + noise() for key in PPO_KEYS}
    groups = {"groups/flat": 2.0, "groups/count": 16.0} if method == "grpo" else {}
    return {
        **base,
        **values,
        **groups,
        "objective/scores": -2 + 5 * part + noise(),
        "objective/kl": 0.8 * part + noise(0.01),
        "objective/unscored": 0.0,
        "tokens/mean_length": 14 + noise(1),
        "tokens/finished": 1.0,
        "episode": 128.0 * step,
        "rewards/model/mean": -2 + 5 * part + noise(),
        "rewards/model/errors": 0.0,
    }


def write_run(directory: Path, method: str, steps: int = 20, *, outcome: str | None = "done", **facts: Any) -> Path:
    """A run of `steps` steps; `facts` go to its only start in run.json, whose outcome None leaves out."""
    directory.mkdir(parents=True)
    chance = random.Random(0)
    settings = METHODS[method](run_dir=str(directory))
    (directory / "config.yaml").write_text(f"# jaxrlhf {method}, every option resolved\n" + text.dump(settings))
    start: dict[str, Any] = {"time": "2026-01-02T03:04:05+00:00", "command": ["jaxrlhf", method], "directory": "/work"}
    start |= {"versions": {"jax": "0.10"}, "config_sha256": "ab" * 32, "total_steps": steps, "about": "data x: 9 rows"}
    if outcome:
        start |= {"end": "2026-01-02T04:04:05+00:00", "outcome": outcome}
    run = {"method": method, "platform": "Linux", "mesh": {"data": 1}, "starts": [start | facts]}
    (directory / "run.json").write_text(json.dumps(run))
    write_lines(directory / "metrics.jsonl", [record(method, step, steps, chance) for step in range(1, steps + 1)])
    return directory


def page_data(page: Path) -> dict[str, Any]:
    """The data of a page of jaxrlhf/report."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(data)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines; unpaired surrogates as their escapes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def token_record(step: int, index: int, pieces: list[str], score: float | None = 0.5) -> dict[str, Any]:
    """A record of a PPO response, all numbers different."""
    count, chance = len(pieces), random.Random(step * 1000 + index)
    names = ("logprob", "ref_logprob", "kl", "reward", "value", "td_error", "advantage", "return", "ratio", "entropy")
    series = {name: [float(f"{chance.gauss(0, 1):.5g}") for _ in pieces] for name in names}
    top = [
        [[piece, -0.1234], *([f" alternative {chance.randrange(900)}", -1.0 - k] for k in range(4))] for piece in pieces
    ]
    return {
        "schema": 1,
        "step": step,
        "index": index,
        "sample": index,
        "prompt": f"prompt {index}",
        "completion": "".join(pieces),
        "score": score,
        "finished": True,
        "tokens": list(range(count)),
        "pieces": pieces,
        **series,
        "top": top,
    }


def write_tokens(directory: Path, step: int, records: list[dict[str, Any]]) -> None:
    """A file of token records of a step."""
    (directory / "tokens").mkdir(exist_ok=True)
    with gzip.open(directory / "tokens" / f"step-{step:06d}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
