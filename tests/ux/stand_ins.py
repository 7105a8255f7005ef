"""Stand-ins for what a user of the README has: the demo's files, from three trainings of a few steps.

python tests/ux/stand_ins.py demo       write runs/demo
python tests/ux/stand_ins.py fill FILE  fill in the keys of a config that are marked `# required`
"""

import sys
from pathlib import Path

from jaxrlhf import config
from jaxrlhf.demo import pipeline

DATA = {  # by method, with the demo's files
    "sft": "runs/demo/data/sft.jsonl",
    "reward": "runs/demo/data/preferences.jsonl",
    "dpo": "runs/demo/data/preferences.jsonl",
    "ppo": "runs/demo/data/prompts.jsonl",
    "grpo": "runs/demo/data/prompts.jsonl",
}


def demo(directory: Path) -> None:
    """Write what `jaxrlhf demo` leaves in `directory`: data, base model and the runs, of a few steps each."""
    pipeline.write_data(directory, seed=0)
    sft, reward, ppo = pipeline.configs(directory, seed=0)
    config_changes = {"train.max_steps": 2, "train.eval_every": 2}
    pipeline.SFTTrainer(config.replace(sft, **config_changes)).train()
    rows = {"data.max_rows": 200}
    pipeline.RewardTrainer(config.replace(reward, **config_changes, **rows)).train()
    pipeline.PPOTrainer(config.replace(ppo, **{"ppo.total_episodes": 128})).train()


def fill(path: Path) -> None:
    """Set model.path, data.path and reward.model, as a user does, and a response length that the demo's model has."""
    section, lines = "", []
    text = path.read_text(encoding="utf-8")
    method = text.removeprefix("# jaxrlhf ").partition(":")[0]
    values = {"model: path": "runs/demo/sft", "data: path": DATA[method], "reward: model": "runs/demo/reward"}
    for line in text.splitlines():
        if line and not line.startswith((" ", "#")):
            section = line.partition(":")[0]
        name = line.strip().partition(":")[0]
        if "  # required" in line and f"{section}: {name}" in values:
            line = f"  {name}: {values[f'{section}: {name}']}"
        lines.append("  response_length: 20" if line.startswith("  response_length:") else line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    demo(Path("runs/demo")) if sys.argv[1] == "demo" else fill(Path(sys.argv[2]))
