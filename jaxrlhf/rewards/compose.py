"""Reward of a run: the weighted sum of its components."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxrlhf import distributed, sharding
from jaxrlhf.config import Component, Environment, RewardSource
from jaxrlhf.data import datasets
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.metrics.keys import JUDGE
from jaxrlhf.metrics.statistics import correlation, deviation
from jaxrlhf.rewards.component import ComponentScores, RewardComponent, open_source
from jaxrlhf.rewards.functions import in_thread
from jaxrlhf.rewards.sources.human import Human
from jaxrlhf.rewards.sources.judge import Judge
from jaxrlhf.rewards.sources.model import Messages, RewardModel
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rollout.text import token_texts, turn_texts
from jaxrlhf.types import Rollout


class Scored(NamedTuple):
    """Scores of a batch of completions."""

    scores: np.ndarray  # f32 [B]   weighted sum of the components that score whole sequences; nan: unscored
    token_scores: np.ndarray | None  # f32 [B, R]   weighted sum of the per-token components, 0 outside the response
    components: dict[str, np.ndarray]  # f32 [B] each, before weights, nan where a component left a response unscored;
    # per-token components summed over the response
    metrics: dict[str, float]  # rewards/NAME/mean, std, errors, length_correlation; perf/judge/NAME/...
    notes: tuple[str, ...]  # errors that did not stop the run

    @property
    def unscored(self) -> np.ndarray:
        """bool [B]: no component with a weight returned a score."""
        return np.isnan(self.scores)

    @property
    def totals(self) -> np.ndarray:
        """f32 [B]: sequence scores plus the sum of token scores; nan: unscored."""
        return self.scores if self.token_scores is None else self.scores + self.token_scores.sum(1)

    def as_list(self) -> list[float | None]:
        """`totals` as Python numbers, None where unscored."""
        return [None if np.isnan(total) else float(total) for total in self.totals]


class _Term(NamedTuple):
    """One term of the weighted sum: a component, an ensemble with its models, or a judge with its criteria."""

    label: str
    config: Component
    members: list[str]  # names in Scorer.components

    @property
    def name(self) -> str:
        """Its name in `Scored.components`."""
        return self.members[0] if len(self.members) == 1 else self.label

    def scores(self, by_name: Mapping[str, ComponentScores]) -> ComponentScores:
        """The scores of the component, or those of the members combined: of the models by `combine`, of the criteria
        their weighted mean.

        A completion that any of the members leaves unscored is unscored, with a value of 0.
        """
        members = [by_name[name] for name in self.members]
        if len(members) == 1:
            return members[0]
        stacked = np.stack([member.values for member in members])
        if self.config.ensemble:
            values = combine_scores(stacked, self.config.combine, self.config.spread_coef)
        else:
            values = np.average(
                stacked, axis=0, weights=[criterion.weight for criterion in self.config.judge.rubric]
            ).astype(np.float32)
        unscored = np.any([member.unscored for member in members], axis=0)
        values[unscored] = 0
        return ComponentScores(values, unscored)


class Scorer:
    """The reward of a run.

    `function` is a Python callable that replaces `config.function`, or belongs to the component whose function is
    `passed`; it runs in this process and cannot be killed. Functions named in the config are loaded here, each in its
    own process. Weights of reward models are loaded on first use, or by `load`. `directory` stores the answers of
    people and judges. Without a component (`required` false), every score is 0. With an `environment`, the rewards of
    its turns are scores of their last tokens.

    Raises ConfigError if a required reward is missing or it is inconsistent, RewardError or DataError if a source
    cannot be loaded.
    """

    def __init__(
        self,
        config: RewardSource,
        tokenizer: Tokenizer,
        function: Callable[..., Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        directory: Path | None = None,
        required: bool = True,
        environment: Environment | None = None,
    ) -> None:
        if function is not None and config.function:
            raise ConfigError(f"two reward functions: a Python one and reward.function '{config.function}'; give one")
        self._tokenizer, self._environment = tokenizer, environment or Environment()
        self.components: dict[str, RewardComponent] = {}
        self._terms: list[_Term] = []
        self._asked: list[futures.Future[dict[str, ComponentScores]]] = []
        for term in config.parts(passed=function is not None):
            members = []
            for member in term.members():
                source = open_source(
                    member,
                    function,
                    mesh,
                    directory,
                    function_timeout=term in config.components,
                    template_date=tokenizer.template_date,
                )
                component = RewardComponent(member, source, tokenizer)
                if component.name in (*self.components, *self._others):
                    raise ConfigError(
                        f"two components of the reward are called '{component.name}'; name one in reward.components"
                    )
                self.components[component.name] = component
                members.append(component.name)
            self._terms.append(_Term(term.label, term, members))
        if required and not self.components:
            raise ConfigError(
                "no reward: give reward.model, reward.function (path.py:name), reward.components, or a Python function"
            )
        self.models = {
            name: component.source
            for name, component in self.components.items()
            if isinstance(component.source, RewardModel)
        }

    @property
    def model(self) -> RewardModel | None:
        """The first reward model, from which a critic may be initialised."""
        return next(iter(self.models.values()), None)

    @property
    def shares_tokenizer(self) -> bool:
        """True if `model` has the policy's tokenizer."""
        return any(self.components[name].shares_tokenizer for name in list(self.models)[:1])

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of the sum, by its name in `Scored.components`."""
        return {term.name: term.config.weight for term in self._terms} | dict.fromkeys(self._others, 1.0)

    @property
    def summed(self) -> dict[str, float]:
        """`weights` without those of 0."""
        return {name: weight for name, weight in self.weights.items() if weight}

    @property
    def _others(self) -> tuple[str, ...]:
        """Names in `Scored.components` of what is no component."""
        return ("environment",) if self._environment.function else ()

    @property
    def per_token(self) -> bool:
        """True if there will be token_scores."""
        return bool(self._others) or any(component.per_token for component in self.components.values())

    @property
    def has_human(self) -> bool:
        return any(component.config.human for component in self.components.values())

    def models_reading_rollouts(self, critic: bool) -> list[RewardModel]:
        """Models whose context must hold a rollout: those that read its tokens and, with `critic`, `model`."""
        return [
            model
            for name, model in self.models.items()
            if self.components[name].reads_rollout or (critic and model is self.model)
        ]

    def pause_while_asking(self, pause: Callable[[], Any]) -> None:
        """Enter the context manager `pause()` while a person is asked, to stop other output to the terminal."""
        for component in self.components.values():
            if isinstance(component.source, Human):
                component.source.pause_while_asking = pause

    def load(self) -> None:
        """Load the weights of all reward models now."""
        for model in self.models.values():
            _ = model.params

    def check(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        messages: Sequence[Messages | None] | None = None,
    ) -> None:
        """Check before generation that the prompts can be scored.

        Raises ConfigError for a template whose columns are missing, RewardError for a function whose columns are
        missing or columns that cannot be sent to it, DataError for a model that cannot read the prompts. Nobody is
        asked: `probe_rows` does.
        """
        if self._environment.function:
            columns = {**columns, "turns": [[text] for text in prompts]}
        for component in self.components.values():
            component.check(prompts, columns, messages)

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """`check` for the prompts of rows of a data set."""
        self.check([row.text for row in rows], datasets.columns(rows), [row.messages for row in rows])

    def probe_rows(self, rows: Sequence[PromptRow]) -> None:
        """Check that the servers of the reward can be reached, and that judges grade a sample completion of the first
        row. Raises RewardError."""
        first, columns = rows[0], datasets.columns([rows[0]])
        if self._environment.function:
            columns = {**columns, "turns": [[first.text]]}
        for component in self.components.values():
            component.probe([first.text], columns, [first.messages])

    def score_rows(
        self, rows: Sequence[PromptRow], completions: Sequence[str], rollout: Rollout, step: int | None = None
    ) -> Scored:
        """`score` a completion of each row's prompt."""
        messages = [row.messages for row in rows]
        return self.score([row.text for row in rows], completions, rollout, datasets.columns(rows), step, messages)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        rollout: Rollout,
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
        messages: Sequence[Messages | None] | None = None,
    ) -> Scored:
        """Score a batch. `columns` hold one value per completion, `messages` the turns of conversational prompts. With
        an environment, components also get a column `turns` (`rollout.text.turn_texts`).

        `Scored.components` also has NAME_truncated for reward models (1 where the text lost its beginning to fit the
        context), NAME_unanswered for sources that may leave completions unscored (1 where they did), and NAME_spread
        for ensembles. Raises RewardError if a component with on_error: fail has no usable score.
        """
        rollout = sharding.fetch(dataclasses.replace(rollout, support=None))
        if self._environment.function:
            turns = turn_texts(rollout, self._tokenizer)
            columns = {**columns, "turns": turns}
            completions = completions if self._environment.completion == "all" else [texts[-1] for texts in turns]
        needs_tokens = any(c.per_token and not isinstance(c.source, RewardModel) for c in self.components.values())
        tokens = token_texts(rollout, self._tokenizer) if needs_tokens else None
        request = ScoreRequest(list(prompts), list(completions), columns, tokens, step)
        by_name = self._component_scores(request, rollout, messages)

        scores, token_scores = np.zeros(len(completions), np.float32), None
        unscored = np.full(len(completions), bool(self._terms))
        arrays = self._component_arrays(by_name)
        for term in self._terms:
            term_scores = term.scores(by_name)
            if term.config.weight:
                unscored &= term_scores.unscored
            weighted = np.float32(term.config.weight) * term_scores.values
            if not term.config.per_token:
                scores += weighted
            else:
                token_scores = weighted if token_scores is None else token_scores + weighted
            if len(term.members) > 1:
                arrays[term.label] = term_scores.totals
            if term.config.ensemble:
                arrays[f"{term.label}_spread"] = deviation(np.stack([arrays[name] for name in term.members]))
        if self._environment.function:
            turn_rewards = np.asarray(rollout.turn_rewards)
            token_scores = turn_rewards if token_scores is None else token_scores + turn_rewards
            arrays["environment"], unscored = turn_rewards.sum(axis=1), np.zeros_like(unscored)
        metrics = self._metrics(by_name, arrays, np.asarray(rollout.response_mask).sum(1))
        notes = tuple(component.note for component in by_name.values() if component.note)
        return Scored(np.where(unscored, np.float32(np.nan), scores), token_scores, arrays, metrics, notes)

    def _component_scores(
        self, request: ScoreRequest, rollout: Rollout, messages: Sequence[Messages | None] | None
    ) -> dict[str, ComponentScores]:
        """The scores of each component. Workers and servers are asked at the same time, each in a thread, and so are
        judges, who take turns in one thread: they may share a server, and share a file of answers. The other components
        follow one another in this thread meanwhile.

        One component after the other in a run of several processes, which exchange their parts in a fixed order, and
        where a person is asked, whom the output of workers would interrupt.
        """

        def score(names: Sequence[str]) -> dict[str, ComponentScores]:
            return {name: self.components[name].score(request, rollout, messages) for name in names}

        futures.wait(self._asked)  # those of an earlier call that was left by an exception
        outside = [name for name, component in self.components.items() if component.is_outside]
        if len(self.components) == 1 or distributed.count() > 1 or self.has_human:
            outside = []
        judges = [name for name in outside if isinstance(self.components[name].source, Judge)]
        asked = [[name] for name in outside if name not in judges] + ([judges] if judges else [])
        self._asked = [in_thread(functools.partial(score, names)) for names in asked]
        found = score([name for name in self.components if name not in outside])
        for answers in self._asked:
            found |= answers.result()
        return {name: found[name] for name in self.components}

    def _component_arrays(self, by_name: Mapping[str, ComponentScores]) -> dict[str, np.ndarray]:
        """`Scored.components`, without the ensembles."""
        arrays: dict[str, np.ndarray] = {}
        for name, component in by_name.items():
            arrays[name] = component.totals
            if component.truncated is not None:
                arrays[f"{name}_truncated"] = component.truncated.astype(np.float32)
            if self._may_be_unscored(name):
                arrays[f"{name}_unanswered"] = component.unscored.astype(np.float32)
        return arrays

    def _metrics(
        self, by_name: Mapping[str, ComponentScores], arrays: Mapping[str, np.ndarray], lengths: np.ndarray
    ) -> dict[str, float]:
        metrics = {f"rewards/{name}/errors": float(component.errors) for name, component in by_name.items()}
        metrics |= {f"{JUDGE}{name}/{key}": v for name, scores in by_name.items() for key, v in scores.costs.items()}
        for name, values in arrays.items():
            scored = ~np.isnan(values)
            if not scored.any():
                continue
            metrics[f"rewards/{name}/mean"] = float(np.mean(values[scored]))
            metrics[f"rewards/{name}/std"] = float(deviation(values[scored]))
            if name in (*self.components, *self._combined, *self._others):
                metrics[f"rewards/{name}/length_correlation"] = correlation(values[scored], lengths[scored])
        return metrics

    def metric_keys(self) -> list[str]:
        """The keys of `Scored.metrics`; those of a component that scores no response of a batch are missing."""
        arrays = [*self.components, *self._combined, *self._others]
        arrays += [f"{term.label}_spread" for term in self._terms if term.config.ensemble]
        arrays += [f"{name}_truncated" for name in self.models]
        arrays += [f"{name}_unanswered" for name in self.components if self._may_be_unscored(name)]
        keys = [f"rewards/{name}/{statistic}" for name in arrays for statistic in ("mean", "std")]
        keys += [f"rewards/{name}/errors" for name in self.components]
        terms = (*self.components, *self._combined, *self._others)
        return keys + [f"rewards/{name}/length_correlation" for name in terms]

    @property
    def _combined(self) -> list[str]:
        """The terms of several members."""
        return [term.label for term in self._terms if len(term.members) > 1]

    def _may_be_unscored(self, name: str) -> bool:
        return name not in self.models or self.components[name].config.on_error == "skip"


def combine_scores(
    scores: Float[np.ndarray, " K *shape"], combine: str, spread_coef: float
) -> Float[np.ndarray, "*shape"]:
    """Mean, minimum, or mean minus `spread_coef` standard deviations over the K models of an ensemble.

    The latter two are the worst-case and the uncertainty-weighted objective of https://arxiv.org/abs/2310.02743, which
    uses the variance; the standard deviation has the unit of the scores.
    """
    if combine == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - np.float32(spread_coef) * deviation(scores) if combine == "mean_minus_std" else mean
