"""Text models inside multimodal folders: read, exported alone, and adapted."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf import cli, lora, models, weights
from jaxrlhf.errors import DataError
from jaxrlhf.models import Adapters
from jaxrlhf.weights import families, peft

TEXT = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models" / "gemma3"
TOWERS = ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "multi_modal_projector.weight")
LAYOUTS = {  # names of transformers 4, of the classes of transformers 5, and of a model without a head
    "older": ("language_model.model.", ""),
    "newer": ("model.language_model.", "model."),
    "headless": ("language_model.", ""),
}


def wrapped(folder, layout="older", more=(), **changes):
    """The model of TEXT inside a Gemma 3 with two tensors of its vision tower."""
    folder.mkdir()
    prefix, outer = LAYOUTS[layout]
    text = json.loads((TEXT / "config.json").read_text())
    dtype, classes = text.pop("torch_dtype"), text.pop("architectures")
    assert classes == ["Gemma3ForCausalLM"]
    kind = "Gemma3Model" if layout == "headless" else "Gemma3ForConditionalGeneration"
    config = {"architectures": [kind], "model_type": "gemma3", "torch_dtype": dtype, "text_config": text}
    config |= {"vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 256}
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = {
        name.replace("model.", prefix, 1): array for name, array in load_file(TEXT / "model.safetensors").items()
    }
    tensors |= {name if name in more else outer + name: np.ones(8, np.float32) for name in (*TOWERS, *more)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_model_is_read_and_exported_alone(layout, tmp_path):
    folder = wrapped(tmp_path / "in", layout)
    with pytest.warns(
        UserWarning, match=r"2 tensors \(0.0 MB\) are left out: multi_modal_projector \(1\), vision"
    ) as warned:
        model, params = weights.load(folder)
    printed = cli.warning_line(*(getattr(warned[0], key) for key in ("message", "category", "filename", "lineno")))
    assert printed == f"jaxrlhf: {warned[0].message}\n"
    plain, expected = weights.load(TEXT)
    assert model == plain
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    out = weights.export(tmp_path / "out", model, params, source=folder)
    written, stored = load_file(out / "model.safetensors"), load_file(TEXT / "model.safetensors")
    assert {n: a.tobytes() for n, a in written.items()} == {n: a.tobytes() for n, a in stored.items()}
    assert json.loads((out / "config.json").read_text()) == json.loads((TEXT / "config.json").read_text())


def test_keys_of_the_frame_that_count():
    text = {"model_type": "mistral", **json.loads((TEXT.parent / "mistral-full" / "config.json").read_text())}
    del text["architectures"], text["tie_word_embeddings"]
    frame = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    assert not families.parse(frame, "x").tie_embeddings
    assert families.parse(frame | {"tie_word_embeddings": True}, "x").tie_embeddings
    assert families.parse(frame | {"tie_word_embeddings": None}, "x") == families.parse(frame, "x")
    written = families.render(families.parse(frame, "x"), frame | {"eos_token_id": 7, "vision_config": {}})
    assert written["model_type"] == "mistral" and written["architectures"] == ["MistralForCausalLM"]
    assert written["eos_token_id"] == text["eos_token_id"] and "vision_config" not in written


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "paligemma"}, "'paligemma' holds a text model that is not known.*gemma3, mistral3"),
        ({"text_config": {"model_type": "cohere2"}}, "text model of this gemma3 is a 'cohere2'.*gemma3_text"),
        ({"text_config": None}, "needs a text_config"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_other_frames_are_refused(changes, says, tmp_path):
    with pytest.raises(DataError, match=says):
        weights.load(wrapped(tmp_path / "in", **changes))


@pytest.mark.parametrize("whole", [True, False])
def test_parts_of_qwen_are_left_out(whole, tmp_path):
    """Of the multimodal model and of its text model alone; the keys that announce them are not written."""
    plain = TEXT.parent / "qwen3_5"
    said, tensors = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors")
    config = said | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    if whole:
        del config["architectures"]
        config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": config}
        tensors = {name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()}
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    others = {name: np.ones(8, np.float32) for name in ("model.visual.merger.weight", "mtp.fc.weight")}
    save_file(tensors | others, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"2 tensors \(0.0 MB\) are left out: (visual|mtp) \(1\), (visual|mtp) \(1\)"):
        model, params = weights.load(folder)
    expected = weights.load(plain)
    assert model == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    out = weights.export(tmp_path / "out", model, params, source=folder)
    assert json.loads((out / "config.json").read_text()) == said
    written, stored = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert {n: a.tobytes() for n, a in written.items()} == {n: a.tobytes() for n, a in stored.items()}


@pytest.mark.filterwarnings("ignore:.*left out")
def test_only_known_parts_are_left_out(tmp_path):
    others = ["audio_tower.weight", "model.visual.merger.weight", "mtp.fc.weight"]  # two of them are parts of Qwen 3.5
    with pytest.raises(DataError, match="".join(rf"\n  unexpected: {name} \[8\]" for name in others)):
        weights.load(wrapped(tmp_path / "in", more=others))
    alone = shutil.copytree(TEXT, tmp_path / "alone")
    save_file(load_file(TEXT / "model.safetensors") | {TOWERS[0]: np.ones(8)}, alone / "model.safetensors")
    with pytest.raises(DataError, match=f"unexpected: {TOWERS[0]} "):
        weights.load(alone)
    folder = wrapped(tmp_path / "twice")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"norm.weight and .*norm.weight are the same tensor"):
        weights.load(folder)


def adapted(folder, layers=None):
    """The model of a folder with adapters for every matrix of these layers that do something."""
    model, base = weights.load(folder, dtype="float32")
    model = dataclasses.replace(model, adapters=Adapters(2, 4.0, layers=layers, tokens=(5,)))
    added = lora.init(model, base, peft.modules(model, ["all-linear"]), jax.random.key(0), magnitudes=False)
    return model, {**base, **jax.tree.map(lambda x: x + 0.1, added)}


@pytest.mark.filterwarnings("ignore:.*left out")
def test_adapters_have_the_names_of_the_whole_model(tmp_path):
    folder = wrapped(tmp_path / "in")
    model, params = adapted(folder)
    out = weights.export(tmp_path / "out", model, params, source=folder, base=(str(folder), None))
    names = load_file(out / peft.WEIGHTS)
    assert all(name.startswith("base_model.model.model.language_model.") for name in names)
    assert json.loads((out / peft.CONFIG).read_text())["target_modules"].startswith(
        r".*\.language_model\.layers\.(0|1|2)\.("
    )
    static, read = peft.read(out, model)
    assert (static.rank, static.tokens) == (2, (5,))
    jax.tree.map(np.testing.assert_array_equal, read["lora"], params["lora"])
    merged = lora.merge(params, model)
    jax.tree.map(np.testing.assert_array_equal, weights.load(out, dtype="float32")[1], merged)


TINY = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 5,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 24}
QWEN_TEXT = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 6, "linear_value_head_dim": 5, "rms_norm_eps": 1e-2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MODELS = {  # the text model: its frame, its vision tower, options of the frame and of the text model
    "gemma3_text": ("gemma3", "siglip_vision_model", VISION, {"mm_tokens_per_image": 4}, {}),
    "mistral": ("mistral3", "pixtral", VISION, {"tie_word_embeddings": False}, {}),
    "ministral3": ("mistral3", "pixtral", VISION, {"tie_word_embeddings": False}, {"rope_parameters": YARN}),
    "llama": ("llava", "clip_vision_model", VISION, {"tie_word_embeddings": False}, {}),
    "qwen2": ("internvl", "internvl_vision", VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, {}, {}),
    "qwen3_5_text": ("qwen3_5", "qwen3_5_vision", QWEN_VISION, {}, QWEN_TEXT),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", MODELS)
def test_a_model_that_transformers_wrote(text, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf_peft = pytest.importorskip("peft")
    frame, vision, sizes, options, more = MODELS[text]
    sub = {"text_config": {"model_type": text, **TINY, **more}, "vision_config": {"model_type": vision, **sizes}}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(frame, **sub, **options)
    theirs = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "in")
    tokens = np.array([[5, 9, 33, 4, 17, 60, 12, 8], [3, 3, 21, 50, 11, 7, 40, 13]])

    def logits(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens), attention_mask=torch.ones(tokens.shape)).logits.numpy()

    @jax.jit
    def ours(params):
        hidden = models.forward(params, model, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool))
        return models.lm_logits(params, model, hidden)

    model, params = weights.load(tmp_path / "in", dtype="float32")
    np.testing.assert_allclose(ours(params), logits(theirs), atol=1e-5, rtol=0)
    out = weights.export(tmp_path / "out", model, params, source=tmp_path / "in")
    alone = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    np.testing.assert_allclose(logits(alone), logits(theirs), atol=1e-5, rtol=0)
    assert type(alone).__name__ == families.FAMILIES[text].language_model

    model, params = adapted(tmp_path / "in", layers=(1, 2))
    base = (str(tmp_path / "in"), None)
    written = weights.export(tmp_path / "adapters", model, params, source=tmp_path / "in", base=base)
    loaded = hf_peft.PeftModel.from_pretrained(theirs, written).eval()
    expected = ours(params)
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-5, rtol=0)
    assert np.abs(expected - ours({k: v for k, v in params.items() if k != "lora"})).max() > 1e-3
