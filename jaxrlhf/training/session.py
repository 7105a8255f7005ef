"""A training run while it is open: its directory, log, checkpoints, evaluation schedule and requests to stop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf import checkpoint, compilation, distributed, memory, metrics, report, runs, sharding
from jaxrlhf.config import GRPOConfig
from jaxrlhf.errors import Interrupted, Preempted, RewardError, StorageError
from jaxrlhf.metrics.keys import EPOCHS
from jaxrlhf.runs import wallclock
from jaxrlhf.training.best import best_of, checkpoints_at_once, metric_of
from jaxrlhf.training.health import Health
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.training.state import State
from jaxrlhf.training.timing import Timing
from jaxrlhf.training.unfinished import PENDING, UNDRAWN, left_to_do, pending

Metrics = dict[str, Any]
TEMPLATE = "chat template"
REPORT_EVERY = 30.0  # least seconds between two reports of a run


class Session:
    """An open run: its directory and log, and checkpoints of its `state`, which the trainer updates.

    Metrics are fetched from the device one step late, so that the device computes step n + 1 while step n is written.
    They are always written before a checkpoint of their step, so a resumed run never misses a line.
    """

    def __init__(
        self,
        run: runs.Run,
        config: RunConfig,
        total_steps: int,
        state: State,
        identity: dict[str, str],
    ) -> None:
        self.directory, self.config, self.total_steps = run.directory, config, total_steps
        self._state = state
        self.best, self.metric = best_of(config), metric_of(config)
        arguments = run.directory, config.logging, config.method, total_steps, self.metric
        self.logger: Any = metrics.Logger(*arguments) if distributed.is_primary() else metrics.Silence()
        self.note = self.logger.note
        self.watch: Callable[[Metrics], tuple[Metrics, list[str]]] | None = None
        """Alarms: called with each record before it is written; returns metrics to add and lines to print."""
        self.run, self._identity = run, identity
        policy = config.checkpoint
        synchronous = policy.synchronous == "always"
        synchronous |= policy.synchronous == "auto" and checkpoint.short_of_memory(state.template)
        self._checkpoints = checkpoint.Checkpoints(run.directory / "checkpoints", policy.keep, synchronous, self.best)
        self._pending: tuple[int, Metrics] | None = None
        self._record: Metrics = {}  # the last one
        self.pending: dict[str, Any] = {}
        """After `resume`: `record` and `samples` of its step, whose evaluation a signal ended."""
        self.undrawn = False
        """After `resume`: a signal ended the drawing of samples of its step, whose record is logged."""
        self._left: dict[str, Any] = {}  # the same, as it is in the checkpoint, until it is done
        self._stop = distributed.Request()
        self._health = self._new_health([])
        self._saved_at = time.monotonic()  # or the start of the run
        self._timing = Timing(run, config, total_steps, self.note)
        self.clock = self._timing.clock
        self._repeated = wallclock.REPEATED  # parts of the time since the last record that are lost if the run ends
        self.done = False
        self._report_due = 0.0  # time when the next report may be written

    def resume(self) -> None:
        """Restore the state from the newest valid checkpoint, if there is one, and cut the logs back to its step."""
        distributed.on_primary(self._checkpoints.remove_unfinished)
        with self.clock.spent("restore"):
            restored = self._checkpoints.restore(self._state.template)
        step, identity = 0, {}
        if restored:
            step, value, identity = restored
            changed = [name for name, digest in self._identity.items() if identity.get(name, digest) != digest]
            if changed and changed != [TEMPLATE]:  # a template that renders the same rows may change
                raise StorageError(
                    f"{self.directory} was started with other {' and '.join(changed)} under the same config: the file, "
                    "or the model it names, has changed since. Restore the old one, or start over with --fresh"
                )
            self._state.value = value
            finished = step == self.total_steps
            self.note(
                f"already finished: step {step} of {self.total_steps} is done, so only the end is repeated (--fresh "
                "starts over)"
                if finished
                else f"resuming at step {step} of {self.total_steps} (--fresh starts over)"
            )
        shortage = self._checkpoints.shortage(self._state.template, checkpoints_at_once(self.config))
        shortage = shortage if step < self.total_steps else ""
        for note in (*self.run.notes, *filter(None, [shortage])):
            self.note(note)
        self._left = left_to_do(identity)
        self.pending, self.undrawn = pending(self._left), UNDRAWN in self._left
        later = self.logger.rewind(step, repeated=bool(self.pending), samples=self._left.get(UNDRAWN))
        records = self.records()
        self._timing.resume(step, records, later or ())
        self._health = self._new_health(records)
        self.report()
        self.clock.begin("training")

    def _samples_of(self, step: int) -> int:
        """Number of samples of a step that are logged."""
        path = self.directory / metrics.SAMPLES_FILE
        return distributed.on_primary(lambda: [row["step"] for row in metrics.read_records(path)].count(step))

    def _new_health(self, before: Sequence[Metrics]) -> Health:
        flat = self.config.alarms.flat_steps if isinstance(self.config, GRPOConfig) else 0
        return Health(self.config.optim.idle_steps, flat, self.total_steps, before)

    def describe(self, text: str) -> None:
        """Print what the run trains and on what, and keep it in run.json."""
        self.run.record(about=text)
        self.note(text)

    def report(self, *, due: bool = False) -> None:
        """Write report.html, unless `logging.report` is false. With `due` only if the last one is REPORT_EVERY seconds
        old, or more if it took long to write."""
        started = time.monotonic()
        if not (self.config.logging.report and distributed.is_primary()) or (due and started < self._report_due):
            return
        try:
            with self.clock.spent("other"):
                report.write(self.directory)
                memory.release_free_memory()  # columns of the log, of which glibc would keep some
        except Exception as error:  # a run does not end for its report
            self.note(f"{self.directory / report.REPORT} could not be written: {type(error).__name__}: {error}")
        ended = time.monotonic()
        self._report_due = ended + max(REPORT_EVERY, 50 * (ended - started))

    def steps(self) -> range:
        """The remaining steps, each by the number of steps done before it."""
        return range(int(self._state.value.step), self.total_steps)

    def due(self, step: int, every: int) -> bool:
        """Return True if an action that happens every `every` steps (0: only at the end) is due after step `step`."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    def records(self) -> list[Metrics]:
        """The records logged so far."""
        return distributed.on_primary(lambda: metrics.read_records(self.directory / "metrics.jsonl"))

    def record_of(self, step: int) -> Metrics:
        """The logged record of `step`, without the step; empty if there is none."""
        return next(({k: v for k, v in r.items() if k != "step"} for r in self.records() if r["step"] == step), {})

    def log(self, step: int, record: Metrics) -> None:
        """Queue the metrics of `step`, which the device may still be computing, and write those of the step before."""
        self.flush()
        times = self.clock.take()
        self._record = record | {wallclock.PREFIX + part: seconds for part, seconds in times.items()}
        self._pending = step, self._record

    def flush(self) -> None:
        """Write the queued metrics. Raises NumericsError if the last steps taught nothing (`Health`)."""
        if self._pending is None:
            return
        (step, record), self._pending = self._pending, None
        with self.clock.spent("training"):  # waits for the step
            values = {k: float(v) for k, v in sharding.fetch(record).items()}
        marks, lines = self.watch(values) if self.watch else ({}, [])
        idle, warnings = self._health(step, values)
        self.logger.log(step, values | marks | idle)
        self._timing.logged(values)
        for line in [*lines, *warnings]:
            self.note(f"step {step}: {line}")
        if any(key.startswith("eval/") for key in values):
            self.report(due=True)
        self.run.record_saved()
        self._health.check()

    def _flushed(self) -> Metrics:
        """Write the queued metrics; returns the last record."""
        self.flush()
        return self._record

    def log_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Write and print sample completions of `step`, after its metrics."""
        self.flush()
        self.logger.samples(step, samples)
        self.report(due=True)

    def log_tokens(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Write the token records of `step`, after the metrics of the step before it."""
        self.flush()
        self.logger.tokens(step, records)

    def samples_due(self, step: int) -> bool:
        """Return True if samples are due after `step`: the first one and every `logging.sample_every` steps."""
        every = self.config.logging.sample_every
        return every > 0 and (step == 1 or step % every == 0)

    def save_due(self, step: int, *, evaluated: bool) -> bool:
        """Return True if a checkpoint of `step`, evaluated or not, is due."""
        return self.due(step, self.config.checkpoint.save_every) or (evaluated and self.best is not None)

    def save_if_due(self, step: int, evaluation: Metrics) -> None:
        """End step number `step`: write a checkpoint if one is due, and stop if the run was asked to.

        With an `evaluation` of the state (else empty) it is also saved if the run keeps its best state. Raises
        Preempted once the state is saved.
        """
        self._timing.end_step(self._flushed)
        saved = self.save_due(step, evaluated=bool(evaluation)) or self._minutes_passed() or bool(self._left)
        self._left = {}
        if saved:
            self.save(step, self._metric(evaluation))
        self.stop_if_asked(step, saved=saved)

    def _minutes_passed(self) -> bool:
        """Return True if a checkpoint is due by `checkpoint.save_minutes`, by the clock of process 0."""
        seconds = 60 * self.config.checkpoint.save_minutes
        return seconds > 0 and distributed.on_primary(lambda: time.monotonic() - self._saved_at >= seconds)

    def save(self, step: int, metric: float | None = None, *, block: bool = False) -> None:
        """Commit the checkpoint of `step`. With `block`, and at the last step, a failure raises at once."""
        self.flush()
        block = block or step == self.total_steps
        started = time.monotonic()
        with self.clock.spent("save"):
            self.logger.sync()
            self._checkpoints.save(step, self._state.value, self._identity | self._left, metric=metric, block=block)
        self._saved_at = time.monotonic()
        if not block:
            self._timing.saved(step, self._saved_at - started, self.records)

    def stopping(self) -> bool:
        """Return True if a signal asked the run to stop, in any process: all of them call this."""
        return self._stop.seen(self.run.stopping)

    def stop_if_asked(self, step: int, *, saved: bool = False) -> None:
        """Save the state, which is that of `step`, and raise Preempted if a signal asked the run to stop."""
        if self.stopping():
            if not saved:
                self.save(step, block=True)
            raise self._preempted(step)

    @contextlib.contextmanager
    def interruptible(self, step: int) -> Iterator[None]:
        """Block that begins with the state after `step` steps and waits for rollouts and rewards only before it has
        replaced it: a signal ends that wait, the state is saved, and Preempted raised. A RewardError is treated as in
        `save_on_reward_error`."""
        try:
            with self.save_on_reward_error(step), distributed.stoppable():
                yield
        except Interrupted:
            if not step:
                raise Preempted("stopped before the first step; run the same command again to start over") from None
            self.save(step, block=True)
            raise self._preempted(step) from None

    @contextlib.contextmanager
    def evaluating(self, step: int, record: Metrics, samples: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
        """Block that evaluates the state after `step` steps, whose `record` and `samples` are logged after it. A signal
        ends it: the state is saved, Preempted raised, and a resumed run evaluates first (`pending`); the result becomes
        that of the checkpoint."""
        values = {k: float(v) for k, v in sharding.fetch(record).items()}
        try:
            with self.clock.spent("evaluation"), distributed.stoppable():
                yield
        except Interrupted:
            texts = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}  # JSON has only finite numbers
            self._save_unfinished(step, {PENDING: {"record": texts, "samples": list(samples)}})
            raise self._preempted(step) from None

    @contextlib.contextmanager
    def sampling(self, step: int, evaluation: Metrics) -> Iterator[None]:
        """Block that draws samples of the state after `step` steps, whose record is logged, and logs them at its end. A
        signal ends it: the state, with its `evaluation` (else empty), is saved, Preempted raised, and a resumed run
        draws them first (`undrawn`)."""
        try:
            with self.clock.spent("evaluation"), distributed.stoppable():
                yield
        except Interrupted:
            self._save_unfinished(step, {UNDRAWN: self._samples_of(step)}, self._metric(evaluation))
            raise self._preempted(step) from None
        if UNDRAWN in self._left:
            self._left = {}
            self.save(step)

    def _save_unfinished(self, step: int, left: dict[str, Any], metric: float | None = None) -> None:
        """Save the state after `step` steps, and what is `left` to do for it when the run is resumed."""
        self.flush()
        with self.clock.spent("save"):
            self.logger.sync()
            self._checkpoints.save(step, self._state.value, self._identity | left, metric=metric, block=True)
        self._repeated = ("evaluation",)

    def _metric(self, evaluation: Metrics) -> float | None:
        """The metric of an evaluation that ranks checkpoints; None if there is none."""
        return float(evaluation[self.metric]) if self.metric in evaluation else None

    def _preempted(self, step: int) -> Preempted:
        return Preempted(f"stopped after step {step} of {self.total_steps}; run the same command again to resume")

    def export(self, save: Callable[[Path], Path]) -> Path:
        """Write the export of a run whose last state is saved; returns its folder. Raises Preempted after a signal."""
        try:
            with distributed.stoppable():
                folder = save(self.directory / "export")
                self.note(f"exported to {folder}")
                return folder
        except Interrupted:
            raise Preempted(
                "stopped before the export was complete; the last step is saved: run the same command again to export"
            ) from None

    @contextlib.contextmanager
    def save_on_reward_error(self, step: int, record: Metrics | None = None) -> Iterator[None]:
        """Save the `step` updates done, and log the `record` of the last one, before a RewardError of the block ends
        the run."""
        try:
            yield
        except RewardError as error:
            if not step:
                raise RewardError(f"{error}\nNothing has been trained yet") from error
            if record:
                self.log(step, record)
                self._left = {}
            self.save(step, block=True)
            raise RewardError(
                f"{error}\n{step} updates are saved. Fix the reward and run the same command again to resume."
            ) from error

    def finish(self) -> Metrics:
        """Save the last state. Returns the last record of the log. Raises NumericsError if the last half of the run
        taught nothing."""
        self.flush()
        self._health.at_end()
        step = int(self._state.value.step)
        if not self.due(step, self.config.checkpoint.save_every):
            self.save(step, block=True)
        self.clock.begin("other")
        record = self.record_of(step)
        if mixed := [f"{key.removeprefix(EPOCHS)} {record[key]:.3g}" for key in record if key.startswith(EPOCHS)]:
            self.note(f"epochs of each data set: {', '.join(mixed)}")
        return record

    def restore_best(self) -> bool:
        """Restore the best saved state. Returns False if the run keeps none."""
        with self.clock.spent("save"):
            self._checkpoints.wait()
        if self._checkpoints.best_step is None:
            return False
        with self.clock.spent("restore"):
            step, self._state.value, _ = self._checkpoints.restore_step("best", self._state.template)
        self.note(f"kept the best state, of step {step}")
        return True

    def close(self) -> None:
        """Wait for pending saves, say what the time was spent on, and close the files."""
        with contextlib.closing(self.logger):
            try:
                with self.clock.spent("save"):
                    self._checkpoints.close()
            finally:
                self.run.record_saved()
                begun = self._pending[1] if self._pending else {}
                self._timing.end(None if self.done else begun, self._repeated)


@contextlib.contextmanager
def open_session(
    config: RunConfig, total_steps: int, state: State, identity: dict[str, str], *, fresh: bool
) -> Iterator[Session]:
    """Open the run directory of `config`; at the end of the block pending saves finish and the lock goes.

    `identity` maps the name of each thing that the config does not pin down (data, frozen parameters) to a hash of its
    content: a run does not resume with another.
    """
    with (
        contextlib.ExitStack() as at_the_end,
        runs.open_run(config, config.method, fresh) as run,
        contextlib.closing(Session(run, config, total_steps, state, identity)) as session,
    ):
        at_the_end.callback(session.report)  # when run.json tells how it ended
        with compilation.announce(session.logger.compiled), compilation.timed(session.clock.compiled):
            yield session
        session.flush()
        session.done = True
