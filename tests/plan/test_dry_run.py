"""What a dry run says about a run directory that is there, and what it prints if it fails."""

import socket
from types import SimpleNamespace

import jax
import pytest

from jaxrlhf import sharding
from jaxrlhf.checkpoint import room
from jaxrlhf.config import GRPO, Component, Generation, GRPOConfig, RewardSource, SFTConfig, replace
from jaxrlhf.errors import DataError, RewardError
from jaxrlhf.plan import Phase, Plan, costs, dry_run
from jaxrlhf.plan.programs import abstract_trainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer


def test_a_run_that_would_be_resumed_or_renamed_is_named(tmp_path):
    config = SFTConfig(run_dir=str(tmp_path), model={"path": "m", "merged_path": "merged"})  # type: ignore[arg-type]
    for step in ("20", "100", "corrupt-400"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    text = "\n".join(dry_run.writes(config, fresh=False))
    assert "saved at step 100: it would be resumed" in text and "the merged model to merged" in text
    assert f"renamed to {tmp_path.name}.old-N" in "\n".join(dry_run.writes(config, fresh=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_comes_without_the_config(tmp_path, capsys):
    with pytest.raises(DataError, match="no such folder"):
        dry_run.show(SFTConfig(model={"path": str(tmp_path / "m")}, data={"path": "d"}))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


@pytest.fixture
def planned(tmp_path):
    """A plan whose checkpoints have 2 GB and whose steps take 0.5 s, and the config of a run that does not exist."""
    config = SFTConfig(run_dir=str(tmp_path / "runs" / "a"), model={"path": "m"}, data={"path": "d"})  # type: ignore[arg-type]
    plan = SimpleNamespace(checkpoint=2_000_000_000, step_seconds=lambda _: 0.5)

    def lines(fresh=False, **options):
        return list(dry_run.checkpoints(plan, None, replace(config, **options), fresh=fresh))  # type: ignore[arg-type]

    return lines


def test_checkpoints_have_a_price_beside_the_steps(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "write_speed", lambda folder: 1e8)
    monkeypatch.setattr(room, "free", lambda folder: 50 * 10**9)
    first, second = planned(**{"checkpoint.save_every": 40})
    assert "2 GB each, written in about 20 s in the background, after every 40 steps of 0.5 s or more" in first
    assert "at the 100 MB/s just measured" in first
    assert "up to 3 of them are on disk at once (the last 2, and the next while it is written): 6.3 GB; 50 GB" in second
    first, second = planned(
        **{"checkpoint.save_every": 0, "checkpoint.synchronous": "always", "data.validation_fraction": 0.1}
    )
    assert "background" not in first and "steps" not in first
    assert "up to 4 of them are on disk at once (the last 2 and the best, and the next" in second
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_checkpoints_is_warned_of(planned, tmp_path, monkeypatch):
    """2.1 GB each at most. Those that are there take no more room, but the next one always does."""
    monkeypatch.setattr(room, "write_speed", lambda folder: 1e8)
    *_, warning = planned()
    assert "warning" not in warning
    monkeypatch.setattr(room, "free", lambda folder: 6 * 10**9)
    *_, warning = planned()
    assert "warning: 3 checkpoints of 2 GB, the next one included while it is written, need 6.3 GB, and" in warning
    assert "has 6 GB free" in warning and "checkpoint.keep" in warning
    for step in ("10", "20"):
        (tmp_path / "runs" / "a" / "checkpoints" / step).mkdir(parents=True)
    assert not any("warning" in line for line in planned())
    assert any("warning" in line for line in planned(fresh=True))
    monkeypatch.setattr(room, "free", lambda folder: 2 * 10**9)
    assert "need 2.1 GB more, and" in planned()[-1]


def test_speed_of_a_disk_is_measured_without_a_trace(tmp_path):
    folder = tmp_path / "runs" / "a"
    assert room.write_speed(folder) > 1e4
    assert list(tmp_path.iterdir()) == [] and room.free(folder) > 0


def test_a_folder_that_cannot_be_written_is_named(planned, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", refused)
    (line,) = planned()
    assert "2 GB each; warning: no file can be written in" in line and "Permission denied" in line


@pytest.mark.parametrize(
    ("platform", "slots", "seconds", "warning"),
    [
        ("cpu", 0, (40, 5), ""),
        ("gpu", 0, (40, 31), "a step, rollout aside, takes longer"),
        ("tpu", 0, (40, 5), "a step takes longer"),
        ("tpu", 16, (40, 5), "a step takes longer"),  # slots for all responses at once are no slots
        ("tpu", 8, (40, 5), ""),
        ("tpu", 8, (40, 31), "a step, rollout aside, takes longer"),
        ("tpu", 0, (20, 5), ""),
    ],
)
def test_a_rollout_in_which_no_signal_is_seen_is_part_of_a_long_step(platform, slots, seconds, warning, monkeypatch):
    """The grace is 30 s; on TPUs a signal is seen in rollouts with slots alone."""
    monkeypatch.setattr(sharding, "platform", lambda mesh=None: platform)
    monkeypatch.setattr(dry_run, "_least_seconds", lambda phase, rates: phase.times)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    times = zip(("rollout", "update"), seconds, strict=True)
    plan = Plan("", tuple(Phase(name, {}, (), mesh, times=time) for name, time in times), 0, 0, 1)
    config = GRPOConfig(grpo=GRPO(batch_size=16), rollout=Generation(slots=slots))
    *_, last = dry_run.needs(plan, costs.Rates({"float32": 1e9}, 1e9), 10, config)
    assert last.startswith(f"warning: {warning} than checkpoint.grace (30 s)" if warning else "time: about ")


def test_a_reward_server_that_is_down_is_the_last_line_and_a_plan_needs_none(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n' * 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    config = GRPOConfig(
        run_dir=str(tmp_path / "run"),
        model={"path": str(tiny_model), "init": "random"},  # type: ignore[arg-type]
        data={"path": str(tmp_path / "p.jsonl")},  # type: ignore[arg-type]
        sampling={"response_length": 4},  # type: ignore[arg-type]
        reward=RewardSource(components=(Component(url=url),)),
    )
    message = f"reward {url} cannot be reached: .*refused.* start the server, or correct reward.components"
    monkeypatch.setattr(dry_run, "plan_of", lambda _: SimpleNamespace(step=()))
    monkeypatch.setattr(dry_run, "needs", lambda *_: [])
    monkeypatch.setattr(dry_run, "checkpoints", lambda *_, **__: [])
    abstract_trainer(config)
    with pytest.raises(RewardError, match=message) as caught:
        dry_run.show(config)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out.endswith("nothing of the run was written, and no weights were read\n")
    with pytest.raises(RewardError, match=message):
        GRPOTrainer(config)
    GRPOTrainer(replace(config, reward=RewardSource(components=(Component(url=url, on_error="skip"),))))
    assert not (tmp_path / "run").exists()
