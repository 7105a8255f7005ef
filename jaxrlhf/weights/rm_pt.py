"""Conversion of StrictBot's rm.pt to a reward model: its MLP head on a base model.

The file is a torch state dict with the layers of the head as `head.net.N.weight` and `.bias`, or `reward_head.net.N`:
in -> 512 -> 256 -> 1 with ReLU between them, on the last token of prompt and completion, as plain text without an end
token.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.files import read_json
from jaxrlhf.models.heads import MLP_SIZES
from jaxrlhf.types import Params
from jaxrlhf.weights.export import export
from jaxrlhf.weights.families import ADD_EOS
from jaxrlhf.weights.hub import CONFIG, base_and_adapters, resolve, tokenizer_folder
from jaxrlhf.weights.loading import load, load_config

_LAYER = re.compile(r"(?:reward_)?head\.net\.(\d+)\.(weight|bias)")


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a torch file. Raises DataError if it holds anything else, which is not unpickled, ConfigError
    if torch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "convert-rm reads a file of torch, which is not installed: run `pip install torch`, or convert the file on "
            "a computer that has it"
        ) from error
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # bytes that are no pickle can raise anything
        raise DataError(f"{path} is damaged or holds more than tensors, so it is refused") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path} is not a state dict: a mapping of names to tensors was expected")
    return {name: value.float().numpy() for name, value in state.items()}


def head(state: dict[str, np.ndarray], hidden: int) -> tuple[Params, list[str]]:
    """Return (MLP head for `hidden` inputs, names that are not part of it). Raises DataError listing tensors that are
    missing or have another shape."""
    found = {name: match for name in state if (match := _LAYER.fullmatch(name))}
    numbers = sorted({int(match[1]) for match in found.values()})  # the numbers between are ReLU and dropout
    sizes = (hidden, *MLP_SIZES, 1)
    if len(numbers) != len(sizes) - 1:
        names = sorted(found) or [*state]
        raise DataError(
            f"the file has {len(numbers)} layers of a head, and {len(sizes) - 1} are expected: head.net.N.weight and "
            f"head.net.N.bias ({' -> '.join(map(str, sizes))}); its names: {', '.join(names[:6]) or 'none'}"
            + ", ..."
            * (len(names) > 6)
        )
    by_layer = {(int(match[1]), match[2]): state[name] for name, match in found.items()}
    missing = [f"head.net.{n}.{kind}" for n in numbers for kind in ("weight", "bias") if (n, kind) not in by_layer]
    if missing:
        raise DataError(f"missing: {', '.join(missing)}")
    score: Params = {}
    for i, number in enumerate(numbers):
        weight, bias = by_layer[number, "weight"], by_layer[number, "bias"]
        if weight.shape != (sizes[i + 1], sizes[i]) or bias.shape != (sizes[i + 1],):
            raise DataError(
                f"head.net.{number} has a weight {list(weight.shape)} and a bias {list(bias.shape)}; expected "
                f"{[sizes[i + 1], sizes[i]]} and {[sizes[i + 1]]} on a base model with hidden size {hidden}"
            )
        score[f"dense_{i}"] = {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
    return score, [name for name in state if name not in found]


def convert(file: Path, base: str, target: Path) -> tuple[Path, list[str]]:
    """Write the reward model to `target`; return (that folder, names of `file` that were not used).

    `base` is the frozen model that the head was trained on; only the head is taken from `file`. The reward model reads
    plain text without an end token, as the head did in training. Raises DataError if `file` or `base` cannot be used.
    """
    score, unused = head(read(file), load_config(base).hidden_size)
    model, params = load(base, head="mlp", key=jax.random.key(0))
    tokenizer = load_tokenizer(tokenizer_folder(base), TokenizerSource(chat_template="none"))
    source, _ = base_and_adapters(resolve(base))
    facts = {"method": "reward", "base_model": base}
    folder = export(target, model, {**params, "score": score}, source=source, tokenizer=tokenizer, facts=facts)
    config = read_json(folder / CONFIG) | {ADD_EOS: False}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder, unused
