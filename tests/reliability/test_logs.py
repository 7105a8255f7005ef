"""Logs that were lost, torn or doubled while a run was not running: resuming says so and goes on."""

import itertools
import json
import math
import os
import tracemalloc

import pytest

from jaxrlhf.config import Logging
from jaxrlhf.errors import DataError, StorageError
from jaxrlhf.metrics import METRICS_FILE, SAMPLES_FILE, Logger, lines, read_records

QUIET = Logging(tensorboard=False)


def written(folder, steps=6):
    logger = Logger(folder, QUIET, "sft", 10)
    logger.rewind(0)
    for step in range(1, steps + 1):
        logger.log(step, {"loss": 1.0 / step})
        logger.samples(step, [{"prompt": "p", "completion": f"c{i}"} for i in range(2)], show=False)
    logger.close()
    return [(folder / name).read_bytes() for name in (METRICS_FILE, SAMPLES_FILE)]


def resumed(folder, step, capsys, **options):
    capsys.readouterr()
    logger = Logger(folder, QUIET, "sft", 10)
    logger.rewind(step, **options)
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


def test_a_torn_sample_of_the_last_step_is_a_loss_and_one_of_a_later_step_is_none(tmp_path, capsys):
    _, samples = written(tmp_path)
    later = samples[:-30] + b"\n" + b'{"step": 7, "pro'
    for content, lost in ((samples[:-30], 1), (samples + b'{"step": 7, "pro', 0), (later, 1)):
        (tmp_path / SAMPLES_FILE).write_bytes(content)
        notes = resumed(tmp_path, 6, capsys)
        assert len(notes) == lost and all("samples.jsonl, up to step 6: 1 line could not be read" in n for n in notes)


def test_a_step_that_is_no_whole_number_costs_its_own_line_alone(tmp_path, capsys):
    metrics, _ = written(tmp_path)
    for step in (b"1e400", b"7.5", b"true", b'"3"', b"null"):
        (tmp_path / METRICS_FILE).write_bytes(metrics.replace(b'"step": 3,', b'"step": ' + step + b","))
        (note,) = resumed(tmp_path, 6, capsys)
        assert "1 line could not be read; the records of 1 step are missing" in note
        assert [record["step"] for record in read_records(tmp_path / METRICS_FILE)] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize(("at", "digits"), [(1, 7), (3, 93), (3, 1), (4, 40), (5, 2)])
def test_a_wrong_digit_of_a_step_costs_its_own_line_alone(tmp_path, capsys, at, digits):
    metrics, samples = written(tmp_path)
    right, wrong = (b'"step": %d,' % step for step in (at, digits))
    (tmp_path / METRICS_FILE).write_bytes(metrics.replace(right, wrong))
    (tmp_path / SAMPLES_FILE).write_bytes(samples.replace(right, wrong, 1))
    notes = resumed(tmp_path, 6, capsys)
    assert ["1 line had a step that does not fit its place" in note for note in notes] == [True, True]
    assert "the records of 1 step are missing" in notes[0] and "repeated" not in "".join(notes)
    others = [line for line in metrics.splitlines(True) if right not in line]
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(others)
    one = next(line for line in samples.splitlines(True) if right in line)
    assert (tmp_path / SAMPLES_FILE).read_bytes() == samples.replace(one, b"", 1)


def test_a_wrong_digit_between_samples_of_one_step(tmp_path, capsys):
    """And a doubled log of few samples, where steps come twice, is none."""
    steps = {(1, 1, 9, 1, 2): [1, 1, 1, 2], (1, 2, 1, 2): [1, 2], (1, 2, 3, 1, 2, 3): [1, 2, 3], (3, 1, 2): [1, 2]}
    for found, kept in steps.items():
        written(tmp_path)
        (tmp_path / SAMPLES_FILE).write_text("".join(f'{{"step": {step}}}\n' for step in found))
        assert len(resumed(tmp_path, 6, capsys)) == 1
        assert [row["step"] for row in read_records(tmp_path / SAMPLES_FILE)] == kept, found


@pytest.mark.parametrize(
    ("found", "kept", "wrong"),
    [
        ([1, 2, 93, 94, 5, 6, 7], [1, 2, 5, 6, 7], 2),
        ([91, 92, 3, 4], [3, 4], 2),
        ([1, 92, 93, 94, 5, 6, 7], [1, 5, 6, 7], 3),
        ([1, 2, 1, 2, 5, 6, 7], [1, 2, 5, 6, 7], 0),
    ],
)
def test_wrong_steps_beside_each_other_cost_their_own_lines_alone(tmp_path, capsys, found, kept, wrong):
    written(tmp_path)
    (tmp_path / METRICS_FILE).write_text("".join(f'{{"step": {step}}}\n' for step in found))
    (note,) = resumed(tmp_path, 7, capsys)
    assert (f"{wrong} lines had a step that does not fit its place" if wrong else "2 lines repeated") in note
    assert f"the records of {7 - len(kept)} step" in note
    assert [record["step"] for record in read_records(tmp_path / METRICS_FILE)] == kept


