"""GRPO on the two environments of the package, with a model of two layers: prints the mean of every tenth of the run.

    python scripts/toy_environments.py guess        # find a number from 0 to 3 from hints
    python scripts/toy_environments.py calculator   # call the calculator, or answer without it

The model is first trained on single turns: on numbers, and on calls beside wrong answers and on copying a result.
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxrlhf import config
from jaxrlhf.training.grpo.trainer import GRPOTrainer
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


def guess(folder: Path) -> tuple[str, str, dict]:
    """Rows for SFT, rows for GRPO, and the options of GRPO that are the task's."""
    sft = [{"prompt": "guess: ", "completion": str(number)} for number in range(4)] * 8
    options = {"low": 0, "high": 3, "turn_cost": 0.1, "higher": "+", "lower": "=", "unclear": "?"}
    return write(folder / "sft.jsonl", sft), write(folder / "rows.jsonl", [{"prompt": "guess: "}] * 16), {
        "environment": config.Environment(
            function="jaxrlhf.environments.guess:GuessNumber", options=options, max_turns=4
        ),
        "sampling": config.Sampling(response_length=15),
    }  # fmt: skip


def calculator(folder: Path) -> tuple[str, str, dict]:
    """See `guess`. The sums of GRPO are others than those of SFT."""
    draw, sft, rows = random.Random(0), [], []
    for i in range(1600):
        a, b, c = (draw.randint(1, 4), draw.randint(1, 4), draw.randint(2, 8))
        sft.append({"prompt": f"{a}+{b}=", "completion": f"<tool>{a}+{b}</tool>" if i % 2 else f"{draw.randint(2, 8)}"})
        sft.append({"prompt": f"{a}+{b}=<tool>{a}+{b}</tool><result>{c}</result>", "completion": str(c)})
    for a, b in ((a, b) for a in range(1, 5) for b in range(1, 5)):
        rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    return write(folder / "sft.jsonl", sft), write(folder / "rows.jsonl", rows), {
        "environment": config.Environment(
            function="jaxrlhf.environments.calculator:Calculator", options={"call_cost": 0.01}, completion="last"
        ),
        "reward": config.RewardSource(function="jaxrlhf.rewards.match:numeric_match"),
        "sampling": config.Sampling(response_length=23, stop_strings=("</tool>",)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("guess", "calculator"))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/environments"))
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.task
    start = write_model(folder / "start")
    sft, rows, task = {"guess": guess, "calculator": calculator}[arguments.task](folder)
    logging = config.Logging(quiet=True, tensorboard=False, report=False, token_samples=0)
    epochs = {"guess": 40, "calculator": 4}[arguments.task]
    SFTTrainer(
        config.SFTConfig(
            run_dir=str(folder / "sft"), model=config.ModelSource(path=str(start), init="random"),
            data=config.Data(path=sft), train=config.Train(num_train_epochs=epochs, batch_size=16),
            optim=config.Optim(learning_rate=5e-3, warmup_steps=0), logging=logging,
        ), fresh=True,
    ).train()  # fmt: skip
    GRPOTrainer(
        config.GRPOConfig(
            run_dir=str(folder / "grpo"), model=config.ModelSource(path=str(folder / "sft" / "export")),
            data=config.Data(path=rows), optim=config.Optim(learning_rate=2e-3, warmup_steps=0, schedule="linear"),
            grpo=config.GRPO(
                total_episodes=128 * arguments.updates, batch_size=128, num_generations=8, kl_coef=0.01
            ),
            logging=logging, **task,
        ), fresh=True,
    ).train()  # fmt: skip
    log = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text().splitlines()]
    print("update", *METRICS)
    size = max(1, len(log) // 10)
    for first in range(0, len(log), size):
        part = log[first : first + size]
        print(part[-1]["step"], *(f"{sum(record[key] for record in part) / len(part):.3f}" for key in METRICS))


if __name__ == "__main__":
    main()
