"""Tasks with a known optimum, for scripts/toy_tasks.py and scripts/toy_trl.py: needs neither jax nor torch.

Every symbol is one character and one token. There are 16: digits, comma, colon, a full stop that no task needs, and the
control tokens <pad>, <bos> and <eos>, which do not appear in the text of a completion. A task consists of prompts, a
reward of prompt and completion with a maximum of 1, and a maximum number of symbols, <eos> included.

emit      Prompts are the ten digits. The reward is the number of 7s divided by the maximum of 8 symbols.
length    Prompts are the ten digits. The reward is 1 if the text has 8 to 10 symbols, else 1 / (1 + distance to that
          band), minus 1 if there was no <eos> among the at most 16 symbols.
modular   Prompts `a,b:c,d` are the first four numbers of an arithmetic sequence of digits modulo 10: it starts at a and
          its step is b - a, so there are 100. The continuation is `,e,f,...`, 32 symbols, 16 commas and 16 digits, and
          the reward is the share of those 32 that the text has in the right place: 1,3:5,7 continues
          ,9,1,3,5,7,9,1,3,5,7 ... Later symbols count even if earlier ones are wrong, so only commas, for any prompt,
          have 0.5.
addition  The same without commas; 1,3:5,7 continues 913579135791..., 32 digits. No text that is the same for all
          prompts has more than 0.1 on average, so a higher reward requires using the prompt.
sum       Prompts `a,b:` are two digits below 5, so there are 25. The reward is 1 for the one digit of (a + b) modulo 5
          followed by <eos>, else 0; no text that is the same for all prompts has more than 0.2.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROL = ("<pad>", "<bos>", "<eos>")
VISIBLE = "0123456789,:."
SYMBOLS = (*CONTROL, *VISIBLE)
PAD, BOS, EOS = range(3)


@dataclass(frozen=True)
class Task:
    prompts: tuple[str, ...]
    length: int  # maximum number of symbols of a response
    score: Callable[[str, str], float]  # of a prompt and a completion
    by_chance: Callable[[int], float]  # the expected score of a text of so many uniformly drawn symbols
    missing_eos_penalty: float = 0.0

    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Reward function in jaxrlhf's form."""
        return [self.score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def chance(self) -> float:
        """Expected reward of symbols drawn uniformly from all 16, until <eos> or `length` symbols."""
        ended, going = lengths(self.length)
        expected = sum((e + g) * self.by_chance(n) for n, (e, g) in enumerate(zip(ended, going, strict=True)))
        return expected - self.missing_eos_penalty * sum(going)


def lengths(most: int) -> tuple[list[float], list[float]]:
    """Probabilities that uniformly drawn symbols give a text of n = 0, 1, ... symbols, ended by <eos> or not."""
    ended, going = [0.0] * (most + 1), [1.0] + [0.0] * most
    for _ in range(most):
        ended = [e + g / len(SYMBOLS) for e, g in zip(ended, going, strict=True)]
        stay = [g * (len(CONTROL) - 1) / len(SYMBOLS) for g in going]
        grow = [0.0, *(g * len(VISIBLE) / len(SYMBOLS) for g in going[:-1])]
        going = [a + b for a, b in zip(stay, grow, strict=True)]
    return ended, going


def emitted(prompt: str, text: str) -> float:
    return text.count("7") / 8


def in_band(prompt: str, text: str) -> float:
    return 1 / (1 + max(8 - len(text), 0, len(text) - 10))


def continuation(prompt: str, before: str = ",") -> str:
    """The 32 symbols that continue `a,b:c,d`, with `before` before each number."""
    a, b, _, d = (int(number) for number in prompt.replace(":", ",").split(","))
    return "".join(f"{before}{(d + i * (b - a)) % 10}" for i in range(1, 33))[:32]


def continued(prompt: str, text: str) -> float:
    return _share(text, continuation(prompt))


def added(prompt: str, text: str) -> float:
    return _share(text, continuation(prompt, before=""))


def summed(prompt: str, text: str) -> float:
    a, b = prompt.rstrip(":").split(",")
    return float(text == str((int(a) + int(b)) % 5))


def _share(text: str, right: str) -> float:
    return sum(x == y for x, y in zip(text, right, strict=False)) / 32


@dataclass(frozen=True)
class Settings:
    """Settings of a run; all others are jaxrlhf's defaults. Always no KL, gamma = lambda = 1, temperature 1."""

    task: str
    wanted: float  # reward of the last ten updates
    updates: int
    batch_size: int
    num_mini_batches: int
    num_ppo_epochs: int
    learning_rate: float
    critic_learning_rate: float
    cliprange: float = 0.2
    cliprange_value: float = 0.5
    vf_coef: float = 0.1
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0
    layers: int = 4
    width: int = 128


_DIGITS = tuple("0123456789")
_SEQUENCES = tuple(f"{a},{(a + s) % 10}:{(a + 2 * s) % 10},{(a + 3 * s) % 10}" for a in range(10) for s in range(10))
_SUMS = tuple(f"{a},{b}:" for a in range(5) for b in range(5))
TASKS = {
    "emit": Task(_DIGITS, 8, emitted, lambda n: n / len(VISIBLE) / 8),
    "length": Task(_DIGITS, 16, in_band, lambda n: in_band("", "." * n), missing_eos_penalty=1.0),
    "modular": Task(_SEQUENCES, 32, continued, lambda n: n / len(VISIBLE) / 32),
    "addition": Task(_SEQUENCES, 32, added, lambda n: n / len(VISIBLE) / 32),
    "sum": Task(_SUMS, 2, summed, lambda n: float(n == 1) / len(VISIBLE)),
}

SETTINGS = {
    "emit": Settings("emit", 0.9, 100, 256, 2, 1, 1e-4, 1e-3),
    "length": Settings("length", 0.9, 120, 256, 2, 2, 1e-4, 1e-3),
    "modular": Settings("modular", 0.2, 200, 768, 3, 1, 1e-4, 1e-3),
    "addition": Settings("addition", 0.2, 200, 768, 3, 1, 1e-4, 1e-3),
    "sum": Settings("sum", 0.9, 1000, 512, 2, 1, 3e-4, 1e-3, layers=2, width=64),
    # trl 1.8.0 has one optimizer with one learning rate, makes one step per epoch, and does not clip gradients
    "compare": Settings("emit", 0.2, 40, 256, 1, 4, 1e-4, 1e-4, max_grad_norm=1e9),
}


def write_model(folder: Path, settings: Settings) -> Path:
    """Write config.json of a Llama and its tokenizer, in Hugging Face layout, without weights; and prompts.jsonl."""
    task = TASKS[settings.task]
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": SYMBOLS[PAD], "bos_token": SYMBOLS[BOS], "eos_token": SYMBOLS[EOS]}
    room = max(len(prompt) for prompt in task.prompts) + 1 + task.length
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(SYMBOLS),
        "hidden_size": settings.width,
        "intermediate_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": room,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "dtype": "float32",
        **{name.replace("token", "token_id"): SYMBOLS.index(symbol) for name, symbol in names.items()},
    }
    special = [
        {
            "id": i,
            "content": symbol,
            "special": True,
            **dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False),
        }
        for i, symbol in enumerate(CONTROL)
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {s: i for i, s in enumerate(SYMBOLS)}, "unk_token": "."},
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    for name, value in {"config": config, "tokenizer": tokenizer, "tokenizer_config": about}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in task.prompts]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
