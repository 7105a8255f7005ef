import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from support.published import MINISTRAL_3B, OLMOE, PHI3_MINI_4K, PHI4_MINI, PHI35_MINI, PYTHIA_70M, QWEN3_30B

from jaxrlhf import models
from jaxrlhf.errors import DataError
from jaxrlhf.models import ModelConfig, Rope
from jaxrlhf.weights import families, names

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2}
GPT2 |= {"n_head": 4, "n_positions": 64}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
GEMMA2 = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
OLMO3 = LLAMA | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
QWEN35 = LLAMA | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "num_hidden_layers": 4}
QWEN35 |= {"head_dim": 16}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}


def parse(config, **changes):
    return families.parse(config | changes, "config.json")


def stretched(kind, **options):
    return {"rope_scaling": {"type": kind, **options}}


def leaves(model):
    abstract = jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract)
    return {tuple(entry.key for entry in path): leaf.shape for path, leaf in flat}


def test_a_file_from_the_hub():
    # HuggingFaceTB/SmolLM2-135M-Instruct, as published, less its special tokens
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert families.parse(published, "config.json") == ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_size=1536,
        max_positions=8192,
        norm="rmsnorm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=Rope(theta=100000.0),
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        sliding_layers=(False,) * 30,
        tie_embeddings=True,
    )


def test_gpt2_from_the_hub():
    # openai-community/gpt2 has been there since before n_inner and the scaling options
    model = parse(GPT2, activation_function="gelu_new", n_ctx=64, resid_pdrop=0.1)
    assert (model.head_dim, model.mlp_size, model.num_kv_heads, model.max_positions) == (8, 128, 4, 64)
    assert model.activation == "gelu_tanh" and model.norm == "layernorm" and model.rope is None
    assert model.tie_embeddings and model.attention_scale is None and not model.attention_scale_by_layer
    assert parse(GPT2, scale_attn_weights=False).attention_scale == 1.0


def test_mixtures_of_experts_from_the_hub():
    qwen = parse(QWEN3_30B)
    assert (qwen.num_experts, qwen.experts_per_token, qwen.mlp_size, qwen.head_dim) == (128, 8, 768, 128)
    assert qwen.normalise_expert_shares and qwen.sliding_window is None
    assert sum(1 for _ in names.tensors(qwen)) == 3 + 48 * (9 + 3 * 128)
    olmoe = parse(OLMOE)
    assert (olmoe.num_experts, olmoe.experts_per_token, olmoe.mlp_size, olmoe.norm_eps) == (64, 8, 1024, 1e-5)
    assert olmoe.qk_norm_over == "all_heads" and not olmoe.normalise_expert_shares


def test_the_load_balancing_loss_is_that_of_the_file_if_it_asks_for_it():
    assert parse(QWEN3_30B).router_aux_loss_coef == parse(OLMOE).router_aux_loss_coef == 0
    assert parse(QWEN3_30B, output_router_logits=True).router_aux_loss_coef == 0.001
    asks = {k: v for k, v in OLMOE.items() if k != "router_aux_loss_coef"} | {"output_router_logits": True}
    assert parse(asks).router_aux_loss_coef == 0.01
    other = dataclasses.replace(parse(asks), router_aux_loss_coef=0.5)  # an option of a run, which is not written
    assert families.render(other, asks) == asks


def test_phi3_from_the_hub():
    short = parse(PHI3_MINI_4K)
    assert (short.head_dim, short.sliding_window, short.max_positions) == (96, 2047, 4096)
    assert short.sliding_layers == (True,) * 32 and short.rope == Rope(theta=10000.0) and not short.qkv_bias
    long = parse(PHI35_MINI)
    assert long.rope.kind == "longrope" and long.rope.factor == 32.0 and long.rope.original_max_positions == 4096
    assert long.rope.long_factor[-1] == 64.8 and long.rope.short_factor[0] == 1.0 and long.max_positions == 131072
    mini = parse(PHI4_MINI)
    assert (mini.num_heads, mini.num_kv_heads, mini.head_dim) == (24, 8, 128)
    assert mini.rope.partial_rotary_factor == 0.75 and len(mini.rope.long_factor) == 48 and mini.tie_embeddings
    # the first files called longrope su
    su = PHI35_MINI["rope_scaling"] | {"type": "su"}
    assert parse(PHI35_MINI, rope_scaling=su) == long
    # the code that auto_map names is not exported, nor needed
    assert "auto_map" not in families.render(short, PHI3_MINI_4K)


