"""Adapters in and out against PEFT itself, in float32: equal logits, whoever wrote the folder."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import lora, models, weights
from jaxrlhf.errors import DataError
from jaxrlhf.models import Adapters
from jaxrlhf.weights import families
from jaxrlhf.weights import peft as ours
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.peft import keys

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity

TOKENS = np.array([[5, 9, 33, 4, 17, 60, 2, 8], [3, 3, 21, 50, 11, 7, 40, 12]])
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "olmoe": ["up_proj", "o_proj"],
}
LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "initializer_range": 0.2},
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4},
    "qwen2": LLAMA | {"tie_word_embeddings": True},
    "qwen3": LLAMA | {"head_dim": 8},
    "gemma3_text": LLAMA
    | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9},
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "olmo2": LLAMA,
    "olmo3": LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "smollm3": LLAMA | {"no_rope_layers": [1, 0, 1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": LLAMA | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "phi3": LLAMA | {"pad_token_id": 0, "eos_token_id": 2},
    "ministral3": LLAMA | {"head_dim": 8},
    "qwen3_moe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "pad_token_id": 0},
    "qwen3_5_text": LLAMA
    | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "rms_norm_eps": 1e-2}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5},
}
FAMILIES = list(CONFIGS)
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of a model with three layers per family, as transformers writes it."""
    root = tmp_path_factory.mktemp("bases")
    for family, settings in CONFIGS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
    return root


def targets(folder):
    return TARGETS.get(folder.name, ["q_proj", "v_proj", "down_proj"])


def theirs(folder, head="lm"):
    kind = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    more = {} if head == "lm" else {"num_labels": 1, "pad_token_id": 0}
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more).eval()


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), attention_mask=torch.ones(TOKENS.shape)).logits.numpy()


@functools.partial(jax.jit, static_argnames="model")
def run(params, model):
    hidden = models.forward(params, model, jnp.array(TOKENS, jnp.int32), jnp.ones(TOKENS.shape, bool))
    if model.head == "lm":
        return models.lm_logits(params, model, hidden)
    return models.label_logits(params, model, hidden[:, -1])


def adapted(folder, head="lm", **options):
    """A model of PEFT whose adapters, magnitudes and token rows do something."""
    torch.manual_seed(0)
    given = {"task_type": "CAUSAL_LM" if head == "lm" else "SEQ_CLS", "target_modules": targets(folder)}
    settings = peft.LoraConfig(**given | {"r": 4, "lora_alpha": 8} | options)
    model = peft.get_peft_model(theirs(folder, head), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            if "trainable_tokens_delta" in name:
                parameter.normal_(std=0.2)
    return model.eval()


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora that skips a layer": {"use_dora": True, "layers_to_transform": [0, 2]},
    "dora of one layer": {"use_dora": True, "layers_to_transform": 1, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5, "c_attn": 5}, "alpha_pattern": {"v_proj": 3, "c_proj": 3}},
    "patterns of rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2, "c_proj": 2}},
    "regular expressions": {
        "rank_pattern": {r".*\.[12]\..*(q_proj|c_attn)": 3, r"^model\.layers\.0\.self_attn\.v_proj": 2},
        "alpha_pattern": {r"(layers|h)\.0\..*": 5},
    },
    "layers": {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    "exclude": {"exclude_modules": r".*\.1\..*"},
    "all-linear": {"target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [60, 5]},
    "tied tokens": {"trainable_token_indices": [60, 5], "ensure_weight_tying": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.3},
    "initialised at random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": {"num_groups": 4}},
    "monteclora": {"monteclora_config": {"num_samples": 2, "buffer_size": 2}},
}


BY_FAMILY = list(OPTIONS)[: list(OPTIONS).index("dropout")]  # the others do not depend on the modules of a model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((f, o) for f in ("gpt2", "qwen2") for o in BY_FAMILY),
        *((f, o) for f in ("gpt_neox", "phi3") for o in ("plain", "dora", "all-linear", "tokens")),
        *(("llama", o) for o in OPTIONS),
        *(("gemma3_text", o) for o in ("plain", "tokens", "tied tokens")),  # the embedding is scaled
        ("olmo2", "dora"),
        ("granite", "tokens"),
    ],
)
def test_a_folder_that_peft_wrote(family, name, folders, tmp_path):
    agrees_with_what_peft_wrote(folders / family, OPTIONS[name], tmp_path)


def agrees_with_what_peft_wrote(folder, options, tmp_path):
    model = adapted(folder, **options)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    whole, params = jaxrlhf.load(tmp_path, dtype="float32")
    assert np.abs(expected - outputs(theirs(folder))).max() > 1e-2, "the adapters do something"
    np.testing.assert_allclose(run(params, whole), expected, **CLOSE)
    base = jaxrlhf.load(folder, dtype="float32")[1]  # and beside the base, unmerged
    found, added = ours.read(tmp_path, whole)
    apart = run({**base, **added}, dataclasses.replace(whole, adapters=found))
    np.testing.assert_allclose(apart, expected, **CLOSE)


def test_every_key_of_pefts_config_is_known():
    """A key of a newer PEFT must be added to one of the tables of keys.py, by what it does."""
    known = keys.USED | keys.WITHOUT_EFFECT | keys.REFUSED.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    assert len(known) == len(keys.USED) + len(keys.WITHOUT_EFFECT) + len(keys.REFUSED), "in one table each"
    keys.check(Fields({**peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), "peft_type": "LORA"}, "defaults"))


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType) - {peft.PeftType.LORA}))
def test_adapters_of_other_types_are_refused_by_name(kind):
    with pytest.raises(DataError, match=f"peft_type is '{kind.value}'; expected 'LORA'"):
        keys.check(Fields({"peft_type": kind.value}, "adapter_config.json"))