def test_as_many_steps_are_kept_as_rise(tmp_path):
    """Of every log of up to 5 lines: its longest subsequence that rises, by trying all."""
    path = tmp_path / METRICS_FILE
    for count in range(6):
        for found in itertools.product(range(1, 5), repeat=count):
            path.write_text("".join(f'{{"step": {step}}}\n' for step in found))
            rising = [part for n in range(count + 1) for part in itertools.combinations(found, n) if rises(part)]
            kept, counts = lines.up_to(path, 4, every=True)
            steps = tuple(json.loads(line)["step"] for line in kept)
            assert rises(steps) and len(steps) == len(rising[-1])
            assert counts.repeated + counts.misplaced <= count - len(steps)


def rises(steps):
    return all(a < b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize(
    ("found", "end", "last"),
    [
        ([1, 2, 3, 4, 5, 96], 4, 5),
        ([1, 2, 3, 4, 95, 96], 4, 4),
        ([1, 2, 3, 4, 5, 6], 4, 6),
        ([50, 51, 52], 51, 52),
        ([1, 9], 9, 9),
        ([], 4, -1),
    ],
)
def test_a_step_far_beyond_the_others_is_not_taken_for_the_last_that_trackers_have(tmp_path, found, end, last):
    (tmp_path / METRICS_FILE).write_text("".join(f'{{"step": {step}}}\n' for step in found))
    assert lines.up_to(tmp_path / METRICS_FILE, end, every=True)[1].last == last


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_log_in_another_encoding(tmp_path, capsys, encoding):
    """As a shell may write it: such lines count as unreadable; a byte order mark of UTF-8 does no harm."""
    metrics, samples = written(tmp_path)
    for name, content in ((METRICS_FILE, metrics), (SAMPLES_FILE, samples)):
        (tmp_path / name).write_bytes(content.decode().encode(encoding))
    notes = resumed(tmp_path, 6, capsys)
    steps = [record["step"] for record in read_records(tmp_path / METRICS_FILE)]
    if encoding == "utf-8-sig":
        assert notes == [] and steps == [1, 2, 3, 4, 5, 6]
    else:
        assert len(notes) == 2 and all("lines could not be read" in note for note in notes) and steps == []
        assert len(read_records(tmp_path / SAMPLES_FILE)) == 0


def test_only_records_that_are_removed_are_held(tmp_path):
    """The file, which is read whole, and little for each of its lines."""
    path = tmp_path / SAMPLES_FILE
    row = json.dumps({str(key): key for key in range(200)})[1:]
    path.write_text("".join(f'{{"step": {step}, {row}\n' for step in range(1, 1001)))
    tracemalloc.start()
    try:
        lines.up_to(path, 1000, every=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * path.stat().st_size


@pytest.mark.parametrize("value", ['"0.5"', '"nan"', '"x"', "null", "[1]", "true", '{"a": 1}', "1" * 400, "9" * 5000])
def test_a_metric_that_is_no_number_costs_its_own_line_alone(tmp_path, capsys, value):
    metrics, _ = written(tmp_path)
    lines = metrics.splitlines(True)
    lines[2] = f'{{"step": 3, "loss": {value}}}\n'.encode()
    (tmp_path / METRICS_FILE).write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"metrics.jsonl:3: "):
        read_records(tmp_path / METRICS_FILE)
    (note,) = resumed(tmp_path, 6, capsys)
    assert "1 line could not be read; the records of 1 step are missing" in note
    assert [record["step"] for record in read_records(tmp_path / METRICS_FILE)] == [1, 2, 4, 5, 6]


def test_numbers_that_json_does_not_have_are_kept(tmp_path, capsys):
    logger = Logger(tmp_path, QUIET, "sft", 10)
    logger.rewind(0)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), 1):
        logger.log(step, {"loss": loss})
    logger.close()
    assert resumed(tmp_path, 3, capsys) == []
    assert repr([record["loss"] for record in read_records(tmp_path / METRICS_FILE)]) == "[nan, inf, -inf]"


def test_what_is_written_again_is_removed_without_a_word(tmp_path, capsys):
    metrics, samples = (content.splitlines(True) for content in written(tmp_path))
    assert resumed(tmp_path, 6, capsys, samples=1) == []
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(metrics)
    assert (tmp_path / SAMPLES_FILE).read_bytes() == b"".join(samples[:-1])
    assert resumed(tmp_path, 6, capsys, repeated=True) == []
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(metrics[:-1])
    assert (tmp_path / SAMPLES_FILE).read_bytes() == b"".join(samples[:-2])


def test_samples_before_training_are_kept_if_the_first_step_is_written_again(tmp_path, capsys):
    logger = Logger(tmp_path, QUIET, "ppo", 10)
    logger.rewind(0)
    logger.samples(0, [{"prompt": "p"}])
    logger.log(1, {"loss": 1.0})
    logger.close()
    resumed(tmp_path, 1, capsys, repeated=True)
    assert read_records(tmp_path / METRICS_FILE) == []
    assert [row["step"] for row in read_records(tmp_path / SAMPLES_FILE)] == [0]


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


@pytest.mark.parametrize("name", [METRICS_FILE, SAMPLES_FILE])
def test_a_pipe_in_place_of_a_log_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(StorageError, match=f"{name} is a named pipe, not a file"):
        Logger(tmp_path, QUIET, "sft", 10)
