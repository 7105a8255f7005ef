"""File names, tensor names and adapter_config.json of PEFT's layout."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.files import read_json
from jaxrlhf.lora import Module
from jaxrlhf.models import ModelConfig, init
from jaxrlhf.weights import safetensors
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.mapping import leaf_at
from jaxrlhf.weights.peft import experts, keys

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ALL = "all-linear"
PREFIX = "base_model.model."
SCORES = (f"{PREFIX}score.weight", f"{PREFIX}score.modules_to_save.weight")


def modules(model: ModelConfig, targets: Sequence[str]) -> list[Module]:
    """The matrices of a layer that `targets` name, as in PEFT ("q_proj", "self_attn.q_proj"), or `all-linear`.

    Those of the experts of a mixture have the names of their parameters in transformers ("mlp.experts.gate_up_proj",
    "down_proj") or of the linear layers in older versions ("gate_proj"). The router takes no adapters. Raises
    ConfigError listing the known names if a target matches no matrix.
    """
    matrices = experts.projections(model)
    router = matrices.pop(experts.ROUTER, None)
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
    result: dict[Module, None] = {}
    for target in targets:
        matches = [paths for name, paths in matrices.items() if target == ALL or f".{name}".endswith(f".{target}")]
        if not matches and router and f".{experts.ROUTER}".endswith(f".{target.removesuffix('.weight')}"):
            raise ConfigError(
                f"lora.target_modules: '{target}' is the router of a {model.family}, which is frozen under adapters; "
                f"name others of {', '.join(known)}, or train the whole model, without lora.enabled"
            )
        if not matches:
            raise ConfigError(
                f"lora.target_modules: a {model.family} has no '{target}'{did_you_mean(target, known)}; it has "
                f"{', '.join(known)}, or {ALL} for all of them"
            )
        result |= dict.fromkeys(path for paths in matches for path in paths)
    return list(result)


def is_adapter(folder: Path) -> bool:
    """Return True if a folder holds adapters and no weights of a whole model. Raises DataError if it holds both."""
    if not (folder / CONFIG).is_file():
        return False
    if not (folder / "config.json").is_file():
        return True
    if not any((folder / name).is_file() for name in (WEIGHTS, PICKLE)):
        return False
    if any((folder / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        raise DataError(
            f"{folder} holds adapters ({CONFIG}) and the weights of a whole model, so it is unclear which model is "
            f"meant; move {CONFIG} and the adapters to a folder of their own, or delete them"
        )
    return True


def base_of(folder: Path) -> tuple[str, str | None]:
    """(path or hub id, revision) of the base model. Raises DataError if adapter_config.json does not name it, and for
    adapters that cannot be read (see keys.py)."""
    fields = read_fields(folder)
    base, revision = (fields.values.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        fields.refuse("base_model_name_or_path", "the base model of these adapters; write its path there")
    return base, revision if isinstance(revision, str) and revision else None


def num_labels(folder: Path) -> int:
    """Number of outputs of the score head stored with the adapters; 0 if there is none. Raises DataError for more than
    two."""
    labels = next((entry.shape[0] for name, entry in scan(folder).items() if name in SCORES), 0)
    if labels > 2:
        raise DataError(
            f"{folder}: the score head has {labels} outputs; a reward model has one (the output is the score) or two "
            "(the score is the probability of label 1)"
        )
    return labels


def read_fields(folder: Path) -> Fields:
    """adapter_config.json. Raises DataError for adapters that cannot be read (see keys.py)."""
    fields = Fields(read_json(folder / CONFIG), str(folder / CONFIG))
    keys.check(fields)
    return fields


def scan(folder: Path) -> dict[str, safetensors.Entry]:
    """The tensors of the adapters by name. Raises DataError if the file is missing or not valid."""
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise DataError(
            f"{folder}: no {WEIGHTS}, only {PICKLE}, which jaxrlhf never opens: reading such files can run "
            "code. Load the adapters with PEFT where that is safe; save_pretrained writes safetensors"
        )
    return safetensors.scan(folder / WEIGHTS)


def widths(model: ModelConfig, paths: Sequence[Module]) -> tuple[int, list[int]]:
    """(inputs, outputs of each) of the matrices at `paths`, which share their inputs."""
    layers = jax.eval_shape(lambda: init(model, jax.random.key(0)))["layers"]
    shapes = [leaf_at(layers, path)["kernel"].shape for path in paths]
    return shapes[0][-2], [shape[-1] for shape in shapes]
