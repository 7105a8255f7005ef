"""The sections that say what a completion is worth."""

import dataclasses
import re
from typing import Any, Literal

from pydantic import Field

from jaxrlhf.config.base import Bool, Count, DType, NonNegative, Positive, Real, section


@section
class Component:
    """One part of the reward. Exactly one of model, function, url and human says who judges."""

    name: str = ""
    """As it stands in logs; letters, digits, underscores. Empty: the function's own name, or model, endpoint, human."""
    weight: Real = 1.0
    enabled: Bool = True
    model: str = ""
    """Folder, run directory or hub id of a sequence classification model with one or two labels."""
    function: str = ""
    """`path.py:name` or `package.module:name`: def reward(prompts, completions, **columns) -> list[float | None], or an
    async one. It runs in a process of its own, without accelerators. `passed`: the Python function given to the
    trainer, which runs in the trainer's process."""
    url: str = ""
    """An http or https address that answers {"prompts", "completions", "columns"} with {"scores": [...]}."""
    human: Literal["", "score", "pick"] = ""
    """A person at the terminal gives each completion a number, or picks the best of those of a prompt."""
    template: str = ""
    """What is judged, in terms of {prompt}, {response} and columns, for example "Prompt: {prompt}\\nResponse:
    {response}". Empty: the completion; of a model, prompt and completion as a conversation, or as the policy's tokens
    where it reads the same ones. A model reads the text as it stands, control tokens of the template included."""
    revision: str | None = None
    """Of a model: branch, tag or commit on the hub."""
    dtype: DType = "auto"
    micro_batch_size: Count = 16
    """Of a model: rows per forward."""
    max_length: Count | None = None
    """Of a model: tokens it reads at most, the last ones; None: its context."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for a function."""
    ensemble: tuple[str, ...] = ()
    """Of a model: more models that judge the same text; the component's score is what `combine` makes of all."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """Of an ensemble. min: the least of the scores. mean_minus_std: the mean less spread_coef times the standard
    deviation between the models."""
    spread_coef: NonNegative = 1.0
    """With combine: mean_minus_std."""
    per_token: Bool = False
    """A number for every token of the response instead of one for all. A function gets their texts as `tokens`; a model
    must read the policy's tokens."""
    timeout: Positive = 300.0
    """Seconds that a function or an endpoint has for a batch."""
    on_error: Literal["fail", "skip", "value"] = "fail"
    """What follows when there is no usable answer: the run saves and stops; the completions concerned go without an
    opinion; or they get error_value."""
    error_value: Real | None = None
    """With on_error: value."""

    def __post_init__(self) -> None:
        who = {kind: getattr(self, kind) for kind in ("model", "function", "url", "human") if getattr(self, kind)}
        if len(who) != 1:
            found = " and ".join(f"{kind} '{value}'" for kind, value in who.items()) or "none of them"
            raise ValueError(f"a component has exactly one of model, function, url and human; this one has {found}")
        if not re.fullmatch(r"|[A-Za-z]\w*", self.name, re.ASCII) or self.name.endswith(_ENDINGS):
            raise ValueError(
                f"name is '{self.name}'; use letters, digits and underscores, and no ending that logs give a meaning "
                f"to ({', '.join(_ENDINGS)})"
            )
        if self.function and self.function != "passed" and not all(self.function.rpartition(":")[::2]):
            raise ValueError(f"function is '{self.function}'; write it as path.py:name or package.module:name")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is '{self.url}'; it must begin with http:// or https://")
        fields: dict[str, Any] = self.__pydantic_fields__  # type: ignore[attr-defined]
        for key, kinds in _ONLY_FOR.items():
            default = fields[key].get_default(call_default_factory=True)
            if getattr(self, key) != default and not set(kinds) & set(who):
                kind = next(iter(who))
                raise ValueError(
                    f"{key} ({getattr(self, key)!r}) has no meaning for a component with {kind}, only with "
                    f"{' or '.join(kinds)}; leave it out"
                )
        if (self.on_error == "value") != (self.error_value is not None):
            raise ValueError(
                f"on_error is '{self.on_error}' and error_value is {self.error_value}: on_error: value needs an "
                "error_value, and nothing else has a use for one"
            )
        if (self.combine != "mean" and not self.ensemble) or (
            self.spread_coef != 1.0 and self.combine != "mean_minus_std"
        ):
            raise ValueError(
                f"combine is {self.combine} and spread_coef {self.spread_coef:g}: combine has a meaning with ensemble "
                "alone, and spread_coef with combine: mean_minus_std; leave out the one that has none"
            )
        if len({self.model, *self.ensemble}) <= len(self.ensemble):
            raise ValueError("ensemble names a model twice, which would count twice; name each once")
        if self.per_token and self.template:
            raise ValueError(
                "per_token and template do not go together: the tokens judged are those of the response as it is; "
                "leave one of them out"
            )

    @property
    def label(self) -> str:
        """The name in logs: `name`, or what the component is."""
        named = function_label(self.function.removeprefix("passed"))
        kinds = {"model": self.model, named: self.function, "endpoint": self.url, "human": self.human}
        return self.name or next(name for name, value in kinds.items() if value)

    def members(self) -> tuple["Component", ...]:
        """The models of an ensemble as components NAME_1, NAME_2, ...; of anything else itself."""
        if not self.ensemble:
            return (self,)
        alone: dict[str, Any] = {"ensemble": (), "combine": "mean", "spread_coef": 1.0}
        return tuple(
            dataclasses.replace(self, name=f"{self.label}_{k}", model=path, **alone)
            for k, path in enumerate((self.model, *self.ensemble), 1)
        )


