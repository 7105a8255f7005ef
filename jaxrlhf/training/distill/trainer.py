"""On-policy distillation: a student learns a teacher's next-token probabilities, on completions of its own."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import distributed, sharding
from jaxrlhf.config import DistillConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, SFTRow, Split, prompt_rows, sft_rows
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.models import init
from jaxrlhf.training import setup
from jaxrlhf.training.distill.update import Objective, evaluate, update
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.session import Metrics
from jaxrlhf.training.supervised import SupervisedTrainer
from jaxrlhf.training.teacher import load_teacher, teacher_model
from jaxrlhf.types import Batch

KEYS = (
    "loss",
    "entropy",
    *(f"distill/{name}" for name in ("forward_kl", "reverse_kl", "teacher_entropy", "agreement")),
)
ROLLOUT = 2**31 - 1  # folded into the key of a step, for its responses
EVALUATION = 2**30  # folded into the run's key in place of a step


def read_rows(config: DistillConfig, tokenizer: Tokenizer) -> Split[Any]:
    """Prompts, if the student samples every completion, else sequences with completions. Raises DataError."""
    if config.distill.lmbda == 1:
        return prompt_rows(config.data, tokenizer)
    try:
        rows = sft_rows(config.data, tokenizer, completion_only=True)
    except DataError as error:
        raise DataError(
            f"{error}\nWith distill.lmbda {config.distill.lmbda:g}, completions of the data are trained on too; for "
            "prompts alone set distill.lmbda to 1"
        ) from error
    without = [row for row in (*rows.train, *rows.validation) if not _prompt(row)]
    if config.distill.lmbda > 0 and without:
        raise DataError(
            f"data {config.data.name}: {len(without)} rows are whole texts without a prompt, and distill.lmbda is "
            f"{config.distill.lmbda:g}: the student has nothing to complete. Give prompts with completions, or set "
            "distill.lmbda to 0"
        )
    return rows


class DistillTrainer(SupervisedTrainer[DistillConfig]):
    """Train `config.model` to have the next-token probabilities of `config.teacher`: `.train()`, then
    `.save_pretrained(directory)`.

    Errors in the config, the data or the models are raised here, before training begins.
    """

    def __init__(self, config: DistillConfig, *, fresh: bool = False) -> None:
        super().__init__(config, role="policy", head="lm", fresh=fresh)
        config = self.config
        self.data = read_rows(config, self.tokenizer)
        every = (*self.data.train, *self.data.validation)
        prompt = max(len(_prompt(row)) for row in every) if config.distill.lmbda else 0
        sampled = prompt + config.sampling.response_length if prompt else 0
        self.use_rows(self.data, [f"eval/{key}" for key in KEYS], texts=1, sampled=sampled)
        longest = max(sampled, *map(batching.row_length, every))
        if not config.teacher.path:
            raise ConfigError(
                "teacher.path is empty; give the folder, run directory or hub id of the model to learn from"
            )
        place = self.tokenizer, config.model.path, self.mesh, longest
        self.objective = Objective(config.distill, teacher_model(config.teacher, "teacher", *place))
        self.sampler = Sampler(config, self.model, self.tokenizer, self.mesh, prompt)
        self.samples = Samples(self.data, config, self.model, self.tokenizer, self.mesh)
        self.load(self.objective)
        self.teacher = load_teacher(config.teacher, self.objective.teacher, self.mesh)

    def _first_row(self) -> list[str]:
        row = self.data.train[0]
        completion = row.tokens[len(_prompt(row)) :]
        lines = ["first prompt:", self.tokenizer.decode(_prompt(row))]
        return [*lines, "its completion:", self.tokenizer.decode(completion)] if completion else lines

    def about(self) -> str:
        teacher, settings = self.objective.teacher, self.config.teacher
        millions = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(teacher, self.key)))) / 1e6
        stored = teacher.dtype if settings.quantize == "none" else settings.quantize
        return f"{super().about()}\nteacher {settings.path}: {teacher.family}, {millions:.1f} M parameters, {stored}"

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last metrics."""
        with self.session(teacher=setup.params_fingerprint(self.teacher)) as session:
            self._resume(session)
            for step in session.steps():
                with session.interruptible(step):
                    batch, drawn = self.batch(step)
                self.state.value, metrics = update(
                    self.state.value, self.frozen, self.teacher, batch, self.key, spec=self.spec
                )
                self._end_step(session, step + 1, metrics | drawn | self.epochs(step + 1))
            self._results = session.finish()
            if session.restore_best():
                self._results |= self._evaluate()
            session.export(self.save_pretrained)
        return self._results

    def batch(self, step: int) -> tuple[Batch, Metrics]:
        """The training batch of a step, on the mesh, and metrics of the student's responses, if it has drawn them."""
        rows = [self.rows.train[i] for i in self.order(step)]
        if not self.on_policy(step):
            return self.collate(rows), {"distill/on_policy": 0.0}
        key = jax.random.fold_in(jax.random.fold_in(self.key, step), ROLLOUT)
        return self.respond(rows, key)

    def on_policy(self, step: int) -> bool:
        """Return True if the student draws the completions of a step: a function of the seed and the step."""
        return np.random.default_rng((self.config.seed, step)).random() < self.config.distill.lmbda

    def respond(self, rows: Sequence[SFTRow | PromptRow], key: jax.Array) -> tuple[Batch, Metrics]:
        """A batch of the prompts of rows with completions from the student, and metrics of these."""
        jax.block_until_ready(self.state.value)  # the update before is not part of the rollout's time
        started = time.monotonic()
        rollout, _ = self.sampler.generate(self.params, self.prompts(rows), key)
        lengths = sharding.fetch(rollout.response_mask).sum(1)
        seconds = time.monotonic() - started
        before = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
        loss_mask = jax.numpy.pad(rollout.response_mask, [(0, 0), (before, 0)])
        metrics = {
            "distill/on_policy": 1.0,
            "tokens/mean_length": float(lengths.mean()),
            "tokens/finished": float(np.mean(sharding.fetch(rollout.finished))),
            "perf/rollout_seconds": seconds,
            "perf/response_tokens_per_second": float(lengths.sum()) / seconds,
        }
        return Batch(tokens=rollout.tokens, mask=rollout.mask, loss_mask=loss_mask), metrics

    def prompts(self, rows: Sequence[SFTRow | PromptRow]) -> list[PromptRow]:
        """The prompts of rows, numbered by their place in the batch, for their random keys."""
        return [PromptRow(tokens=_prompt(row), text="", columns={}, index=i) for i, row in enumerate(rows)]

    def collate(self, rows: Sequence[SFTRow]) -> Batch:
        """A batch of these rows, on the mesh."""
        return sharding.put_rows(batching.batch(rows, self.tokenizer.pad_id, self.padded_length(rows)), self.mesh)

    def eval_batches(self) -> Iterator[Batch]:
        """Batches of the held-out rows, the last one filled up with rows without a loss mask. The student completes
        prompts that have no completions, with the same random keys in each evaluation."""
        size, rows = self.config.train.eval_batch_size, self.rows.validation
        for number, part in enumerate(rows[i : i + size] for i in range(0, len(rows), size)):
            distributed.check_stop()
            filled = [*part, *[part[0]] * (size - len(part))]
            if self.config.distill.lmbda < 1:
                blank = dataclasses.replace(part[0], loss_mask=[False] * len(part[0].tokens))
                yield self.collate([*part, *[blank] * (size - len(part))])
                continue
            key = jax.random.fold_in(jax.random.fold_in(self.key, EVALUATION), number)
            batch, _ = self.respond(filled, key)
            real = sharding.put_rows(np.arange(size) < len(part), self.mesh)
            yield dataclasses.replace(batch, loss_mask=batch.loss_mask & real[:, None])

    def _evaluate(self) -> dict[str, float]:
        """Token-weighted means of the metrics over the held-out rows; empty if there are none."""
        counted = [
            evaluate(self.params, self.teacher, batch, model=self.model, objective=self.objective)
            for batch in self.eval_batches()
        ]
        total = max(sum(float(tokens) for tokens, _ in counted), 1)
        keys = counted[0][1] if counted else ()
        return {f"eval/{k}": sum(float(n) * float(m[k]) for n, m in counted) / total for k in keys}


def _prompt(row: SFTRow | PromptRow) -> list[int]:
    """The tokens before the last completion of a row: before the last run of tokens under its loss mask. Empty for a
    text that is a completion from its first token on."""
    if isinstance(row, PromptRow):
        return row.tokens
    mask = np.asarray(row.loss_mask)
    starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
    start = int(starts[-1]) if len(starts) else 0
    return row.tokens[:start] if start > 1 else []
