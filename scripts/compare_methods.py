"""Compare SFT, PPO, GRPO, DPO and best-of-16 on the demo's task, measured by its exact check.

    python scripts/compare_methods.py FOLDER [--seed 0]

FOLDER is the output of `jaxrlhf demo --output FOLDER --seed SEED`, which this script runs if necessary. All methods
start from its SFT model and are trained with its reward model; its PPO run is the one in the table. Each method may
sample as many completions of the training prompts as PPO does, 12,800 of up to 20 tokens: GRPO in 100 updates of 128;
DPO before training, 22 of each prompt, which form 11 pairs (the best and the worst of the 22 would teach little but
form, because the worst are hardly answers). Best-of-16 is not trained and samples 16 completions for each answer.

The table: shares of 768 answers to held-out questions (192, four each, temperature 0.6) that are right in tone, fact
and form together, and in each; KL in nats per answer from the SFT model, over samples at temperature 1 (best-of-16: at
most log 16 - 15/16); completions sampled for training, and seconds. It is also written to FOLDER/methods.json.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrlhf
from jaxrlhf import DPOTrainer, GRPOTrainer, runtime
from jaxrlhf import config as c
from jaxrlhf.algorithms import masked
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import prompt_rows
from jaxrlhf.demo import pipeline, task
from jaxrlhf.evaluation.completions import evaluate
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.selection.rule import Rule
from jaxrlhf.selection.select import select

PER_PROMPT = 22  # completions of each of 576 prompts: the whole number closest to PPO's 12,800
PARTS = {"right_level": "tone", "fact_right": "fact", "well_formed": "form"}


def grpo(folder: Path, ppo: c.PPOConfig) -> tuple[Path, int]:
    """Train by GRPO with PPO's data, reward, batch and updates. Return the run and the number of completions."""
    config = c.GRPOConfig(
        run_dir=str(folder / "grpo"),
        seed=ppo.seed,
        model=ppo.model,
        data=ppo.data,
        reward=ppo.reward,
        grpo=c.GRPO(total_episodes=ppo.ppo.total_episodes, batch_size=128, num_mini_batches=2, kl_coef=0.5),
        scores=ppo.scores,
        sampling=ppo.sampling,
        optim=ppo.optim,
        logging=ppo.logging,
        checkpoint=ppo.checkpoint,
    )
    GRPOTrainer(config, fresh=True).train()
    return folder / "grpo", config.grpo.total_episodes


def dpo(folder: Path, ppo: c.PPOConfig) -> tuple[Path, int]:
    """Train by DPO on pairs of the SFT model's own completions, the one with the higher score chosen."""
    completions, pairs = folder / "completions.jsonl", folder / "pairs.jsonl"
    drawn = c.replace(ppo, **{"critic.init": "policy", "ppo.batch_size": 256})
    summary = select(drawn, completions, Rule("all"), PER_PROMPT, fresh=True)
    rows = [json.loads(line) for line in completions.read_text(encoding="utf-8").splitlines()]
    with pairs.open("w", encoding="utf-8") as file:
        for two in zip(rows[::2], rows[1::2], strict=True):
            worse, better = sorted(two, key=lambda row: row["score"])
            if better["score"] > worse["score"]:
                pair = {"prompt": two[0]["prompt"], "chosen": better["completion"], "rejected": worse["completion"]}
                file.write(json.dumps(pair) + "\n")
    config = c.DPOConfig(
        run_dir=str(folder / "dpo"),
        seed=ppo.seed,
        model=ppo.model,
        data=c.Data(path=str(pairs), completion_prefix=" ", max_length=64),
        dpo=c.DPO(beta=1.0),
        train=c.Train(batch_size=64, num_train_epochs=2),
        optim=c.Optim(learning_rate=2e-4, schedule="cosine", warmup_steps=5, final_lr_fraction=0.05),
        logging=c.Logging(quiet=True, tensorboard=False, sample_every=0),
        checkpoint=ppo.checkpoint,
    )
    DPOTrainer(config, fresh=True).train()
    return folder / "dpo", summary.prompts * PER_PROMPT


