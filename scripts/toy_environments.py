"""The two environments of the package learnt by a model of two layers: prints the mean of every tenth of each run.

    python scripts/toy_environments.py guess [--method ppo] [--seeds 0 1 2]   # find one of 7 numbers in 3 turns
    python scripts/toy_environments.py calculator --updates 40                # call the calculator or answer at once

The model is first trained on single turns: on games in which every second guess ignores the hints, and on calls beside
wrong answers and on copying a result. A finished supervised run in the folder is used again.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxrlhf import config
from jaxrlhf.metrics import read_records
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PIECES = ("<tool>", "</tool>", "<result>", "</result>", *"abcdefghijklmnopqrstuvwxyz ,.?!:+=0123456789\n")
METRICS = ("objective/scores", "turns/mean", "tokens/finished", "rewards/environment/mean", "perf/rollout_seconds")


def write_model(folder: Path) -> Path:
    """A folder with a tokenizer of characters and a config.json of a tiny Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tags = "|".join(PIECES[:4])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{tags}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | kind))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    rest |= {"hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(about | sizes | rest))
    return folder


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


class Task(NamedTuple):
    """Rows, and the settings that depend on the task."""

    sft: list[dict]
    rows: list[dict]
    epochs: int  # of SFT
    size: int  # rows of a batch of SFT
    rates: tuple[float, float]  # of SFT and RL
    warmup: int  # of RL, in updates
    group: int
    batch_size: int
    kl_coef: float
    sections: dict


def guess(numbers: int = 7, turns: int = 3, games: int = 6000) -> Task:
    """Numbers from 0. Halving finds each of seven within three turns, guesses at random find 37 % of them. An update
    has every number equally often."""
    draw, sft = random.Random(0), []
    for _ in range(games):
        prompt, secret, low, high = "guess: ", draw.randrange(numbers), 0, numbers - 1
        for _ in range(turns):
            number = draw.randint(low, high) if draw.random() < 0.5 else draw.randrange(numbers)
            sft.append({"prompt": prompt, "completion": str(number)})
            if number == secret:
                break
            prompt += f"{number}</s>" + ("+" if number < secret else "=")
            low, high = (max(low, number + 1), high) if number < secret else (low, min(high, number - 1))
    rows = [{"prompt": "guess: ", "secret": number} for number in range(numbers)]
    options = {"low": 0, "high": numbers - 1, "higher": "+", "lower": "=", "unclear": "?"}
    function = "jaxrlhf.environments.guess:GuessNumber"
    sections = {
        "environment": config.Environment(function=function, options=options, max_turns=turns),
        "sampling": config.Sampling(response_length=3 * turns - 1),
    }
    return Task(sft, rows, 3, 64, (2e-3, 3e-3), 15, 32, numbers * 32, 0.0, sections)


def calculator() -> Task:
    """Sums, of which those of RL are others than those of SFT."""
    draw, sft, rows = random.Random(0), [], []
    for i in range(1600):
        a, b, c = (draw.randint(1, 4), draw.randint(1, 4), draw.randint(2, 8))
        sft.append({"prompt": f"{a}+{b}=", "completion": f"<tool>{a}+{b}</tool>" if i % 2 else f"{draw.randint(2, 8)}"})
        sft.append({"prompt": f"{a}+{b}=<tool>{a}+{b}</tool><result>{c}</result>", "completion": str(c)})
    for a, b in ((a, b) for a in range(1, 5) for b in range(1, 5)):
        rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    function = "jaxrlhf.environments.calculator:Calculator"
    sections = {
        "environment": config.Environment(function=function, options={"call_cost": 0.01}, completion="last"),
        "reward": config.RewardSource(function="jaxrlhf.rewards.match:numeric_match"),
        "sampling": config.Sampling(response_length=23, stop_strings=("</tool>",)),
    }
    return Task(sft, rows, 4, 16, (5e-3, 2e-3), 0, 8, 128, 0.01, sections)


LOGGING = config.Logging(quiet=True, tensorboard=False, report=False, sample_every=0, token_samples=0)


def supervised(folder: Path, task: Task, control_tokens: bool) -> str:
    """The folder of the model after SFT."""
    start = write_model(folder / "start")
    SFTTrainer(
        config.SFTConfig(
            run_dir=str(folder / "sft"), model=config.ModelSource(path=str(start), init="random"),
            data=config.Data(path=write(folder / "sft.jsonl", task.sft), control_tokens=control_tokens),
            train=config.Train(num_train_epochs=task.epochs, batch_size=task.size),
            optim=config.Optim(learning_rate=task.rates[0], warmup_steps=0), logging=LOGGING,
        )
    ).train()  # fmt: skip
    return str(folder / "sft" / "export")


def reinforce(folder: Path, task: Task, method: str, model: str, updates: int, seed: int) -> list[dict]:
    """The records of a run of GRPO or PPO."""
    settings = {
        "batch_size": task.batch_size, "total_episodes": task.batch_size * updates, "num_generations": task.group,
        "kl_coef": task.kl_coef,
    }  # fmt: skip
    rate = task.rates[1]
    sections = task.sections | {
        "run_dir": str(folder / f"{method}-{seed}"), "seed": seed, "model": config.ModelSource(path=model),
        "data": config.Data(path=write(folder / "rows.jsonl", task.rows)),
        "optim": config.Optim(learning_rate=rate, warmup_steps=task.warmup, schedule="linear"),
        "checkpoint": config.Checkpoint(save_every=0), "logging": LOGGING,
    }  # fmt: skip
    if method == "grpo":
        GRPOTrainer(config.GRPOConfig(grpo=config.GRPO(**settings), **sections), fresh=True).train()
    else:
        ppo, critic = config.PPO(num_ppo_epochs=1, lam=1.0, **settings), config.Critic(learning_rate=rate)
        PPOTrainer(config.PPOConfig(ppo=ppo, critic=critic, **sections), fresh=True).train()
    return read_records(folder / f"{method}-{seed}" / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("guess", "calculator"))
    parser.add_argument("--method", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/environments"))
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.task
    task = {"guess": guess, "calculator": calculator}[arguments.task]()
    model = supervised(folder, task, control_tokens=arguments.task == "guess")
    for seed in arguments.seeds:
        begin = time.perf_counter()
        log = reinforce(folder, task, arguments.method, model, arguments.updates, seed)
        print(f"{arguments.method}, seed {seed}, {time.perf_counter() - begin:.0f} s\nupdate", *METRICS)
        size = max(1, len(log) // 10)
        for first in range(0, len(log), size):
            part = log[first : first + size]
            means = (sum(record[key] for record in part) / len(part) for key in METRICS)
            print(int(part[-1]["step"]), *(f"{mean:.3f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