def function_label(spec: str) -> str:
    """What a function is called in logs: its name without path and module, where that is one for a metric's key."""
    last = spec.rpartition(":")[2]
    return last if last.isidentifier() and last.isascii() and last != "model" else "function"


_ENDINGS = ("_truncated", "_unanswered", "_spread")
_ONLY_FOR = {
    "revision": ("model",),
    "dtype": ("model",),
    "micro_batch_size": ("model",),
    "max_length": ("model",),
    "ensemble": ("model",),
    "options": ("function",),
    "timeout": ("function", "url"),
    "per_token": ("model", "function", "url"),
    "on_error": ("model", "function", "url"),
}
"""Keys of a component that only some kinds of it have a use for. (A person who does not answer has no opinion.)"""


@section
class RewardSource:
    """What a completion is worth: the weighted sum of a reward model, a Python function, and any other components."""

    model: str = ""
    """Folder, run directory or hub id of a sequence classification model with one or two labels."""
    revision: str | None = None
    model_weight: Real = 1.0
    model_dtype: DType = "auto"
    function: str = ""
    """`path.py:name` or `package.module:name`: def reward(prompts, completions, **columns) -> list[float | None]."""
    function_weight: Real = 1.0
    micro_batch_size: Count = 16
    """Rows per forward of the reward model."""
    components: tuple[Component, ...] = ()
    """More parts, a list. Their keys:"""

    def __post_init__(self) -> None:
        labels = [name for part in self.parts() for name in {part.label, *(member.label for member in part.members())}]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"{labels.count(label)} components of the reward are called '{label}'; name each one")

    def parts(self, passed: bool = False) -> tuple[Component, ...]:
        """Everything that is enabled, as components, the short form first. `passed`: there is a Python function, which
        stands in for `function` unless a component asks for it."""
        short = []
        if self.model:
            short.append(
                Component(
                    model=self.model,
                    revision=self.revision,
                    weight=self.model_weight,
                    dtype=self.model_dtype,
                    micro_batch_size=self.micro_batch_size,
                )
            )
        asked = any(component.function == "passed" for component in self.components if component.enabled)
        if self.function or (passed and not asked):
            short.append(Component(function=self.function or "passed", weight=self.function_weight))
        return (*short, *(component for component in self.components if component.enabled))
