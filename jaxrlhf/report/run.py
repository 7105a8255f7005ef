"""The report of a run: report.html, from the files in its directory, whether it runs, has crashed or is done."""

import dataclasses
import datetime
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from jaxrlhf import runs
from jaxrlhf.config.file import METHODS
from jaxrlhf.errors import DataError, first_line
from jaxrlhf.files import write_whole
from jaxrlhf.metrics import read_records
from jaxrlhf.metrics.keys import REWARDS, definition
from jaxrlhf.metrics.statistics import correlation
from jaxrlhf.report import curves, tokens, verdict
from jaxrlhf.report.page import page

T = TypeVar("T")
REPORT = "report.html"
NAMES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Preference optimisation",
    "ppo": "PPO",
    "grpo": "GRPO",
}
LONGEST_TEXT = 4000
"""Characters of a prompt or completion on the page."""
ALL_TEXTS = 250_000
"""Characters of all samples together."""
STEPS = 12  # steps whose samples are shown
VALIDATIONS = 60  # rows of the table of held-out metrics
BINS = 20


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
    records, samples = files.lines("metrics.jsonl"), files.lines("samples.jsonl")
    run, baseline, evaluation = (files.json(name) for name in ("run.json", "validation.json", "evaluation.json"))
    config_text, config = files.config()
    method = str(run.get("method") or config_text.removeprefix("# jaxrlhf ").partition(",")[0])
    starts = [start for start in run.get("starts") or [] if isinstance(start, dict)]
    before = baseline.get("metrics", {})
    token_records = tokens.sample(directory / "tokens", files.problems)
    status = _status(directory, starts, records, method)
    return {
        "title": str(config.get("run_dir") or directory.resolve().name),
        "method": NAMES.get(method, method or "run"),
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "status": status,
        "verdict": verdict.verdict(method, records, baseline, evaluation),
        "facts": _facts(records, starts, config, method),
        "changes": _changes(config, method),
        "warnings": [*files.problems, *verdict.warnings(records)],
        "curves": curves.charts(records, before),
        "tradeoffs": curves.tradeoffs(records, before),
        "restarts": [start["step"] for start in starts[1:] if start.get("step")],
        "definitions": {key: definition(key) for record in records for key in record if key != "step"},
        "samples": _samples(samples),
        "tokens": tokens.pack(token_records, _cut),
        "scores": _score_histogram(samples, token_records),
        "components": _components(records),
        "correlations": _correlations(records, token_records),
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

    def lines(self, name: str) -> list[dict[str, Any]]:
        records = self._try(name, read_records, [])
        return [record for record in records if isinstance(record.get("step"), int)]

    def json(self, name: str) -> dict[str, Any]:
        value = self._try(name, lambda path: json.loads(path.read_bytes()), {})
        return value if isinstance(value, dict) else {}

    def config(self) -> tuple[str, dict[str, Any]]:
        """config.yaml as text, and as a flat mapping of dotted keys."""
        content = self._try("config.yaml", lambda path: path.read_text(encoding="utf-8", errors="replace"), "")
        value = self._try("config.yaml", lambda _: yaml.safe_load(content), {})
        return content, runs.flatten(value) if isinstance(value, dict) else {}

    def _try(self, name: str, reader: Callable[[Path], T], missing: T) -> T:
        path = self.directory / name
        if not path.is_file():
            return missing
        try:
            return reader(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.problems.append(f"{name} cannot be read: {first_line(error)}")
            return missing


def _status(
    directory: Path, starts: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], method: str
) -> dict[str, str]:
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
    records: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], config: Mapping[str, Any], method: str
) -> list[tuple[str, str]]:
    """[(name, value)] for the head of the page."""
    facts = []
    if model := config.get("model.path"):
        adapters = f", LoRA of rank {config['lora.rank']}" if config.get("lora.enabled") else ""
        facts.append(("Base model", f"{model}{adapters}"))
    if config.get("data.path"):
        facts.append(("Data", str(config["data.path"])))
    reward = [config.get(f"reward.{kind}") for kind in ("model", "function")]
    reward += [config.get(f"reward.components.{i}.{kind}") for i in range(16) for kind in ("model", "function", "url")]
    if method in verdict.ON_POLICY and any(reward):
        facts.append(("Reward", ", ".join(str(part) for part in reward if part)))
    if records:
        last = records[-1]
        facts.append(("Updates" if method in verdict.ON_POLICY else "Steps", f"{last['step']:,}"))
        if isinstance(last.get("episode"), float | int):
            facts.append(("Responses", f"{last['episode']:,.0f}"))
        for key, name in (("tokens/generated", "Tokens generated"), ("num_tokens", "Tokens in the loss")):
            if amount := sum(record.get(key, 0) for record in records):
                facts.append((name, f"{amount:,.0f}"))
    if starts:
        facts.append(("Started", str(starts[0].get("time", "")).replace("T", " ")[:16]))
        if seconds := sum(map(_seconds, starts)):
            again = f" in {len(starts)} starts" if len(starts) > 1 else ""
            facts.append(("Time", _duration(seconds) + again))
        peak = starts[-1].get("peak_memory") or {}
        if memory := peak.get("device") or peak.get("host"):
            facts.append(("Peak memory", f"{memory / 2**30:.2f} GiB" + ("" if peak.get("device") else " (process)")))
    return facts


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


