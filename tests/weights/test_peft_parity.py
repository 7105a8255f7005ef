"""Adapters in and out against PEFT itself, in float32: equal logits, whoever wrote the folder."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import lora, models, weights
from jaxrlhf.models import Adapters
from jaxrlhf.weights import peft as ours

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
TOKENS = np.array([[5, 9, 33, 4, 17, 60, 2, 8], [3, 3, 21, 50, 11, 7, 40, 12]])
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def family(folder):
    return "gpt2" if "gpt2" in folder.name else "llama"


def theirs(folder, head):
    kind = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    more = {} if head == "lm" else {"num_labels": 1}
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more).eval()


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), attention_mask=torch.ones(TOKENS.shape)).logits.numpy()


def run(params, model):
    hidden = models.forward(params, model, jnp.array(TOKENS, jnp.int32), jnp.ones(TOKENS.shape, bool))
    if model.head == "lm":
        return models.lm_logits(params, model, hidden)
    return models.label_logits(params, model, hidden[:, -1])


FAMILIES = [FOLDER / name for name in ("gpt2", "llama", "mistral-window", "qwen2", "qwen3")]
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 5, "c_attn": 5}, "alpha_pattern": {"v_proj": 3, "c_proj": 3}},
    "layers": {"layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [60, 5]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("folder", FAMILIES[:2], ids=lambda f: f.name)  # one with a tied head, one without
def test_a_folder_that_peft_wrote(folder, name, tmp_path):
    torch.manual_seed(0)
    given = {"target_modules": TARGETS[family(folder)], "r": 4, "lora_alpha": 8, "init_lora_weights": False}
    model = peft.get_peft_model(theirs(folder, "lm"), peft.LoraConfig(task_type="CAUSAL_LM", **given | OPTIONS[name]))
    if name == "dora":
        with torch.no_grad():
            for parameter_name, value in model.named_parameters():
                if "magnitude" in parameter_name:
                    value.mul_(1 + 0.3 * torch.rand_like(value))
    if name == "tokens":
        with torch.no_grad():
            model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].normal_()
    model.save_pretrained(tmp_path)
    expected = outputs(model.eval())
    whole, params = jaxrlhf.load(tmp_path, dtype="float32")
    assert np.abs(expected - outputs(theirs(folder, "lm"))).max() > 1e-2, "the adapters do something"
    np.testing.assert_allclose(run(params, whole), expected, atol=2e-4)
    base = jaxrlhf.load(folder, dtype="float32")[1]  # and beside the base, unmerged
    found, added = ours.read(tmp_path, whole)
    apart = run({**base, **added}, dataclasses.replace(whole, adapters=found))
    np.testing.assert_allclose(apart, expected, atol=2e-4)


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda f: f.name)
def test_a_classifier_that_peft_wrote(folder, tmp_path):
    torch.manual_seed(0)
    base = theirs(folder, "linear")
    base.config.pad_token_id = 0
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[family(folder)], r=4, lora_alpha=8, init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path)
    expected = outputs(model.eval())
    whole, params = jaxrlhf.load(tmp_path, dtype="float32")
    assert whole.head == "linear" and whole.num_labels == 1
    np.testing.assert_allclose(run(params, whole), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *((f, "plain") for f in FAMILIES),
        *((f, o) for f in FAMILIES[:2] for o in ("rslora", "dora", "layers", "tokens")),
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_folder_that_we_wrote(folder, name, head, tmp_path):
    model, base = jaxrlhf.load(folder, head=head, key=jax.random.key(1), dtype="float32")
    static = Adapters(4, 8.0, rank_stabilised=name == "rslora", layers=(1, 2) if name == "layers" else None)
    static = dataclasses.replace(static, tokens=(60, 5) if name == "tokens" else ())
    model = dataclasses.replace(model, adapters=static)
    added = lora.init(
        model, base, ours.modules(model, TARGETS[family(folder)]), jax.random.key(2), magnitudes=name == "dora"
    )
    added = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), added)
    whole = {**base, **added}
    weights.export(tmp_path / "out", model, whole, source=folder, base=(str(folder), None))
    loaded = peft.PeftModel.from_pretrained(theirs(folder, head), tmp_path / "out").eval()
    if head == "linear":
        loaded.config.pad_token_id = 0
    expected = np.asarray(run(whole, model))
    np.testing.assert_allclose(outputs(loaded), expected, atol=2e-4)
    assert np.abs(expected - np.asarray(run(base, model))).max() > 1e-3
