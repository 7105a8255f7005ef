"""Memory of a PPO run by `jaxrlhf plan`, with one option changed at a time. Nothing is executed."""

import json
from pathlib import Path
from typing import Any

from bench_process import Job

from jaxrlhf import config, plan
from jaxrlhf.config import PPO, Data, ModelSource, PPOConfig, RewardSource, Sampling

LORA = {"lora.enabled": True, "lora.rank": 16}
AWAY = {"optim.offload": True, "reference.offload": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "model.remat dots": {"model.remat": "dots"},
    "model.remat full": {"model.remat": "full"},
    "ppo.micro_batch_size 2": {"ppo.micro_batch_size": 2},
    "optim.state_dtype bfloat16": {"optim.state_dtype": "bfloat16"},
    "optim.offload": {"optim.offload": True},
    "reference.dtype bfloat16": {"reference.dtype": "bfloat16"},
    "reference.offload": {"reference.offload": True},
    "model.param_dtype bfloat16": {"model.param_dtype": "bfloat16"},
    "rollout.dtype int8": {"rollout.dtype": "int8"},
    "rollout.slots 4": {"rollout.slots": 4},
    "critic.trunk shared": {"critic.trunk": "shared"},
    "lora": LORA,
    "lora over int8": LORA | {"lora.quantize": "int8"},
    "lora over nf4": LORA | {"lora.quantize": "nf4"},
    "all of full": {"model.remat": "full", "optim.state_dtype": "bfloat16", **AWAY},
    "lora, remat full": {"model.remat": "full", **LORA},
    "lora over int8, remat full": {"model.remat": "full", **LORA, "lora.quantize": "int8"},
    "lora over nf4, remat full": {"model.remat": "full", **LORA, "lora.quantize": "nf4"},
}
"""One change each from float32, nothing recomputed, two mini-batches of one micro-batch; then several at once."""


def table(job: Job) -> dict[str, dict[str, float]]:
    """Gigabytes of every variant: of each part in the update, and the total of each phase."""
    prompts, judge = Path(job.work) / "prompts.jsonl", Path(job.work) / "reward.py"
    text = " ".join(["w3"] * job.prompt)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for _ in range(job.batch)))
    judge.write_text("def reward(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    run = PPOConfig(
        data=Data(path=str(prompts), max_length=job.prompt + job.response),
        model=ModelSource(path=job.model, init="random", compute_dtype="float32", remat="none"),
        reward=RewardSource(function=f"{judge}:reward"),
        ppo=PPO(batch_size=job.batch, num_ppo_epochs=job.epochs, num_mini_batches=2),
        sampling=Sampling(response_length=job.response),
    )
    found = {}
    for name, changes in VARIANTS.items():
        phases = {phase.name: phase for phase in plan.plan(config.replace(run, **changes)).phases}
        row = phases["update"].bytes | {phase.name: phase.total for phase in phases.values()}
        found[name] = {part: round(count / 1e9, 4) for part, count in row.items()}
    return found
