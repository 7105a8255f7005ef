"""Write tests/fixtures/models, tiny random models with results of transformers, and tests/fixtures/adapters, adapters
for some of them with results of PEFT.

    python scripts/make_fixtures.py [NAME ...]   (needs torch, transformers and peft: the `parity` extra)

writes the folders of these names again, or all.

One folder per case, in Hugging Face layout (config.json, model.safetensors in bfloat16), with golden.safetensors:

    tokens, lengths      [B, T], [B]   sequences to run, right-padded
    logits               [sum(lengths), V]   at their real tokens, or
    scores               [B, labels]   of a classifier
    prompts, prompt_lengths, greedy    [G, P], [G], [G, 64]   greedy continuations
    gradient/NAME        [5]   of the mean negative log-likelihood: see `digest`

A folder of adapters is as PEFT saves it, except that its base is a name in tests/fixtures/models. Its
golden.safetensors has only tokens, lengths and logits.
"""

import json
import pathlib
import shutil
import sys
import zlib
from typing import Any

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
FOLDER = FIXTURES / "models"
LENGTHS, PROMPT_LENGTHS, NEW_TOKENS = (20, 13, 6), (9, 4), 64
LARGEST_ROUNDING = 4e-5  # of logits, as the difference with and without a cache: the tests allow 1e-4
LEAST_MARGIN = 2e-3  # between the two best tokens of a greedy step: rounding must not change the choice

LINEAGE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"torch_dtype": "bfloat16", "rope_theta": 10000.0}
NEW = {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LISTS = {"short_factor": [1.0, 1.25, 2.0], "long_factor": [1.5, 3.0, 5.0]}
PHI_LONG = {"hidden_size": 32, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **LISTS}}
# the original length is short, so that queries are scaled
MINISTRAL = {
    "rope_parameters": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 10,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.3,
    }
}


def rope(kind: str, theta: float = 10000.0, **options: Any) -> dict[str, Any]:
    """RoPE scaling in the newer spelling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


def case(family: str, classes: str, *parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A config.json."""
    merged: dict[str, Any] = {"architectures": [classes], "model_type": family}
    for part in (*parts, options):
        merged |= part
    return merged


