"""Model folder from which the demo's SFT starts: tokenizer and config.json in Hugging Face layout, no weights."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxrlhf.demo import task

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Special tokens with ids 0, 1, 2, 3."""
_PIECE = r" ?[A-Za-z]+|[^A-Za-z]"  # a word with the space before it, or one other character


def write_base(directory: str | Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json and config.json of a tiny Llama into `directory` and return it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    _write(directory / "tokenizer_config.json", {**settings, "model_max_length": _MODEL["max_position_embeddings"]})
    ids = {name.replace("token", "token_id"): SPECIAL.index(token) for name, token in names.items() if token != UNKNOWN}
    _write(directory / "config.json", {**_MODEL, **ids, "vocab_size": tokenizer.get_vocab_size()})
    return directory


def build() -> Tokenizer:
    """Build a word-level tokenizer over the task's closed vocabulary; decoding restores the text exactly.

    A token includes the space before its word, so a word at the start of a question has a different token.
    """
    splitter = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    lines = [*task.questions(), *(f" {sentence}" for sentence in task.sentences())]
    pieces = {piece for line in lines for piece, _ in splitter.pre_tokenize_str(line)}
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "dtype": "float32",
}


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
