"""Files of strangers, changed at random: every reader returns what it reads or raises an error of its own kind.

The reader of safetensors files is fuzzed in tests/weights/test_safetensors.py; scripts/fuzz.py looks for longer.
"""

import copy
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bounded import MEMORY, bounded, resident

from jaxrlhf.checkpoint import storage
from jaxrlhf.checkpoint.digest import with_seal
from jaxrlhf.config import Data
from jaxrlhf.config.file import METHODS, load_config, presets
from jaxrlhf.data.file_readers import read_file
from jaxrlhf.data.hf_tokenizer import generation_stops
from jaxrlhf.errors import ConfigError, DamagedCheckpoint, DataError, JaxrlhfError, StorageError
from jaxrlhf.metrics import read_records
from jaxrlhf.runs.record import read_record
from jaxrlhf.training.unfinished import PENDING, UNDRAWN, left_to_do, pending
from jaxrlhf.weights import families, peft

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 10**9, 10**30, -(10**30), 0.5, -0.0, 1e308, math.inf, math.nan),
    *("", "x", "a" * 5000, "\x00", "\x1b[2J", "../../etc/passwd", "\ud800", "${HOME}", "-1", "null"),
    *([], [[]], [None], ["x"] * 50, [-1, 0], {}, {"a": 1}, {"": None}, {"rope_type": "yarn"}),
]
TEXTS = [json.dumps(value) for value in HOSTILE]
DEEP = "[" * 400 + "]" * 400


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


@st.composite
def changed(draw: Any, original: Any) -> Any:
    """A JSON value with up to three of its values replaced, removed or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        target = value
        for key in path:
            target = target[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                target[last] = json.loads(draw(st.sampled_from([*TEXTS, DEEP])))
            case "remove":
                del target[last]
            case "add" if isinstance(target, dict):
                target[draw(st.text(max_size=8))] = json.loads(draw(st.sampled_from(TEXTS)))
    return value


def quickly(read: Any, *errors: type[JaxrlhfError]) -> Any:
    """What `read` returns, None if it raises one of `errors`. Any other exception fails the test, and so does more than
    2 s or 200 MB."""
    try:
        with bounded():
            return read()
    except errors as error:
        assert "\x1b" not in str(error) and len(str(error)) < 50_000
        return None


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory):
    """What readers import when they are first called."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "generation_config.json").write_text("{}")
    generation_stops(folder, "m", None)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError):
        list(read_file(folder / "rows.parquet", Data()))


@pytest.fixture(autouse=True)
def nothing_kept():
    """The memory that all cases of a test together leave behind."""
    before = resident(os.getpid())
    yield
    assert resident(os.getpid()) - before < MEMORY


def test_what_takes_long_or_fills_the_memory_is_seen(monkeypatch):
    with pytest.raises(AssertionError):
        quickly(lambda: np.ones(int(1.2 * MEMORY), np.int8).sum())  # freed before it returns
    monkeypatch.setattr("support.bounded.SECONDS", 0.01)
    with pytest.raises(AssertionError):
        quickly(lambda: sum(range(3_000_000)))


CONFIGS = {
    path.parent.name: json.loads(path.read_text()) for path in sorted((FIXTURES / "models").glob("*/config.json"))
}


@FUZZ
@given(st.data(), st.sampled_from(sorted(CONFIGS)))
def test_config_json(data, name):
    config = data.draw(changed(CONFIGS[name]))
    model = quickly(lambda: families.parse(config, "config.json"), DataError)
    assert model is None or model.num_layers <= families.base.LARGEST["num_layers"]