def judged(folder: Path, path: Path, ppo: c.PPOConfig, best_of: int = 1) -> dict[str, float]:
    """Shares of correct answers, four per held-out question, each the best of `best_of` samples by the reward model."""
    asked = c.replace(
        ppo,
        **{
            "model.path": str(path),
            "data.path": str(folder / "data" / "held_out.jsonl"),
            "sampling.temperature": pipeline.EVAL_TEMPERATURE,
            "critic.init": "policy",
        },
    )
    verdicts = []
    for number in range(4):
        again = c.replace(asked, seed=number)
        made = evaluate(again, num_prompts=pipeline.HELD_OUT, num_completions=best_of)
        verdicts += [task.judge(item["prompt"], item["completions"][0]["text"]) for item in made["prompts"]]
    shares = {name: float(np.mean([getattr(v, key) for v in verdicts])) for key, name in PARTS.items()}
    right = [all(getattr(v, key) for key in PARTS) for v in verdicts]
    return {"right": float(np.mean(right)), **shares}


def nats(folder: Path, path: Path, ppo: c.PPOConfig) -> float:
    """KL of the model in `path` from the SFT model, nats per answer: k1 over 768 samples at temperature 1."""
    model, params = jaxrlhf.load(path)
    _, reference = jaxrlhf.load(folder / "sft")
    tokenizer = jaxrlhf.load_tokenizer(folder / "base", c.TokenizerSource())
    rows = [*prompt_rows(c.replace(ppo.data, path=str(folder / "data" / "held_out.jsonl")), tokenizer).train] * 4
    length = max(len(row.tokens) for row in rows)
    prompts = batching.prompts(rows, tokenizer.pad_id, length, [i // (len(rows) // 4) for i in range(len(rows))])
    rollout = jaxrlhf.generate(
        *jaxrlhf.inference_copy(model, params, "float32")[::-1], prompts, jax.random.key(7),
        c.replace(ppo.sampling, temperature=1.0), tokenizer.stop_ids, tokenizer.pad_id,
    )  # fmt: skip

    @jax.jit
    def logprobs(params: Any) -> jax.Array:
        hidden = response_states(params, model, rollout)[:, :-1]
        targets = rollout.tokens[:, -rollout.response_mask.shape[1] :]
        found, _ = token_logprobs(params, model, hidden, targets, 1.0)
        return jnp.sum(masked.keep(found, rollout.response_mask), axis=1)

    return float(jnp.mean(logprobs(params) - logprobs(reference)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder
    runtime.configure()
    if not (folder / "results.json").is_file():
        pipeline.run(folder, arguments.seed)
    ppo = pipeline.configs(folder, arguments.seed)[2]
    before = json.loads((folder / "results.json").read_text(encoding="utf-8"))["stages"]
    rows: dict[str, dict[str, float]] = {
        "SFT": judged(folder, folder / "sft", ppo) | {"kl": 0.0, "drawn": 0, "seconds": before["SFT"]["seconds"]},
        "PPO": judged(folder, folder / "ppo", ppo)
        | {"kl": nats(folder, folder / "ppo", ppo), "drawn": ppo.ppo.total_episodes}
        | {"seconds": before["PPO"]["seconds"]},
    }
    methods: dict[str, Callable[[Path, c.PPOConfig], tuple[Path, int]]] = {"GRPO": grpo, "DPO": dpo}
    for name, train in methods.items():
        started = time.monotonic()
        run, drawn = train(folder, ppo)
        seconds = time.monotonic() - started
        rows[name] = judged(folder, run, ppo) | {"kl": nats(folder, run, ppo), "drawn": drawn, "seconds": seconds}
    best = judged(folder, folder / "sft", ppo, best_of=16)
    rows["best of 16"] = best | {"kl": math.log(16) - 15 / 16, "drawn": 0, "seconds": 0.0}
    print("| | right | tone | fact | form | KL | sampled in training | seconds |\n|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        shares = " | ".join(f"{row[key]:.3f}" for key in ("right", *PARTS.values()))
        kl = f"{'at most ' * (name == 'best of 16')}{row['kl']:.2f}"
        print(f"| {name} | {shares} | {kl} | {row['drawn']:,} | {row['seconds']:.0f} |")
    (folder / "methods.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
