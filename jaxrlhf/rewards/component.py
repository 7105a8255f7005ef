"""A component of the reward: opens its source, checks it against the data, and turns its scores into arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf import distributed
from jaxrlhf.config import Component, TokenizerSource
from jaxrlhf.config.reward_source import function_label
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, RewardError, quoted
from jaxrlhf.rewards.functions import RewardFunction
from jaxrlhf.rewards.sources import template
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.human import Human
from jaxrlhf.rewards.sources.judge import SAMPLE, Judge
from jaxrlhf.rewards.sources.model import Messages, RewardModel, transcript
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores
from jaxrlhf.rewards.sources.worker import Worker, to_json_line
from jaxrlhf.secrets import resolve
from jaxrlhf.types import Rollout

PROBED = 32  # prompts on which `check` tries a source

Source = RewardModel | RewardFunction | Worker | Endpoint | Judge | Human


def open_source(
    config: Component,
    function: Callable[..., Any] | None,
    mesh: jax.sharding.Mesh | None,
    directory: Path | None,
    *,
    function_timeout: bool,
    template_date: str,
) -> Source:
    """Open the source of a component. `function` is the Python function given to the trainer, which the component's
    timeout applies to if `function_timeout`; `template_date` is the date in the chat template of a reward model.

    Raises ConfigError, DataError or RewardError if the source cannot be opened.
    """
    if config.template:
        template.fields(config.template)
    if config.model:
        return RewardModel(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            micro_batch_size=config.micro_batch_size,
            max_length=config.max_length,
            add_eos=config.add_eos,
            mesh=mesh,
            tokenizer=TokenizerSource(template_date=template_date),
        )
    options = resolve(config.options, "options of a component of the reward")
    if config.function == "passed":
        if function is None:
            raise ConfigError(
                "reward.components has function: passed, and no Python function was given; give one to the trainer "
                "(PPOTrainer(config, reward=...)), or name it as path.py:name"
            )
        return RewardFunction(function, options=options, timeout=config.timeout if function_timeout else None)
    if config.function:
        return Worker(config.function, options=options, timeout=config.timeout)
    if config.url:
        return Endpoint(config.url, timeout=config.timeout, headers=config.headers)
    if config.judge.url:
        return Judge(config.judge, text=config.template, timeout=config.timeout, directory=directory)
    assert config.human
    return Human(config.human, directory / "human.jsonl" if directory else None)


def _score_in_parts(source: RewardFunction | Worker | Endpoint | Judge | Human, request: ScoreRequest) -> SourceScores:
    """The scores of a batch, of which each process scores a part, in the order of the rows; process 0 asks a person. A
    RewardError of one process is raised in all of them."""
    if distributed.count() == 1:
        return source(request)
    rows = np.array_split(np.arange(len(request.completions)), 1 if isinstance(source, Human) else distributed.count())
    mine = rows[distributed.index()].tolist() if distributed.index() < len(rows) else []

    def score() -> list[Any]:
        if not mine:
            return [[], [], "", {}]
        values, failed, problem, costs = source(request.rows(mine))
        return [list(values), [mine[i] for i in failed], problem, dict(costs)]

    parts = distributed.shared(score)
    values, failed = ([item for part in parts for item in part[i]] for i in (0, 1))
    costs = {name: sum(part[3].get(name, 0) for part in parts) for name in parts[0][3]}
    return SourceScores(values, failed, next((part[2] for part in parts if part[2]), ""), costs)


class ComponentScores(NamedTuple):
    """Scores of a batch from one component, before its weight."""

    values: np.ndarray  # f32 [B], or [B, R] per token; 0 where unscored
    unscored: np.ndarray  # bool [B]
    truncated: np.ndarray | None = None  # bool [B]   of a reward model: the text lost its beginning to fit the context
    errors: int = 0  # completions without a usable score
    note: str = ""  # the first error and how it was handled
    costs: Mapping[str, float] = {}  # of a judge: metrics of what the scores took

    @property
    def totals(self) -> np.ndarray:
        """f32 [B]: the scores, those per token summed over the response; nan where unscored."""
        totals = self.values if self.values.ndim == 1 else self.values.sum(1)
        return np.where(self.unscored, np.float32(np.nan), totals)


class RewardComponent:
    """One component with its opened source. Raises ConfigError for a per-token model with another tokenizer."""

    def __init__(self, config: Component, source: Source, tokenizer: Tokenizer) -> None:
        self.config, self.source, self.per_token = config, source, config.per_token
        self.name = config.label
        if isinstance(source, RewardFunction) and not config.name:
            self.name = function_label(source.name)
        self.shares_tokenizer = isinstance(source, RewardModel) and source.shares_tokenizer(tokenizer)
        if self.per_token and isinstance(source, RewardModel) and not self.shares_tokenizer:
            raise ConfigError(
                f"reward '{self.name}' is per_token, but {config.model} reads other tokens than the policy, so its "
                "scores belong to no token of a response; set per_token: false, or use a model with the policy's "
                "tokenizer"
            )

    @property
    def is_outside(self) -> bool:
        """True if the source is in another process or on a server, so that a thread can wait for it. Not while a worker
        has to be started again: it would end with the thread that starts it (PR_SET_PDEATHSIG)."""
        if isinstance(self.source, Worker):
            return not self.source.ended
        return isinstance(self.source, Endpoint | Judge)

    @property
    def reads_rollout(self) -> bool:
        """True for a reward model that reads the token ids of the rollout."""
        return self.shares_tokenizer and not self.config.template

    def check(
        self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], messages: Sequence[Messages | None] | None
    ) -> None:
        """See `Scorer.check`."""
        source, first_prompts = self.source, list(prompts[:PROBED])
        if self.config.template:
            template.check(self.config.template, columns)
        if isinstance(source, RewardFunction | Worker):
            source.signature.check(columns, f"reward {source.name}", per_token=self.per_token)
        if isinstance(source, Worker | Endpoint):
            first_values = {
                name: values[:PROBED]
                for name, values in columns.items()
                if isinstance(source, Endpoint) or source.signature.wants(name)
            }
            to_json_line(ScoreRequest(first_prompts, [], first_values), f"reward {source.name}")
        if isinstance(source, RewardModel) and not self.reads_rollout:
            source.check_readable(first_prompts)
            if source.tokenizer.has_chat and not self.config.template:  # its chat format must accept the conversations
                conversations = messages[:PROBED] if messages else [None] * len(first_prompts)
                for prompt, turns in zip(first_prompts, conversations, strict=True):
                    turns = turns or [{"role": "user", "content": prompt}]
                    source.tokenizer.render([*turns, {"role": "assistant", "content": "Yes."}])

    def probe(
        self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], messages: Sequence[Messages | None] | None
    ) -> None:
        """See `Scorer.probe_rows`."""
        source = self.source
        if isinstance(source, Endpoint) and self.config.on_error == "fail":  # else it may come up later
            distributed.on_primary(source.check)
        if isinstance(source, Judge):
            first = ScoreRequest(_readable(prompts, messages), [SAMPLE], columns)
            distributed.on_primary(lambda: source.check(first))

    def score(
        self, request: ScoreRequest, rollout: Rollout, messages: Sequence[Messages | None] | None
    ) -> ComponentScores:
        """Score a batch. With on_error: fail, raises RewardError if any completion has no usable score."""
        request = request if self.per_token else request._replace(tokens=None)
        truncated = None
        try:
            if isinstance(self.source, RewardModel):
                scores, truncated = self._model_scores(self.source, request, rollout, messages)
            else:
                if isinstance(self.source, Judge):
                    request = request._replace(prompts=_readable(request.prompts, messages))
                elif self.config.template:
                    request = request._replace(completions=template.fill(self.config.template, request))
                scores = _score_in_parts(self.source, request)
            if scores.problem and self.config.on_error == "fail":
                raise RewardError(scores.problem)
        except RewardError as error:
            if self.config.on_error == "fail":
                raise
            rows = range(len(request.completions))
            scores = SourceScores([None for _ in rows], rows, str(error))
        note, errors = "", len(scores.failed)
        if scores.problem and self.config.on_error == "value":
            note = f"{scores.problem}; {errors} completions get {self.config.error_value:g} (on_error: value)"
        elif scores.problem:
            note = f"{scores.problem}; {errors} completions go without this reward (on_error: skip)"
        values, unscored = self._to_arrays(scores, np.asarray(rollout.response_mask))
        costs = self.source.metrics(scores.costs) if isinstance(self.source, Judge) and scores.costs else {}
        return ComponentScores(values, unscored, truncated, errors, note, costs)

    def _model_scores(
        self, model: RewardModel, request: ScoreRequest, rollout: Rollout, messages: Sequence[Messages | None] | None
    ) -> tuple[SourceScores, np.ndarray]:
        """(scores, non-finite ones marked as failed; truncated bool [B])."""
        if self.config.template:
            texts = template.fill(self.config.template, request, model.tokenizer.escape)
            scores, truncated = model.score_formatted(texts)
        elif self.per_token:
            scores, truncated = model.score_tokens(rollout)
        else:
            scores, truncated = self._sequence_scores(model, request, rollout, messages)
        mask = np.asarray(rollout.response_mask)
        values: list[Any] = [row[real] for row, real in zip(scores, mask, strict=True)] if self.per_token else [*scores]
        failed = [i for i, value in enumerate(values) if not np.isfinite(value).all()]
        problem = ""
        if failed:
            shown = "a non-finite number" if self.per_token else values[failed[0]]
            completion = f"completion {failed[0]}: {quoted(request.completions[failed[0]])}"
            problem = f"{request.error_prefix(model.path)} gave {shown} for {completion}"
        for i in failed:
            values[i] = None
        return SourceScores(values, failed, problem), truncated

    def _sequence_scores(
        self, model: RewardModel, request: ScoreRequest, rollout: Rollout, messages: Sequence[Messages | None] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]): of the rollout's ids if they mean the same to the model and it has rows
        for them, else of the text."""
        fits = model.has_rows(rollout) & self.shares_tokenizer
        if fits.all():
            return model.score_rollout(rollout)
        finished = np.asarray(rollout.finished).tolist()
        scores, truncated = model.score_texts(request.prompts, request.completions, finished, messages)
        if not fits.any():
            return scores, truncated
        known = dataclasses.replace(rollout, tokens=np.where(fits[:, None], rollout.tokens, 0))
        scores_of_ids, truncated_ids = model.score_rollout(known)
        return np.where(fits, scores_of_ids, scores), np.where(fits, truncated_ids, truncated)

    def _to_arrays(self, scores: SourceScores, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values f32 [B], or [B, R] per token, failed ones by `on_error`; unscored bool [B])."""
        failed = set(scores.failed)
        values = np.zeros(mask.shape if self.per_token else len(mask), np.float32)
        unscored = np.zeros(len(mask), bool)
        for i, value in enumerate(scores.values):
            if i in failed and self.config.on_error == "value":
                value = self.config.error_value
            if value is None:
                unscored[i] = True
            elif self.per_token:
                values[i, mask[i]] = value
            else:
                values[i] = value
        return values, unscored


def _readable(prompts: Sequence[str], messages: Sequence[Messages | None] | None) -> list[str]:
    """Prompts for a reader that is no model of this tokenizer: conversations as transcripts, without control tokens."""
    conversations = messages or [None] * len(prompts)
    return [transcript(turns) if turns else text for text, turns in zip(prompts, conversations, strict=True)]
