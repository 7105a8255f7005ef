import json
import shutil
import threading
import time

import jax
import pytest

from jaxrlhf import PPOTrainer, config, sharding
from jaxrlhf.metrics.keys import TIMES
from jaxrlhf.runs import wallclock
from jaxrlhf.runs.wallclock import Clock
from jaxrlhf.training.timing import Timing
from tests.support.runs import records


@pytest.fixture
def now(monkeypatch):
    """The time, which passes only when the test says so."""

    class Now:
        seconds = 100.0

        def __iadd__(self, more):
            self.seconds += more
            return self

    now = Now()
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def test_every_moment_belongs_to_one_part(now):
    with wallclock.command(90.0):
        clock = Clock()
    clock.begin("training")  # 10 s of other
    now += 3
    with clock.spent("evaluation"):
        now += 5
        with clock.spent("save"):
            now += 7
        now += 1
        clock.compiled(4.0)  # of the 6 s of evaluation
    thread = threading.Thread(target=clock.compiled, args=(1.0,))
    thread.start()
    thread.join()
    assert clock.take() == {"other": 10, "training": 3, "evaluation": 2, "compile": 4, "save": 7}
    now += 2
    clock.compiled(50.0)  # more than has passed: what jax measured twice
    assert clock.take() == {"compile": 2}
    assert Clock().take() == {}


def test_an_error_ends_a_block(now):
    clock = Clock()
    with pytest.raises(ValueError), clock.spent("save"):
        now += 1
        raise ValueError
    now += 2
    assert clock.take() == {"save": 1, "other": 2}


def timed(step, **parts):
    return {"step": step, "loss": 1.0} | {wallclock.PREFIX + part: seconds for part, seconds in parts.items()}


def test_time_of_a_killed_process_is_that_of_its_records():
    kept = [timed(1, training=1.0), timed(2, training=2.0, compile=4.0), timed(3, training=3.0, save=1.0)]
    removed = [timed(4, training=5.0, reward=6.0), timed(5, training=7.0)]
    starts = [{"end": "x", "step": 0}, {"step": 1}]  # the first one did step 1, and was stopped
    known = {"training": 1.0, "other": 10.0, "restore": 0.5}
    found = wallclock.before(starts, known, kept, removed)
    assert found == {"training": 1 + 2 + 3, "compile": 4, "save": 1, "lost": 5 + 6 + 7, "other": 10, "restore": 0.5}
    assert sum(found.values()) == sum(known.values()) + 2 + 4 + 3 + 1 + 5 + 6 + 7
    assert known == {"training": 1.0, "other": 10.0, "restore": 0.5}


def test_steps_that_a_process_had_counted_before_it_ended_are_moved_to_those_lost():
    found = wallclock.before([{"end": "x", "step": 0}], {"training": 9.0, "save": 3.0}, [], [timed(7, training=4.0)])
    assert found == {"training": 5, "save": 3, "lost": 4}


def test_all_steps_of_a_run_without_a_checkpoint_are_lost():
    assert wallclock.before([], {}, [], [timed(1, training=4.0, compile=2.0)]) == {"lost": 6}
    assert wallclock.before([], {}, [], []) == {}


def test_records_of_versions_without_times_count_nothing():
    assert wallclock.before([{"step": 0}], {}, [{"step": 1, "loss": 2.0}], [{"step": 2, "loss": 1.0}]) == {}
    assert wallclock.step_seconds([{"step": 1}], ["training"]) is None


def test_time_of_a_step_is_a_median_without_what_is_apart():
    logged = [timed(n, training=float(n), compile=100.0) | {"perf/rollout_seconds": 0.5} for n in (1, 2, 30)]
    assert wallclock.step_seconds(logged, ["training"]) == 2
    assert wallclock.step_seconds(logged, ["training"], ["perf/rollout_seconds"]) == 1.5
    assert wallclock.step_seconds(logged, ["training", "compile"]) == 102


def test_costly_checkpoints_are_warned_of():
    assert wallclock.costly_saves(save=0.9, step=1.0, interval=10, left=100_000) == ""
    assert wallclock.costly_saves(save=2.0, step=1.0, interval=10, left=290) == ""  # less than a minute in all
    warning = wallclock.costly_saves(save=2.0, step=1.0, interval=10, left=400)
    assert "waits 2 s" in warning and "every 10 steps of 1 s: 20% on top" in warning
    assert "checkpoint.save_every 20 or more" in warning


