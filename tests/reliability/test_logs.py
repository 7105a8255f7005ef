"""Logs that were lost, torn or doubled while a run was not running: resuming says so and goes on."""

import json
import os

import pytest

from jaxrlhf.config import Logging
from jaxrlhf.metrics import METRICS_FILE, SAMPLES_FILE, Logger, read_records

QUIET = Logging(tensorboard=False)


def written(folder, steps=6):
    logger = Logger(folder, QUIET, "sft", 10)
    logger.rewind(0)
    for step in range(1, steps + 1):
        logger.log(step, {"loss": 1.0 / step})
        logger.samples(step, [{"prompt": "p", "completion": f"c{i}"} for i in range(2)], show=False)
    logger.close()
    return [(folder / name).read_bytes() for name in (METRICS_FILE, SAMPLES_FILE)]


def resumed(folder, step, capsys):
    capsys.readouterr()
    logger = Logger(folder, QUIET, "sft", 10)
    logger.rewind(step)
    logger.close()
    return [line for line in capsys.readouterr().out.splitlines() if ".jsonl" in line]


def test_a_log_that_is_whole_is_kept_without_a_word(tmp_path, capsys):
    metrics, samples = written(tmp_path)
    assert resumed(tmp_path, 6, capsys) == []
    assert [(tmp_path / name).read_bytes() for name in (METRICS_FILE, SAMPLES_FILE)] == [metrics, samples]
    assert resumed(tmp_path, 4, capsys) == []
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(metrics.splitlines(True)[:4])
    assert (tmp_path / SAMPLES_FILE).read_bytes() == b"".join(samples.splitlines(True)[:8])


def test_the_torn_end_of_a_killed_run_is_no_loss(tmp_path, capsys):
    metrics, _ = written(tmp_path)
    (tmp_path / METRICS_FILE).write_bytes(metrics + b'{"step": 7, "lo')
    assert resumed(tmp_path, 6, capsys) == []
    assert (tmp_path / METRICS_FILE).read_bytes() == metrics


@pytest.mark.parametrize("name", [METRICS_FILE, SAMPLES_FILE])
def test_a_deleted_log(tmp_path, capsys, name):
    written(tmp_path)
    (tmp_path / name).unlink()
    (note,) = resumed(tmp_path, 6, capsys)
    assert f"{name}, up to step 6: it was missing" in note
    assert (tmp_path / name).read_bytes() == b""


def test_records_that_are_gone_or_cannot_be_read_are_counted(tmp_path, capsys):
    metrics, _ = written(tmp_path)
    lines = metrics.splitlines(True)
    (tmp_path / METRICS_FILE).write_bytes(lines[0] + b"\x00\x00\n" + lines[3] + b"[" * 5000 + b"\n" + lines[4][:9])
    (note,) = resumed(tmp_path, 6, capsys)
    assert "3 lines could not be read" in note and "the records of 4 steps are missing" in note
    assert (tmp_path / METRICS_FILE).read_bytes() == lines[0] + lines[3]


def test_a_doubled_log_is_kept_once(tmp_path, capsys):
    metrics, samples = written(tmp_path)
    (tmp_path / METRICS_FILE).write_bytes(metrics + metrics)
    (tmp_path / SAMPLES_FILE).write_bytes(samples + samples)
    notes = resumed(tmp_path, 6, capsys)
    assert ["6 lines repeated" in notes[0], "12 lines repeated" in notes[1]] == [True, True]
    assert [(tmp_path / name).read_bytes() for name in (METRICS_FILE, SAMPLES_FILE)] == [metrics, samples]
    assert [record["step"] for record in read_records(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5, 6]


def test_lines_are_on_disk_before_a_checkpoint_counts_on_them(tmp_path, monkeypatch):
    """`sync` waits for the kernel, for both files, after their lines were handed to it."""
    logger = Logger(tmp_path, QUIET, "sft", 10)
    logger.rewind(0)
    logger.log(1, {"loss": 1.0})
    synced = {}
    real = os.fsync

    def fsync(descriptor):
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    logger.sync()
    logger.close()
    length = len(json.dumps({"step": 1, "loss": 1.0})) + 1
    files = {METRICS_FILE: length, SAMPLES_FILE: 0}
    assert synced == {(tmp_path / name).stat().st_ino: size for name, size in files.items()}
