"""scripts/torture.py and scripts/soak.py see what they are there to see."""

import json
import logging
import random

import pytest
import soak
import torture


@pytest.fixture
def run(tmp_path):
    """What a run leaves that is compared."""
    records = [{"step": step, "loss": 1 / step, "perf/step_time": 0.1} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "samples.jsonl").write_text('{"step": 3, "completion": "ab"}\n')
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(bytes(64))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("metrics.jsonl", b"0.1", b"0.2", None),  # times are not compared
        ("metrics.jsonl", b"0.5", b"0.5000000000000001", "the first one at 1"),
        ("metrics.jsonl", b'{"step": 3', b'{"step": 4', "the first one at 2"),
        ("samples.jsonl", b"ab", b"ac", "samples.jsonl differ"),
        ("export/model.safetensors", bytes(64), bytes(63) + b"\1", "model.safetensors differ"),
    ],
)
def test_a_run_is_compared_byte_for_byte(run, file, old, new, says):
    expected = torture.facts(run)
    assert torture.difference(run, expected) is None
    content = (run / file).read_bytes()
    (run / file).write_bytes(content.replace(old, new))
    assert (run / file).read_bytes() != content
    found = torture.difference(run, expected)
    assert found is None if says is None else says in found


def test_a_missing_file_and_a_missing_record_are_differences(run):
    expected = torture.facts(run)
    (run / "export" / "model.safetensors").unlink()
    assert torture.difference(run, expected) == "model.safetensors differ"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "2 records in place of 3" in torture.difference(run, expected)


def test_a_file_is_damaged_in_every_way(tmp_path):
    file, seen, chance = tmp_path / "file", set(), random.Random(0)
    for _ in range(100):
        file.write_bytes(content := bytes(range(1, 256)) * 8)
        seen.add(torture.damage(file, chance).split(" of ")[0])
        assert not file.exists() or file.read_bytes() != content
    assert seen == {"a bit", "a byte", "a zeroed block", "cut off", "longer", "empty", "removed"}


def test_growth_is_seen_and_neither_a_start_nor_what_comes_and_goes():
    chance = random.Random(0)
    looks = [dict.fromkeys(soak.QUANTITIES, 100.0) for _ in range(200)]
    for i, look in enumerate(looks):
        look["threads"] = chance.choice((24.0, 27.0, 30.0, 36.0)) + (i // 50 == 2)  # more of them in the third quarter
        look["RSS, MB"] -= 40 * (i < 120)  # before all programs are compiled
        look[soak.PROGRAMS] -= i < 120
    assert soak.grown(looks) == []
    for i, look in enumerate(looks):
        look["descriptors"] += i // 50
        look["threads"] += i // 10  # one more after every tenth look
        look["RSS, MB"] += i / 8
    assert soak.grown(looks) == ["RSS, MB", "descriptors", "threads"]


@pytest.mark.parametrize(("values", "rise"), [([5.0] * 9, 0), ([0.0, 1, 2, 3], 3), ([0.0, 1, 90, 3, 4, 5, 6], 6)])
def test_a_trend_is_a_line_through_all_but_outliers(values, rise):
    assert soak.trend(values) == rise


@pytest.mark.long
def test_a_minute_of_torture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["torture.py", "--minutes", "1", "--kinds", "kill", "damage"])
    try:
        assert torture.main() == 0, capsys.readouterr().out
    finally:
        logging.disable(logging.NOTSET)  # other tests look for warnings
    kinds = json.loads((tmp_path / "torture.json").read_text())["kinds"]
    assert kinds["kill"]["events"] and kinds["damage"]["events"]
