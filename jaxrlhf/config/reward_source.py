"""Sections for the reward of on-policy methods: a weighted sum of components."""

import dataclasses
import re
from typing import Any, Literal

from pydantic import Field

from jaxrlhf.config.base import (
    Address,
    AutoBool,
    Bool,
    Count,
    DType,
    FilePath,
    NonNegative,
    Positive,
    Real,
    Text,
    check_used,
    section,
)
from jaxrlhf.config.judge import Judge, check_headers
from jaxrlhf.secrets import redact_value

_RESERVED_SUFFIXES = ("_truncated", "_unanswered", "_spread")  # of metric keys that are logged per component
_KINDS_USING = {
    "revision": ("model",),
    "dtype": ("model",),
    "micro_batch_size": ("model",),
    "max_length": ("model",),
    "add_eos": ("model",),
    "ensemble": ("model",),
    "options": ("function",),
    "headers": ("url",),
    "timeout": ("function", "url", "judge"),
    "per_token": ("model", "function", "url"),
    "on_error": ("model", "function", "url", "judge"),
}
"""Options that only some kinds of component use."""


@section
class Component:
    """One term of the reward. Set exactly one of model, function, url, judge and human."""

    name: str = ""
    """Name in the logs: letters, digits, underscores. Empty: the function's name, or model, endpoint,
    judge or human."""
    weight: Real = 1.0
    """Factor of the component's score in the sum."""
    enabled: Bool = True
    """Use the component."""
    model: FilePath = ""
    """Reward model: folder, run directory or hub id of a sequence classification model with one or two labels."""
    function: FilePath = ""
    """Reward function, `path.py:name` or `package.module:name`: def reward(prompts, completions, **columns) ->
    list[float | None], or an async function. It runs in a separate process without accelerators. `passed`: the Python
    function given to the trainer, run in the trainer's process."""
    url: Address = ""
    """HTTP endpoint that receives {"prompts", "completions", "columns"} and returns {"scores": [...]}. A user name and
    password (https://NAME:PASSWORD@HOST/...) are sent as basic authentication. Secrets in it are written nowhere; as
    `${NAME}`, an environment variable, they are found again when the run is resumed."""
    headers: dict[str, str] = Field(default_factory=dict)
    """url: headers of the requests, e.g. {Authorization: "Bearer ${SCORE_KEY}"}. `${NAME}` is an environment variable,
    read when the run starts; values are written nowhere, but for such references."""
    judge: Judge = Field(default_factory=Judge)
    """Set `url` in it to use it."""
    human: Literal["", "score", "pick"] = ""
    """Human feedback in the terminal. score: enter a number for each completion. pick: choose the best completion of
    each prompt."""
    template: Text = ""
    """Text to score, with fields {prompt}, {response} and columns, e.g. "Prompt: {prompt}\\nResponse: {response}".
    Empty: the completion; a model receives prompt and completion as a conversation, or as the policy's tokens if it
    shares the tokenizer, a judge both between marks. Models read the text without adding a chat template; control
    tokens in the template are parsed."""
    revision: str | None = None
    """model: branch, tag or commit on the hub."""
    dtype: DType = "auto"
    """model: dtype in which parameters are stored."""
    micro_batch_size: Count = 16
    """model: rows per forward pass."""
    max_length: Count | None = None
    """model: maximum number of tokens; only the last ones are read. None: the model's context length."""
    add_eos: AutoBool = "auto"
    """model: end token after the completion. true: always. false: never. auto: after a completion that ended by
    itself, as in training; never for a model of `jaxrlhf convert-rm`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """function: additional keyword arguments. `${NAME}` in a text is an environment variable, read when the run
    starts; only the reference is written down."""
    ensemble: tuple[FilePath, ...] = ()
    """model: additional reward models that score the same text; their scores are combined by `combine`."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """ensemble: how scores are combined. mean_minus_std: mean - spread_coef * standard deviation over the models."""
    spread_coef: NonNegative = 1.0
    """Coefficient of the standard deviation for combine: mean_minus_std."""
    per_token: Bool = False
    """Return one number per response token instead of one per completion. A function receives the tokens' texts as
    `tokens`; a model must share the policy's tokenizer."""
    timeout: Positive = 300.0
    """function, url and judge: seconds allowed per batch (judge: and criterion)."""
    on_error: Literal["fail", "skip", "value"] = "fail"
    """If a component returns no usable score. fail: save and stop the run. skip: leave the completion unscored by this
    component. value: use error_value."""
    error_value: Real | None = None
    """Score for on_error: value."""

    def __post_init__(self) -> None:
        sources = {name: getattr(self, name) for name in ("model", "function", "url", "human")}
        kinds = {kind: value for kind, value in (sources | {"judge": self.judge.url}).items() if value}
        if len(kinds) != 1:
            named = [f"{kind} '{redact_value(value)}'" for kind, value in kinds.items()]
            given = " and ".join(named) or "none of them"
            unused = "; judge has options but no url" if not self.judge.url and self.judge != Judge() else ""
            raise ValueError(
                f"a component has exactly one of model, function, url, judge and human; this one has {given}{unused}"
            )
        (kind,) = kinds
        if not re.fullmatch(r"|[A-Za-z]\w*", self.name, re.ASCII) or self.name.endswith(_RESERVED_SUFFIXES):
            raise ValueError(
                f"name is '{self.name}'; use letters, digits and underscores, and no ending that is reserved for "
                f"metrics ({', '.join(_RESERVED_SUFFIXES)})"
            )
        if self.function and self.function != "passed" and not all(self.function.rpartition(":")[::2]):
            raise ValueError(f"function is '{self.function}'; write it as path.py:name or package.module:name")
        if self.url and not self.url.startswith(("http://", "https://", "${")):
            raise ValueError(f"url is '{redact_value(self.url)}'; it must begin with http:// or https://")
        check_headers(self.headers, self.url)
        if kind != "judge" and self.judge != Judge():
            raise ValueError(f"judge has options but no url, and this component has {kind}; leave judge out")
        check_used(self, _KINDS_USING, kind, f"for a component with {kind}")
        if (self.on_error == "value") != (self.error_value is not None):
            raise ValueError(
                f"on_error is '{self.on_error}' and error_value is {self.error_value}: on_error: value needs an "
                "error_value, and the other choices do not use it"
            )
        if self.combine != "mean" and not self.ensemble:
            raise ValueError(f"combine is {self.combine}, but there is no ensemble to combine; leave it out")
        if self.spread_coef != 1.0 and self.combine != "mean_minus_std":
            raise ValueError(
                f"spread_coef is {self.spread_coef:g}, but combine is {self.combine}; it is for combine: mean_minus_std"
            )
        if len({self.model, *self.ensemble}) <= len(self.ensemble):
            raise ValueError("ensemble names a model twice; list each model once")
        if self.add_eos != "auto" and (self.per_token or self.template):
            raise ValueError(
                f"add_eos is {self.add_eos}, but with {'per_token' if self.per_token else 'template'} the text ends as "
                "it is given; leave add_eos out"
            )
        if self.per_token and self.template:
            raise ValueError(
                "per_token and template do not go together: scores per token are for the response's own tokens; leave "
                "one of them out"
            )

    @property
    def label(self) -> str:
        """Name in the logs: `name`, or the default for the kind of component."""
        function = function_label(self.function.removeprefix("passed"))
        defaults = {"model": self.model, function: self.function, "endpoint": self.url}
        defaults |= {"judge": self.judge.url, "human": self.human}
        return self.name or next(name for name, value in defaults.items() if value)

    def members(self) -> tuple["Component", ...]:
        """The models of an ensemble as components NAME_1, NAME_2, ..., the criteria of a judge as judges
        NAME_CRITERION; for any other component, itself."""
        if len(self.judge.rubric) > 1:
            return tuple(
                dataclasses.replace(
                    self,
                    name=f"{self.label}_{criterion.name or number}",
                    judge=dataclasses.replace(self.judge, rubric=(criterion,)),
                )
                for number, criterion in enumerate(self.judge.rubric, 1)
            )
        if not self.ensemble:
            return (self,)
        return tuple(
            dataclasses.replace(
                self, name=f"{self.label}_{k}", model=path, ensemble=(), combine="mean", spread_coef=1.0
            )
            for k, path in enumerate((self.model, *self.ensemble), 1)
        )


