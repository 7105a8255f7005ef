"""Shared by all tests. What jax reads once is set here, before anything imports it."""

import collections
import ctypes
import gc
import json
import os
import pathlib
import shutil

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # for other workers

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` is about the GPU of this machine, if it has one; all other tests run on its CPU."""
    if config.getoption("markexpr") == "gpu" and pathlib.Path("/proc/driver/nvidia/version").exists():
        del os.environ["JAX_PLATFORMS"]
        jax.config.update("jax_platforms", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of minutes come first, then those with many tests: at the end one worker would be left with
    them."""
    sizes = collections.Counter(item.path for item in items)
    minutes = ("tests/ux/", "tests/recipes/", "tests/distributed/")
    items.sort(key=lambda item: (not item.nodeid.startswith(minutes), -sizes[item.path], item.path))


def pytest_collection_finish() -> None:
    """Tracing makes many small objects that live on. Looking through all of them for garbage was a fifteenth of the
    tests' time: what was imported is left out, and the rest is looked through less often."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data and a real trained model, where the machine has them: JAXRLHF_TEST_DATA, or shared/data beside us."""
    folder = pathlib.Path(os.environ.get("JAXRLHF_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (JAXRLHF_TEST_DATA says where)")
    return folder


@pytest.fixture
def serve():
    """Start servers whose answers are given."""
    from support.server import serving

    with serving() as start:
        yield start


ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.?!:0123456789\n"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with config.json and a tokenizer of single characters, for `init: random`; no weights.

    ids: <pad> 0, <s> 1, </s> 2, then the characters of ALPHABET.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-model")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | kind))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": len(vocab),
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def recurrent_model(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`tiny_model` as a Qwen 3.5: a layer with a delta net, whose cache is a recurrent state, then attention."""
    folder = tmp_path_factory.mktemp("recurrent-model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "head_dim": 8}
    config |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
    config |= {"linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Programs are let go before they fill the process's table of memory maps (65,530 on Linux), where XLA would crash,
    or the memory that the workers share."""
    yield
    process = pathlib.Path("/proc/self")
    if not (process / "maps").exists():
        return
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > 2.5e9 or len((process / "maps").read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed
            libc.malloc_trim(0)
