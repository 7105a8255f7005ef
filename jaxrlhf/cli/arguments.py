"""Arguments that several commands share, as keyword arguments of `add_argument`."""

import argparse
import functools
from typing import Any

from jaxrlhf.config.file import METHODS


def _integer(minimum: int, text: str) -> int:
    if text.isdecimal() and int(text) >= minimum:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got '{text}'")


def sets(key: str, help: str, **keywords: Any) -> dict[str, Any]:
    """Keyword arguments of an argument that sets a config key."""
    return {"dest": key, "help": help, **keywords}


natural, count = functools.partial(_integer, 0), functools.partial(_integer, 1)
SEED = sets("seed", "random seed", metavar="N", type=natural)
METHOD: dict[str, Any] = {"choices": list(METHODS)}
USE_LORA: dict[str, Any] = {"action": "store_true", "help": "short for --lora.enabled true"}
CONFIG: dict[str, Any] = {"nargs": "?", "metavar": "CONFIG.yaml", "help": "config file, or the name of a preset"}
MODEL: dict[str, Any] = {"metavar": "MODEL", "help": "model folder, hub id or run directory"}
TRAIN: dict[str, dict[str, Any]] = {
    "config": CONFIG,
    "--fresh": {"action": "store_true", "help": "start over in an existing run directory instead of resuming"},
    "--dry-run": {
        "action": "store_true",
        "help": "print the resolved config, the first batch, and the memory and files of the run, then stop",
    },
    "--use-lora": USE_LORA,
    "--restarts": {
        "type": natural,
        "default": 0,
        "metavar": "N",
        "help": "start the run again, up to N times, when its process is killed or crashes (default: 0)",
    },
    "--distributed": {
        "action": "store_true",
        "help": "this is one of several processes that train together; in a job of SLURM, Open MPI or Kubernetes or on "
        "a TPU slice they find each other",
    },
    "--coordinator-address": {"metavar": "HOST:PORT", "help": "elsewhere: host of process 0, and a free port of it"},
    "--num-processes": {"type": count, "metavar": "N", "help": "elsewhere: number of processes"},
    "--process-id": {"type": natural, "metavar": "I", "help": "elsewhere: number of this process, from 0"},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "--greedy": sets("sampling.greedy", "greedy decoding", action="store_const", const="true"),
    "--max-new-tokens": sets("sampling.response_length", "maximum number of generated tokens", metavar="N", type=count),
    "--temperature": sets("sampling.temperature", "sampling temperature", metavar="T"),
    "--top-k": sets("sampling.top_k", "sample from the K most probable tokens", metavar="K"),
    "--top-p": sets("sampling.top_p", "nucleus sampling", metavar="P"),
    "--min-p": sets("sampling.min_p", "minimum probability relative to the most probable token", metavar="P"),
    "--seed": SEED,
}
EVALUATION: dict[str, dict[str, Any]] = {
    "--prompts": {
        "required": True,
        "action": "append",
        "metavar": "FILE",
        "help": "data file with prompts; repeat it for several files",
    },
    "--num-prompts": {"type": count, "default": 20, "metavar": "N", "help": "number of prompts (default: 20)"},
    "--num-completions": {
        "type": count,
        "metavar": "N",
        "help": "completions per prompt (default: 4; with greedy decoding 1)",
    },
    **SAMPLING,
    "--reward": sets(
        "reward.function", "reward function; default: the reward of the PPO or GRPO run", metavar="path.py:name"
    ),
    "--reward-model": sets("reward.model", "reward model", metavar="DIR"),
    "--references": {
        "metavar": "COLUMN",
        "help": "column with reference completions, for BLEU and ROUGE-L; default: the data's answer column, if any",
    },
    "--by": {"metavar": "COLUMN", "help": "column of the categories to report separately (default: category)"},
    "--threshold": {
        "type": float,
        "metavar": "X",
        "help": "minimum score of a passing completion, for pass@k: one of k completions passes",
    },
    "--output": {"metavar": "FILE.json", "help": "write all results to this file"},
}
