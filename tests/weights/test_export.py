import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxrlhf import models, sharding, weights
from jaxrlhf.config import Mesh, TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError

FOLDERS = Path(__file__).resolve().parents[1] / "fixtures" / "models"
NAMES = sorted(p.name for p in FOLDERS.iterdir())
exporting = importlib.import_module("jaxrlhf.weights.export")


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, shards and all, as the reference library reads it."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        for name, array in safetensors.numpy.load_file(file).items():
            found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def extremes(folder: Path, target: Path, dtype: str) -> Path:
    """The model of `folder` with random bits in place of its weights: subnormals, -0 and infinities, but no nan."""
    target.mkdir()
    rng, kind = np.random.default_rng(0), np.dtype(jnp.dtype(dtype))
    stored = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        bits = np.frombuffer(rng.bytes(array.size * kind.itemsize), kind).reshape(array.shape).copy()
        with np.errstate(invalid="ignore"):
            bits[~(np.abs(bits.astype(np.float64)) <= np.inf)] = -0.0
        bits.reshape(-1)[:3] = [-0.0, np.inf, jnp.finfo(kind).smallest_subnormal]
        stored[name] = bits
    safetensors.numpy.save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_model_is_exported_bit_for_bit(name, tmp_path):
    folder = FOLDERS / name
    out = weights.export(tmp_path / "out", *weights.load(folder), source=folder)
    assert tensors(out) == tensors(folder)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert {k: after.get(k) for k in before} == before  # every key as it was
    assert weights.load_config(out) == weights.load_config(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-label"])
def test_extreme_numbers_survive(name, dtype, tmp_path):
    folder = extremes(FOLDERS / name, tmp_path / "in", dtype)
    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=4))
    for i, place in enumerate([None, mesh]):
        out = weights.export(
            tmp_path / f"out{i}", *weights.load(folder, mesh=place), source=folder, max_shard_size="4KB"
        )
        assert tensors(out) == tensors(folder)
        assert len(list(out.glob("*.safetensors"))) > 3
        config = json.loads((out / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == dtype


def test_the_dtype_of_an_export_can_be_chosen(tmp_path):
    model, params = weights.load(FOLDERS / "qwen3", dtype="float32")
    params = jax.tree.map(lambda x: x * 1.001, params)
    out = weights.export(tmp_path / "out", model, params, source=FOLDERS / "qwen3", dtype="bfloat16")
    written = weights.load(out)[1]
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(params), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_model_without_a_source_gets_a_whole_config(tmp_path):
    model, params = weights.load(FOLDERS / "llama-llama3")
    out = weights.export(tmp_path / "a" / "b" / "out", model, params)
    assert weights.load_config(out) == model
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]


# ---------------------------------------------------------------- what stands beside the weights


@pytest.fixture
def pretrained(tiny_model, tmp_path) -> Path:
    """A model folder with everything that can stand in one."""
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(0))
    folder = weights.export(tmp_path / "pretrained", model, params, source=tiny_model)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5], "top_p": 0.9, "pad_token_id": 0}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"x_custom": [1]})
    )
    return folder


def test_configs_and_tokenizer_files_are_kept(pretrained, tmp_path):
    out = weights.export(tmp_path / "out", *weights.load(pretrained), source=pretrained)
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*kept, "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"]
    )
    for name in kept:
        assert (out / name).read_bytes() == (pretrained / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 5],
        "top_p": 0.9,
        "pad_token_id": 0,
    }
    assert json.loads((out / "config.json").read_text())["x_custom"] == [1]