def test_pythia_from_the_hub():
    model = parse(PYTHIA_70M)
    assert (model.head_dim, model.num_kv_heads, model.norm, model.activation) == (64, 8, "layernorm", "gelu")
    assert model.rope == Rope(theta=10000.0, partial_rotary_factor=0.25) and model.parallel_residual
    assert model.qkv_bias and model.attention_out_bias and model.mlp_bias and not model.gated_mlp
    newer = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    written = {key: value for key, value in PYTHIA_70M.items() if not key.startswith("rotary")}
    assert parse(written, rope_parameters=newer) == model
    tensors = {tensor.name for tensor in names.tensors(model)}
    assert {"embed_out.weight", "gpt_neox.layers.5.attention.query_key_value.bias"} <= tensors


def test_ministral_from_the_hub():
    model = parse(MINISTRAL_3B)
    assert model.rope == Rope(
        theta=1e6,
        kind="yarn",
        factor=16.0,
        original_max_positions=16384,
        mscale=1.0,
        mscale_all_dim=1.0,
        query_scale_beta=0.1,
    )
    assert model.sliding_window is None and model.tie_embeddings and model.head_dim == 128
    assert families.parse(families.render(model, {}), "config.json") == model


YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


LONGROPE = {
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "attention_factor": 1.2,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("default", {}), ("linear", {"factor": 2.0}), ("llama3", LLAMA3), ("yarn", YARN), ("longrope", LONGROPE)],
)
def test_both_spellings_of_rotary_embeddings_mean_the_same(kind, options):
    newer = parse(LLAMA, rope_parameters={"rope_type": kind, "rope_theta": 500.0, **options}, dtype="bfloat16")
    older = parse(LLAMA, rope_theta=500.0, rope_scaling={"rope_type": kind, **options}, torch_dtype="bfloat16")
    oldest = parse(LLAMA, rope_theta=500.0, rope_scaling={"type": kind, **options})
    assert newer == older == oldest
    renamed = {"original_max_position_embeddings": "original_max_positions"}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert newer.rope == Rope(theta=500.0, kind=kind, **{renamed.get(k, k): v for k, v in values.items()})
    assert families.parse(families.render(newer, {}), "config.json") == newer


def test_dynamic_scaling_stretches_the_context():
    model = parse(LLAMA, **stretched("dynamic", factor=4.0))
    assert model.rope == Rope(theta=10000.0, kind="dynamic", factor=4.0, original_max_positions=256)
    assert model.max_positions == 1024
    assert families.render(model, {})["max_position_embeddings"] == 256
    # the length of a run is not part of the model
    assert families.render(models.for_length(model, 700), LLAMA | stretched("dynamic", factor=4.0)) == (
        LLAMA | stretched("dynamic", factor=4.0)
    )


def test_defaults_of_keys_that_old_files_lack():
    assert parse(LLAMA).rope == Rope(theta=10000.0)
    assert not parse(LLAMA).tie_embeddings
    assert parse(LLAMA, num_key_value_heads=None).num_kv_heads == 4
    assert parse(LLAMA, **stretched("yarn", factor=2.0)).rope.original_max_positions == 256
    assert parse(MISTRAL).sliding_window == 4096
    assert parse(MISTRAL, sliding_window=None).sliding_layers == (False, False)
    qwen3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert parse(qwen3).head_dim == 128 and parse(qwen3, head_dim=20).head_dim == 20