@FUZZ
@given(st.data(), st.sampled_from(["gpt2-dora-rslora", "llama-lora"]))
def test_adapter_config(tmp_path, data, name):
    config = data.draw(changed(json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    quickly(lambda: peft.base_of(tmp_path), DataError)


@FUZZ
@given(st.data())
def test_the_record_of_a_checkpoint(tmp_path, data):
    file = FIXTURES / "runs" / "ppo" / "run" / "checkpoints" / "2" / "record" / "data.json"
    target = tmp_path / "2" / "record" / "data.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        record = data.draw(changed(json.loads(content)))
        target.write_text(json.dumps(with_seal(record) if data.draw(st.booleans()) else record))
    else:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        target.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    quickly(lambda: storage.stored_shapes(tmp_path, 2, "params"), DamagedCheckpoint, StorageError)


@pytest.mark.parametrize(
    "change",
    [
        {"leaves": 5},
        {"leaves": {"a": 5}},
        {"leaves": {"a": "0"}},
        {"leaves": {"a": "0:float52:3"}},
        {"leaves": {"a": "0:float32:3x?"}},
        {"leaves": {"a": "0:float32:3", "a.b": "0:float32:3"}},
        {"extra": []},
        {"metric": "1"},
        {"step": [2]},
    ],
)
def test_a_forged_record_of_a_checkpoint(tmp_path, change):
    """Its seal is right, but it does not describe a checkpoint."""
    whole = json.loads((FIXTURES / "runs" / "ppo" / "run" / "checkpoints" / "2" / "record" / "data.json").read_bytes())
    target = tmp_path / "2" / "record" / "data.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(with_seal(whole | change)))
    with pytest.raises(DamagedCheckpoint, match="does not describe a checkpoint|checkpoint of step"):
        storage.read_record(tmp_path, 2)


LEFT = {PENDING: {"record": {"loss": 1.5, "eval/loss": "nan"}, "samples": [{"prompt": "p"}]}, UNDRAWN: 2, "data": "7f"}


def test_what_is_left_to_do_for_a_step():
    assert left_to_do(LEFT) == {name: LEFT[name] for name in (PENDING, UNDRAWN)} and left_to_do({"data": 5}) == {}
    found = pending(LEFT)
    assert found["record"]["loss"] == 1.5 and math.isnan(found["record"]["eval/loss"]) and pending({}) == {}


@pytest.mark.parametrize(
    "forged",
    [
        *({PENDING: value} for value in (5, None, [], "x", {}, {"record": {}}, {"samples": []})),
        *(
            {PENDING: {"record": record, "samples": []}}
            for record in (5, [], {"x": 1.0}, {"loss": "x"}, {"loss": None})
        ),
        *({PENDING: {"record": {"loss": loss}, "samples": []}} for loss in (None, True, [1.0], 10**400)),
        *({PENDING: {"record": {}, "samples": samples}} for samples in (5, {}, [5], [[]])),
        *({UNDRAWN: value} for value in ("x", None, -1, True, 1.5, [1])),
    ],
    ids=str,
)
def test_forged_work_that_is_left_to_do(forged):
    with pytest.raises(StorageError, match="the newest checkpoint has been changed: its '.* to come' is"):
        left_to_do(forged)


@FUZZ
@given(changed(LEFT))
def test_work_that_is_left_to_do(extra):
    quickly(lambda: pending(left_to_do(extra)), StorageError)


@FUZZ
@given(st.data())
def test_the_record_of_a_run(tmp_path, data):
    record = json.loads((FIXTURES / "runs" / "ppo" / "run" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(data.draw(changed(record))))
    found = quickly(lambda: read_record(tmp_path), StorageError)
    assert found is None or (isinstance(found["method"], str) and isinstance(found["starts"][-1], dict))


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_generation_config(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    quickly(lambda: generation_stops(tmp_path, "m", None), DataError)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
@settings(FUZZ, max_examples=60)
@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from(HOSTILE)).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(st.dictionaries(st.text(max_size=3), st.sampled_from(HOSTILE), max_size=3), max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
)
def test_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    quickly(lambda: list(read_file(tmp_path / name, Data())), DataError)


@FUZZ
@given(st.lists(st.sampled_from([*TEXTS, '{"step": 1}', '{"step": 1, "loss": 2}'])))
def test_logs(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    records = quickly(lambda: read_records(tmp_path / "metrics.jsonl"), DataError)
    assert records is None or all(type(record["step"]) is int for record in records)


PRESETS = {name: path.read_text() for name, path in presets().items() if name in METHODS}


@settings(FUZZ, max_examples=60)
@given(st.data(), st.sampled_from(sorted(PRESETS)))
def test_config_files(tmp_path, data, name):
    """A preset with characters replaced, or any text; without the hints that are looked up for every unknown key."""
    text = PRESETS[name]
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(text)))
            cut = data.draw(st.integers(0, 8))
            text = text[:at] + data.draw(st.text(":{}[]&*!|>'\"%@`#-?, \n\tx\x00\x1b", max_size=4)) + text[at + cut :]
    else:
        text = data.draw(st.text(max_size=120))
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    quickly(lambda: load_config(name, tmp_path / "c.yaml", partial=True), ConfigError)
