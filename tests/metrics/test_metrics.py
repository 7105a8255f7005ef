"""Metric records: exact, complete after a kill, cut on resume, and safe on a terminal."""

import io
import json
import math
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Logging
from jaxrlhf.errors import DataError
from jaxrlhf.metrics import Logger, console, read_records
from jaxrlhf.metrics.keys import METRICS, definition

PLAIN = Logging(tensorboard=False)


def strict(line):
    """Parse standard JSON, which has no NaN."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(line, parse_constant=refuse)


def test_numbers_survive_to_the_last_bit(tmp_path):
    logger = Logger(tmp_path, PLAIN, "sft", 10)
    values = [np.float32(0.1), jnp.float32(1 / 3), 1e-300, 5e-324, np.float64(math.pi), jnp.bfloat16(0.3)]
    for step, value in enumerate(values, 1):
        logger.log(step, {"loss": value, "num_tokens": np.int64(2**53 + 1)})
    for record, value in zip(read_records(tmp_path / "metrics.jsonl"), values, strict=True):
        assert record["loss"] == float(value) and record["num_tokens"] == 2**53 + 1


def test_non_finite_numbers_are_valid_json(tmp_path):
    logger = Logger(tmp_path, PLAIN, "ppo", 10)
    logger.log(1, {"objective/kl": float("nan"), "rewards/f/mean": np.float32("inf"), "grad_norm": -math.inf})
    logger.samples(1, [{"prompt": "a", "completion": "b", "score": float("nan"), "parts": [math.inf]}])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert strict(line) == {"step": 1, "objective/kl": "NaN", "rewards/f/mean": "Infinity", "grad_norm": "-Infinity"}
    assert strict((tmp_path / "samples.jsonl").read_text())["parts"] == ["Infinity"]
    record = read_records(tmp_path / "metrics.jsonl")[0]
    assert (
        math.isnan(record["objective/kl"]) and record["rewards/f/mean"] == math.inf and record["grad_norm"] == -math.inf
    )


def test_unknown_keys_are_an_error(tmp_path):
    with pytest.raises(AssertionError, match="objective/kll"):
        Logger(tmp_path, PLAIN, "ppo", 10).log(1, {"objective/kll": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_every_shown_key_is_defined():
    for labels in console.SUMMARY.values():
        assert labels.keys() <= METRICS.keys()
    assert all(text and "\n" not in text for text in METRICS.values())


def test_lines_are_written_at_once_and_rewind_removes_later_ones(tmp_path, capsys):
    logger = Logger(tmp_path, PLAIN, "sft", 10)
    for step in range(1, 6):
        logger.log(step, {"loss": step / 3})
        logger.samples(step, [{"prompt": "p", "completion": "c"}] * 2)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert whole.count(b"\n") == 5  # without close
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    records = tmp_path / "tokens"
    records.mkdir()
    for name in ("step-000003.jsonl.gz", "step-000004.jsonl.gz", "step-notes.jsonl.gz"):
        (records / name).touch()
    resumed = Logger(tmp_path, PLAIN, "sft", 10)
    resumed.rewind(3)
    assert sorted(path.name for path in records.iterdir()) == ["step-000003.jsonl.gz", "step-notes.jsonl.gz"]
    assert [r["step"] for r in read_records(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]
    for step in (4, 5):
        resumed.log(step, {"loss": step / 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    resumed.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_invalid_lines_are_refused_with_their_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="is it a run directory"):
        read_records(path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        read_records(path)
    path.write_text('{"step": 1, "loss": 2.0}\n[1]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected an object, found \[1\]"):
        read_records(path)
    path.write_text('{"step": 1, "loss": "high"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: 'loss' is 'high', not a number"):
        read_records(path)


def test_records_of_a_long_run_share_their_keys(tmp_path):
    """Strings of keys are half of the memory of a record."""
    line = json.dumps({"step": 1, "objective/scores": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert all(mine is other for mine, other in zip(first, second, strict=True))


def test_any_text_is_read_back_unchanged(tmp_path):
    text = "é 漢 \u202e \x1b[31m \u2028 \x85 \r\n [bold] \ud800"
    Logger(tmp_path, Logging(tensorboard=False, quiet=True), "ppo", 1).samples(1, [{"prompt": text, "completion": ""}])
    assert read_records(tmp_path / "samples.jsonl")[0]["prompt"] == text
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 1


def test_plain_console(tmp_path, capsys):
    logger = Logger(tmp_path, Logging(tensorboard=False, log_every=5), "ppo", 12)
    for step in range(1, 13):
        record = {"objective/scores": 0.91, "objective/kl": 2.7, "tokens/mean_length": 12.1, "learning_rate": 1e-5}
        logger.log(step, record | {"policy/approxkl_avg": 0.1})
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" score")[0].split("ppo ")[1] for line in lines] == [f"step {n}/12" for n in (1, 5, 10, 12)]
    assert lines[0].endswith("score=0.91 kl=2.7 len=12.1 lr=1.0e-05")
    assert " eta=" in lines[1] and "approxkl" not in lines[1] and lines[1][:2] == "20" and lines[1][10] == "T"


def test_the_remaining_time_leaves_out_steps_that_compiled(tmp_path, capsys, monkeypatch):
    now = iter([0.0, 500.0, 501.0, 502.0, 999.0, 1000.0, 1001.0])  # read by records that set or read the clock
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    logger = Logger(tmp_path, Logging(tensorboard=False, log_every=1), "sft", 6)
    for step in range(1, 6):
        if step in (2, 5):  # while this step was computed
            logger.compiled("compiled jit(f) in 499.0 s")
        logger.log(step, {"loss": 2.0})
    logger.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [line.partition("eta=")[2] for line in lines] == ["", "", "3s", "2s", ""]


def test_every_validation_is_printed(tmp_path, capsys):
    logger = Logger(tmp_path, Logging(tensorboard=False, log_every=50), "sft", 100, "eval/entropy")
    for step in range(1, 50):
        logger.log(step, {"loss": 2.0} | ({"eval/loss": 1.5, "eval/entropy": 0.7} if step == 45 else {}))
    logger.close()
    shown = [line.split("sft ")[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split(" loss")[0] for line in shown] == ["step 1/100", "step 45/100"]
    assert "eval/entropy=0.7" in shown[1].split(), "the metric that was chosen, by its name"
    assert "1.5" not in shown[1]


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_of_samples_are_escaped_on_the_console(tmp_path, monkeypatch, terminal):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "dumb")  # so that rich itself writes no escape sequences
    logger = Logger(tmp_path, PLAIN, "ppo", 2)
    logger.log(1, {"objective/scores": 0.5})
    wild = "[bold red]x[/nothing] \x1b[2J\x1b]0;title\x07 \r overwritten \u202e \x9b31m \ud800 " + "long " * 1000
    logger.samples(1, [{"prompt": wild, "completion": "line\n[/]", "score": -1.5}])
    logger.note("[/red] \x1b[2J note")
    logger.close()
    shown = out.getvalue()
    assert "[bold red]x[/nothing]" in shown and "[/]" in shown and "score=-1.5" in shown and "[/red]" in shown
    assert "\\x1b[2J" in shown and not set("\x1b\x07\x9b\u202e\ud800") & set(shown)
    assert ("\r" in shown) <= terminal and len(shown) < 4000


def test_only_the_first_samples_are_shown_and_quiet_shows_none(tmp_path, capsys):
    rows = [{"prompt": f"prompt {n}", "completion": "c"} for n in range(5)]
    logger = Logger(tmp_path, Logging(tensorboard=False, num_samples=2), "ppo", 2)
    logger.samples(1, rows)
    shown = capsys.readouterr().out
    assert "prompt 1" in shown and "prompt 2" not in shown and len(read_records(tmp_path / "samples.jsonl")) == 5
    quiet = Logger(tmp_path, Logging(tensorboard=False, quiet=True), "ppo", 2)
    quiet.samples(1, rows)
    quiet.log(1, {"objective/kl": 1.0})
    quiet.note("hush")
    assert capsys.readouterr().out == ""


def test_a_console_of_another_encoding(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Logger(tmp_path, PLAIN, "ppo", 2).samples(1, [{"prompt": "漢", "completion": "é"}])
    assert b"\\u6f22" in raw.getvalue()


def test_metrics_of_components_are_defined_by_their_part():
    assert definition("loss/kl_avg") == METRICS["loss/kl_avg"]
    assert definition("rewards/chosen") == METRICS["rewards/chosen"]
    assert (
        definition("rewards/tone/mean") == "mean over the completions that the component tone scored, before its weight"
    )
    assert definition("rewards/tone_unanswered/mean") == "share of completions that the component left unscored"
    assert definition("rewards/a_spread/std").startswith("standard deviation over the completions")
    assert definition("step") == definition("rewards/tone/other") == ""
