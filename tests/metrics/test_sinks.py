"""TensorBoard, W&B and trackio: the same numbers under the asked tags, once and in order; never the end of a run."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config import Logging
from jaxrlhf.errors import ConfigError
from jaxrlhf.metrics import Logger, read_records, sinks, tags
from jaxrlhf.metrics.keys import METRICS, REWARDS

ONLY = {"tensorboard": False, "quiet": True}
HOSTILE = "<script>x</script> ``` | \x1b[2J \ud800\n# head"


def events(run):
    """All events of a run's TensorBoard files, in the order in which a viewer reads them."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401 - the format is that of the writer we use

    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def stub(calls, **broken):
    """A module with the functions of W&B and trackio, which appends its calls to `calls`."""

    def refuse(error):
        def fail(*_, **__):
            raise error

        return fail

    functions = {
        "init": lambda **options: calls.append(("init", options)),
        "log": lambda record, step: calls.append((step, record)),
        "finish": lambda: calls.append("finish"),
        "Table": lambda columns, data: ("table", columns, data),
        "Histogram": lambda array: ("histogram", array.tolist()),
    }
    return SimpleNamespace(__name__="wandb", **functions | {name: refuse(error) for name, error in broken.items()})


# ---------------------------------------------------------------- tags


def test_tags_are_trls_only_when_asked_and_files_keep_ours(tmp_path):
    record = {"objective/scores": 1.0, "objective/kl": 0.5, "loss/policy_avg": 0.1, "learning_rate": 1e-5, "eval/kl": 2}
    for method, wanted in {
        "ppo": {"rewards/mean": 1.0, "kl_divergence": 0.5, "loss": 0.1, "learning_rate": 1e-5, "lr": 1e-5},
        "grpo": {"rewards/mean": 1.0, "reward": 1.0, "kl_divergence": 0.5, "loss": 0.1, "learning_rate": 1e-5},
    }.items():
        assert tags.tagged(record, method, "ours") == record
        assert wanted.items() <= tags.tagged(record, method, "trl").items()
    assert tags.tagged({"loss": 1.0}, "sft", "trl") == {"loss": 1.0}
    assert tags.tagged(record, "ppo", "ours", "train/") == {
        key if key == "eval/kl" else f"train/{key}": value for key, value in record.items()
    }
    logger = Logger(tmp_path, Logging(quiet=True, tags="trl"), "ppo", 2)
    logger.log(1, record)
    logger.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, **record}]
    assert {"rewards/mean", "loss", "kl_divergence"} <= {v.tag for e in events(tmp_path) for v in e.summary.value}


def test_no_two_metrics_have_one_tag():
    for method, table in tags.TRL.items():
        assert all(key in METRICS or key.startswith(REWARDS) for key in table)
        given = [tag for names in table.values() for tag in names]
        assert len(given) == len(set(given)), method
        # a new tag is no name of another metric of these methods
        own = {key for key in METRICS if not key.startswith("rewards/")} - {"loss", "entropy", "grad_norm"}
        assert not [tag for key, names in table.items() for tag in names if tag in own and tag != key], method


def test_the_documented_tags_are_those_written():
    page = (Path(__file__).resolve().parents[2] / "docs" / "logging.md").read_text()
    table = re.search(r"^\| metric \| PPO \| GRPO \|\n.*?(?=\n\n)", page, re.M | re.S)[0].splitlines()[2:]
    documented = {"ppo": {}, "grpo": {}}
    for line in table:
        (key,), ppo, grpo = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
        documented["ppo"][key], documented["grpo"][key] = tuple(ppo), tuple(grpo)
    for method, shown in documented.items():
        assert tags.TRL[method].keys() <= shown.keys()
        assert shown == {key: tags.TRL[method].get(key, (key,)) for key in shown}


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_the_same_numbers_and_purges(tmp_path):
    logger = Logger(tmp_path, Logging(quiet=True), "sft", 10)
    logger.rewind(4)
    logger.log(5, {"loss": 0.25, "eval/loss": 2.0})
    logger.close()
    found = events(tmp_path)
    scalars = {v.tag: (e.step, v.simple_value) for e in found for v in e.summary.value}
    assert scalars == {"loss": (5, 0.25), "eval/loss": (5, 2.0)}
    assert [e.step for e in found if e.session_log.status == 1] == [5]  # a viewer drops what was logged from step 5 on


def test_a_run_resumed_within_a_second_keeps_its_first_events(tmp_path):
    for step in (0, 2, 4):
        logger = Logger(tmp_path, Logging(quiet=True), "sft", 10)
        logger.rewind(step)
        logger.log(step + 1, {"loss": 1.0})
        logger.close()
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 3, 5]


