"""What all trainers share while they run: an open run directory, logging one step late, saving, stopping, the end."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import jax

from jaxrlhf import checkpoint, compilation, runs
from jaxrlhf.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, NumericsError, Preempted, StorageError
from jaxrlhf.metrics import Logger, read_records
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.training.state import State
from jaxrlhf.types import TrainState

Metrics = dict[str, Any]
Best = Literal["min", "max"] | None
LESS_IS_BETTER = ("eval/loss", "eval/nll_loss", "eval/entropy", "eval/ece", "eval/absolute_error", "eval/kl")
MAX_SKIPPED = 5  # records in a row with a step skipped for non-finite numbers, before a run gives up


class Session:
    """An open run: its lock and directory, its log, its checkpoints, and the request to stop.

    Metrics are fetched one step late, so that the device works on step n + 1 while step n is written. They are always
    written before a checkpoint of their step, so a resumed run never misses a line.
    """

    def __init__(
        self,
        run: runs.Run,
        config: RunConfig,
        method: str,
        total_steps: int,
        state: State,
        identity: dict[str, str],
    ) -> None:
        self.run, self.config, self.total_steps = run, config, total_steps
        self.logger = Logger(run.directory, config.logging, method, total_steps)
        self.identity, self.best = identity, best_of(config)
        policy = config.checkpoint
        short = policy.synchronous == "auto" and checkpoint.short_of_memory(state.template)
        self.checkpoints = checkpoint.Checkpoints(
            run.directory / "checkpoints", policy.keep, short or policy.synchronous == "always", self.best
        )
        self.watch: Callable[[Metrics], tuple[Metrics, list[str]]] | None = None
        """What looks at each record before it is written: marks to add to it, and lines to say."""
        self._pending: tuple[int, Metrics] | None = None
        self._skipped = 0.0

    def resume(self, state: State) -> int:
        """Take up the newest whole checkpoint, if there is one, and cut the logs back to it. Returns its step, or 0."""
        found = self.checkpoints.restore(state.template)
        step = 0
        if found:
            changed = [what for what, value in self.identity.items() if found[2].get(what, value) != value]
            if changed:
                raise StorageError(
                    f"{self.run.directory} was started with other {' and '.join(changed)} than there is now, under the "
                    "same config: the file, or the model it names, has changed since. Put the old one back, or start "
                    "over with --fresh"
                )
            step, state.value, _ = found
            self.logger.note(f"resuming at step {step} of {self.total_steps} (--fresh starts over)")
        for note in self.run.notes:
            self.logger.note(note)
        self.logger.rewind(step)
        for record in reversed(
            self.records()
        ):  # of a run that was given up, the same command does not start a new count
            if not record.get("skipped_updates"):
                break
            self._skipped += 1
        return step

    def records(self) -> list[Metrics]:
        """What has been logged so far."""
        return read_records(self.run.directory / "metrics.jsonl")

    def last(self) -> Metrics:
        """The last record in the log: what a run that is already finished ended with; empty in a new run."""
        records = self.records()
        return {key: value for key, value in records[-1].items() if key != "step"} if records else {}

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand over a step's metrics (the device may still compute them) and write those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Write what is waiting. Raises NumericsError after too many skipped updates in a row."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        marks, lines = self.watch(values) if self.watch else ({}, [])
        self.logger.log(step, values | marks)
        for line in lines:
            self.logger.note(f"step {step}: {line}")
        skipped = values.get("skipped_updates", 0.0)
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped >= MAX_SKIPPED:
            raise NumericsError(
                f"non-finite losses or gradients in {MAX_SKIPPED} steps in a row (last: step {step}). Those were "
                "left out, but whatever led there was learnt: look at the metrics before them, lower "
                "optim.learning_rate or mend data and rewards, and start over with --fresh"
            )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        every = self.config.checkpoint.save_every
        return step == self.total_steps or (every > 0 and step % every == 0)

    def save(self, step: int, state: TrainState, metric: float | None = None, *, block: bool = False) -> None:
        """Commit `state` as the checkpoint of `step`. With `block`, and at the last step, a failure raises at once."""
        self.flush()
        block = block or step == self.total_steps
        self.checkpoints.save(step, state, self.identity, metric=metric, block=block)

    def take_best(self, state: State) -> bool:
        """Put the best kept state in `state`, if one is kept, and say so; whether there was one."""
        self.checkpoints.wait()
        if self.checkpoints.best_step is None:
            return False
        step, state.value, _ = self.checkpoints.restore_step("best", state.template)
        self.logger.note(f"kept the best state, of step {step}")
        return True

    def stop_if_asked(self, step: int, state: TrainState, *, saved: bool = False) -> None:
        """Save and raise Preempted if a signal asked the run to stop. `state` is that of the boundary after `step`."""
        if self.run.stopping:
            if not saved:
                self.save(step, state, block=True)
            raise Preempted(f"stopped after step {step} of {self.total_steps}; the same command goes on from there")

    def close(self) -> None:
        """Wait for pending saves and close the files."""
        try:
            self.checkpoints.close()
        finally:
            self.logger.close()


@contextlib.contextmanager
def session(
    config: RunConfig,
    method: str,
    total_steps: int,
    state: State,
    identity: dict[str, str],
    *,
    fresh: bool,
) -> Iterator[Session]:
    """Open the run directory of `config` for `method`; when the block ends pending saves land and the lock goes.

    `identity` names what a config does not pin down (the content of the data, frozen parameters) and a hash of each: a
    run is not resumed with another.
    """
    with runs.open_run(config, method, fresh) as run:
        opened = Session(run, config, method, total_steps, state, identity)
        try:
            with compilation.announce(opened.logger.note):
                yield opened
            opened.flush()
        finally:
            opened.close()


def best_of(config: RunConfig) -> Best:
    """What makes a checkpoint of this run the best, which is then kept beside the newest: its metric is least or
    greatest. None: none is best."""
    if isinstance(config, PPOConfig | GRPOConfig):
        return config.validation.mode if config.validation.keep_best else None
    if not config.train.keep_best:
        return None
    if config.train.mode != "auto":
        return config.train.mode
    return "min" if metric_of(config) in LESS_IS_BETTER else "max"


def metric_of(config: SFTConfig | RewardConfig | DPOConfig) -> str:
    """The key of the records of an evaluation that says which state is the best."""
    match config:
        case DPOConfig():
            usual = "eval/rewards/margins" if config.dpo.loss == "kto" else "eval/rewards/accuracies"
        case RewardConfig():
            usual = "eval/loss" if config.loss == "regression" else "eval/accuracy"
        case SFTConfig():
            usual = "eval/loss"
    return config.train.metric or usual


def check_metric(config: SFTConfig | RewardConfig | DPOConfig, known: Collection[str], held_out: bool) -> None:
    """Refuse a `train.metric` that no evaluation gives; `known` are the keys of one, `held_out`: there will be any."""
    metric = config.train.metric
    if metric and not held_out:
        raise ConfigError(
            f"train.metric is '{metric}' but there are no held-out rows to measure it on; give data.validation_path or "
            "data.validation_fraction"
        )
    if metric and metric not in known:
        raise ConfigError(
            f"train.metric: no evaluation here gives '{metric}'{did_you_mean(metric, sorted(known))}; there are "
            f"{', '.join(sorted(known))}"
        )


def fit(
    session: Session,
    state: State,
    *,
    update: Callable[[int], Metrics],
    evaluate: Callable[[], Metrics] | None,
    eval_every: int,
    samples: Callable[[], list[dict[str, Any]]] | None,
) -> Metrics:
    """Run what is left of supervised training (SFT, reward models, preferences); return the last step's metrics.

    `update(step)` moves `state` on from step to step + 1. `evaluate` runs every `eval_every` steps and at the end, and
    what it says of `metric_of` the run goes into a checkpoint made at that moment. `samples` runs every
    `logging.sample_every` steps. If the session keeps the best state, `state` is that one in the end.
    """
    config = session.config
    assert not isinstance(config, PPOConfig | GRPOConfig)
    total, sample_every = session.total_steps, config.logging.sample_every
    done = session.resume(state)
    record = session.last()
    for step in range(done + 1, total + 1):
        record = update(step - 1)
        results = evaluate() if evaluate and (step % eval_every == 0 or step == total) else {}
        record |= results
        session.log(step, record)
        if samples and sample_every and (step % sample_every == 0 or step == 1):
            session.flush()
            session.logger.samples(step, samples())
        saved = session.due(step) or (bool(results) and session.best is not None)
        if saved:
            worth = float(results[metric_of(config)]) if results and session.best else None
            session.save(step, state.value, worth)
        session.stop_if_asked(step, state.value, saved=saved)
    session.flush()
    if session.take_best(state):
        record |= evaluate() if evaluate else {}
    return record


def num_steps(num_rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps for so many epochs over an endless stream of rows, the last one filled from the next epoch."""
    steps = max(1, math.ceil(num_rows * epochs / batch_size))
    return min(steps, max_steps) if max_steps else steps


def weighted_mean(records: list[tuple[float, Metrics]]) -> Metrics:
    """Means over batches of different weight: [(count, {key: mean over count})] -> {key: mean over all}."""
    total = sum(count for count, _ in records)
    return {k: sum(count * float(m[k]) for count, m in records) / max(total, 1) for k in records[0][1]}
