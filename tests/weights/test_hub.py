import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors

from jaxrlhf import lora, models, sharding, weights
from jaxrlhf.config import Data, Mesh
from jaxrlhf.data import sources
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.weights import peft

FOLDERS = Path(__file__).resolve().parents[1] / "fixtures" / "models"


def changed(folder: Path, target: Path, edit, **config) -> Path:
    """A copy of a model folder with its tensors edited in place and its config.json updated."""
    target.mkdir()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return target


def nothing(tensors: dict) -> None:
    pass


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------- finding a model


def test_a_run_directory_means_its_export(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"no export yet .* `jaxrlhf export \S+ DIR`"):
        weights.resolve(run)
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    assert weights.resolve(run) == run / "export"
    assert weights.resolve(run / "export") == run / "export"


def test_local_paths_never_touch_the_network(tmp_path, monkeypatch, audit):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir()
    missing = ["./a", "../a", "/no/such/folder", "~/no-such-folder", "a/b/c", "runs/sft", "a\\b", "a b", "-a", "a/"]
    with audit("socket.connect") as connects:
        for path in missing:
            with pytest.raises(DataError, match=r"no such folder.*hf://") as caught:
                weights.resolve(path)
            assert str(Path(path).expanduser()) in str(caught.value)
        with pytest.raises(DataError, match="is a file"):
            weights.resolve("file")
        with pytest.raises(DataError, match=r"no config\.json and no export/config\.json.*nothing"):
            weights.resolve("bare")
        with pytest.raises(DataError, match="empty"):
            weights.resolve("")
        assert weights.resolve("bare", weights=False) == Path("bare")
        weights.load(FOLDERS / "llama")
    assert not connects


