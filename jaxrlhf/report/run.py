"""The report of a run: report.html, from the files in its directory, whether it runs, has crashed or is done."""

import dataclasses
import datetime
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jaxrlhf import runs
from jaxrlhf.config import yaml12
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.reader import read_config
from jaxrlhf.errors import DataError, first_line
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.metrics import read_records
from jaxrlhf.metrics.columns import Columns, read_columns
from jaxrlhf.metrics.keys import definition
from jaxrlhf.report import curves, reward_health, tokens, verdict
from jaxrlhf.report.page import page
from jaxrlhf.report.samples import by_prompt, cut
from jaxrlhf.runs import wallclock
from jaxrlhf.secrets import redact, redact_value

T = TypeVar("T")
REPORT = "report.html"
NAMES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Preference optimisation",
    "ppo": "PPO",
    "grpo": "GRPO",
    "distill": "Distillation",
}
VALIDATIONS = 60  # rows of the table of held-out metrics


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of the run in `directory`, to report.html there unless `output` is given, and return its path.

    A file of the run that cannot be read is named on the page. Raises DataError if `directory` is not a run directory,
    and StorageError if the report cannot be written.
    """
    data = collect(directory)
    return write_whole(output or directory / REPORT, page(f"{data['title']} - jaxrlhf report", "run", data))


def collect(directory: Path) -> dict[str, Any]:
    """Data of the page, as a JSON value."""
    files = _Files(directory)
    records = files.read("metrics.jsonl", read_columns, Columns())
    samples = files.read("samples.jsonl", read_records, [])
    run = files.run()
    baseline, evaluation = (files.json(name) for name in ("validation.json", "evaluation.json"))
    config_text, config = files.config()
    method = str(run.get("method") or config_text.removeprefix("# jaxrlhf ").partition(",")[0])
    starts = run.get("starts") or []
    before = baseline.get("metrics", {})
    token_records = tokens.sample(directory / "tokens", files.problems)
    trained = [start for start in starts if not _was_finished(start)]
    status = _status(directory, starts, records, method)
    return {
        "title": str(config.get("run_dir") or directory.resolve().name),
        "method": NAMES.get(method, method or "run"),
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "status": status,
        "verdict": verdict.verdict(method, records, baseline, evaluation),
        "facts": _facts(records, trained, config, method),
        "changes": _changes(config, method, starts[-1].get("command") or [] if starts else []),
        "time": _time(run, starts, records),
        "warnings": [*files.problems, *verdict.warnings(records)],
        "curves": curves.charts(records, before),
        "tradeoffs": curves.tradeoffs(records, before),
        "restarts": [start["step"] for start in trained[1:] if start.get("step")],
        "definitions": {key: definition(key) for key in records.metrics},
        "samples": by_prompt(samples),
        "tokens": tokens.pack(token_records, cut),
        "scores": reward_health.score_histogram(samples, token_records),
        "components": reward_health.components(records),
        "correlations": reward_health.correlations(records, token_records),
        "validations": _validations(records, before),
        "evaluation": evaluation,
        "about": str(starts[-1].get("about") or "") if starts else "",
        "reproduce": _reproduce(directory, run, starts, config_text),
    }


class _Files:
    """The files of a run directory; `problems` names those that cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.problems = directory, []
        if not any((directory / name).is_file() for name in ("run.json", "metrics.jsonl", "config.yaml")):
            inside = sorted(path.parent.name for path in directory.glob("*/run.json")) if directory.is_dir() else []
            hint = f"; {' and '.join(inside)} in it {'are' if len(inside) > 1 else 'is'}" if inside else ""
            reason = "has no run.json, config.yaml or metrics.jsonl" if directory.is_dir() else "is not a directory"
            raise DataError(f"{directory} {reason}, so it is not a run directory{hint}")

    def json(self, name: str) -> dict[str, Any]:
        return self.read(name, read_json, {})

    def run(self) -> dict[str, Any]:
        return self.read("run.json", lambda path: runs.read_record(path.parent), {})

    def config(self) -> tuple[str, dict[str, Any]]:
        """config.yaml as text, and as a flat mapping of dotted keys."""
        content = self.read("config.yaml", read_config, "")
        value = self.read("config.yaml", lambda _: yaml12.load(content), {})
        return redact(content), runs.flatten(redact_value(value)) if isinstance(value, dict) else {}

    def read(self, name: str, reader: Callable[[Path], T], missing: T) -> T:
        path = self.directory / name
        if not path.is_file():
            return missing
        try:
            return reader(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.problems.append(f"{name} cannot be read: {first_line(error)}")
            return missing


def _was_finished(start: Mapping[str, Any]) -> bool:
    """The run was at its last step when it was started again."""
    return bool(start.get("step")) and start.get("step") == start.get("total_steps")


def _status(directory: Path, starts: Sequence[Mapping[str, Any]], records: Columns, method: str) -> dict[str, str]:
    """{"kind": done, running, stopped or failed, "text": a sentence}."""
    last = starts[-1] if starts else {}
    step, total = (records[-1]["step"] if records else 0), last.get("total_steps")
    unit = "updates" if method in verdict.ON_POLICY else "steps"
    far = f"after {step:,} of {total:,} {unit}" if total else f"after {step:,} {unit}"
    match last.get("outcome"):
        case "done" if total and step < total:
            return {"kind": "done", "text": f"Finished early, {far}."}
        case "done":
            return {"kind": "done", "text": "Finished."}
        case "preempted":
            return {"kind": "stopped", "text": f"Stopped on request {far}; the same command resumes it."}
        case None if runs.is_open(directory):
            return {"kind": "running", "text": f"Still running, {far}."}
        case None if starts:
            text = f"Ended without a record of how, {far}: killed, or its machine failed. The same command resumes it."
            return {"kind": "failed", "text": text}
        case None:
            return {"kind": "stopped", "text": f"How it ended is not recorded; its log ends {far}."}
        case outcome:
            message = f": {str(last['error']).rstrip('.')}." if last.get("error") else "."
            return {"kind": "failed", "text": f"Ended by {outcome} {far}{message}"}


def _facts(
    records: Columns, starts: Sequence[Mapping[str, Any]], config: Mapping[str, Any], method: str
) -> list[tuple[str, str]]:
    """[(name, value)] for the head of the page."""
    facts = []
    if model := config.get("model.path"):
        adapters = f", LoRA of rank {config['lora.rank']}" if config.get("lora.enabled") else ""
        facts.append(("Base model", f"{model}{adapters}"))
    sources = {
        "Data": r"data\.(mix\.\d+\.)?path",
        "Reward": r"reward\.(components\.\d+\.)?(model|function|url|judge\.url)",
        "Environment": r"environment\.function",
    }
    for name, pattern in sources.items():
        given = [str(value) for key, value in config.items() if value and re.fullmatch(pattern, key)]
        if given and (name == "Data" or method in verdict.ON_POLICY):
            facts.append((name, ", ".join(given)))
    if records:
        last = records[-1]
        facts.append(("Updates" if method in verdict.ON_POLICY else "Steps", f"{last['step']:,}"))
        if isinstance(last.get("episode"), float | int):
            facts.append(("Responses", f"{last['episode']:,.0f}"))
        for key, name in (("tokens/generated", "Tokens generated"), ("num_tokens", "Tokens in the loss")):
            if amount := records.arrays(key)[1].sum():
                facts.append((name, f"{amount:,.0f}"))
    if starts:
        facts.append(("Started", str(starts[0].get("time", "")).replace("T", " ")[:16]))
        if seconds := sum(map(_seconds, starts)):
            again = f" in {len(starts)} starts" if len(starts) > 1 else ""
            facts.append(("Time", _duration(seconds) + again))
        peaks = [start.get("peak_memory") or {} for start in starts]
        device, host = (max((peak.get(kind) or 0 for peak in peaks), default=0) for kind in ("device", "host"))
        if memory := device or host:
            facts.append(("Peak memory", f"{memory / 2**30:.2f} GiB" + ("" if device else " (process)")))
    return facts


def _time(run: Mapping[str, Any], starts: Sequence[Mapping[str, Any]], records: Columns) -> list[tuple[str, float]]:
    """[(what the wall-clock time was spent on, seconds)], the longest first."""
    begun = starts[-1].get("step", 0) if starts else 0
    summed: dict[str, Any] = {"step": begun + 1}  # in one record: a run that goes on has thousands
    for key in records.metrics:
        if key.startswith(wallclock.PREFIX):
            steps, seconds = records.arrays(key)
            summed[key] = float(seconds[steps > begun].sum())
    times = wallclock.before(starts, run.get("time", {}), [summed], ()) if starts else {}
    named = [(wallclock.NAMES[part], times[part]) for part in wallclock.NAMES if part in times]
    return sorted(named, key=lambda pair: -pair[1])


def _seconds(start: Mapping[str, Any]) -> float:
    try:
        begin, end = (datetime.datetime.fromisoformat(start[key]) for key in ("time", "end"))
        return (end - begin).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _changes(config: Mapping[str, Any], method: str, command: Sequence[str]) -> list[tuple[str, str, str, bool]]:
    """[(key, value, default, whether the command sets it)] of the options that are not at their default, those that the
    command sets first."""
    if method not in METHODS:
        return []
    flags = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in command if word.startswith("--")}
    typed = {"lora.enabled" if flag == "use_lora" else flag for flag in flags}
    defaults = runs.flatten(json.loads(json.dumps(dataclasses.asdict(METHODS[method]()))))  # tuples become lists
    found = [
        (
            key,
            _value(value),
            _value(defaults[key]) if key in defaults else "",
            any(key == name or key.startswith(f"{name}.") for name in typed),
        )
        for key, value in config.items()
        if key not in defaults or defaults[key] != value
    ]
    return sorted(found, key=lambda change: not change[3])


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _validations(records: Columns, before: Mapping[str, float]) -> list[dict[str, Any]]:
    """The held-out metrics of the records that have any, evenly thinned, and those of the initial policy."""
    measured = records.with_any(key for key in records.metrics if key.startswith("eval/"))
    rows = [{"step": 0, **before}] if any(key.startswith("eval/") for key in before) else []
    kept = tokens.spread(len(rows) + len(measured), VALIDATIONS)
    rows = [rows[i] if i < len(rows) else records[measured[i - len(rows)]] for i in kept]
    return [
        {"step": row["step"]} | {key: curves.rounded(row[key]) for key in row if key.startswith("eval/")}
        for row in rows
    ]


def _command(words: Sequence[str]) -> str:
    """The command with an option per line, to copy into a shell."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def _reproduce(
    directory: Path, run: Mapping[str, Any], starts: Sequence[Mapping[str, Any]], config: str
) -> dict[str, Any]:
    """Command, config, versions, hashes, checkpoints and export."""
    checkpoints, export = directory / "checkpoints", directory / "export"
    last = starts[-1] if starts else {}
    return {
        "command": _command(runs.typed_command(last)),
        "directory": str(last.get("directory", "")),
        "config": config,
        "versions": [(str(k), str(v)) for k, v in (last.get("versions") or run.get("versions") or {}).items()],
        "platform": str(run.get("platform", "")),
        "mesh": " x ".join(f"{axis} {size}" for axis, size in (run.get("mesh") or {}).items()),
        "hash": str(last.get("config_sha256", "")),
        "starts": [
            {k: str(start.get(k, "")) for k in ("time", "end", "host", "outcome")} | {"step": start.get("step")}
            for start in starts
        ],
        "checkpoints": sorted((p.name for p in checkpoints.iterdir() if p.is_dir()), key=lambda n: (len(n), n))
        if checkpoints.is_dir()
        else [],
        "export": str(export) if export.is_dir() else "",
    }
