"""Convert StrictBot's rm.pt to a jaxrlhf reward model: its MLP head on a base model.

    python scripts/convert_rm_pt.py RM.pt BASE TARGET   (needs torch: the `parity` extra)

RM.pt is a torch state dict with the layers of the head as `head.net.N.weight` and `.bias`, or `reward_head.net.N`:
in -> 512 -> 256 -> 1 with ReLU between them, on the last real token. BASE is the frozen model that the head was trained
on, a folder or a hub id; only the head is taken from RM.pt. TARGET is a new folder for `reward.model`. Missing and
unexpected names are listed; a file with anything but tensors is refused without unpickling it.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import DataError, JaxrlhfError
from jaxrlhf.models.heads import MLP_SIZES
from jaxrlhf.types import Params

_LAYER = re.compile(r"(?:reward_)?head\.net\.(\d+)\.(weight|bias)")


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a torch file. Raises DataError if it holds anything else."""
    import torch  # pyright: ignore[reportMissingImports]

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
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
        raise DataError(
            f"the head has {len(numbers)} layers, {', '.join(sorted(found)) or 'none'}; expected "
            f"{len(sizes) - 1} as head.net.N.weight and head.net.N.bias ({' -> '.join(map(str, sizes))})"
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
    """Write the reward model to `target`; return (that folder, names of `file` that were not used)."""
    score, unexpected = head(read(file), weights.load_config(base).hidden_size)
    model, params = weights.load(base, head="mlp", key=jax.random.key(0))
    tokenizer = load_tokenizer(weights.tokenizer_folder(base), TokenizerSource())
    folder = weights.resolve(base)
    facts = {"method": "reward", "base_model": base}
    return weights.export(
        target, model, {**params, "score": score}, source=folder, tokenizer=tokenizer, facts=facts
    ), unexpected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="RM.pt", type=Path)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("target", metavar="TARGET", type=Path)
    options = parser.parse_args()
    try:
        folder, unexpected = convert(options.file, options.base, options.target)
    except JaxrlhfError as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return error.exit_code
    if unexpected:
        print(f"unexpected names, not used: {', '.join(unexpected)}")
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