def cache(folder: Path, files: dict[str, str], model: Path) -> Path:
    """A snapshot as in the hub's cache: links into a folder of blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, (name, source) in enumerate(files.items()):
        (blobs / str(i)).write_bytes((model / source).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_a_hub_id_is_a_cached_download_of_the_files_we_read(tmp_path, monkeypatch):
    both = {"config.json": "config.json", "model.safetensors": "model.safetensors"}
    snapshot = cache(tmp_path, both, FOLDERS / "llama")
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _, params = weights.load("org/some.model-1", revision="abc")
    assert equal(params, weights.load(FOLDERS / "llama")[1])
    weights.resolve("gpt2", weights=False)
    (tmp_path / "org").mkdir()
    weights.resolve("hf://org/some.model-1")
    assert [a[:2] for a in asked] == [("org/some.model-1", "abc"), ("gpt2", None), ("org/some.model-1", None)]

    def wanted(patterns):
        from fnmatch import fnmatch

        files = [
            *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"),
            *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling_x.py"),
            *("consolidated.safetensors", "original/model.safetensors", "optimizer.pt", "onnx/model.onnx"),
        ]
        return [f for f in files if any(fnmatch(f, p) for p in patterns)]

    assert len(wanted(asked[0][2])) == 7
    assert wanted(asked[1][2]) == ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]


def bare(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the HTTP response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (bare(errors.GatedRepoError), "consent.*hf auth login"),
        (bare(errors.RepositoryNotFoundError), "no such folder here and no such model"),
        (bare(errors.RevisionNotFoundError), "no revision 'r1'"),
        (errors.LocalEntryNotFoundError("offline"), "at revision 'r1': .* and HF_HUB_OFFLINE keeps the hub from"),
        (ConnectionError("no route\nsecond line"), "no route\\). Check the network"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, says):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=says) as caught:
        weights.resolve("org/model", "r1")
    assert "'org/model'" in str(caught.value)


def test_offline_with_an_empty_cache_is_one_clear_message(tmp_path):
    code = "from jaxrlhf import weights\nweights.load('org/model')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    (said,) = (line for line in done.stderr.splitlines() if "DataError: " in line)
    assert said.endswith(
        f"model 'org/model': there is nothing of that name here, the hub's cache ({tmp_path}/hub) holds no such model, "
        "and HF_HUB_OFFLINE keeps the hub from being asked. Run the command once with a network and without "
        "HF_HUB_OFFLINE, which fills the cache, or give the path of a local copy"
    )


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_data_offline_with_an_empty_cache_are_one_clear_message(tmp_path, monkeypatch, switch):
    def fail(*arguments, **options):
        raise ConnectionError("Couldn't reach 'org/rows' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"data org/rows: no such file .*OfflineModeIsEnabled"):
        sources.read_rows(Data(path="org/rows"))
    monkeypatch.setenv(switch, "1")
    with pytest.raises(DataError, match=f"holds no such data set, and {switch} keeps the hub from") as caught:
        sources.read_rows(Data(path="org/rows"))
    assert "OfflineModeIsEnabled" not in str(caught.value)


def test_a_hub_model_without_safetensors_is_refused(tmp_path, monkeypatch):
    snapshot = cache(tmp_path, {"config.json": "config.json"}, FOLDERS / "llama")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    with pytest.raises(DataError, match="reads safetensors only"):
        weights.load("org/model")


# ---------------------------------------------------------------- reading it


def test_every_leaf_is_the_tensor_it_should_be():
    folder = FOLDERS / "gpt2"
    model, params = weights.load(folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    d = model.hidden_size
    for i in range(model.num_layers):
        attention = {k: params["layers"]["attention"][k]["kernel"][i] for k in "qkvo"}
        whole = stored[f"transformer.h.{i}.attn.c_attn.weight"]
        for j, name in enumerate("qkv"):
            np.testing.assert_array_equal(attention[name], whole[:, j * d : (j + 1) * d])
        np.testing.assert_array_equal(attention["o"], stored[f"transformer.h.{i}.attn.c_proj.weight"])
    np.testing.assert_array_equal(params["embed"]["embedding"], stored["transformer.wte.weight"])
    model, params = weights.load(FOLDERS / "qwen2")
    stored = safetensors.numpy.load_file(FOLDERS / "qwen2" / "model.safetensors")
    for i in range(model.num_layers):
        down = params["layers"]["mlp"]["down"]["kernel"][i]
        np.testing.assert_array_equal(down, stored[f"model.layers.{i}.mlp.down_proj.weight"].T)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_dtype(name, tmp_path):
    stored = {t.dtype for t in jax.tree.leaves(weights.load(FOLDERS / name)[1])}
    assert stored == {jnp.dtype("bfloat16")}  # as in the file
    model, params = weights.load(FOLDERS / name, dtype="float32", compute_dtype="bfloat16", remat="dots")
    assert {t.dtype for t in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert (model.dtype, model.remat) == ("bfloat16", "dots")
    assert weights.load_config(FOLDERS / name, compute_dtype="bfloat16", remat="dots") == model
    assert weights.load_config(FOLDERS / name).dtype == "float32"  # auto, on a CPU
    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=4))
    for kind in (np.float16, np.float64):
        folder = changed(
            FOLDERS / name,
            tmp_path / kind.__name__,
            lambda tensors, kind=kind: tensors.update({k: v.astype(kind) for k, v in tensors.items()}),
        )
        for place in (None, mesh):
            assert {t.dtype for t in jax.tree.leaves(weights.load(folder, mesh=place)[1])} == {jnp.dtype("float32")}
    with pytest.raises(ConfigError, match="dtype"):
        weights.load(FOLDERS / name, dtype="int8")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2-score"])
@pytest.mark.parametrize("shape", [{"data": 8}, {"fsdp": 2, "tensor": 4}])
def test_parameters_go_to_the_mesh_by_the_rule_table(name, shape):
    mesh = sharding.make_mesh(Mesh(**shape))
    _, params = weights.load(FOLDERS / name, mesh=mesh)
    _, alone = weights.load(FOLDERS / name)
    assert equal(params, alone)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(sharding.shardings(params, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    head = {"head": "mlp", "key": jax.random.key(3)} if name != "qwen2-score" else {}
    _, scored = weights.load(FOLDERS / name, mesh=mesh, **head)
    assert equal(scored["score"], weights.load(FOLDERS / name, **head)[1]["score"])


def test_parameters_can_be_donated():
    """They are jax's own memory, not borrowed from the reader, so that an update can happen in place."""
    _, params = weights.load(FOLDERS / "llama")
    places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    after = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)} == places


def test_a_language_model_becomes_a_reward_model_with_a_fresh_head():
    folder, key = FOLDERS / "llama", jax.random.key(5)  # untied: its output head is left behind
    language_model, trunk = weights.load(folder)
    assert "lm_head" in trunk
    for head in ("linear", "mlp"):
        model, params = weights.load(folder, head=head, key=key)
        assert (model.head, model.num_labels) == (head, 1)
        assert model == dataclasses.replace(language_model, head=head)
        assert weights.load_config(folder, head=head) == model
        abstract = jax.eval_shape(lambda k, m=model: models.init(m, k), key)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
        assert equal(
            {k: v for k, v in params.items() if k != "score"}, {k: v for k, v in trunk.items() if k != "lm_head"}
        )
        again, other = (weights.load(folder, head=head, key=k)[1]["score"] for k in (key, jax.random.key(6)))
        assert equal(params["score"], again) and not equal(params["score"], other)
        with pytest.raises(ConfigError, match="key"):
            weights.load(folder, head=head)


