"""What TRL's trainers computed (scripts/make_trl_fixtures.py): for PPO, one update of fixed responses per case."""

import functools
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import safe_open

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


class Case:
    """The arrays of a file by name, and what was set."""

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / "trl" / f"{name}.safetensors", framework="numpy") as file:
            self.arrays: dict[str, np.ndarray] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.about: dict[str, Any] = json.loads(file.metadata()["about"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def settings(self) -> dict[str, Any]:
        """What goes by the same name here as in TRL."""
        return {key: value for key, value in self.about["settings"].items() if key != "temperature"}

    @property
    def temperature(self) -> float:
        return self.about["settings"]["temperature"]

    @property
    def width(self) -> int:
        """R: columns of a response."""
        return self["logprobs"].shape[1]

    @property
    def mask(self) -> np.ndarray:
        """bool [B, R]: the tokens of the responses."""
        return np.arange(self.width) < self["response_lengths"][:, None]

    @property
    def longer_mask(self) -> np.ndarray:
        """bool [B, R]: TRL's episodes, which have one column more where there is room: the first padding."""
        return np.arange(self.width) <= self["response_lengths"][:, None]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose name begins with the prefix, by the rest of their name."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


load = functools.cache(Case)