def test_samples_and_histograms_reach_tensorboard(tmp_path):
    logger = Logger(tmp_path, Logging(quiet=True), "ppo", 2)
    rows = [{"prompt": "a", "completion": HOSTILE, "score": 0.5, "messages": [{"role": "user"}], "greedy": None}]
    logger.samples(1, rows)
    logger.histograms(1, {"scores": np.array([0.0, 1.0, math.nan, 1.0]), "none": np.array([math.nan])})
    logger.close()
    values = {v.tag: v for e in events(tmp_path) for v in e.summary.value}
    assert set(values) == {"samples/text_summary", "histograms/scores"}
    text = values["samples/text_summary"].tensor.string_val[0].decode()
    assert "score 0.5" in text and "role" in text and "greedy" not in text
    for line in ("<script>x</script> ``` | \x1b[2J \\ud800", "# head"):
        assert f"\n    {line}" in text, "an indented code block, in which Markdown is not interpreted"
    histogram = values["histograms/scores"].histo
    assert (histogram.num, histogram.sum, sum(histogram.bucket)) == (3, 2.0, 3)


def test_token_records_give_histograms_of_what_they_have(tmp_path):
    logger = Logger(tmp_path, Logging(quiet=True), "grpo", 2)
    logger.tokens(1, [{"kl": [0.5, None], "advantage": [1.0, 2.0]}, {"kl": [1.5]}, {}])
    logger.tokens(2, [{"logprob": [-1.0]}])
    logger.close()
    values = {v.tag: v.histo for e in events(tmp_path) for v in e.summary.value}
    assert {tag: (h.num, h.sum) for tag, h in values.items()} == {
        "histograms/kl_per_token": (2, 2.0),
        "histograms/advantage": (2, 3.0),
    }


def test_without_events_there_are_no_event_files(tmp_path):
    logger = Logger(tmp_path, Logging(quiet=True), "ppo", 2)
    logger.rewind(0)
    logger.close()
    assert not (tmp_path / "tensorboard").exists()


# ---------------------------------------------------------------- W&B, and what both trackers do


def test_a_tracker_is_optional_and_gets_the_run(tmp_path, monkeypatch):
    config = Logging(**ONLY, wandb_project="p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb cannot be imported .*jaxrlhf\\[wandb"):
        Logger(tmp_path, config, "sft", 1)
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub(calls))
    (tmp_path / "config.yaml").write_text("# jaxrlhf sft\nseed: 3\n")
    logger = Logger(tmp_path, config, "sft", 1)
    logger.log(1, {"loss": 2.0})
    logger.samples(1, [{"prompt": "p", "completion": HOSTILE}, {"prompt": [{"role": "user"}], "score": 1.0}])
    logger.histograms(1, {"scores": np.array([1.0, math.inf])})
    logger.close()
    (_, options), scalars, table, histogram, last = calls
    assert (options["project"], options["name"], options["config"]) == ("p", tmp_path.name, {"seed": 3})
    assert (scalars, histogram, last) == (
        (1, {"loss": 2.0}),
        (1, {"histograms/scores": ("histogram", [1.0])}),
        "finish",
    )
    step, record = table
    _, columns, data = record["samples"]
    assert (step, columns) == (1, ["prompt", "completion", "score"])
    assert data == [["p", HOSTILE.replace("\ud800", "\\ud800"), None], ['[{"role": "user"}]', None, 1.0]]


def test_kinds_of_samples_of_one_step_do_not_replace_each_other(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub(calls))
    logger = Logger(tmp_path, Logging(**ONLY, wandb_project="p"), "ppo", 1)
    logger.rewind(0)
    logger.samples(0, [{"completion": "before", "held_out": True}])  # step 0 is before training
    logger.samples(0, [{"completion": "fixed"}], show=False)
    logger.samples(0, [{"completion": "sampled"}])
    logger.close()
    assert [(step, list(record)) for step, record in calls[1:-1]] == [
        (0, ["held_out_samples"]),
        (0, ["fixed_prompts"]),
        (0, ["samples"]),
    ]


