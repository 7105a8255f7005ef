"""Model shapes of bench.py, and the minimum FLOPs and bytes of each case."""

import json
from pathlib import Path
from typing import Any

from bench_process import Job

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
# A Llama with biases: with a config.json of Qwen2, transformers would not load the tokenizer that is written below.
_QWEN2 = _LLAMA | {"attention_bias": True, "rms_norm_eps": 1e-6}


def _shape(family: dict[str, Any], sizes: tuple[int, ...], vocabulary: int, context: int, theta: float):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    rest = {"vocab_size": vocabulary, "max_position_embeddings": context, "rope_theta": theta}
    return family | dict(zip(names, sizes, strict=True)) | rest


SHAPES: dict[str, dict[str, Any]] = {
    "S": _shape(_LLAMA, (576, 30, 9, 3, 1536), 49152, 2048, 1e5),  # SmolLM2-135M
    "M": _shape(_QWEN2, (896, 24, 14, 2, 4864), 151936, 2048, 1e6),  # Qwen2.5-0.5B
    "L": _shape(_QWEN2, (1536, 28, 12, 2, 8960), 151936, 2048, 1e6),  # Qwen2.5-1.5B
    "T": _shape(_LLAMA, (64, 2, 4, 2, 128), 512, 512, 1e4),  # tiny, for tests
}
"""config.json of each shape."""


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a Hugging Face folder without weights, with a tokenizer of V words: <eos>, <pad>, <unk>, w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    special = ["<eos>", "<pad>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), config["vocab_size"])]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | kind))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def gemms(config: dict[str, Any], device: str, quick: bool) -> list[tuple[int, int, int]]:
    """(rows, k, n) of the matrix products to time: those of training and decoding, and a large square."""
    width, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    square = min(8192 if device == "gpu" else 2048, 32 * width)
    shapes = [(square, square, square), (2048, width, mlp), (1024, width, vocabulary)]
    decoding = [(32, width, 2 * mlp), (8, width, vocabulary), (32, width, vocabulary)]
    return shapes if quick else shapes + decoding


class Costs:
    """FLOPs and bytes of one shape. A multiply-add is two FLOPs; recomputation does not count."""

    def __init__(self, config: dict[str, Any]) -> None:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.layers, head = config["num_hidden_layers"], width // heads
        self.attended = heads * head  # N H, also the width of attention's output
        self.cached = 2 * config["num_key_value_heads"] * head  # keys and values of a token in a layer
        self.layer = width * (2 * self.attended + self.cached) + 3 * width * config["intermediate_size"]
        self.head = width * config["vocab_size"]

    def forward(self, rows: int, tokens: int, scored: int) -> float:
        """FLOPs of a forward pass over `rows` of `tokens`, with logits for `scored` tokens of each."""
        attention = 4 * self.attended * tokens * (tokens + 1) / 2
        return rows * (self.layers * (2 * self.layer * tokens + attention) + 2 * self.head * scored)

    def decode(self, rows: int, start: int, steps: float, dtype: str, limits: dict[str, float]) -> float:
        """Minimum seconds for `steps` tokens after `start`: every step reads all weights and the cache so far."""
        length = start + steps / 2
        weight, cached = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 2)}[dtype]
        read = weight * (self.layers * self.layer + self.head) + cached * rows * self.layers * self.cached * length
        products = rows * (2 * (self.layers * self.layer + self.head) + 4 * self.layers * self.attended * length)
        return steps * max(read / limits["read"], products / peak(dtype, limits)) / 1e9


def peak(dtype: str, limits: dict[str, float]) -> float:
    """Peak GFLOP/s of matrix products; int8 weights are compared with bfloat16."""
    return limits["bfloat16" if dtype == "int8" else dtype]


def add_percentages(summary: dict[str, Any], job: Job, limits: dict[str, float]) -> None:
    """Add floor_percent, decode_percent and update_percent to a contestant's record, where they are defined."""
    costs, seconds, phases = Costs(SHAPES[job.shape]), summary["seconds"]["median"], summary.get("phases", {})
    rows, total = job.batch, job.prompt + job.response

    def products(flops: float) -> float:
        return flops / peak(job.dtype, limits) / 1e9

    prefill = products(costs.forward(rows, job.prompt, 1))
    drawn = job.dtype if job.case not in ("ppo", "grpo") or job.rollout_dtype == "auto" else job.rollout_dtype
    decode = costs.decode(rows, job.prompt, job.response - 1, drawn, limits)
    score = costs.forward(rows, total, job.response)  # log-probs of a response
    value = costs.forward(rows, total, 0)  # values, or a reward
    floor, update, updating = 0.0, 0.0, seconds
    match job.case:
        case "generate":
            floor = prefill + decode
            if "prefill" in phases:
                summary["decode_percent"] = percent(decode, seconds - phases["prefill"])
        case "engine":
            steps = summary["tokens_per_second"] * seconds / job.slots
            mean = int(steps * job.slots / rows)
            floor = prefill + steps * costs.decode(job.slots, job.prompt + mean // 2, 1, job.dtype, limits)
        case "prefix":
            floor = prefill
        case "logprobs":
            floor = products(score)
        case "sft":
            floor = update = products(3 * costs.forward(rows, total, total - 1))
        case "reward":
            floor = update = products(3 * 2 * value)
        case "dpo":
            update, updating = products(3 * 2 * score), phases.get("update", 0.0)
            floor = products(2 * score) + update  # the reference's
        case "grpo":
            prompts = rows // job.samples  # each is prefilled once for all its responses
            update, updating = products(3 * job.epochs * score), phases.get("update", 0.0)
            # The reward is a function; with one step, only the reference has a forward pass before it.
            before = score + (score if job.epochs > 1 else 0.0)
            floor = products(costs.forward(prompts, job.prompt, 1) + before) + decode + update
        case "ppo":
            update, updating = products(3 * job.epochs * (score + value)), phases.get("update", 0.0)
            # Old log-probs and values need their own forward passes only with more than one epoch.
            floor = prefill + decode + products((score + value) * (1 if job.epochs == 1 else 2)) + update
    if floor:
        summary["floor_percent"] = percent(floor, seconds)
    if update and updating:
        summary["update_percent"] = percent(update, updating)


def percent(least: float, seconds: float) -> float:
    return round(100 * least / seconds, 1) if seconds > 0 else 0.0
