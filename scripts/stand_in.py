"""Make a small stand-in for a hub model: the same architecture with a few narrow layers, and a tokenizer of its kind.

    python scripts/stand_in.py qwen2.5-0.5b-instruct FOLDER --text rows.jsonl [--steps 200] [--tokenizer DIR]

The recipes (scripts/recipe_*.sh) run on it where the real model would be too slow or cannot be downloaded. Its
tokenizer is a byte-level BPE with the special tokens and chat template of the family, trained on `--text`; or the one
of `--tokenizer`, a folder or hub id. The weights are random, or trained for `--steps` steps on `--text`.

`--text` is a file in any of the formats that `jaxrlhf sft` reads (docs/formats.md).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxrlhf
from jaxrlhf import SFTConfig, SFTTrainer, runtime
from jaxrlhf import config as c

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, HEADS, LAYERS, CONTEXT, VOCABULARY = 64, 4, 2, 512, 1024
_ROTARY = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "intermediate_size": 3 * WIDTH,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_ROTARY, "rope_theta": 1e6}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_ROTARY, "head_dim": 32, "rope_theta": 1e6}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_ROTARY, "rope_theta": 1e5}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "activation_function": "gelu_new",
}
_TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MODELS: dict[str, tuple[dict[str, Any], list[str], dict[str, str]]] = {
    "gpt2": (_GPT2, ["<|endoftext|>"], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "qwen2.5-0.5b-instruct": (_QWEN2, _TURNS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3-0.6b-base": (_QWEN3, _TURNS, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "smollm2-135m": (_LLAMA, _TURNS, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "smollm2-135m-instruct": (
        _LLAMA,
        _TURNS,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
}
"""Name -> config.json, special tokens in the order of their ids, and the roles of the special tokens."""


def train_tokenizer(text: str, special: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode any text, on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [AddedToken(token, special=True) for token in special]
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def write_description(folder: Path, name: str, tokenizer: str, text: str) -> None:
    """Write config.json and the tokenizer of model `name`, without weights."""
    config, special, roles = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer)
        loaded.save_pretrained(folder)
        vocabulary, ids = len(loaded), {role: loaded.convert_tokens_to_ids(token) for role, token in roles.items()}
    else:
        trained = train_tokenizer(text, special)
        trained.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **roles}
        if "<|im_start|>" in special:
            settings["chat_template"] = CHATML
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        vocabulary, ids = trained.get_vocab_size(), {role: special.index(token) for role, token in roles.items()}
    ids = {role.replace("token", "token_id"): number for role, number in ids.items()}
    values = {**config, **ids, "vocab_size": vocabulary, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="data file for the tokenizer and the training")
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0 leaves the weights random")
    parser.add_argument("--tokenizer", default="", help="folder or hub id of a tokenizer to use instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runtime.configure()
    description = options.folder.with_name(options.folder.name + ".description")
    write_description(description, options.model, options.tokenizer, options.text.read_text(encoding="utf-8"))
    if options.steps:
        config = SFTConfig(
            model=c.ModelSource(path=str(description), init="random"),
            data=c.Data(path=str(options.text), truncation="right"),
            train=c.Train(batch_size=16, max_steps=options.steps, num_train_epochs=1000.0),
            optim=c.Optim(learning_rate=3e-3, warmup_steps=min(20, options.steps), schedule="cosine"),
            logging=c.Logging(quiet=True, sample_every=0, tensorboard=False),
            seed=options.seed,
            run_dir=str(options.folder.with_name(options.folder.name + ".training")),
        )
        trainer = SFTTrainer(config, fresh=True)
        result = trainer.train()
        print(f"{options.folder}: {options.steps} steps on {options.text}, loss {result['loss']:.2f}")
        trainer.save_pretrained(options.folder)
    else:
        model, params = jaxrlhf.load(description, init="random", key=jax.random.key(options.seed))
        jaxrlhf.export(options.folder, model, params, source=description)
        print(f"{options.folder}: random weights")


if __name__ == "__main__":
    main()
