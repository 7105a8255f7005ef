"""Data files and options that would fill the memory: the message names the line and the option that allows more."""

import gzip
import json
import subprocess
import sys
import time

import pytest

from jaxrlhf import PPOTrainer, config
from jaxrlhf.config import Data
from jaxrlhf.data import file_readers
from jaxrlhf.data.file_readers import read_file
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.files import read_lines
from jaxrlhf.training.ppo.state import passes


def test_a_line_that_is_too_long_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "a" * 1_100_000})
    path.write_text('{"prompt": "b"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: this line is longer than 1 MB; .* data\.max_line_mb"):
        list(read_file(path, Data(max_line_mb=1)))
    assert len(list(read_file(path, Data(max_line_mb=2)))) == 2
    (tmp_path / "rows.json").write_text("[" + row + "]")
    assert len(list(read_file(tmp_path / "rows.json", Data(max_line_mb=1)))) == 1, "a JSON file may be one line"


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_a_file_that_unpacks_to_many_times_its_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(file_readers, "UNPACKED", 10**6)
    line = json.dumps({"prompt": "x" * 98}) if "json" in name else "x" * 99
    path = tmp_path / name
    path.write_bytes(gzip.compress((line + "\n").encode() * 30_000))
    assert path.stat().st_size * 100 < 3_000_000
    with pytest.raises(DataError, match=rf"{name}:\d+: the file unpacks to more than 100 times .* data\.max_gz_ratio"):
        list(read_file(path, Data()))
    if "jsonl" in name:
        assert len(list(read_file(path, Data(max_gz_ratio=1000)))) == 30_000


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in kilobytes there")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_an_endless_line_takes_little_memory(tmp_path, name):
    """300 MB without a line break, in a process of its own."""
    program = (
        "import resource, sys, pathlib\n"
        "from jaxrlhf.config import Data\n"
        "from jaxrlhf.data.file_readers import read_file\n"
        "from jaxrlhf.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    list(read_file(pathlib.Path(sys.argv[1]), Data()))\n"
        "except DataError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    path = tmp_path / name
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as file:
        for _ in range(300):
            file.write(b"a" * 10**6)
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    kilobytes, _, message = done.stdout.partition(" ")
    assert "rows.jsonl" in message and ":1: " in message, done.stderr
    assert int(kilobytes) < 200_000


@pytest.mark.parametrize("levels", [99, 101, 900, 100_000])
def test_values_in_values(tmp_path, levels):
    (tmp_path / "rows.jsonl").write_text('{"a": ' + "[" * levels + "]" * levels + "}\n")
    if levels < 100:
        assert len(list(read_file(tmp_path / "rows.jsonl", Data()))) == 1
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl:1: not JSON"):
            list(read_file(tmp_path / "rows.jsonl", Data()))


def test_lines_of_a_file_up_to_a_length(tmp_path):
    (tmp_path / "f").write_text("ab\ncde\n\nf")
    with (tmp_path / "f").open() as file:
        assert list(read_lines(file, 4)) == ["ab\n", "cde\n", "\n", "f"]
    with (tmp_path / "f").open("rb") as file, pytest.raises(DataError, match="line 2 is longer than 3 bytes"):
        list(read_lines(file, 3))


@pytest.mark.parametrize("first", [0, 1, 3, 12])
@pytest.mark.parametrize("replay", [0, 1, 4, 20])
def test_passes_of_a_run_are_counted_without_going_through_its_updates(first, replay):
    assert passes(first, 9, replay) == sum(1 + min(number, replay) for number in range(first, 9))
    assert passes(first, 2**53, replay) >= 2**53 - first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ppo.batch_size": 2**30}, "batch_size: must be at most 1048576"),
        ({"ppo.num_ppo_epochs": 2**53}, "num_ppo_epochs: must be at most 65536"),
        ({"optim.learning_rate": 1e-39}, "learning_rate: must be at least 1.17"),
        ({"lora.rank": 2**53}, "rank: must be at most 65536"),
        ({"ppo.total_episodes": 2**53}, r"the run would have 4.5e\+15 optimizer steps"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_at_once(options, message, ppo):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        PPOTrainer(config.replace(ppo, **options), reward=lambda prompts, completions: [0.0 for _ in completions])
    assert time.monotonic() - began < 30


def test_any_limit_of_a_line_can_be_given(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert len(list(read_file(tmp_path / "rows.jsonl", Data(max_line_mb=2**53)))) == 1
