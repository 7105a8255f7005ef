"""The base class of the SFT, reward, DPO and distillation trainers: setup, batches, session and export."""

import abc
import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from jaxrlhf import runs, sharding, traced, weights
from jaxrlhf.config import DistillConfig, DPOConfig, RewardConfig, SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import Split
from jaxrlhf.data.packing import pack
from jaxrlhf.models import for_length
from jaxrlhf.training import by_length, pretrained, setup
from jaxrlhf.training.abstract import build
from jaxrlhf.training.adapters import add_adapters, split_trainable
from jaxrlhf.training.best import check_metric, metric_of
from jaxrlhf.training.by_length import Budget
from jaxrlhf.training.facts import Origin
from jaxrlhf.training.optim import make_optimizer, warmup_warnings
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.session import TEMPLATE, Metrics, Session, open_session
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Spec
from jaxrlhf.types import Params

Config = TypeVar("Config", SFTConfig, RewardConfig, DPOConfig, DistillConfig)
FEW_HELD_OUT = 5  # rows below which the best state is a matter of chance


class SupervisedTrainer(abc.ABC, Generic[Config]):
    """Mesh, tokenizer and model of a run; a subclass adds rows, parameters and its `train`.

    `role` is the model that trains. Raises ConfigError for batches that the mesh cannot split.
    """

    samples: Samples | None = None
    """Completions of held-out prompts; a reward model has none."""

    def __init__(self, config: Config, *, role: Literal["policy", "reward"], head: str, fresh: bool) -> None:
        runs.check_processes(config)
        self.config = config = runs.with_template_date(config, fresh)
        self.role, self._fresh = role, fresh
        train, self.mesh = config.train, sharding.make_mesh(config.mesh)
        micro = train.micro_batch_size or train.batch_size
        sharding.check_rows(micro, self.mesh, "train.micro_batch_size, or train.batch_size without it")
        sharding.check_rows(train.eval_batch_size, self.mesh, "train.eval_batch_size")
        self._micro_batches: int | Budget = train.batch_size // micro
        if train.micro_batch_tokens:
            shards = sharding.row_shards(self.mesh)
            self._micro_batches = Budget(train.micro_batch_tokens, shards, "train.micro_batch_tokens")
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.model = setup.model_config(config.model, self.tokenizer, head, config.lora, self.mesh)
        _, self.key, _, self._lora_key = setup.keys(config.seed)
        self._results: dict[str, float] = {}
        self._origin: Origin | None = None  # once `.train()` has opened the run

    def use_rows(self, rows: Split[Any], evaluations: Collection[str], *, texts: int, sampled: int = 0) -> None:
        """Train on `rows`, packed if `train.packing`. `evaluations` are the metrics of held-out rows, `texts` the
        number of texts in a row of a batch, `sampled` the tokens of the longest text that the model samples to train on
        (0: none). Raises ConfigError for texts longer than the model's context."""
        train = self.config.train
        setup.check_data(self.model, rows.train, rows.validation)
        check_metric(self.config, evaluations, bool(rows.validation))
        longest = max(map(batching.row_length, chain(rows.train, rows.validation)))
        setup.check_context(longest, self.model, "the longest row", "data.max_length")
        self.model = for_length(self.model, max(longest, sampled))
        context = self.model.max_positions  # limits a text; a packed row, whose positions restart, may be longer
        limit = min(self.config.data.max_length, context) if train.packing else longest
        self._columns = batching.bucket(limit, context)
        self.width = texts * self._columns
        """Columns of all texts of the longest row together, or of every packed row."""
        if not sampled:  # with rollouts between steps it was not measured
            rows_at_once = train.micro_batch_size or train.batch_size
            tokens = train.micro_batch_tokens or rows_at_once * self.width
            self.model = setup.with_kept_products(self.model, self.config, tokens)
        if isinstance(self._micro_batches, Budget):
            texts = max(len(batching.texts(row)) for row in rows.train)
            by_length.shapes(self._micro_batches, self._columns, train.batch_size, texts)
        if train.packing:
            rows = pack(rows, batching.texts, self.width, train.batch_size)
            self._max_pairs = max(len(row.lengths) // 2 for row in chain(rows.train, rows.validation))
        self.rows = rows
        steps = max(1, math.ceil(len(rows.train) * train.num_train_epochs / train.batch_size))
        self.total_steps = min(steps, train.max_steps or steps)
        """Optimizer steps of `.train()`; the last batch is filled up from the next epoch."""
        self.eval_every = train.eval_every or math.ceil(len(rows.train) / train.batch_size)
        free = not (train.packing or sampled or train.micro_batch_tokens)
        self.widths = self._few_widths(texts) if free else ()
        """Columns of the texts of a batch, of which it takes the least that it fits in; empty: those of
        `batching.bucket`."""

    def _few_widths(self, texts: int) -> tuple[int, ...]:
        def longest(step: int) -> int:
            return max(batching.row_length(self.rows.train[i]) for i in self.order(step))

        rows, limit = texts * self.config.train.batch_size, self.model.max_positions
        chosen = setup.few_widths(longest, self.total_steps, rows, self.model, self.mesh, limit)
        return tuple(sorted({*chosen, self._columns}))

    def load(self, objective: Any = None, *, frozen_trunk: bool = False, **more: Any) -> None:
        """Read or initialise the parameters, and split them into `state`, with `more` fields, and `frozen`."""
        config = self.config
        optimizer = make_optimizer(config.optim, config.optim.learning_rate, self.total_steps)
        spec = Spec(self.model, optimizer, self._micro_batches, self.mesh, objective)
        self.spec = traced.place(spec, self.mesh)
        params = setup.load_model(config, self.tokenizer, self.mesh, self.model.head)
        params = build(lambda p: add_adapters(p, self.model, config.lora, self._lora_key), self.mesh, params)
        trained, self.frozen = split_trainable(params, frozen_trunk or config.lora.enabled)
        self.state = State({self.role: trained}, {self.role: optimizer}, self.mesh, **more)

    @property
    def params(self) -> Params:
        """The current parameters, frozen ones included."""
        return {**self.frozen, **self.state.value.params[self.role]}

    def describe(self) -> str:
        """Model, data and number of steps of `.train()`, and the first row as the model sees it."""
        return "\n".join((self.summary(), *self._first_row()))

    def summary(self) -> str:
        """Model, data and number of steps of `.train()`."""
        return f"{self.about()}\n{self.total_steps} steps"

    @abc.abstractmethod
    def _first_row(self) -> list[str]:
        """Lines that show the first training row."""

    def about(self) -> str:
        """Model, precision, devices, tokenizer and data, one line each, and warnings about a run that is too short."""
        config, train = self.config, self.config.train
        lines = [setup.describe(config, self.model, self.tokenizer, self.rows.report, self.mesh)]
        if self.widths:
            lines.append(f"width of batches: {' or '.join(map(str, self.widths))} tokens")
        if self.total_steps < (train.max_steps or 0):
            lines.append(
                f"{self.total_steps} steps, fewer than train.max_steps ({train.max_steps}): train.num_train_epochs "
                f"({train.num_train_epochs:g}) ends before it"
            )
        lines += warmup_warnings(config.optim, self.total_steps)
        held_out = len(self.rows.validation)
        if train.keep_best and 0 < held_out < FEW_HELD_OUT:
            lines.append(
                f"warning: which state is kept is decided by {metric_of(config)} on {held_out} held-out "
                f"row{'s' * (held_out > 1)}; so few say little, and of equal values the first one wins. Hold out more, "
                "or set train.keep_best to false"
            )
        return "\n".join(lines)

    @contextlib.contextmanager
    def session(self, **identity: str) -> Iterator[Session]:
        """The run while it is open. `identity` adds hashes to those of the rows and the frozen parameters."""
        identity |= {
            TEMPLATE: self.tokenizer.template_digest,
            "data": setup.fingerprint(chain(self.rows.train, self.rows.validation)),
            "frozen parameters": setup.params_fingerprint(self.frozen),
        }
        with open_session(self.config, self.total_steps, self.state, identity, fresh=self._fresh) as session:
            self._origin = Origin(session.directory, identity["data"])
            session.describe(self.about())
            yield session

    @abc.abstractmethod
    def _evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows; empty if there are none."""

    def _resume(self, session: Session) -> None:
        """Restore the newest state, and end its step if a signal has ended its evaluation or samples."""
        session.resume()
        step = int(self.state.value.step)
        if session.pending:
            self._end_step(session, step, session.pending["record"])
        elif session.undrawn:
            self._log_samples(session, step, {})

    def _end_step(self, session: Session, step: int, metrics: Metrics) -> None:
        """Evaluate, log, sample and save what is due after step number `step` (from 1), whose metrics are given."""
        evaluation = {}
        if session.due(step, self.eval_every):
            with session.evaluating(step, metrics):
                evaluation = self._evaluate()
        session.log(step, metrics | evaluation)
        self._log_samples(session, step, evaluation)
        session.save_if_due(step, evaluation)

    def _log_samples(self, session: Session, step: int, evaluation: Metrics) -> None:
        """Draw and log samples of the state after `step` if they are due; a run keeps its `evaluation`, too."""
        if self.samples and session.samples_due(step):
            with session.sampling(step, evaluation):
                self.samples.log(session, step, self.params, self.key)

    def order(self, step: int) -> list[int]:
        """The numbers of the rows that a step trains on."""
        config = self.config
        return self.rows.rows_at(step, config.train.batch_size, config.seed, config.data.shuffle)

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over the rows, and over each data set of a mixture, after `step` steps."""
        return self.rows.epochs(step * self.config.train.batch_size)

    @property
    def columns(self) -> int | None:
        """Columns of the texts of a training batch; None: what its longest row needs. Micro-batches of a budget are cut
        to what they need, so that batches of one width, and one program, do."""
        return self._columns if isinstance(self._micro_batches, Budget) else None

    def padded_length(self, rows: Sequence[Any]) -> int:
        """Columns of a batch of these rows, unless they are packed."""
        longest = max(map(batching.row_length, rows))
        fitting = (width for width in self.widths if width >= longest)
        return next(fitting, batching.bucket(longest, self.model.max_positions))

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the model, its config and its tokenizer in Hugging Face layout; only what trains of a LoRA run unless
        `merge_lora`. A reward model is written as a sequence classification model."""
        return pretrained.save(
            directory,
            self.model,
            self.params,
            self.config,
            self.tokenizer,
            step=int(self.state.value.step),
            results=self._results,
            origin=self._origin,
            merge_lora=merge_lora,
        )
