"""The commands of the command line and their arguments."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.cli import chat, completion, evaluation, launch, models, training, verify
from jaxrlhf.cli.arguments import (
    CONFIG,
    EVALUATION,
    METHOD,
    MODEL,
    SAMPLING,
    SEED,
    TRAIN,
    USE_LORA,
    count,
    natural,
    sets,
)
from jaxrlhf.cli.models import Options, Overrides
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.schema import keys
from jaxrlhf.selection.rule import KEEP


@dataclass(frozen=True)
class Command:
    """A command: the function it runs, its help text, and keyword arguments of `add_argument` by argument name.

    An argument with a `dest` sets the config key of that name.
    """

    run: Callable[[Options, Overrides], int | None]
    help: str
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: bool = False  # accepts --section.key value


COMMANDS: dict[str, Command] = {
    "demo": Command(
        training.demo,
        "run SFT, reward modelling and PPO on a tiny task (two minutes on a CPU)",
        {
            "--seed": {**SEED, "default": 0},
            "--output": {"default": "runs/demo", "metavar": "DIR", "help": "output directory (default: runs/demo)"},
            "--quiet": {"action": "store_true", "help": "print less"},
        },
    ),
    "doctor": Command(
        training.doctor,
        "check the installation and, optionally, a model (files, decoding, a small PPO update in memory) and the data, "
        "reward and sampling of a PPO config; exit code 1 if a check fails",
        {"model": {"nargs": "?", **MODEL}, "config": {**CONFIG, "help": "PPO config file, or the name of a preset"}},
        overrides=True,
    ),
    "new": Command(training.new, "print a config file with all options", {"method": {**METHOD, "metavar": "METHOD"}}),
    "data": Command(
        training.data,
        "show the format of a data file, how each trainer reads it, what is learnt, and what is suspicious",
        {
            "file": {
                "metavar": "FILE",
                "help": "data file, folder or hub id; or the config file of a run, for its data",
            },
            "--model": sets("model.path", "model whose tokenizer to use", metavar="DIR"),
            "--tokenizer": sets("tokenizer.path", "tokenizer to use", metavar="DIR"),
            "--ids": {"action": "store_true", "help": "list the tokens of the first row with their ids"},
        },
        overrides=True,
    ),
    **{
        method: Command(training.train, help, TRAIN, overrides=True)
        for method, help in {
            "sft": "supervised fine-tuning",
            "reward": "train a reward model on pairs, rankings, labels or scores",
            "dpo": "train on preferences without a reward model: DPO and related losses",
            "ppo": "train with PPO on a reward model or reward function",
            "grpo": "train with GRPO, a related method without a critic, or online DPO",
            "distill": "train a student on the probabilities of a teacher, on its own completions or those of the data",
        }.items()
    },
    "launch": Command(launch.launch, launch.HELP, launch.ARGUMENTS),
    "plan": Command(
        training.plan,
        "estimate the memory of a run, whether it fits, and the minimum time of a step, without running it; exit code "
        "8 if it does not fit",
        {
            "config": CONFIG,
            "--method": {**METHOD, "help": "method of the config; default: recognised from the file"},
            "--use-lora": USE_LORA,
            "--knobs": {"action": "store_true", "help": "try memory-saving options even if the run fits"},
            "--explain": {
                "action": "store_true",
                "help": "show how every array is split over the devices of the mesh and by which rule, instead of the "
                "memory of the run; nothing is compiled",
            },
            "--devices": {
                "metavar": "TARGET",
                "help": "plan for these devices, which need not exist: h100:8, v5e:4x4, ...; the programs are compiled "
                "by XLA's compiler for them (extras plan-gpu and plan-tpu), or estimated without it",
            },
        },
        overrides=True,
    ),
    "generate": Command(
        models.generate,
        "complete a prompt, or complete a file of prompts and keep completions by their reward",
        {
            "model": MODEL,
            "--prompt": {"metavar": "TEXT", "help": "prompt; empty: start from the bos token"},
            **SAMPLING,
            "--n": {"type": count, "default": 1, "metavar": "N", "help": "completions per prompt (default: 1)"},
            "--prompts": {"metavar": "FILE", "help": "data file with prompts, instead of --prompt"},
            "--best-by": {
                "metavar": "reward.yaml",
                "help": "config file with a section `reward`; default: the reward of the PPO or GRPO run",
            },
            "--keep": {
                "choices": KEEP,
                "help": "rows to write per prompt. best (default): the best completion, for sft. pairs: best and "
                "worst, for reward and dpo. above: completions with at least --threshold. all: all completions. "
                "prompts: the prompt without a completion, with its scores",
            },
            "--threshold": {
                "type": float,
                "metavar": "X",
                "help": "minimum score of a passing completion; a prompt's pass_rate is the fraction that pass",
            },
            "--min-pass-rate": {"type": float, "metavar": "RATE", "help": "drop prompts with a lower pass rate"},
            "--max-pass-rate": {"type": float, "metavar": "RATE", "help": "drop prompts with a higher pass rate"},
            "--out": {
                "metavar": "FILE.jsonl",
                "help": "output file of --prompts (FILE.jsonl.scored until it is complete)",
            },
            "--fresh": {"action": "store_true", "help": "overwrite --out and do not resume an interrupted command"},
        },
        overrides=True,
    ),
    "chat": Command(
        chat.chat,
        "talk to a model in the terminal; replies are scored by the reward given, or that of a PPO or GRPO run",
        {
            "model": MODEL,
            "--system": {"metavar": "TEXT", "help": "system prompt"},
            **SAMPLING,
            **{name: EVALUATION[name] for name in ("--reward", "--reward-model")},
            "--no-history": {"action": "store_true", "help": "answer each message alone, without earlier turns"},
        },
        overrides=True,
    ),
    "evaluate": Command(
        evaluation.evaluate,
        "score a language model's completions with a reward (ranked BEST, MEDIUM, WORST) and against reference "
        "completions, in all and by category; or measure its perplexity on texts; or a reward model's judgements on "
        "examples",
        {
            "model": MODEL,
            **EVALUATION,
            "--prompts": {
                "action": "append",
                "metavar": "FILE",
                "help": "data file with prompts, to evaluate a language model; repeat it for several files",
            },
            "--text": {
                "metavar": "FILE",
                "help": "data file with texts, prompts with completions, or conversations: perplexity of a language "
                "model on what SFT would train on",
            },
            "--examples": {
                "metavar": "FILE",
                "help": "to evaluate a reward model: rows {name, prompt, good, bad}, {name, prompt, completion, "
                "label}, or preference pairs",
            },
        },
        overrides=True,
    ),
    "compare": Command(
        evaluation.compare,
        "evaluate two or more models on the same prompts and compare each with the first, A, the baseline: answers "
        "side by side, score, win rate and length-controlled win rate, KL, by category, and costs of training of run "
        "directories",
        {
            "model": {**MODEL, "metavar": "A", "help": "the baseline: model folder, hub id or run directory"},
            "others": {**MODEL, "metavar": "B", "nargs": "+", "help": "models to compare with A"},
            **EVALUATION,
            "--show": {
                "type": natural,
                "default": 3,
                "metavar": "N",
                "help": "print the answers to N prompts (default: 3)",
            },
            "--output": {
                "metavar": "DIR",
                "help": "write compare.html, compare.json, compare.csv and plots to this folder; FILE.json: only JSON, "
                "to this file",
            },
        },
        overrides=True,
    ),
    "convert-rm": Command(
        models.convert_rm,
        "convert a head in a torch file (StrictBot's rm.pt) and its base model to a reward model; needs torch",
        {
            "file": {"metavar": "RM.pt", "help": "state dict of the head: head.net.N.weight and head.net.N.bias"},
            "base": {"metavar": "BASE", "help": "model folder or hub id of the model that the head was trained on"},
            "directory": {"metavar": "DIR", "help": "output folder"},
        },
    ),
    "plot": Command(
        training.plot,
        "plot the metrics of a run, or of several over each other, and write metrics and samples as CSV",
        {
            "run": {"metavar": "RUN", "nargs": "+", "help": "run directory"},
            "--output": {
                "metavar": "FILE",
                "help": "the picture; default: plot.png in the run directory, of several runs in the current one",
            },
            "--format": {"choices": ("png", "pdf", "svg"), "help": "default: that of --output, or png"},
        },
    ),
    "report": Command(
        training.report,
        "write the report of a run, an HTML page that opens without a network, and print its path",
        {
            "run": {"metavar": "RUN", "help": "run directory"},
            "--output": {"metavar": "FILE.html", "help": "file to write (default: RUN/report.html)"},
        },
    ),
    "export": Command(
        models.export,
        "export a run's model in Hugging Face format (adapters in PEFT format), and upload it to the hub if asked",
        {
            "run": {"metavar": "RUN", "help": "run directory; with --merge-lora also a folder of adapters"},
            "directory": {"metavar": "DIR", "help": "output folder"},
            "--role": {"choices": ("policy", "critic"), "default": "policy", "help": "model of a PPO run to export"},
            "--merge-lora": {"action": "store_true", "help": "merge adapters into the model"},
            "--push-to-hub": {"metavar": "NAME", "help": "also upload it to this hub repository; a new one is private"},
            "--public": {"action": "store_true", "help": "make a new hub repository public"},
        },
    ),
    "verify": Command(
        verify.verify,
        verify.HELP,
        {"directory": {"metavar": "DIR", "help": "run directory, export or checkpoint"}},
    ),
    "completion": Command(
        completion.completion,
        "print a script that completes commands, options, config keys and their values in a shell",
        {"shell": {"choices": completion.SHELLS, "metavar": "{bash,zsh,fish}"}},
    ),
}
USING_DEVICES = {"demo", "doctor", *METHODS, "plan", "generate", "chat", "evaluate", "compare", "verify"}
CONFIG_KEYS = {key for cls in METHODS.values() for key, _ in keys(cls)}
"""The keys of all configs."""
