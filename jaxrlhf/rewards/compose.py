"""What a completion is worth: the weighted sum of reward models, functions, endpoints and people."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.compilation import Ahead
from jaxrlhf.config import Component, RewardSource
from jaxrlhf.config.reward_source import function_label
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, RewardError, quoted
from jaxrlhf.rewards.functions import RewardFunction
from jaxrlhf.rewards.sources import judges, template
from jaxrlhf.rewards.sources.answers import Answer, Request
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.ensemble import combined
from jaxrlhf.rewards.sources.human import Human
from jaxrlhf.rewards.sources.judges import Judge
from jaxrlhf.rewards.sources.model import RewardModel, Turns
from jaxrlhf.rewards.sources.worker import Worker, json_line
from jaxrlhf.rollout.text import token_texts
from jaxrlhf.types import Rollout

PROBED = 32  # prompts that a reward model's tokenizer is tried on


class Scored(NamedTuple):
    """What a batch is worth."""

    scores: np.ndarray  # f32 [B]   weighted sum of the components that judge a completion as a whole
    token_scores: np.ndarray | None  # f32 [B, R]   weighted sum of those per token, 0 outside the response mask
    components: dict[str, np.ndarray]  # f32 [B] each, before weights; of one per token the sum over the response
    metrics: dict[str, float]  # rewards/NAME/mean, std, errors, length_correlation
    notes: tuple[str, ...]  # what went wrong and did not stop the run
    unscored: np.ndarray  # bool [B]   no part had an opinion: the score of 0 says nothing

    @property
    def totals(self) -> np.ndarray:
        """f32 [B]: all that a completion is worth."""
        return self.scores if self.token_scores is None else self.scores + self.token_scores.sum(1)


class Scorer:
    """The reward of a run. `function`, a Python callable, stands in for `config.function`, or for the component whose
    function is `passed`; it runs in this process and cannot be killed.

    Functions named in the config are loaded here, each in a process of its own; the weights of reward models when they
    are first needed, or by `load`. `directory` keeps what a person answers. Raises ConfigError if there is no reward or
    one that cannot work, RewardError or DataError if one cannot be loaded.
    """

    def __init__(
        self,
        config: RewardSource,
        tokenizer: Tokenizer,
        function: Callable[..., Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        directory: Path | None = None,
    ) -> None:
        if function is not None and config.function:
            raise ConfigError(f"two reward functions: a Python one and reward.function '{config.function}'; give one")
        self._tokenizer = tokenizer
        self.parts: dict[str, tuple[Component, Judge]] = {}
        self._sums: dict[str, tuple[Component, list[str]]] = {}
        for source in config.parts(passed=function is not None):
            names = []
            for component in source.members():
                judge = judges.open_judge(component, function, mesh, directory, whole=source not in config.components)
                name = component.label
                if isinstance(judge, RewardFunction) and not component.name:
                    name = function_label(judge.name)
                if name in self.parts:
                    raise ConfigError(
                        f"two components of the reward are called '{name}'; name one in reward.components"
                    )
                self.parts[name] = component, judge
                names.append(name)
            self._sums[source.label if source.ensemble else names[0]] = source, names
        if not self.parts:
            raise ConfigError(
                "no reward: give reward.model, reward.function (path.py:name), reward.components, or a Python function"
            )
        self.models = {name: judge for name, (_, judge) in self.parts.items() if isinstance(judge, RewardModel)}
        self._shared = {name: judge.shares_tokenizer(tokenizer) for name, judge in self.models.items()}
        for name, (component, _) in self.parts.items():
            if component.per_token and name in self.models and not self._shared[name]:
                raise ConfigError(
                    f"reward '{name}' is per_token, but {component.model} reads other tokens than the policy, so its "
                    "scores belong to no token of a response; set per_token: false, or use a model with the policy's "
                    "tokenizer"
                )

    @property
    def model(self) -> RewardModel | None:
        """The first reward model: the one that a critic may start from."""
        return next(iter(self.models.values()), None)

    @property
    def shares_tokenizer(self) -> bool:
        """Whether `model` reads the policy's tokens."""
        return next(iter(self._shared.values()), False)

    @property
    def per_token(self) -> bool:
        """Whether there will be token_scores."""
        return any(component.per_token for component, _ in self.parts.values())

    def readers(self, critic: bool) -> list[RewardModel]:
        """The models whose context must hold a rollout, as they read its tokens, or as a `critic` starts from them."""
        return [
            judge for name, judge in self.models.items() if self._reads_tokens(name) or critic * (judge is self.model)
        ]

    @property
    def asks_a_person(self) -> bool:
        """Whether any component is a person."""
        return any(component.human for component, _ in self.parts.values())

    def metrics(self) -> list[str]:
        """The keys of `Scored.metrics`."""
        names = [*self.parts]
        names += [name for label in self._ensembles for name in (label, f"{label}_spread")]
        names += [f"{name}_truncated" for name in self.models]
        names += [
            f"{name}_unanswered"
            for name, (part, _) in self.parts.items()
            if name not in self.models or part.on_error == "skip"
        ]
        about = [f"rewards/{name}/{what}" for name in names for what in ("mean", "std")]
        about += [f"rewards/{label}/length_correlation" for label in self._ensembles]
        return [*about, *(f"rewards/{name}/{what}" for name in self.parts for what in ("errors", "length_correlation"))]

    @property
    def _ensembles(self) -> list[str]:
        return [label for label, (source, _) in self._sums.items() if source.ensemble]

    def pause(self, pausing: Callable[[], Any]) -> None:
        """`pausing()` is entered while a person is asked: for whatever else writes to the terminal."""
        for _, judge in self.parts.values():
            if isinstance(judge, Human):
                judge.pausing = pausing

    def load(self, *, abstract: bool = False) -> None:
        """Load the weights of all reward models now; if `abstract`, their shapes."""
        for judge in self.models.values():
            if abstract:
                judge.outline()
            _ = judge.params

    def compile(self, ahead: Ahead, width: int) -> None:
        """Begin to compile what reward models do with rows of up to `width` tokens."""
        for name, judge in self.models.items():
            judge.compile(ahead, width, per_token=self.parts[name][0].per_token)

    def check(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        messages: Sequence[Turns | None] | None = None,
    ) -> None:
        """Refuse, before anything has been generated, what could not be scored: ConfigError for a template without its
        columns, RewardError for a function without them or for columns that cannot be sent to it, DataError for a model
        that cannot read the prompts."""
        first = list(prompts[:PROBED])
        turns = list(messages[:PROBED]) if messages else [None] * len(first)
        for name, (component, judge) in self.parts.items():
            if component.template:
                template.check(component.template, columns)
            if isinstance(judge, RewardFunction | Worker):
                judge.signature.check(columns, f"reward {judge.name}", per_token=component.per_token)
            if isinstance(judge, Worker | Endpoint):
                wanted = [key for key in columns if isinstance(judge, Endpoint) or judge.signature.wants(key)]
                sent = {key: columns[key][:PROBED] for key in wanted}
                json_line(Request(first, [], sent), f"reward {judge.name}")
            if isinstance(judge, RewardModel) and not self._reads_tokens(name):
                judge.check_readable(first)
                if judge.tokenizer.has_chat and not component.template:  # its chat format must take such conversations
                    for text, said in zip(first, turns, strict=True):
                        said = said or [{"role": "user", "content": text}]
                        judge.tokenizer.render([*said, {"role": "assistant", "content": "Yes."}])

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        rollout: Rollout,
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
        messages: Sequence[Turns | None] | None = None,
    ) -> Scored:
        """`columns` hold a value per completion, `messages` the turns of prompts that are conversations.

        Beside each component in `components` stand NAME_truncated for a model, 1 where the text lost its beginning to
        fit, and NAME_unanswered for the others, 1 where there was no opinion. Raises RewardError where a component with
        on_error: fail has no usable answer.
        """
        mask = np.asarray(rollout.response_mask)
        request = Request(list(prompts), list(completions), columns, step=step)
        pieces: list[list[str]] | None = None
        scores, token_scores = np.zeros(len(completions), np.float32), None
        components: dict[str, np.ndarray] = {}
        metrics: dict[str, float] = {}
        settled: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        notes, unscored = [], np.ones(len(completions), bool)
        for name, (component, judge) in self.parts.items():
            asked = request
            if component.per_token and not isinstance(judge, RewardModel):
                pieces = pieces or token_texts(rollout, self._tokenizer)
                asked = request._replace(tokens=pieces)
            truncated = None
            try:
                if isinstance(judge, RewardModel):
                    answer, truncated = self._read(name, asked, rollout, messages)
                else:
                    if component.template:
                        asked = asked._replace(completions=template.fill(component.template, asked))
                    answer = judge(asked)
                if answer.problem and component.on_error == "fail":
                    raise RewardError(answer.problem)
            except RewardError as error:
                if component.on_error == "fail":
                    raise
                answer = Answer([None] * len(completions), range(len(completions)), str(error))
            if answer.problem:
                notes.append(f"{answer.problem}; {_consequence(component, len(answer.failed))}")
            values, unanswered = settled[name] = _settled(answer, component, mask)
            whole = values.sum(1) if component.per_token else values
            components[name] = whole
            if truncated is not None:
                components[f"{name}_truncated"] = truncated.astype(np.float32)
            if truncated is None or component.on_error == "skip":
                components[f"{name}_unanswered"] = unanswered.astype(np.float32)
            metrics[f"rewards/{name}/errors"] = float(len(answer.failed))
            metrics[f"rewards/{name}/length_correlation"] = correlation(whole, mask.sum(1))
        for label, (source, names) in self._sums.items():
            values = settled[names[0]][0]
            unscored &= np.any([settled[name][1] for name in names], axis=0)
            if source.ensemble:
                values = _together([settled[name] for name in names], source)
                each = np.stack([components[name] for name in names])
                components[label] = whole = values.sum(1) if source.per_token else values
                components[f"{label}_spread"] = each.std(axis=0)
                metrics[f"rewards/{label}/length_correlation"] = correlation(whole, mask.sum(1))
            if source.per_token:
                before = np.zeros(mask.shape, np.float32) if token_scores is None else token_scores
                token_scores = before + np.float32(source.weight) * values
            else:
                scores += np.float32(source.weight) * values
        for name, values in components.items():
            metrics |= {f"rewards/{name}/mean": float(np.mean(values)), f"rewards/{name}/std": float(np.std(values))}
        return Scored(scores, token_scores, components, metrics, tuple(notes), unscored)

    def _reads_tokens(self, name: str) -> bool:
        return self._shared[name] and not self.parts[name][0].template

    def _read(
        self, name: str, request: Request, rollout: Rollout, messages: Sequence[Turns | None] | None
    ) -> tuple[Answer, np.ndarray | None]:
        """What a reward model says, with non-finite scores marked, and which texts it could not read whole."""
        component, judge = self.parts[name][0], self.models[name]
        if component.template:
            texts = template.fill(component.template, request, judge.tokenizer.guard)
            found, truncated = judge.score_written(texts)
        elif not self._shared[name]:
            finished = np.asarray(rollout.finished).tolist()
            found, truncated = judge.score_texts(request.prompts, request.completions, finished, messages)
        elif component.per_token:
            found, truncated = judge.score_tokens(rollout)
        else:
            found, truncated = judge.score_rollout(rollout)
        finite: np.ndarray = np.isfinite(found).reshape(len(found), -1).min(axis=1)
        failed = np.flatnonzero(~finite).tolist()
        problem = ""
        if failed:
            shown = quoted(request.completions[failed[0]])
            bad = found[failed[0]] if found.ndim == 1 else "a non-finite number"
            problem = f"{request.about(judge.path)} gave {bad} for completion {failed[0]}: {shown}"
        if component.per_token:
            mask = np.asarray(rollout.response_mask)
            values: list[Any] = [
                row[real] if good else None for row, real, good in zip(found, mask, finite, strict=True)
            ]
        else:
            values = [float(value) if good else None for value, good in zip(found, finite, strict=True)]
        return Answer(values, failed, problem), truncated