def function_label(spec: str) -> str:
    """The name of a reward function without path and module, or `function` if it cannot be part of a metric key."""
    name = spec.rpartition(":")[2]
    return name if name.isidentifier() and name.isascii() and name != "model" else "function"


@section
class RewardSource:
    """The reward: the weighted sum of a reward model, a Python function and any other components."""

    model: FilePath = ""
    """Reward model: folder, run directory or hub id of a sequence classification model with one or two labels."""
    revision: str | None = None
    """Branch, tag or commit of the reward model on the hub."""
    model_weight: Real = 1.0
    """Factor of the reward model's score in the sum."""
    model_dtype: DType = "auto"
    """Dtype in which the reward model's parameters are stored."""
    add_eos: AutoBool = "auto"
    """End token after the completion, for the reward model. true: always. false: never. auto: after a completion that
    ended by itself, as in training; never for a model of `jaxrlhf convert-rm`."""
    function: FilePath = ""
    """Reward function, `path.py:name` or `package.module:name`: def reward(prompts, completions, **columns) ->
    list[float | None]."""
    function_weight: Real = 1.0
    """Factor of the reward function's score in the sum."""
    micro_batch_size: Count = 16
    """Rows per forward pass of the reward model."""
    components: tuple[Component, ...] = ()
    """Additional components, a list. Keys of a component:"""

    def __post_init__(self) -> None:
        labels = [name for part in self.parts() for name in {part.label, *(member.label for member in part.members())}]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"{labels.count(label)} components of the reward are called '{label}'; name each one")

    def parts(self, passed: bool = False) -> tuple[Component, ...]:
        """All enabled components, starting with those for `model` and `function`.

        `passed`: the trainer was given a Python function; it takes the place of `function` unless a component has
        `function: passed`.
        """
        enabled = tuple(component for component in self.components if component.enabled)
        short = []
        if self.model:
            short.append(
                Component(
                    model=self.model,
                    revision=self.revision,
                    weight=self.model_weight,
                    dtype=self.model_dtype,
                    micro_batch_size=self.micro_batch_size,
                    add_eos=self.add_eos,
                )
            )
        if self.function or (passed and not any(component.function == "passed" for component in enabled)):
            short.append(Component(function=self.function or "passed", weight=self.function_weight))
        return (*short, *enabled)