def test_added_tokens_are_exported_consistently(pretrained, tmp_path):
    (pretrained / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(pretrained, TokenizerSource(chat_template="chatml"))
    model, params = weights.load(pretrained)
    model, params = weights.resize_embeddings(model, params, tokenizer.size)
    out = weights.export(tmp_path / "out", model, params, source=pretrained, tokenizer=tokenizer)
    config, generation = (json.loads((out / n).read_text()) for n in ("config.json", "generation_config.json"))
    again = load_tokenizer(out, TokenizerSource())
    assert config["vocab_size"] == tokenizer.size == again.size == weights.load(out)[0].vocab_size
    assert again.has_chat and again.stop_ids == tokenizer.stop_ids
    assert set(generation["eos_token_id"]) == set(tokenizer.stop_ids) and generation["top_p"] == 0.9
    assert (config["pad_token_id"], config["eos_token_id"], config["x_custom"]) == (
        tokenizer.pad_id,
        tokenizer.eos_id,
        [1],
    )


def test_a_reward_model_is_a_sequence_classifier(pretrained, tmp_path):
    model, params = weights.load(pretrained, head="linear", key=jax.random.key(2))
    tokenizer = load_tokenizer(pretrained, TokenizerSource())
    for i, beside in enumerate(
        [{"tokenizer": tokenizer}, {}]
    ):  # without a tokenizer generation_config.json knows the pad
        out = weights.export(tmp_path / f"out{i}", model, params, source=pretrained, **beside)
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert (config["id2label"], config["pad_token_id"]) == ({"0": "LABEL_0"}, 0)
        stored = tensors(out)
        assert stored["score.weight"][:2] == ("float32", (1, model.hidden_size)) and "lm_head.weight" not in stored
        assert not (out / "generation_config.json").exists()
        again, read = weights.load(out)
        assert again == model
        np.testing.assert_array_equal(read["score"]["kernel"], params["score"]["kernel"])


def test_a_reward_model_without_a_class_of_transformers_is_read_here(tmp_path):
    model, params = weights.load(FOLDERS / "granite", head="linear", key=jax.random.key(2))
    out = weights.export(tmp_path / "out", model, params, source=FOLDERS / "granite")
    again, read = weights.load(out)
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert "no class for reward models of this family" in (out / "README.md").read_text()


def test_an_mlp_head_round_trips_and_is_named_in_the_card(tmp_path):
    model, params = weights.load(FOLDERS / "gpt2", head="mlp", key=jax.random.key(2))
    out = weights.export(tmp_path / "out", model, params, source=FOLDERS / "gpt2")
    assert {n for n in tensors(out) if n.startswith("score")} == {
        f"score.dense_{i}.{kind}" for i in range(3) for kind in ("weight", "bias")
    }
    again, read = weights.load(out)
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert "MLP, for which transformers has no class" in (out / "README.md").read_text()
    with pytest.raises(DataError, match="trained mlp score head"):
        weights.load(out, head="linear", key=jax.random.key(0))


# ---------------------------------------------------------------- whole or not at all


@pytest.fixture
def small():
    return weights.load(FOLDERS / "llama")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_export_replaces_an_export_and_an_empty_folder(small, tmp_path):
    model, params = small
    target = tmp_path / "out"
    target.mkdir()
    weights.export(target, model, params, max_shard_size="10KB", facts={"method": "sft"})
    assert len(list(target.glob("model-*.safetensors"))) > 1
    weights.export(target, model, params)
    assert sorted(p.name for p in target.iterdir()) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_not_an_export_is_never_replaced(small, tmp_path):
    model, params = small
    ours = weights.export(tmp_path / "ours", model, params)
    (ours / "notes.txt").write_text("mine")
    theirs = tmp_path / "theirs"  # a model of somebody else: the same names, another card
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / "README.md").write_text("---\ntags:\n- llama\n---\njaxrlhf\n- jaxrlhf\n")
    file = tmp_path / "file"
    file.write_text("x")
    for target, says in ((ours, "notes.txt"), (theirs, "not an export of jaxrlhf"), (file, "not an export of jaxrlhf")):
        before = snapshot(target) if target.is_dir() else target.read_bytes()
        with pytest.raises(StorageError, match=says):
            weights.export(target, model, params)
        assert (snapshot(target) if target.is_dir() else target.read_bytes()) == before
    (theirs / "README.md").unlink()
    with pytest.raises(StorageError, match="not an export of jaxrlhf"):
        weights.export(theirs, model, params)