def test_a_classifier_is_a_reward_model_and_no_language_model():
    model, params = weights.load(FOLDERS / "qwen2-score")
    assert (model.head, model.num_labels, params["score"]["kernel"].shape) == ("linear", 1, (model.hidden_size, 1))
    assert weights.load(FOLDERS / "qwen2-score", head="linear")[0] == model
    assert weights.load(FOLDERS / "qwen3-label")[0].num_labels == 2
    with pytest.raises(DataError, match=r"Qwen2ForSequenceClassification.*no language-model head"):
        weights.load(FOLDERS / "qwen2-score", head="lm")
    with pytest.raises(DataError, match="trained linear score head"):
        weights.load(FOLDERS / "qwen2-score", head="mlp", key=jax.random.key(0))
    with pytest.raises(ConfigError, match="'lm', 'linear' or 'mlp'"):
        weights.load(FOLDERS / "qwen2-score", head="cubic")


def test_random_models_need_config_json_alone(tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDERS / "llama" / "config.json").read_bytes())
    key = jax.random.key(1)
    model, params = weights.load(tmp_path, init="random", key=key, head="linear")
    assert equal(params, jax.jit(models.init, static_argnums=0)(model, key))
    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=4))
    _, placed = weights.load(tmp_path, init="random", key=key, dtype="bfloat16", mesh=mesh)
    assert placed["embed"]["embedding"].sharding.is_equivalent_to(
        sharding.shardings(placed, mesh)["embed"]["embedding"], 2
    )
    assert placed["norm"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="key"):
        weights.load(tmp_path, init="random")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        weights.load(tmp_path)


def test_every_difference_is_listed(tmp_path):
    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(5, np.float32)
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.1.self_attn.q_proj.weight"][:, 1:]
        )
        tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
        tensors["v_head\x1b.bias"] = np.ones(1, np.float32)
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.int8)

    with pytest.raises(DataError) as caught:
        weights.load(changed(FOLDERS / "llama", tmp_path / "m", damage))
    said = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight" in said
    assert "wrong shape: model.norm.weight is [5]" in said
    assert re.search(r"wrong shape: model.layers.1.self_attn.q_proj.weight is \[\d+, \d+\], config.json makes it", said)
    assert "unexpected: model.layers.7.mlp.up_proj.weight [2, 2]" in said
    assert r"unexpected: 'v_head\x1b.bias'" in said and "\x1b" not in said
    assert "wrong dtype: model.layers.0.mlp.down_proj.weight holds int8" in said
    assert str(tmp_path / "m") in said and said.count("\n") == 6