@pytest.mark.parametrize(
    ("platform", "rollout", "besides"),
    [
        ("cpu", {}, None),
        ("gpu", {}, None),
        ("tpu", {}, "100 s besides its rewards"),
        ("tpu", {"rollout.slots": 8}, "100 s besides its rewards"),  # slots for all 8 responses at once are no slots
        ("tpu", {"rollout.slots": 4}, None),
        ("cpu", {"rollout.devices": 1}, "90 s besides its rollouts and rewards"),  # the rollout ran beside the update
        ("tpu", {"rollout.devices": 1}, "100 s besides its rewards"),
    ],
)
def test_a_rollout_counts_as_part_of_a_long_step_where_no_signal_is_seen_in_it(
    platform, rollout, besides, ppo, now, monkeypatch
):
    """A step of 100 s of training, 80 of them a rollout, and a grace of 30 s."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    record = {"step": 1, "perf/time/training": 100.0, "perf/time/reward": 50.0, "perf/rollout_seconds": 80.0}
    record |= {"perf/rollout_wait_seconds": 10.0} if "rollout.devices" in rollout else {}
    said: list[str] = []
    ppo = config.replace(ppo, **{"ppo.sampler_correction": "truncate"}, **rollout)
    Timing(None, ppo, 2, said.append).end_step(lambda: record)  # type: ignore[arg-type]
    expected = [f"warning: a step takes {besides}, and a signal to stop is seen at its end"] if besides else []
    assert [line.partition(", while ")[0] for line in said] == expected


def test_a_long_step_without_rollouts_and_rewards_names_none(now):
    said: list[str] = []
    timing = Timing(None, config.SFTConfig(), 2, said.append)  # type: ignore[arg-type]
    timing.end_step(lambda: {"step": 1, "perf/time/training": 31.0})
    assert len(said) == 1 and said[0].startswith("warning: a step takes 31 s, and a signal")


def test_the_line_names_all_parts_that_can_be_seen():
    times = {"training": 70.0, "compile": 14.0, "save": 0.4, "lost": 15.6}
    assert (
        wallclock.line(times, 1, "1m40s") == "time: 1m40s; training 70 %, compiling 14 %, lost in unfinished steps 16 %"
    )
    assert wallclock.line(times, 3, "1m40s").startswith("time: 1m40s in 3 starts; ")


def test_parts_of_a_record_are_documented():
    assert set(TIMES) | {"lost"} == set(wallclock.NAMES)


def test_time_of_a_run_adds_up_over_a_kill(ppo, tmp_path, capsys):
    jax.clear_caches()  # programs of another test would leave nothing to compile
    options = {"ppo.total_episodes": 64, "checkpoint.save_every": 4, "checkpoint.synchronous": "always"}
    ppo = config.replace(ppo, **options, **{"logging.quiet": False, "logging.report": False})
    calls = 0

    def reward(prompts, completions):
        nonlocal calls
        calls += 1
        time.sleep(0.05)
        if calls == 7:  # what a kill would leave: 4 steps saved, 5 logged
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        return [float(len(text)) for text in completions]

    def train(folder, **options):
        trainer = PPOTrainer(config.replace(ppo, run_dir=str(tmp_path / folder), **options), reward)
        started = time.monotonic()
        trainer.train()
        return time.monotonic() - started

    def read(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return json.loads((tmp_path / folder / "run.json").read_text()), [json.loads(line) for line in lines]

    seconds = train("run")
    run, logged = read("run")
    times = run["time"]
    assert 0.5 * seconds < sum(times.values()) < seconds  # but for opening and closing the directory
    assert times["reward"] >= 8 * 0.05 and times["save"] > 0 and times["compile"] > 0.1 and "lost" not in times
    assert sum(record["perf/time/reward"] for record in logged) == pytest.approx(times["reward"], abs=0.01)
    assert capsys.readouterr().out.count("\ntime: ") == 1

    killed, logged = read("killed")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5] and "end" not in killed["starts"][0]
    before = sum(killed["time"].values()) + sum(sum(wallclock.of_record(line).values()) for line in logged)
    seconds = train("killed", **{"checkpoint.grace": 1e-6})
    times = read("killed")[0]["time"]
    assert times["lost"] == pytest.approx(sum(wallclock.of_record(logged[4]).values()), abs=0.01)
    assert times["restore"] > 0 and times["reward"] >= 8 * 0.05
    # at least its rewards: on a busy machine opening and closing so short a run takes most of its time
    assert before + 4 * 0.05 < sum(times.values()) < before + seconds
    assert "\ntime: " in (printed := capsys.readouterr().out) and " in 2 starts; " in printed
    assert printed.index("warning: a step takes") < printed.index(" ppo step 5/8 ")  # its records tell
    assert printed.count("warning: a step takes") == 1
    assert records(tmp_path / "killed") == records(tmp_path / "run")
