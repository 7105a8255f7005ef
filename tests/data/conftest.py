"""Small tokenizers of the kinds that matter: byte-level with a chat format, and sentencepiece-like."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog. the system, the user and the assistant say hello there"] * 4
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# drops what was thought in earlier turns, as Qwen3 does, so that a rendered beginning is no prefix of the whole
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# marks what the model says, but not the terminator
MARKED = TEMPLATE.replace(
    "+ m.content + '<|im_end|>\n' }}",
    "}}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}",
)
NO_TERMINATOR = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tokenizer(folder: pathlib.Path, backend: Backend, **config: Any) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fin_retuning|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return backend


def sentencepiece_like() -> Backend:
    """BOS first, a space before the first word, bytes for what is unknown: Llama's way."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.,"
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters])
    }
    vocab |= {token: len(vocab) + i for i, token in enumerate(["▁t", "▁th", "▁the", "he"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Byte-level, GPT-2's way: eos is bos, no pad, no chat format."""
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return write_tokenizer(tmp_path_factory.mktemp("base"), byte_level(), **names)


@pytest.fixture(scope="session")
def sp_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write_tokenizer(tmp_path_factory.mktemp("sp"), sentencepiece_like(), **names)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """A byte-level tokenizer folder with the given chat template inside tokenizer_config.json."""

    def folder(template: str) -> pathlib.Path:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        return write_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=template, **names)

    return folder


@pytest.fixture(scope="session")
def base(base_folder: pathlib.Path) -> Tokenizer:
    return load_tokenizer(base_folder, TokenizerSource())


@pytest.fixture(scope="session")
def sp(sp_folder: pathlib.Path) -> Tokenizer:
    return load_tokenizer(sp_folder, TokenizerSource())


@pytest.fixture(scope="session")
def chatty(chat_folder: Callable[[str], pathlib.Path]) -> Tokenizer:
    return load_tokenizer(chat_folder(TEMPLATE), TokenizerSource())