def _settled(answer: Answer, component: Component, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values f32 [B], or [B, R] per token, by the component's policy; unanswered bool [B])."""
    failed = set(answer.failed)
    values = np.zeros(mask.shape if component.per_token else len(mask), np.float32)
    unanswered = np.zeros(len(mask), bool)
    for i, value in enumerate(answer.values):
        if i in failed and component.on_error == "value":
            value = np.full(mask[i].sum(), component.error_value) if component.per_token else component.error_value
        if value is None:
            unanswered[i] = True
        elif component.per_token:
            values[i, mask[i]] = value
        else:
            values[i] = value
    return values, unanswered


def _together(settled: Sequence[tuple[np.ndarray, np.ndarray]], source: Component) -> np.ndarray:
    """The score of an ensemble by what its models said; none, so 0, where one of them has no opinion."""
    values = combined(np.stack([said for said, _ in settled]), source.combine, source.spread_coef)
    without = np.any([unanswered for _, unanswered in settled], axis=0)
    return np.where(without.reshape(-1, *[1] * (values.ndim - 1)), np.float32(0), values)


def _consequence(component: Component, count: int) -> str:
    if component.on_error == "value":
        return f"{count} completions count as {component.error_value:g} (on_error: value)"
    return f"{count} completions go without this reward (on_error: skip)"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if np.ptp(a) > 0 and np.ptp(b) > 0 and spread > 0 else 0.0