@pytest.mark.parametrize("fails", ["weights", "rename"])
def test_a_failed_export_leaves_what_was_there(small, tmp_path, monkeypatch, fails):
    model, params = small
    target = weights.export(tmp_path / "out", model, params)
    before = snapshot(target)
    rename = Path.rename

    def broken(self, to):
        if self.name.endswith(".partial"):
            raise OSError("disk went away")
        return rename(self, to)

    def write(*args):
        raise OSError("disk full")

    if fails == "weights":
        monkeypatch.setattr(exporting.writer, "write", write)
    else:
        monkeypatch.setattr(Path, "rename", broken)
    for place in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="disk"):
            weights.export(place, model, params, facts={"method": "ppo"})
    assert snapshot(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


KILLED = """
import sys, time
from jaxrlhf import weights
from jaxrlhf.weights import writer
write_file = writer.write_file
def slow(file, sources):
    write_file(file, sources)
    print("written", flush=True)
    time.sleep(60)
writer.write_file = slow
weights.export(sys.argv[2], *weights.load(sys.argv[1]))
"""


def test_a_killed_export_leaves_what_was_there(small, tmp_path):
    target = weights.export(tmp_path / "out", *small)
    before = snapshot(target)
    command = [sys.executable, "-c", KILLED, str(FOLDERS / "llama"), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert snapshot(target) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out"]
    weights.export(target, *small)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_larger_than_the_disk_is_refused_before_writing(small, tmp_path, monkeypatch):
    full = type("usage", (), {"free": 1000})
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match="1,000 free"):
        weights.export(tmp_path / "out", *small)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), (77, 77), ("9", 9)]
)
def test_shard_sizes(size, count):
    assert exporting._bytes(size) == count


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", "5 XB", "5GB5", None])
def test_invalid_shard_sizes_are_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        exporting._bytes(size)


# ---------------------------------------------------------------- against others


def test_a_trained_model_survives(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    model, params = weights.load(folder)
    out = weights.export(tmp_path / "out", model, params, source=folder)
    assert (out / "model.safetensors").read_bytes()[-1_000_000:] == (folder / "model.safetensors").read_bytes()[
        -1_000_000:
    ]
    assert tensors(out) == tensors(folder)
    tokens = jnp.array([[1]])  # greedy from bos, which begins the known story
    decode = load_tokenizer(folder, TokenizerSource()).decode

    @jax.jit
    def step(tokens, length):
        hidden = models.forward(params, model, tokens, jnp.arange(40)[None] < length)
        return tokens.at[0, length].set(jnp.argmax(models.lm_logits(params, model, hidden[0, length - 1])))

    tokens = jnp.zeros((1, 40), jnp.int32).at[0, 0].set(1)
    for length in range(1, 40):
        tokens = step(tokens, length)
    assert decode(tokens[0].tolist()).startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_write(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = weights.load(FOLDERS / name, dtype="float32")
    params = jax.tree.map(lambda x: x * 1.01, params)
    out = weights.export(tmp_path / "out", model, params, source=FOLDERS / name, max_shard_size="9KB")
    kind = "AutoModelForCausalLM" if model.head == "lm" else "AutoModelForSequenceClassification"
    theirs, report = getattr(transformers, kind).from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, (3, 12))
    mask = np.ones_like(tokens, bool)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    hidden = models.forward(params, model, jnp.asarray(tokens), jnp.asarray(mask))
    if model.head == "lm":
        ours = models.lm_logits(params, model, hidden)
    else:
        ours = models.label_logits(params, model, hidden[:, -1])
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["gemma3", "gpt2", "gpt_neox", "llama", "mistral-window", "olmo2", "phi3", "qwen2", "qwen3"]
)
@pytest.mark.parametrize("labels", [1, 2])
def test_transformers_gives_our_scores(name, labels, tmp_path):
    """A reward model made from a language model, on right-padded rows as transformers' pipelines score them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = weights.load(FOLDERS / name, dtype="float32", head="linear", key=jax.random.key(0))
    if labels == 2:
        model = dataclasses.replace(model, num_labels=2)
        params["score"] = {"kernel": jax.random.normal(jax.random.key(1), (model.hidden_size, 2))}
    original = tmp_path / "in"
    original.mkdir()
    config = json.loads((FOLDERS / name / "config.json").read_text()) | {"pad_token_id": 0}
    (original / "config.json").write_text(json.dumps(config))
    out = weights.export(tmp_path / "out", model, params, source=original)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    tokens, lengths = np.random.default_rng(0).integers(3, model.vocab_size, (3, 12)), np.array([12, 5, 9])
    mask = np.arange(12) < lengths[:, None]
    tokens = np.where(mask, tokens, 0)
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits
    expected = logits[:, 0] if labels == 1 else torch.softmax(logits, -1)[:, 1]
    hidden = models.forward(params, model, jnp.asarray(tokens), jnp.asarray(mask))
    ours = models.scalar_head(params, model, hidden[np.arange(3), lengths - 1])
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5, rtol=1e-5)