def llama(*parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A Llama language model on top of the common sizes."""
    return case("llama", "LlamaForCausalLM", LINEAGE, *parts, **options)


def gemma(family: str, classes: str, *parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A model of Gemma 2 or 3 on top of the common sizes."""
    sizes = {key: value for key, value in LINEAGE.items() if key not in ("hidden_act", "tie_word_embeddings")}
    return case(family, classes, sizes, {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": 5}, *parts, **options)


def qwen3_5(classes: str, layer_types: str, *parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A text model of Qwen 3.5 on top of the common sizes, with layers of a delta net (d) and of attention (a)."""
    sizes = {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "rms_norm_eps": 1e-2,  # outputs near 0 would be normalised with their rounding errors
        "num_hidden_layers": len(layer_types),
        "layer_types": [{"d": "linear_attention", "a": "full_attention"}[kind] for kind in layer_types],
    }
    return case("qwen3_5_text", classes, LINEAGE, sizes, *parts, **options)


LABELS = {n: {"id2label": {str(i): f"LABEL_{i}" for i in range(n)}} for n in (1, 2)}
# the original length and theta put both ends of the correction range inside a head of 16
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
YARN_SIZES = {"max_position_embeddings": 8192, "head_dim": 16}
CASES = {
    "llama": llama(OLD),
    "llama-linear-tied": llama(OLD, rope_scaling={"type": "linear", "factor": 2.5}, tie_word_embeddings=True),
    "llama-llama3": llama(
        rope(
            "llama3",
            theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "llama-yarn": llama(YARN_SIZES, torch_dtype="bfloat16", rope_theta=100.0, rope_scaling={"type": "yarn", **YARN}),
    "llama-yarn-mscale": llama(
        YARN_SIZES,
        rope("yarn", 100.0, **YARN, mscale=0.9, mscale_all_dim=0.5, truncate=False, beta_fast=20.0, beta_slow=2.0),
    ),
    "llama-yarn-factor": llama(YARN_SIZES, rope("yarn", 100.0, **YARN, attention_factor=1.25)),
    "llama-biases": llama(NEW, attention_bias=True, mlp_bias=True, head_dim=10, num_key_value_heads=1),
    "llama-gelu": llama(NEW, num_key_value_heads=None, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-2),
    "mistral-window": case("mistral", "MistralForCausalLM", LINEAGE, OLD, sliding_window=5),
    "mistral-full": case("mistral", "MistralForCausalLM", LINEAGE, NEW, sliding_window=None, head_dim=8),
    "qwen2": case("qwen2", "Qwen2ForCausalLM", LINEAGE, OLD, sliding_window=4, tie_word_embeddings=True),
    "qwen2-window": case(
        "qwen2",
        "Qwen2ForCausalLM",
        LINEAGE,
        OLD,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen2-layer-types": case(
        "qwen2",
        "Qwen2ForCausalLM",
        LINEAGE,
        YARN_SIZES,
        rope("yarn", 100.0, **YARN),
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": case("qwen3", "Qwen3ForCausalLM", LINEAGE, OLD, head_dim=14, tie_word_embeddings=True),
    "qwen3-window-biases": case(
        "qwen3",
        "Qwen3ForCausalLM",
        LINEAGE,
        NEW,
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    # as published before transformers 5: no layer_types, the full layers scaled
    "gemma3": gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        torch_dtype="bfloat16",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=6,
        sliding_window_pattern=3,
        rope_theta=1000.0,
        rope_local_base_freq=10.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3-layer-types": gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        dtype="bfloat16",
        attention_bias=True,
        tie_word_embeddings=False,
        final_logit_softcapping=2.0,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
    "gemma2": gemma(
        "gemma2",
        "Gemma2ForCausalLM",
        OLD,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
    ),
    "gemma2-uncapped": gemma(
        "gemma2",
        "Gemma2ForCausalLM",
        NEW,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        hidden_activation="gelu",
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": case("olmo2", "Olmo2ForCausalLM", LINEAGE, OLD),
    "olmo3": case(
        "olmo3",
        "Olmo3ForCausalLM",
        LINEAGE,
        YARN_SIZES,
        num_hidden_layers=4,
        sliding_window=5,
        torch_dtype="bfloat16",
        rope_theta=500000.0,
        rope_scaling={"rope_type": "yarn", **YARN, "attention_factor": 1.2},
    ),
    "olmo3-layer-types": case(
        "olmo3",
        "Olmo3ForCausalLM",
        LINEAGE,
        dtype="bfloat16",
        attention_bias=True,
        tie_word_embeddings=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "smollm3": case("smollm3", "SmolLM3ForCausalLM", LINEAGE, OLD, no_rope_layers=[1, 0]),
    "smollm3-window": case(
        "smollm3",
        "SmolLM3ForCausalLM",
        LINEAGE,
        NEW,
        num_hidden_layers=3,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=5,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "granite": case(
        "granite",
        "GraniteForCausalLM",
        LINEAGE,
        OLD,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        logits_scaling=1.5,
    ),
    "gpt2": case("gpt2", "GPT2LMHeadModel", GPT2),
    "gpt2-options": case(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2,
        n_inner=36,
        activation_function="gelu",
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        tie_word_embeddings=False,
    ),
    "gpt2-unscaled": case("gpt2", "GPT2LMHeadModel", GPT2, activation_function="relu", scale_attn_weights=False),
    "gpt_neox": case("gpt_neox", "GPTNeoXForCausalLM", NEOX, torch_dtype="bfloat16", rotary_pct=0.25),
    "gpt_neox-sequential": case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        NEOX,
        dtype="bfloat16",
        rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 2.0},
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="quick_gelu",
        tie_word_embeddings=True,
    ),
    "phi3": case("phi3", "Phi3ForCausalLM", LINEAGE, OLD, sliding_window=5, hidden_size=32),
    "phi3-longrope": case("phi3", "Phi3ForCausalLM", LINEAGE, OLD, PHI_LONG, original_max_position_embeddings=100),
    # every sequence, and the first step of decoding, is longer than the original length
    "phi3-longrope-long": case(
        "phi3",
        "Phi3ForCausalLM",
        LINEAGE,
        rope("longrope", 10000.0, partial_rotary_factor=0.75, **LISTS),
        dtype="bfloat16",
        hidden_size=32,
        original_max_position_embeddings=4,
        tie_word_embeddings=True,
    ),
    "ministral3": case("ministral3", "Ministral3ForCausalLM", LINEAGE, MINISTRAL, dtype="bfloat16", head_dim=8),
    "ministral3-window": case(
        "ministral3", "Ministral3ForCausalLM", LINEAGE, MINISTRAL, torch_dtype="bfloat16", head_dim=10, sliding_window=5
    ),
    "qwen3_moe": case(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        LINEAGE,
        NEW,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    ),
    "olmoe": case(
        "olmoe", "OlmoeForCausalLM", LINEAGE, OLD, intermediate_size=16, num_experts=4, num_experts_per_tok=3
    ),
    "qwen3_5": qwen3_5(
        "Qwen3_5ForCausalLM",
        "dada",
        rope("default", 1000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 0], mrope_interleaved=True),
        dtype="bfloat16",
        tie_word_embeddings=True,
    ),
    "qwen3_5-biases": qwen3_5(
        "Qwen3_5ForCausalLM", "add", OLD, attention_bias=True, linear_conv_kernel_dim=2, linear_num_key_heads=4
    ),
    "qwen3_5-score": qwen3_5("Qwen3_5TextForSequenceClassification", "da", NEW, LABELS[1]),
    "llama-score": case("llama", "LlamaForSequenceClassification", LINEAGE, OLD, LABELS[1]),
    "mistral-label": case("mistral", "MistralForSequenceClassification", LINEAGE, NEW, sliding_window=5),
    "qwen2-score": case("qwen2", "Qwen2ForSequenceClassification", LINEAGE, NEW, LABELS[1], tie_word_embeddings=True),
    "qwen3-label": case("qwen3", "Qwen3ForSequenceClassification", LINEAGE, NEW, LABELS[2], head_dim=8),
    "gemma3-score": gemma(
        "gemma3_text", "Gemma3TextForSequenceClassification", LABELS[1], dtype="bfloat16", sliding_window_pattern=2
    ),
    "gemma2-label": gemma("gemma2", "Gemma2ForSequenceClassification", NEW, LABELS[2]),
    "olmo2-score": case("olmo2", "Olmo2ForSequenceClassification", LINEAGE, NEW, LABELS[1]),
    "olmo3-label": case("olmo3", "Olmo3ForSequenceClassification", LINEAGE, LABELS[2], sliding_window=5),
    "smollm3-score": case(
        "smollm3", "SmolLM3ForSequenceClassification", LINEAGE, NEW, LABELS[1], no_rope_layers=[0, 1]
    ),
    "qwen3_moe-score": case(
        "qwen3_moe",
        "Qwen3MoeForSequenceClassification",
        LINEAGE,
        OLD,
        LABELS[1],
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=20,
    ),
    "gpt_neox-label": case("gpt_neox", "GPTNeoXForSequenceClassification", NEOX, LABELS[2], dtype="bfloat16"),
    "phi3-score": case("phi3", "Phi3ForSequenceClassification", LINEAGE, NEW, LABELS[1]),
    "ministral3-score": case(
        "ministral3", "Ministral3ForSequenceClassification", LINEAGE, MINISTRAL, LABELS[1], head_dim=8
    ),
    "gpt2-score": case("gpt2", "GPT2ForSequenceClassification", GPT2, LABELS[1]),
    "gpt2-label": case("gpt2", "GPT2ForSequenceClassification", GPT2),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-lora": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "trainable_token_indices": {"embed_tokens": [60, 5], "lm_head": [60, 5]},
        },
    ),
    "gpt2-dora-rslora": (
        "gpt2",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "fan_in_fan_out": True,
            "use_dora": True,
            "use_rslora": True,
            "layers_to_transform": [1],
            "trainable_token_indices": [5],
        },
    ),
    "qwen3_moe-experts": ("qwen3_moe", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
}


def stored(name: str, array: torch.Tensor, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What files hold of a parameter that transformers 5 renames, or joins, when it reads them."""
    if config["model_type"] == "gpt_neox":
        name = name.replace("lm_head.", "embed_out.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    prefix, _, module = name.rpartition(".")
    if not prefix.endswith("experts"):
        return {name: array}
    return {
        f"{prefix}.{number}.{part}.weight": piece
        for number, expert in enumerate(array)
        for part, piece in zip(parts[module], expert.chunk(len(parts[module])), strict=True)
    }


def digest(gradient: np.ndarray) -> np.ndarray:
    """The norm of a gradient, and its products with four fixed directions: f64 [5]."""
    flat = gradient.astype(np.float64).ravel()
    directions = [np.cos((i + 1) * np.arange(flat.size)) for i in range(4)]
    return np.array([np.linalg.norm(flat), *(flat @ direction for direction in directions)])


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights that make every part matter: norms not 1, biases not 0, logits of a few units; bfloat16 values."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            new = 0.3 * noise
        elif weight.ndim == 1:
            around_zero = model.config.model_type == "qwen3_5_text" and name.endswith("norm.weight")  # of 1 + scale
            new = 0.3 * noise + (0 if around_zero and "linear_attn" not in name else 1)
        elif "embed" in name or "wte" in name or "wpe" in name:
            new = 0.5 * noise
        elif "linear_attn" in name:  # smaller, as recurrence and norm amplify rounding errors
            new = noise * weight[0].numel() ** -0.5
        else:
            new = 1.5 * noise * min(weight.shape[-2:]) ** -0.5
        weight.data = new.bfloat16().float()


def padded(rows: list[np.ndarray], side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions of rows of several lengths."""
    width = max(len(row) for row in rows)
    tokens, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, at], mask[i, at] = row, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return torch.tensor(tokens), torch.tensor(mask), torch.tensor(positions)


def random_rows(lengths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Sequences without the special ids 0, 1 and 2, by which a classifier would find its last token."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 64, length) for length in lengths]


def logits_of(model: Any, rows: list[np.ndarray], side: str) -> torch.Tensor:
    """[sum of lengths, V], at real tokens."""
    tokens, mask, positions = padded(rows, side)
    return model(tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()]


def language_model(model: Any, seed: int, config: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The golden arrays of a language model, or None if two tokens of a greedy step are too close to a tie, or if the
    weights make rounding errors large."""
    rows, prompts = random_rows(LENGTHS, seed), random_rows(PROMPT_LENGTHS, seed + 1)
    logits = logits_of(model, rows, "right")
    left = logits_of(model, rows, "left")
    torch.testing.assert_close(left, logits, atol=1e-2, rtol=0)
    if (left - logits).abs().max() > LARGEST_ROUNDING:
        return None
    predicts = np.concatenate([np.arange(length) < length - 1 for length in LENGTHS])
    targets = torch.tensor(np.concatenate([row[1:] for row in rows]))
    torch.nn.functional.cross_entropy(logits[torch.tensor(predicts)], targets).backward()
    tokens, mask, _ = padded(prompts, "left")
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    written = model.generate(tokens, attention_mask=mask, **options)
    greedy = written.sequences[:, tokens.shape[1] :].numpy()
    cached = torch.stack(written.logits, dim=1)
    for row, (prompt, continuation) in enumerate(zip(prompts, greedy, strict=True)):
        with torch.no_grad():
            whole = logits_of(model, [np.concatenate([prompt, continuation])], "right")[len(prompt) - 1 : -1]
        if (whole - cached[row]).abs().max() > LARGEST_ROUNDING:
            return None
        best = whole.topk(2)
        if (best.values[:, 0] - best.values[:, 1]).min() < LEAST_MARGIN:
            return None
        np.testing.assert_array_equal(best.indices[:, 0].numpy(), continuation)
    return {
        "tokens": padded(rows, "right")[0].numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits.detach().numpy(),
        "prompts": tokens.numpy().astype(np.int32),
        "prompt_lengths": np.array(PROMPT_LENGTHS, np.int32),
        "greedy": greedy.astype(np.int32),
    } | {
        f"gradient/{stored_name}": digest(gradient.numpy())
        for name, weight in model.named_parameters()
        for stored_name, gradient in stored(name, weight.grad, config).items()
    }


def classifier(model: Any, seed: int) -> dict[str, np.ndarray]:
    """The golden arrays of a classifier."""
    rows = random_rows(LENGTHS, seed)
    tokens, mask, positions = padded(rows, "right")
    with torch.no_grad():
        scores = model(tokens, attention_mask=mask, position_ids=positions).logits
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "scores": scores.numpy(),
    }


def write(name: str, config: dict[str, Any]) -> None:
    """Write one folder; the seed is derived from the name and increased until no greedy step is close to a tie."""
    folder = FOLDER / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    kind = getattr(transformers, config["architectures"][0])
    loaded = transformers.AutoConfig.from_pretrained(folder)
    model = kind._from_config(loaded, dtype=torch.float32, attn_implementation="eager").eval()
    seed, golden = zlib.crc32(name.encode()) % 10_000, None
    while golden is None:
        randomise(model, seed)
        model.zero_grad()
        golden = classifier(model, seed) if "ForSequence" in kind.__name__ else language_model(model, seed, config)
        seed += 1
    weights = {
        stored_name: piece.detach().bfloat16().contiguous()
        for name, weight in model.named_parameters()
        for stored_name, piece in stored(name, weight, config).items()
    }
    save_torch(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(golden, folder / "golden.safetensors", metadata={"transformers": transformers.__version__})


def write_adapters(name: str, base: str, options: dict[str, Any]) -> None:
    """Write one folder of adapters for the model `base`: bfloat16 values that make every part matter."""
    folder = FIXTURES / "adapters" / name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER / base, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.get_peft_model(loaded, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) % 10_000)
    for parameter_name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "magnitude" in parameter_name:
            weight.data = (weight.data * (1 + 0.3 * noise)).bfloat16().float()
        elif weight.requires_grad:
            weight.data = (0.3 * noise).bfloat16().float()
    rows = random_rows(LENGTHS, 0)
    with torch.no_grad():
        logits = logits_of(model, rows, "right")
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    golden = {
        "tokens": padded(rows, "right")[0].numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits.numpy(),
    }
    save_file(golden, folder / "golden.safetensors", metadata={"peft": peft.__version__})


def main(*names: str) -> None:
    """Write the folders of these names again, or all."""
    torch.set_num_threads(1)
    if not names:
        for folder in (FOLDER, FIXTURES / "adapters"):
            shutil.rmtree(folder, ignore_errors=True)
    for name in names or (*CASES, *ADAPTERS):
        folder = FOLDER / name if name in CASES else FIXTURES / "adapters" / name
        shutil.rmtree(folder, ignore_errors=True)
        if name in CASES:
            write(name, CASES[name])
        else:
            write_adapters(name, *ADAPTERS[name])
        print(f"{name}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