def _changes(config: Mapping[str, Any], method: str) -> list[tuple[str, str, str]]:
    """[(key, value, default)] of the options that are not at their default."""
    if method not in METHODS:
        return []
    defaults = runs.flatten(json.loads(json.dumps(dataclasses.asdict(METHODS[method]()))))  # tuples become lists
    return [
        (key, _value(value), _value(defaults[key]) if key in defaults else "")
        for key, value in config.items()
        if key not in defaults or defaults[key] != value
    ]


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _cut(content: Any) -> str:
    content = str(content)
    left = len(content) - LONGEST_TEXT
    return f"{content[:LONGEST_TEXT]} ... ({left:,} more characters)" if left > 0 else content


def _samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples by prompt: {"steps": [...], "fixed": [...], "others": [...]}.

    A prompt of "fixed" was sampled at several steps: {"prompt", "held_out", "answers": {step: [completion, score]}}. If
    it was sampled several times at one step, each time makes a row. "others" are the samples of prompts that did not
    come back, of the first and the last step.
    """
    grouped: dict[tuple[str, bool, int], dict[int, tuple[str, float | None]]] = {}
    times: dict[tuple[str, bool, int], int] = {}
    for row in rows:
        key = str(row.get("prompt", "")), bool(row.get("held_out")), row["step"]
        times[key] = times.get(key, -1) + 1
        score = row.get("score")
        answer = str(row.get("completion", "")), curves.rounded(score) if isinstance(score, float | int) else None
        grouped.setdefault((key[0], key[1], times[key]), {})[row["step"]] = answer
    several = {key: answers for key, answers in grouped.items() if len(answers) > 1}
    steps = sorted({step for answers in several.values() for step in answers})
    shown = {steps[i] for i in tokens.spread(len(steps), STEPS)}
    budget, fixed = ALL_TEXTS, []
    for (prompt, held_out, _), answers in several.items():
        kept = {step: [_cut(text), score] for step, (text, score) in sorted(answers.items())}
        ends = (min(kept), max(kept))
        kept = {step: answer for step, answer in kept.items() if step in shown or step in ends}
        budget -= sum(len(answer[0]) for answer in kept.values()) + min(len(prompt), LONGEST_TEXT)
        if budget < 0 and fixed:
            break
        fixed.append({"prompt": _cut(prompt), "held_out": held_out, "answers": kept})
    single = [(*key, *next(iter(answers.items()))) for key, answers in grouped.items() if len(answers) == 1]
    ends = {step for *_, step, _ in single}
    ends = {min(ends), max(ends)} if ends and not fixed else set()
    others = [
        {"step": step, "prompt": _cut(prompt), "completion": _cut(answer[0]), "score": answer[1]}
        for prompt, _, _, step, answer in single
        if step in ends
    ]
    return {"fixed": fixed, "left_out": len(several) - len(fixed), "others": others[: STEPS * 2]}


def _validations(records: Sequence[Mapping[str, Any]], before: Mapping[str, float]) -> list[dict[str, Any]]:
    """The held-out metrics of the records that have any, evenly thinned, and those of the initial policy."""
    rows = [row for row in [{"step": 0, **before}, *records] if any(key.startswith("eval/") for key in row)]
    rows = [rows[i] for i in tokens.spread(len(rows), VALIDATIONS)]
    return [
        {"step": row["step"]} | {key: curves.rounded(row[key]) for key in row if key.startswith("eval/")}
        for row in rows
    ]


def _score_histogram(
    samples: Sequence[Mapping[str, Any]], token_records: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Histograms of early and late scores, of what has most of them: held-out prompts at the first and last step, or
    samples of training or recorded sequences in the first and last third of their steps."""
    sources = {
        "held-out prompts": [row for row in samples if row.get("held_out")],
        "samples": [row for row in samples if not row.get("held_out")],
        "recorded sequences": token_records,
    }
    scores = {
        name: [(row["step"], row["score"]) for row in rows if curves.is_finite(row.get("score"))]
        for name, rows in sources.items()
    }
    of, rows = max(scores.items(), key=lambda item: len(item[1]))
    steps = sorted({step for step, _ in rows})
    if len(steps) < 2:
        return None
    part = 1 if of == "held-out prompts" else max(1, len(steps) // 3)
    ends = steps[:part], steps[-part:]
    groups = [[score for step, score in rows if step in end] for end in ends]
    edges = np.histogram_bin_edges(np.concatenate(groups), BINS)
    names = [f"step {end[0]}" if len(end) == 1 else f"steps {end[0]} to {end[-1]}" for end in ends]
    return {
        "of": of,
        "edges": [curves.rounded(float(edge)) for edge in edges],
        "series": [
            {"label": f"{name} ({len(group)})", "counts": np.histogram(group, edges)[0].tolist()}
            for name, group in zip(names, groups, strict=True)
        ],
    }


def _components(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each component of the score: first and last mean, and what was unscored, cut or failed."""
    keys = {key for record in records for key in record if key.startswith(REWARDS) and key.endswith("/errors")}
    rows = []
    for name in sorted(key.split("/")[1] for key in keys):

        def values(part: str, suffix: str = "", name: str = name) -> list[float]:
            key = f"{REWARDS}{name}{suffix}/{part}"
            return [record[key] for record in records if isinstance(record.get(key), float | int)]

        def last(*key: str) -> float | int | None:
            found = values(*key)
            found = found[-verdict.window(len(found)) :]
            return curves.rounded(float(np.mean(found))) if found else None

        means = values("mean")
        rows.append(
            {
                "name": name,
                "first": curves.rounded(means[0]) if means else None,
                "last": last("mean"),
                "std": last("std"),
                "length": last("length_correlation"),
                "unanswered": last("mean", "_unanswered"),
                "truncated": last("mean", "_truncated"),
                "errors": int(sum(values("errors"))),
            }
        )
    return rows


def _correlations(
    records: Sequence[Mapping[str, Any]], token_records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Correlations of score with length and KL: [{"name", "value", "count", "of"}]."""
    found = []
    scored = [r for r in token_records if isinstance(r.get("score"), float | int)]
    score = np.array([r["score"] for r in scored], np.float64)
    for name, of in (("length", lambda r: len(r["pieces"])), ("KL", lambda r: sum(v or 0 for v in r["kl"]))):
        if len(scored) > 3 and (name == "length" or all(isinstance(r.get("kl"), list) for r in scored)):
            value = correlation(score, np.array([of(r) for r in scored], np.float64))
            found.append({"name": name, "value": value, "count": len(scored), "of": "recorded sequences"})
    for name, key in (("length", "tokens/mean_length"), ("KL", "objective/kl")):
        rows = [(r["objective/scores"], r[key]) for r in records if "objective/scores" in r and key in r]
        rows = [row for row in rows if np.isfinite(row).all()]
        if len(rows) > 3:
            scores, others = np.array(rows, np.float64).T
            found.append(
                {"name": f"mean {name}", "value": correlation(scores, others), "count": len(rows), "of": "updates"}
            )
    return found


def _reproduce(
    directory: Path, run: Mapping[str, Any], starts: Sequence[Mapping[str, Any]], config: str
) -> dict[str, Any]:
    """Command, config, versions, hashes, checkpoints and export."""
    checkpoints, export = directory / "checkpoints", directory / "export"
    last = starts[-1] if starts else {}
    return {
        "command": shlex.join(map(str, last.get("command") or [])),
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
