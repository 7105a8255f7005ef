"""Checkpoints that are gone or forged: the run stops, and nothing that is left of it is replaced."""

import json
import shutil

import pytest

from jaxrlhf.checkpoint import storage
from jaxrlhf.config import SFTConfig
from jaxrlhf.errors import StorageError
from jaxrlhf.runs import check_run_directory, open_run
from jaxrlhf.training.unfinished import PENDING, UNDRAWN


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(start, run, message):
    """A start of the run raises StorageError, and changes nothing."""
    before = content(run)
    with pytest.raises(StorageError, match=message):
        start()
    assert content(run) == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(start, tmp_path):
    run = tmp_path / "run"
    start("sft")
    assert "saved" in json.loads((run / "run.json").read_text())["starts"][0]
    shutil.move(run / "checkpoints", tmp_path / "checkpoints")
    refused(lambda: start("sft"), run, "its checkpoints are gone; put them back, or start over with --fresh")
    (run / "checkpoints").mkdir()
    refused(lambda: start("sft"), run, "its checkpoints are gone")
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    refused(lambda: start("sft"), run, "checkpoints is a link to .*/disk, which is not there; put that back")
    (tmp_path / "checkpoints").rename(tmp_path / "disk")
    log = (run / "metrics.jsonl").read_bytes()
    start("sft")
    assert (run / "metrics.jsonl").read_bytes() == log


def test_a_checkpoint_with_forged_work_left_to_do_stops_the_run(start, tmp_path):
    start("sft")
    checkpoints, log = tmp_path / "run" / "checkpoints", (tmp_path / "run" / "metrics.jsonl").read_bytes()
    extra = storage.read_record(checkpoints, 3)["extra"]
    for forged in ({PENDING: 5}, {UNDRAWN: "x"}):
        storage.update_record(checkpoints, 3, extra | forged, None)
        with pytest.raises(StorageError, match="which no run writes; put an unchanged copy back"):
            start("sft")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("fact", [{"saved": "2026-01-01T00:00:00"}, {"step": 3}, "export"])
@pytest.mark.parametrize("opens", [open_run, check_run_directory])
def test_each_sign_of_a_checkpoint(tmp_path, fact, opens):
    """Also in the record of a start that was killed, and in one before the last."""
    config, run = SFTConfig(run_dir=str(tmp_path / "run")), tmp_path / "run"
    with open_run(config, "sft", fresh=False) as opened:
        opened.record(step=0)
    with open_run(config, "sft", fresh=False) as opened:
        assert not opened.resumed, "it has saved nothing"
    if fact == "export":
        (run / "export").mkdir()
    else:
        record = json.loads((run / "run.json").read_text())
        last = record["starts"].pop()
        record["starts"] += [last | fact, {"time": last["time"], "step": 0}]
        (run / "run.json").write_text(json.dumps(record))

    def begin():
        with open_run(config, "sft", fresh=False):
            pass

    refused(begin if opens is open_run else lambda: opens(config, "sft", False), run, "its checkpoints are gone")
    with open_run(config, "sft", fresh=True) as opened:
        assert not opened.resumed and (tmp_path / "run.old-1").is_dir()


def test_the_first_checkpoint_is_recorded_while_the_run_goes_on(tmp_path):
    with open_run(SFTConfig(run_dir=str(tmp_path / "run")), "sft", fresh=False) as run:

        def starts():
            return json.loads((run.directory / "run.json").read_text())["starts"]

        run.record_saved()
        assert "saved" not in starts()[0]
        (run.directory / "checkpoints" / "1").mkdir(parents=True)
        run.record_saved()
        (first,) = starts()
        run.record_saved()
        assert first["saved"] and starts() == [first]


def test_a_record_that_cannot_be_read_is_not_replaced(tmp_path):
    config, run = SFTConfig(run_dir=str(tmp_path / "run")), tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("[1")
    refused(lambda: check_run_directory(config, "sft", False), run, "run.json cannot be read: .*; put the file back")


@pytest.mark.parametrize("name", ["1", "25"])
def test_a_file_in_the_place_of_a_checkpoint(tmp_path, name):
    config, run = SFTConfig(run_dir=str(tmp_path / "run")), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / name).write_text("")
    refused(lambda: check_run_directory(config, "sft", False), run, f"{name} is a file, and a run has a folder of that")


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "export", ".lock"])
def test_a_link_that_leads_nowhere(tmp_path, name):
    config, run = SFTConfig(run_dir=str(tmp_path / "run")), tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "disk" / name)
    refused(lambda: check_run_directory(config, "sft", False), run, f"{name} is a link to .*which is not there")


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path):
    run = tmp_path / "run"
    (run / ".lock").mkdir(parents=True)
    config = SFTConfig(run_dir=str(run))
    refused(lambda: check_run_directory(config, "sft", False), run, "/.lock is a folder, and a run has a file of that")


def test_names_that_are_no_steps(tmp_path):
    """Other digits, and numbers that are not written as a step is."""
    run = tmp_path / "run"
    for name in ("²", "٣", "01"):
        (run / "checkpoints" / name).mkdir(parents=True)
    with open_run(SFTConfig(run_dir=str(run)), "sft", fresh=False) as opened:
        assert not opened.resumed
