"""Published config.json files: what is read from them, and the number of parameters."""

import jax
import numpy as np
import pytest
from support.published import MINISTRAL_3B, OLMOE, PHI3_MINI_4K, PHI4_MINI, PYTHIA_70M, QWEN3_30B, QWEN35_27B

from jaxrlhf import models
from jaxrlhf.models import Rope
from jaxrlhf.weights import families

# as published, less special tokens, dropout rates, initialisers and caches
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
OLMO2_1B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 100352,
}
OLMO3_7B = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 128256,
}
GRANITE_2B = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49159,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32768,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LINEAR = Rope(theta=1e6, kind="linear", factor=8.0)
YARN = Rope(theta=5e5, kind="yarn", factor=8.0, original_max_positions=8192, attention_factor=1.2079441541679836)
# name: (config.json, parameters, some of what it says)
PUBLISHED = {
    "gpt2": (GPT2, 124_439_808, {"mlp_size": 3072, "tie_embeddings": True, "rope": None}),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400, {"head_dim": 64, "tie_embeddings": True}),
    "Mistral-7B-v0.3": (MISTRAL_7B, 7_248_023_552, {"head_dim": 128, "sliding_window": None}),
    "Ministral-3-3B": (MINISTRAL_3B, 3_429_006_336, {"head_dim": 128, "tie_embeddings": True}),
    "Qwen2.5-0.5B": (QWEN25_05B, 494_032_768, {"head_dim": 64, "qkv_bias": True, "sliding_layers": (False,) * 24}),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920, {"head_dim": 128, "qk_norm": True}),
    "Phi-3-mini-4k": (PHI3_MINI_4K, 3_821_079_552, {"sliding_window": 2047}),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760, {"num_kv_heads": 8}),
    "pythia-70m": (PYTHIA_70M, 70_426_624, {"parallel_residual": True}),
    "Qwen3-30B-A3B": (QWEN3_30B, 30_532_122_624, {"num_experts": 128}),
    "Qwen3.5-27B": (
        QWEN35_27B,
        26_895_998_464,
        {"family": "qwen3_5_text", "attention_gate": True, "norm": "rmsnorm_1p", "tie_embeddings": False,
         "rope": Rope(theta=1e7, partial_rotary_factor=0.25),
         "delta": models.DeltaNet(layers=(True, True, True, False) * 16, key_heads=16, value_heads=48, key_size=128,
                                  value_size=128, conv_width=4)},
    ),
    "OLMoE-1B-7B": (OLMOE, 6_919_161_856, {"num_experts": 64}),
    "gemma-3-1b": (
        GEMMA3_1B,
        999_885_952,
        {"embedding_multiplier": 1152**0.5, "attention_scale": 1 / 16, "rope": Rope(theta=1e6), "logits_softcap": None,
         "sliding_rope": Rope(theta=1e4), "tie_embeddings": True, "sliding_window": 512, "norm": "rmsnorm_1p"},
    ),
    "gemma-3-4b": (
        GEMMA3_4B,
        3_880_263_168,
        {"family": "gemma3_text", "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "vocab_size": 262208,
         "rope": LINEAR, "sliding_rope": Rope(theta=1e4), "max_positions": 131072},
    ),
    "gemma-2-2b": (
        GEMMA2_2B,
        2_614_341_888,
        {"attention_softcap": 50.0, "logits_softcap": 30.0, "sliding_layers": (True, False) * 13, "sliding_rope": None},
    ),
    "olmo-2-1b": (OLMO2_1B, 1_484_916_736, {"norm_placement": "post", "qk_norm_over": "all_heads", "norm_eps": 1e-6}),
    "olmo-3-7b": (
        OLMO3_7B,
        7_298_011_136,
        {"rope": YARN, "sliding_rope": Rope(theta=5e5), "sliding_layers": (True, True, True, False) * 8},
    ),
    "smollm3-3b": (
        SMOLLM3_3B,
        3_075_098_624,
        {"rope_layers": (True, True, True, False) * 9, "tie_embeddings": True, "sliding_window": None},
    ),
    "granite-3.3-2b": (
        GRANITE_2B,
        2_533_539_840,
        {"attention_scale": 1 / 64, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_divisor": 8.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_file_says(name):
    config, count, says = PUBLISHED[name]
    model = families.parse(config, name)
    assert {field: getattr(model, field) for field in says} == says
    if name.startswith("gemma-3"):
        assert [i for i, slides in enumerate(model.sliding_layers) if not slides] == [*range(5, model.num_layers, 6)]
    shapes = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == count


def test_every_family_has_a_published_file():
    parsed = {families.parse(config, name).family for name, (config, *_) in PUBLISHED.items()}
    assert parsed == set(families.FAMILIES)


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same_parameters(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, count, _ = PUBLISHED[name]
    text = families.multimodal.text_config(config, name, families.FAMILIES)
    with torch.device("meta"):
        kind = getattr(transformers, text["architectures"][0])
        theirs = kind(transformers.AutoConfig.for_model(**text))
    assert sum({id(p): p.numel() for p in theirs.parameters()}.values()) == count