def test_stored_constants_and_missing_prefixes_are_passed_over(tmp_path):
    def old_style(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 8, 8), np.bool_)
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    _, expected = weights.load(FOLDERS / "gpt2")
    assert equal(weights.load(changed(FOLDERS / "gpt2", tmp_path / "gpt2", old_style))[1], expected)

    def frequencies(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    _, expected = weights.load(FOLDERS / "llama")
    assert equal(weights.load(changed(FOLDERS / "llama", tmp_path / "llama", frequencies))[1], expected)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    def untied(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + np.float32(1)

    folder = changed(FOLDERS / "gpt2", tmp_path / "m", untied)
    with pytest.raises(DataError, match="tie_word_embeddings"):
        weights.load(folder)
    weights.load(folder, head="linear", key=jax.random.key(0))  # has no use for the output head


def test_config_json_with_a_key_twice_is_refused(tmp_path):
    folder = changed(FOLDERS / "llama", tmp_path / "m", nothing)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "vocab_size": 64}')
    with pytest.raises(DataError, match="'vocab_size' occurs more than once"):
        weights.load(folder)


# ---------------------------------------------------------------- shapes without the weights


def adapter_folder(folder: Path, base: Path, head: str) -> Path:
    """Fresh adapters for the model in `base`, with a score head if `head` is linear."""
    model, params = weights.load(base, head=head, key=jax.random.key(0))
    model = dataclasses.replace(model, adapters=models.Adapters(rank=2, alpha=4.0))
    modules = peft.modules(model, ["all-linear"])
    adapters = lora.init(model, params, modules, jax.random.key(1), magnitudes=False)
    folder.mkdir()
    peft.write(folder, model, {**params, **adapters}, str(base))
    return folder


def assert_abstract_load_matches(path: Path, **options) -> None:
    model, params = weights.load(path, **options)
    with weights.abstract_weights():
        abstract_model, shapes = weights.load(path, **options)
    assert abstract_model == model
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        if "mesh" in options:
            assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        else:
            assert shape.sharding is None


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama + linear", "qwen2-score", "llama adapters", "llama scorer"])
def test_abstract_weights_have_the_shapes_dtypes_and_shardings_of_a_load(name, dtype, mesh, tmp_path):
    options: dict = {"dtype": dtype} | ({} if mesh is None else {"mesh": sharding.make_mesh(Mesh(**mesh))})
    path = FOLDERS / name
    if name == "llama + linear":
        path, options = FOLDERS / "llama", options | {"head": "linear", "key": jax.random.key(0)}
    elif name.startswith("llama "):
        head = "lm" if name == "llama adapters" else "linear"
        path = adapter_folder(tmp_path / "adapters", FOLDERS / "llama", head)
    assert_abstract_load_matches(path, **options)


def test_abstract_weights_of_a_known_dtype_need_config_json_alone(tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDERS / "llama" / "config.json").read_bytes())
    assert_abstract_load_matches(tmp_path, init="random", key=jax.random.key(0), dtype="bfloat16")
    with weights.abstract_weights():
        _, shapes = weights.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    with pytest.raises(DataError, match=r"model\.safetensors"):
        weights.load(tmp_path, dtype="bfloat16")  # reads weights again after the block


# ---------------------------------------------------------------- more tokens


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_new_tokens_start_at_the_mean(name):
    model, params = weights.load(FOLDERS / name, dtype="float32")
    larger, grown = weights.resize_embeddings(model, params, model.vocab_size + 3)
    assert larger == dataclasses.replace(model, vocab_size=model.vocab_size + 3)
    table = params["embed"]["embedding"]
    np.testing.assert_array_equal(grown["embed"]["embedding"][: model.vocab_size], table)
    mean = np.asarray(table, np.float64).mean(0)
    np.testing.assert_allclose(grown["embed"]["embedding"][model.vocab_size :], np.tile(mean, (3, 1)), atol=1e-6)
    tokens = jnp.array([[3, 4, 5]])
    hidden = models.forward(params, model, tokens, tokens > 0)
    logits = models.lm_logits(params, model, hidden)
    found = models.lm_logits(grown, larger, models.forward(grown, larger, tokens, tokens > 0))
    np.testing.assert_allclose(found[..., : model.vocab_size], logits, atol=1e-5)
    np.testing.assert_allclose(
        found[..., model.vocab_size :], np.repeat(logits.mean(-1, keepdims=True), 3, -1), atol=1e-5
    )
    assert weights.resize_embeddings(model, params, model.vocab_size) == (model, params)
    with pytest.raises(ConfigError, match="shrink"):
        weights.resize_embeddings(model, params, model.vocab_size - 1)


# ---------------------------------------------------------------- memory

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MEASURE = r"""
import re, sys
import jax, jax.numpy as jnp
from jaxrlhf import weights
jnp.zeros(3).block_until_ready()
def peak():  # and not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = peak()
_, params = weights.load(sys.argv[1], dtype="float32")
leaves = jax.tree.leaves(params)
print(peak() - before, sum(x.nbytes for x in leaves), params["embed"]["embedding"].nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_while_loading_half_a_billion_parameters(tmp_path):
    """Peak host memory stays under the size of the parameters, the largest tensor and 300 MB (here: of jax and XLA)."""
    from jaxrlhf.weights import families, mapping, names, writer

    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    model = families.parse(QWEN, "")
    abstract = jax.eval_shape(lambda k: models.init(model, k), jax.random.key(0))
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(jnp.bfloat16)
    sources = []
    for tensor in names.tensors(model):
        shape = mapping.shape_of(tensor, mapping.leaf_at(abstract, tensor.path))
        sources.append(writer.Source(tensor.name, block.dtype, shape, lambda shape=shape: np.resize(block, shape)))
    try:
        writer.write(tmp_path, sources, max_shard_size=300_000_000)
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        command = [sys.executable, "-c", MEASURE, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    peak, size, largest = map(int, done.stdout.split())
    assert size > 1.9e9
    assert peak < size + largest + 300e6
    assert peak > size  # or it was not measured
