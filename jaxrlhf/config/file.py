"""Load a config from a YAML file and command-line overrides. Imports no jax, transformers or datasets.

Values are read as YAML 1.2: 1e-4 is a number; on, off, yes and no are text. Overrides are merged into the file's
mapping, which is then validated as a whole, so that all problems are reported together with their key and location.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.reader import MOST_PROBLEMS, ConfigReader, read_config
from jaxrlhf.errors import ConfigError

METHODS: dict[str, type] = {
    cls.method: cls for cls in (SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig, DistillConfig)
}


def load_config(
    method: str, path: Path | None, overrides: Sequence[tuple[str, str]] = (), *, partial: bool = False
) -> Any:
    """Load the config of `method` from a YAML file (None: the defaults), with `overrides` (dotted key, text) applied.

    In an override of a text that a model reads, `\\n` is a newline. Problems of a preset name it instead of its path.
    partial: do not check that required keys are set. Raises ConfigError listing all problems.
    """
    preset = next((f"preset {name}" for name, file in presets().items() if file == path), "")
    reader = ConfigReader(METHODS[method], preset or (str(path) if path else "command line"))
    mapping = reader.read_file(path) if path else {}
    for key, text in overrides:
        reader.apply_override(mapping, key, text)
    config = reader.validate(mapping)
    if not partial:
        reader.check_required(config, method, mapping)
    if reader.problems:
        ordered = sorted(reader.problems, key=lambda problem: problem[0].line or math.inf)
        lines = [f"  {location}: {message}" for location, message in ordered[:MOST_PROBLEMS]]
        lines += [f"  and {len(ordered) - MOST_PROBLEMS} more"] if len(ordered) > MOST_PROBLEMS else []
        raise ConfigError("\n".join(["the config cannot be used:", *lines]))
    return config


def presets() -> dict[str, Path]:
    """The presets by name; those of a sub-folder have its name before theirs: recipes/gpt2/ppo."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else checkout
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def method_of(path: Path) -> str:
    """The method that a config file is for: the one named in its first comment (`# jaxrlhf ppo`), or else the only one
    that has all of its sections. Raises ConfigError if neither is conclusive."""
    comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), read_config(path).splitlines()))
    if named := re.search(rf"jaxrlhf ({'|'.join(METHODS)})\b", comment):
        return named[1]
    methods = methods_with_sections(path)
    if len(methods) == 1:
        return methods[0]
    raise ConfigError(
        f"{path} does not say which method it is for: its sections fit {' and '.join(methods) or 'no method'}; "
        f"give --method {'|'.join(METHODS)}"
    )


def methods_with_sections(path: Path) -> list[str]:
    """The methods that have all sections of a config file. Raises ConfigError if the file cannot be read."""
    sections = {line.partition(":")[0] for line in read_config(path).splitlines() if re.match(r"\w+\s*:", line)}
    return [m for m, cls in METHODS.items() if sections <= {field.name for field in dataclasses.fields(cls)}]
