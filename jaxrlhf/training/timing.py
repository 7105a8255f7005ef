"""Times of a run: what its seconds are spent on, and warnings about steps and checkpoints that take long."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxrlhf import metrics, runs, sharding
from jaxrlhf.config import DistillConfig, GRPOConfig, PPOConfig
from jaxrlhf.runs import wallclock
from jaxrlhf.training.setup import RunConfig

Record = Mapping[str, Any]


def interruptible_timings(config: RunConfig) -> tuple[str, ...]:
    """Timings of a record, beside those of rewards, during which a signal to stop is seen: those of rollouts. On TPUs
    a rollout without slots is one program (`engine.generate_in_chunks`), whose end a signal waits for."""
    if not isinstance(config, PPOConfig | GRPOConfig | DistillConfig):
        return ()
    if sharding.platform() == "tpu" and not 0 < config.rollout.slots < config.settings.batch_size:
        return ()
    return ("perf/rollout_wait_seconds" if config.rollout.devices else "perf/rollout_seconds",)


class Timing:
    """The clock of a start of a run, and the seconds of all starts, which run.json keeps. `note` prints a line."""

    def __init__(self, run: runs.Run, config: RunConfig, total_steps: int, note: Callable[[str], None]) -> None:
        self.clock = wallclock.Clock()
        self._run, self._config, self._total_steps, self._note = run, config, total_steps, note
        self._times: wallclock.Times = {}  # of the run, up to the last record
        self._apart = interruptible_timings(config)
        self._length_known = False  # it has been said whether a step takes longer than the grace
        self._saves: list[tuple[int, float]] = []  # step and seconds of the first two checkpoints of this start

    def resume(self, step: int, kept: Sequence[Record], removed: Iterable[Record]) -> None:
        """Begin at `step`, with the records that are `kept` up to it and those `removed` after it."""
        content = self._run.content
        self._times = wallclock.before(content["starts"][:-1], content.get("time", {}), kept, removed)
        self._write(step=step, total_steps=self._total_steps)
        if (seconds := wallclock.step_seconds(kept, ["training"], self._apart)) is not None:
            self._warn_of_long_steps(seconds)

    def logged(self, record: Record) -> None:
        """Count the times of a record, which has been written."""
        wallclock.add(self._times, wallclock.of_record(record))

    def end_step(self, record: Callable[[], Record]) -> None:
        """End a step: after the first one say if it takes too long. `record` waits for it and returns its record."""
        if not self._length_known:
            seconds = wallclock.step_seconds([record()], ["training"], self._apart) or 0.0
            self._warn_of_long_steps(seconds + self.clock.since_taken("training"))

    def saved(self, step: int, seconds: float, records: Callable[[], Sequence[Record]]) -> None:
        """Note that the checkpoint of `step` took these seconds; say if the first two were too close to each other for
        what they cost. `records` reads those logged so far."""
        if len(self._saves) == 2:
            return
        self._saves.append((step, seconds))
        (before, _), *second = self._saves
        if second and step > before:  # the first one takes longer
            length = wallclock.step_seconds(records(), ["training", "reward"])
            if length and (warning := wallclock.costly_saves(seconds, length, step - before, self._total_steps - step)):
                self._note(warning)

    def end(self, begun: Record | None, repeated: Sequence[wallclock.Part]) -> None:
        """Write and print what the time of the run was spent on. `begun` is what a run that is not done has begun since
        its last record, None if it is done; its `repeated` parts are lost."""
        if "step" not in self._run.content["starts"][-1]:
            return  # it could not be resumed
        times = self.clock.take()
        if begun is not None:
            wallclock.add(times, wallclock.of_record(begun))
            times = wallclock.repeated(times, repeated)
        wallclock.add(self._times, times)
        with contextlib.suppress(OSError):  # a full disk must not hide the original error
            self._write()
        starts, total = len(self._run.content["starts"]), sum(self._times.values())
        self._note(wallclock.line(self._times, starts, metrics.duration(total)))

    def _write(self, **facts: Any) -> None:
        """Write `facts` of this start to run.json, and what the time of the run was spent on."""
        wallclock.add(self._times, self.clock.take())
        self._run.content["time"] = {part: round(seconds, 3) for part, seconds in self._times.items()}
        self._run.record(**facts)

    def _warn_of_long_steps(self, seconds: float) -> None:
        """Say, once, if a step takes longer than the time that a signal leaves: before the first step of a run that is
        resumed, else after it. `seconds` is the time of a step in which no signal is seen."""
        self._length_known, grace = True, self._config.checkpoint.grace
        if seconds > grace:
            apart = ["rollouts"] * bool(self._apart) + ["rewards"] * isinstance(self._config, PPOConfig | GRPOConfig)
            besides = f" besides its {' and '.join(apart)}" if apart else ""
            self._note(
                f"warning: a step takes {seconds:.0f} s{besides}, and a signal to stop is seen at its end, "
                f"while checkpoint.grace is {grace:g}: a run that is killed then loses the steps since its last "
                "checkpoint. Raise the time that your cluster grants and checkpoint.grace, save more often "
                "(checkpoint.save_minutes), or make steps shorter"
            )