def test_sliding_layers_of_qwen2():
    on = {"use_sliding_window": True, "sliding_window": 8}
    off = parse(QWEN2, sliding_window=8, max_window_layers=0)
    assert off.sliding_window is None and off.sliding_layers == (False, False)
    assert parse(QWEN2, **on, max_window_layers=1).sliding_layers == (False, True)
    assert parse(QWEN2, **on, max_window_layers=0).sliding_layers == (True, True)
    assert parse(QWEN2, **on, max_window_layers=2).sliding_window is None
    given = parse(QWEN2, **on, max_window_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert given.sliding_layers == (True, False) and given.sliding_window == 8


def test_layers_of_families_with_a_pattern():
    assert parse(GEMMA3, num_hidden_layers=7).sliding_layers == (*[True] * 5, False, True)
    assert parse(GEMMA3, sliding_window_pattern=2).sliding_layers == (True, False)
    assert parse(GEMMA3, sliding_window_pattern=1).sliding_window is None
    assert parse(GEMMA2, num_hidden_layers=3).sliding_layers == (True, False, True)
    assert parse(GEMMA2).sliding_window == 4096
    assert parse(OLMO3, num_hidden_layers=5).sliding_layers == (True, True, True, False, True)
    assert parse(SMOLLM3, num_hidden_layers=5).rope_layers == (True, True, True, False, True)
    assert parse(SMOLLM3, no_rope_layers=[1, 1, 1, 0]).rope_layers == ()
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert parse(SMOLLM3, num_hidden_layers=4, **window).sliding_layers == (False, False, False, True)


def test_layers_with_a_delta_net():
    model = parse(QWEN35, num_hidden_layers=8)
    assert model.delta == models.DeltaNet(
        layers=(True, True, True, False) * 2, key_heads=16, value_heads=32, key_size=128, value_size=128, conv_width=4
    )
    assert (model.period, model.layers_with("attention"), model.layers_with("mlp")) == (4, (3, 7), tuple(range(8)))
    assert model.layers_with("delta") == (0, 1, 2, 4, 5, 6)
    assert parse(QWEN35, num_hidden_layers=6, full_attention_interval=2).period == 2
    kinds = ["full_attention", "linear_attention", "linear_attention"]
    assert parse(QWEN35, num_hidden_layers=3, layer_types=kinds).delta.layers == (False, True, True)
    assert model.rope == Rope(theta=1e4, partial_rotary_factor=0.25)
    images = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    of_text = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    assert parse(QWEN35, rope_parameters=of_text | images) == parse(QWEN35, rope_parameters=of_text)
    assert parse(QWEN35, rope_parameters=of_text).rope == Rope(theta=1e7, partial_rotary_factor=0.5)


def test_rotary_embeddings_of_each_kind_of_layer():
    old = parse(GEMMA3, rope_theta=50.0, rope_local_base_freq=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    of_full = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
    of_sliding = {"rope_type": "default", "rope_theta": 7.0}
    new = parse(GEMMA3, rope_parameters={"full_attention": of_full, "sliding_attention": of_sliding})
    assert old == new and new.sliding_rope == Rope(theta=7.0)
    assert new.rope == Rope(theta=50.0, kind="linear", factor=2.0)
    assert parse(GEMMA3).rope == Rope(theta=1e6) and parse(GEMMA3).sliding_rope == Rope(theta=1e4)
    assert parse(GEMMA3, rope_parameters={"full_attention": of_full}).sliding_rope == Rope(theta=1e4)
    one = parse(OLMO3, rope_theta=50.0)
    assert one.rope == Rope(theta=50.0) and one.sliding_rope is None and parse(OLMO3).rope == Rope(theta=5e5)
    # in Olmo 3 scaling is for full layers
    scaled = parse(OLMO3, rope_theta=50.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert scaled.rope == new.rope and scaled.sliding_rope == one.rope
    assert parse(SMOLLM3).rope == Rope(theta=2e6)


def test_changed_rotary_embeddings_of_sliding_layers_are_written_for_every_version():
    original = GEMMA3 | {"rope_theta": 50.0, "rope_local_base_freq": 7.0}
    model = dataclasses.replace(parse(original), sliding_rope=Rope(theta=9.0))
    written = families.render(model, original)
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (50.0, 9.0)
    assert written["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 9.0}
    assert families.parse(written, "config.json") == model


def test_classifiers():
    assert parse(LLAMA, **CLASSIFIER, id2label={"0": "score"}).num_labels == 1
    assert parse(LLAMA, **CLASSIFIER, num_labels=1).num_labels == 1
    # two is transformers' default, which it does not write
    assert parse(LLAMA, **CLASSIFIER).num_labels == 2 and parse(LLAMA, **CLASSIFIER).head == "linear"
    assert parse(LLAMA, id2label={"0": "score"}).head == "lm"


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (LLAMA, {"model_type": "mamba"}, r"'mamba'.*gpt2, llama, mistral, qwen2, qwen3, gemma2"),
        (LLAMA, {"model_type": None}, "model_type"),
        (LLAMA, {"hidden_size": None}, "hidden_size is None; expected a whole number"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (LLAMA, {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA, {"num_key_value_heads": 3}, r"num_kv_heads \(3\) must divide"),
        (LLAMA, {"head_dim": 7}, "even head_dim"),
        (LLAMA, {"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'; expected one of silu"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias is 'yes'; expected true or false"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        (LLAMA, {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        (LLAMA, {"architectures": ["Qwen2ForCausalLM"]}, "architectures"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN35, {"num_hidden_layers": 3}, "layer_types is missing.*full_attention both among them"),
        (QWEN35, {"layer_types": ["full_attention"] * 4}, "layer_types"),
        (QWEN35, {"attn_output_gate": False}, "attn_output_gate is False; expected true"),
        (QWEN35, {"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'; expected one of swish, silu"),
        (QWEN35, {"linear_num_value_heads": 24}, r"key heads of delta nets \(16\) must divide their value heads"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, stretched("proportional", factor=2.0), "'proportional' is not supported"),
        (LLAMA, stretched("dynamic", factor=0.5), "factor is 0.5"),
        (LLAMA, stretched("longrope", **LONGROPE | {"long_factor": [1.0]}), "long_factor is .*a list of 4 numbers"),
        (LLAMA, stretched("longrope", **LONGROPE | {"short_factor": 1.0}), "short_factor is 1.0"),
        (LLAMA, stretched("linear"), "rope_scaling: factor is missing"),
        (LLAMA, stretched("linear", factor=2.0, beta_fast=1.0), "'linear' has no option 'beta_fast'"),
        (LLAMA, stretched("yarn", factor=0), "factor is 0"),
        (LLAMA, stretched("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor"),
        (LLAMA, {"rope_theta": 0}, "rope_theta"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (
            LLAMA,
            stretched("linear", factor=2.0) | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "contradicts",
        ),
        (LLAMA, CLASSIFIER | {"id2label": {"0": "a", "1": "b", "2": "c"}}, "3 labels"),
        (LLAMA, CLASSIFIER | {"problem_type": "multi_label_classification"}, "problem_type"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN2, {"layer_types": ["full_attention"]}, "each of the 2 layers"),
        (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (PHI3_MINI_4K, {"attention_bias": True}, "attention_bias"),
        (PHI3_MINI_4K, {"hidden_size": 3000}, "hidden_size is 3000"),
        (PHI3_MINI_4K, {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}}, "auto_map"),
        (PHI3_MINI_4K, stretched("linear", factor=2.0), "'linear' is not supported; supported are default, longrope"),
        (PHI4_MINI, {"partial_rotary_factor": 0.5}, "short_factor is .*a list of 32 numbers"),
        (PHI4_MINI, {"original_max_position_embeddings": None} | stretched("longrope", **LONGROPE), "4096 at the top"),
        (QWEN3_30B, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN3_30B, {"num_experts": 4}, r"num_experts_per_tok is 8; expected at most num_experts \(4\)"),
        (
            QWEN3_30B,
            {"output_router_logits": True, "router_aux_loss_coef": -1},
            "router_aux_loss_coef is -1; expected a",
        ),
        (QWEN3_30B, {"n_shared_experts": 1}, "n_shared_experts is 1.*shared experts"),
        (QWEN3_30B, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; expected one of softmax"),
        (QWEN3_30B, {"gating_function": "sigmoid"}, "gating_function is 'sigmoid'.*top experts of a softmax"),
        (QWEN3_30B, {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5.*top experts of a softmax"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv"),
        (PYTHIA_70M, {"rotary_pct": 1.5}, "rotary_pct is 1.5; expected at most 1.0"),
        (PYTHIA_70M, {"rotary_pct": 0.05}, "would turn 3 of the 64 components"),
        (PYTHIA_70M, {"num_attention_heads": 7}, "hidden_size is 512; expected a multiple"),
        (MINISTRAL_3B, {"rope_parameters": None}, "rope_parameters is missing"),
        (LLAMA, stretched("yarn", **YARN, llama_4_scaling_beta=0.1), "no option 'llama_4_scaling_beta'"),
        (GPT2, {"n_head": 5}, r"n_embd is 32; expected a multiple of n_head \(5\)"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention.*causal"),
        (GEMMA3, {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types"),
        (GEMMA3, {"sliding_window": None}, "layer_types"),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (GEMMA3, {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar is 0.5"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, "an entry each for full_attention and sliding_att"),
        (GEMMA3, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 0}}},
            "sliding_attention, rope_parameters: factor is 0",
        ),
        (GEMMA2, {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        (SMOLLM3, {"no_rope_layers": [1]}, "no_rope_layers is .*each of the 2 layers"),
        (SMOLLM3, {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        (SMOLLM3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (GPT2, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
    ],
)
def test_what_is_not_implemented_is_refused(config, changes, says):
    with pytest.raises(DataError, match=says) as caught:
        parse(config, **changes)
    assert "config.json" in str(caught.value)


CASES = sorted(folder.name for folder in FIXTURES.iterdir())


@pytest.fixture(params=CASES)
def original(request):
    return json.loads((FIXTURES / request.param / "config.json").read_text())


def test_rendering_what_was_read_changes_nothing(original):
    model = families.parse(original, "config.json")
    assert families.render(model, original) == original
    computed = dataclasses.replace(model, dtype="bfloat16", remat="full")  # ours, no business of the file
    assert families.render(computed, original) == original


def test_a_rendered_config_parses_to_the_same_model(original):
    model = families.parse(original, "config.json")
    assert families.parse(families.render(model, {}), "config.json") == model


def test_only_what_changed_is_rewritten(original):
    model = families.parse(original, "config.json")
    larger = families.render(dataclasses.replace(model, vocab_size=80), original)
    assert larger == original | {"vocab_size": 80}


def test_a_language_model_becomes_a_reward_model():
    reward = dataclasses.replace(parse(LLAMA), head="linear", num_labels=1)
    stale = {"num_labels": 2, "problem_type": "single_label_classification", "id2label": {"0": "a", "1": "b"}}
    written = families.render(reward, LLAMA | stale)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    assert written == LLAMA | CLASSIFIER | labels
    assert families.parse(written, "config.json") == reward


def test_labels_of_the_original_are_kept():
    config = LLAMA | CLASSIFIER | {"id2label": {"0": "BAD", "1": "GOOD"}, "label2id": {"BAD": 0, "GOOD": 1}}
    model = parse(config)
    assert families.render(model, config) == config
    back = families.render(dataclasses.replace(model, head="lm", num_labels=1), config)
    assert back["architectures"] == ["LlamaForCausalLM"] and "id2label" not in back


def test_the_stored_dtype_keeps_its_spelling():
    model = parse(LLAMA)
    assert families.render(model, LLAMA | {"torch_dtype": "float16"}, "float32")["torch_dtype"] == "float32"
    newer = families.render(model, LLAMA | {"dtype": "float16"}, "bfloat16")
    assert newer["dtype"] == "bfloat16" and "torch_dtype" not in newer


def test_changed_rotary_embeddings_replace_both_spellings():
    original = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    model = dataclasses.replace(parse(original), rope=Rope(theta=500.0, kind="linear", factor=2.0))
    written = families.render(model, original)
    assert "rope_parameters" not in written and families.parse(written, "config.json") == model


def test_a_model_that_its_family_cannot_describe_is_refused():
    with pytest.raises(DataError, match="cannot describe"):
        families.render(dataclasses.replace(parse(LLAMA), qk_norm=True), LLAMA)


def test_mlp_heads_are_written_and_read():
    model = dataclasses.replace(parse(LLAMA), head="mlp")
    assert families.parse(families.render(model, LLAMA), "config.json") == model


@pytest.mark.parametrize("case", [*CASES, "mlp"])
def test_every_leaf_has_its_tensors(case):
    mlp = LLAMA | CLASSIFIER | {"score_head": "mlp", "num_labels": 1}
    config = mlp if case == "mlp" else json.loads((FIXTURES / case / "config.json").read_text())
    model = families.parse(config, "config.json")
    shapes, covered = leaves(model), {}
    for tensor in names.tensors(model):
        assert tensor.path in shapes
        covered.setdefault(tensor.path, []).append(tensor.index)
        assert tensor.transpose <= (len(shapes[tensor.path]) - len(tensor.index) == 2)
    assert covered.keys() == shapes.keys()
    for path, found in covered.items():
        lead = len(found[0])
        assert lead == (path[0] == "layers") + (path[1:2] == ("experts",) and path[2] != "router")
        assert found == list(np.ndindex(*shapes[path][:lead]))
    by_name = {}
    for tensor in names.tensors(model):
        by_name.setdefault(tensor.name, []).append(tensor.part)
    for parts in by_name.values():
        columns = [column for part in parts if part is not None for column in part.columns]
        assert sorted(columns) == list(range(len(columns))) and (columns or parts == [None])