REFUSED = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 9]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["down_proj"], "match_strict": False}},
    "kasa_config": {"kasa_config": {}},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name_with_a_remedy(name, folders, tmp_path):
    adapted(folders / "llama", **REFUSED[name]).save_pretrained(tmp_path)
    key = next(iter(REFUSED[name]))
    with pytest.raises(DataError) as error:
        jaxrlhf.load(tmp_path)
    message = str(error.value)
    assert (name if key == "target_modules" else key) in message
    assert "merge" in message or "train plain LoRA" in message


GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
OF_EXPERTS = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "all-linear": {"target_modules": "all-linear"},  # with the router
    "one": {"target_modules": [], "target_parameters": [DOWN]},
    "other": {"target_modules": ["q_proj"], "target_parameters": [GATE_UP], "use_rslora": True},
    "of one layer": {"target_modules": [], "target_parameters": [f"layers.1.{GATE_UP}", f"layers.2.{DOWN}"]},
    "patterns": {
        "target_modules": [],
        "target_parameters": [DOWN, "mlp.gate.weight", "self_attn.v_proj.weight"],
        "rank_pattern": {"down_proj": 2, "gate.weight": 3},
        "alpha_pattern": {r".*\.1\.mlp\.experts\.down_proj": 5, "v_proj.weight": 3},
    },
    "old names": {"target_modules": ["gate_proj", "up_proj", "down_proj", "k_proj"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "name"), [*(("qwen3_moe", name) for name in OF_EXPERTS), ("olmoe", "all-linear"), ("olmoe", "one")]
)
def test_adapters_of_experts_that_peft_wrote(family, name, folders, tmp_path):
    agrees_with_what_peft_wrote(folders / family, OF_EXPERTS[name], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_the_linear_layers_that_experts_were(folders, tmp_path):
    """As under transformers 4, an A and a B for each matrix of each expert, which PEFT still reads."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
    stored = {}
    for layer, expert, (name, (width_in, width_out)) in itertools.product(range(3), range(4), shapes.items()):
        rank = 2 if name == "down_proj" else 4
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
        stored[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, width_in, generator=generator)
        stored[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(width_out, rank, generator=generator)
    safetensors.save_file(stored, tmp_path / "adapter_model.safetensors")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(shapes), rank_pattern={"down_proj": 2},
        base_model_name_or_path=str(folders / "qwen3_moe"), inference_mode=True,
    )  # fmt: skip
    settings.save_pretrained(tmp_path)
    expected = outputs(peft.PeftModel.from_pretrained(theirs(folders / "qwen3_moe"), tmp_path).eval())
    whole, params = jaxrlhf.load(tmp_path, dtype="float32")
    np.testing.assert_allclose(run(params, whole), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "init"),  # PEFT's olora does not fit the layout of GPT-2's matrices
    [("gpt2", "pissa"), ("llama", "pissa"), ("qwen2", "pissa"), ("llama", "olora"), ("qwen2", "olora")],
)
def test_adapters_that_peft_converted_back_to_the_unchanged_base_model(family, init, folders, tmp_path):
    """The remedy that the refusal names."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets(folders / family), r=4, lora_alpha=8, init_lora_weights=init
    )
    model = peft.get_peft_model(theirs(folders / family), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = outputs(model.eval())
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    whole, params = jaxrlhf.load(tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(run(params, whole), expected, **CLOSE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if families.FAMILIES[family].has_classifier])
def test_a_classifier_that_peft_wrote(family, folders, tmp_path):
    model = adapted(folders / family, "linear")
    model.save_pretrained(tmp_path)
    whole, params = jaxrlhf.load(tmp_path, dtype="float32")
    assert whole.head == "linear" and whole.num_labels == 1
    np.testing.assert_allclose(run(params, whole), outputs(model), **CLOSE)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((f, "plain") for f in FAMILIES),
        *((f, o) for f in ("gpt2", "llama") for o in ("rslora", "dora", "layers", "tokens")),
        *((f, "dora") for f in ("gpt_neox", "phi3")),
        ("qwen3_moe", "layers"),
    ],
)
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_folder_that_we_wrote(family, name, head, folders, tmp_path):
    if head == "linear" and not families.FAMILIES[family].has_classifier:
        pytest.skip("transformers has no classifier of this family")
    folder = folders / family
    model, base = jaxrlhf.load(folder, head=head, key=jax.random.key(1), dtype="float32")
    static = Adapters(4, 8.0, rank_stabilised=name == "rslora", layers=(1, 2) if name == "layers" else None)
    static = dataclasses.replace(static, tokens=(60, 5) if name == "tokens" else ())
    model = dataclasses.replace(model, adapters=static)
    added = lora.init(model, base, ours.modules(model, targets(folder)), jax.random.key(2), magnitudes=name == "dora")
    added = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), added)
    whole = {**base, **added}
    weights.export(tmp_path / "out", model, whole, source=folder, base=(str(folder), None))
    loaded = peft.PeftModel.from_pretrained(theirs(folder, head), tmp_path / "out").eval()
    expected = np.asarray(run(whole, model))
    np.testing.assert_allclose(outputs(loaded), expected, **CLOSE)
    assert np.abs(expected - np.asarray(run(base, model))).max() > 1e-3