def test_a_resumed_run_sends_a_tracker_no_step_twice(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub(calls))
    config = Logging(**ONLY, wandb_project="p")

    def run(start, stop, config=config):
        logger = Logger(tmp_path, config, "sft", 9)
        logger.rewind(start)
        for step in range(start + 1, stop + 1):
            logger.log(step, {"loss": float(step)})
        logger.close()

    run(0, 5)
    run(3, 7)  # killed after step 5 with a checkpoint of step 3
    assert [call[0] for call in calls if call != "finish" and call[0] != "init"] == [1, 2, 3, 4, 5, 6, 7]
    ids = [call[1]["id"] for call in calls if call[0] == "init"]
    assert len(ids) == 2 and ids[0] == ids[1]
    calls.clear()
    run(0, 1)
    assert calls[0][1]["id"] != ids[0], "another run, from the start"
    assert [call[0] for call in calls[1:-1]] == [1]
    run(1, 4, Logging(**ONLY))
    calls.clear()
    run(2, 5)
    assert [call[0] for call in calls[1:-1]] == [3, 4, 5], "the steps that were logged without the tracker"


def test_a_tracker_that_cannot_start_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", stub([], init=RuntimeError("no API key\nmore")))
    logger = Logger(tmp_path, Logging(**ONLY, wandb_project="p"), "sft", 1)
    with pytest.raises(ConfigError, match=r"could not start: no API key\. .*wandb login.*WANDB_MODE=offline"):
        logger.rewind(0)
    logger.close()


def test_a_sink_that_fails_is_a_note_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub(calls, log=ConnectionError("no route to host")))
    logger = Logger(tmp_path, Logging(wandb_project="p"), "sft", 9)
    for step in (1, 2, 3):
        logger.log(step, {"loss": 1.0})
    logger.close()
    printed = capsys.readouterr().out
    assert printed.count("no more is logged to wandb: no route to host") == 1
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3 and calls[-1] == "finish"
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 2, 3], "the other sink"


def test_a_full_disk_stops_tensorboard_and_not_the_run(tmp_path, monkeypatch, capsys):
    logger = Logger(tmp_path, Logging(), "sft", 100)
    logger.log(1, {"loss": 1.0})
    (board,) = logger._sinks
    monkeypatch.setattr(sinks, "FLUSH_SECONDS", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "flush", full)
    for step in range(2, 40):  # a writer with a thread and a queue of its own would block here
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert "no more is logged to TensorBoard: [Errno 28] No space left on device" in capsys.readouterr().out
    assert len(read_records(tmp_path / "metrics.jsonl")) == 39


def test_close_hides_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", stub([], finish=RuntimeError("upload failed")))
    logger = Logger(tmp_path, Logging(tensorboard=False, wandb_project="p"), "sft", 9)
    logger.log(1, {"loss": 1.0})
    with pytest.raises(ZeroDivisionError):
        try:
            1 / 0  # noqa: B018
        finally:
            logger.close()
    assert "wandb could not be closed: upload failed" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    logger = Logger(tmp_path, Logging(**ONLY), "sft", 9)
    logger._metrics.close()
    logger._metrics = open("/dev/full", "w") if os.path.exists("/dev/full") else io.TextIOWrapper(io.BufferedIOBase())  # noqa: SIM115
    with pytest.raises(OSError):
        logger.log(1, {"loss": 1.0})
    logger.close()


# ---------------------------------------------------------------- trackio

TRACKIO = """
import json, pathlib, sys
sys.addaudithook(lambda event, args: print("network", args, file=sys.stderr) if event == "socket.connect" else None)
import numpy as np
from jaxrlhf.config import Logging
from jaxrlhf.metrics import Logger
run = pathlib.Path(sys.argv[1])
config = Logging(tensorboard=False, trackio_project="project", tags="trl", log_every=100)
for start, stop in ((0, 4), (2, 6)):
    logger = Logger(run, config, "ppo", 6)
    logger.rewind(start)
    for step in range(start + 1, stop + 1):
        logger.log(step, {"objective/scores": step / 2, "objective/kl": float("nan")})
    logger.samples(stop, [{"prompt": "p", "completion": "<b>\\ud800", "score": 1.0}])
    logger.histograms(stop, {"scores": np.arange(3.0)})
    logger.close()
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("project")
print("RESULT", json.dumps([name, SQLiteStorage.get_logs("project", name)]))
"""


def test_trackio_has_every_step_once_and_needs_no_network(tmp_path):
    pytest.importorskip("trackio")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path / "run")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "network" not in done.stderr
    name, logs = json.loads(done.stdout.partition("RESULT ")[2])
    assert name.startswith("run-")
    assert [(row["step"], row["rewards/mean"]) for row in logs if "rewards/mean" in row] == [
        (step, step / 2) for step in range(1, 7)
    ]
    (table,) = [row["samples"] for row in logs if "samples" in row and row["step"] == 6]
    assert table["_value"] == [{"prompt": "p", "completion": "<b>\\ud800", "score": 1.0}]
    assert [sum(row["histograms/scores"]["values"]) for row in logs if "histograms/scores" in row] == [3, 3]
