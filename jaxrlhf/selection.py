"""Completions to data: several of each prompt, scored, and kept by their score.

Best-of-n, pairs of best and worst, rejection sampling, and prompts by how often they are answered well.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxrlhf import evaluate
from jaxrlhf.config import PPOConfig
from jaxrlhf.console import Console
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.formats import DECIDING
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError, first_line
from jaxrlhf.files import whole
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.selection_log import Log

Keep = Literal["best", "pairs", "above", "all", "prompts"]
KEEP: tuple[str, ...] = get_args(Keep)
Answer = dict[str, Any]
BATCHES = 8  # of ppo.batch_size completions that are drawn before they are scored: ended rows make room for others
MENDING = ("timeout", "on_error", "error_value", "micro_batch_size")  # of a reward: may change when a job goes on
WRITTEN = {"pairs": ("chosen_score", "rejected_score"), "prompts": ("mean_score",)}  # scores in a row; else "score"


@dataclass(frozen=True)
class Rule:
    """What of a prompt's scored completions is written.

    best: the one with the highest score. pairs: that and the one with the lowest. above: all that score at least
    `threshold`. all: all. prompts: the prompt as it was read, without a completion. Where there is a threshold, a
    prompt's pass rate is the share of its scored completions that reach it; prompts whose rate is not between
    `min_pass_rate` and `max_pass_rate` are left out. Raises ConfigError for what does not go together.
    """

    keep: str
    threshold: float | None = None
    min_pass_rate: float | None = None
    max_pass_rate: float | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ConfigError(f"--keep is {self.keep!r}; it must be one of {', '.join(KEEP)}")
        if self.threshold is None:
            needing = [f"--keep {self.keep}"] * (self.keep == "above")
            needing += ["--min-pass-rate"] * (self.min_pass_rate is not None)
            needing += ["--max-pass-rate"] * (self.max_pass_rate is not None)
            if needing:
                raise ConfigError(f"{needing[0]} needs --threshold, the least score of a completion that is good")
        elif not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold is {self.threshold}; it must be a finite number")
        low, high = self.pass_rates
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"pass rates from {low:g} to {high:g}: they are shares, from 0 to 1, the lower one first")

    @property
    def pass_rates(self) -> tuple[float, float]:
        """The least and the highest pass rate of a prompt that is kept."""
        low, high = self.min_pass_rate, self.max_pass_rate
        return 0.0 if low is None else low, 1.0 if high is None else high

    def apply(self, row: PromptRow, answers: Sequence[Answer]) -> tuple[list[dict[str, Any]], str]:
        """The rows to write for a prompt, and why there are none. `answers` have text, score (None: none was given) and
        finished."""
        scored = [answer for answer in answers if answer["score"] is not None]
        if not scored:
            return [], "no completion has a score"
        about: dict[str, Any] = {}
        if self.threshold is not None:
            passed = [answer for answer in scored if answer["score"] >= self.threshold]
            about["pass_rate"] = rate = len(passed) / len(scored)
            if not self.pass_rates[0] <= rate <= self.pass_rates[1]:
                return [], f"the pass rate is {'below' if rate < self.pass_rates[0] else 'above'} what was asked for"
            if self.keep == "above" and not passed:
                return [], f"no completion scores {self.threshold:g} or more"
            if self.keep == "above":
                scored = passed
        if self.keep == "prompts":
            return [row.columns | {"mean_score": mean([answer["score"] for answer in scored])} | about], ""
        best = max(scored, key=lambda answer: answer["score"])
        about = {name: value for name, value in row.columns.items() if name not in DECIDING} | about
        about |= {"prompt": row.text if row.messages is None else row.messages}
        if self.keep == "pairs":
            worst = min(scored, key=lambda answer: answer["score"])
            if best["score"] == worst["score"]:
                return [], "best and worst have the same score"
            if best["text"] == worst["text"]:
                return [], "best and worst have the same text"
            chosen = {"chosen": _said(row, best), "chosen_score": best["score"]}
            return [about | chosen | {"rejected": _said(row, worst), "rejected_score": worst["score"]}], ""
        kept = [best] if self.keep == "best" else scored
        return [
            about | {"completion": _said(row, answer), "score": answer["score"], "finished": answer["finished"]}
            for answer in kept
        ], ""


def _said(row: PromptRow, answer: Answer) -> Any:
    """A completion in the form of its prompt: text, or the assistant's turn of a conversation."""
    return answer["text"] if row.messages is None else [{"role": "assistant", "content": answer["text"]}]


@dataclass
class Summary:
    """What a selection was made from and what is left, for people: print it."""

    model: str
    rule: Rule
    completions_per_prompt: int
    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # why -> prompts
    unscored: int = 0
    unfinished: int = 0  # of the completions that are written
    scores: list[float] = field(default_factory=list)
    kept_scores: dict[str, list[float]] = field(default_factory=dict)  # by the column of the file
    left_out: list[str] = field(default_factory=list)

    def add(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], why: str) -> None:
        """Count a prompt: its completions, the rows written for it, and why there are none."""
        scores = _scores(answers)
        self.prompts += 1
        self.rows += len(rows)
        self.dropped.update([why] * bool(why))
        self.unscored += len(answers) - len(scores)
        self.scores += scores
        names = WRITTEN.get(self.rule.keep, ("score",))
        for row in rows:
            self.unfinished += names == ("score",) and not row["finished"]
            for name in names:
                self.kept_scores.setdefault(name, []).append(row[name])

    def __str__(self) -> str:
        n = self.completions_per_prompt
        kept = ", ".join(f"{name} {mean(values):.4f}" for name, values in self.kept_scores.items()) or "nothing"
        lines = [f"{self.prompts} prompts, {self.prompts * n} completions of {self.model}, {n} of each"]
        lines.append(f"kept          {self.rows} rows ({self.rule.keep})")
        lines += [f"dropped       {count} prompts: {why}" for why, count in self.dropped.most_common()]
        if self.unscored:
            lines.append(f"unscored      {self.unscored} completions, left out")
        if self.unfinished:
            lines.append(f"unfinished    {self.unfinished} rows: cut at sampling.response_length, finished is false")
        if self.left_out:
            lines.append(f"columns       without {', '.join(self.left_out)}: a row is read by its prompt and answers")
        lines.append(f"mean          score {mean(self.scores):.4f}; of the rows kept: {kept}")
        if self.rule.keep == "best":
            lines.append(f"KL            the best of {n} is at most {kl_bound(n):.3f} nats from the model per response")
        return "\n".join(lines)


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: what the best of n is from the model in KL (https://arxiv.org/abs/2009.01325) at most
    (https://arxiv.org/abs/2401.01879): exactly that if no two completions are alike."""
    return math.log(n) - (n - 1) / n


def select(
    config: PPOConfig,
    out: Path,
    rule: Rule,
    count: int,
    *,
    fresh: bool = False,
    function: Callable[..., Any] | None = None,
) -> Summary:
    """Complete every prompt of `config.data` `count` times, score the completions, and write what `rule` keeps to `out`
    as JSON lines in the order of the prompts.

    Uses model, tokenizer, data, reward, sampling and rollout of `config`; rollout.slots completions are made at a time
    (0: ppo.batch_size) and about ppo.batch_size scored. What they are depends on the seed alone. What has been scored
    is at once in `out`.scored, from where an interrupted call goes on. `fresh` begins anew, whatever is there.
    `function` stands in for `reward.function`. Raises StorageError where `out` exists, unless `fresh`.
    """
    if out.suffix != ".jsonl" or out.resolve() == Path(config.data.path).resolve():
        raise ConfigError(f"--out is {out}: give a file of its own whose name ends in .jsonl")
    if out.exists() and not fresh:
        raise StorageError(f"{out} exists; give another --out, or --fresh to write it anew")
    if rule.keep == "pairs" and count < 2:
        raise ConfigError("--keep pairs needs two completions of each prompt or more; give --n 8, say")
    if config.sampling.greedy and count > 1:
        raise ConfigError(f"sampling.greedy with {count} completions of a prompt: all would be the same; leave it out")
    tokenizer, rows = evaluate.read_prompts(config)
    _check_columns(rows)
    scorer = evaluate.open_scorer(config, tokenizer, rows, function)
    with Log(out.with_name(f"{out.name}.scored"), _settings(config, rows, count), fresh=fresh) as log:
        if log.count < len(rows):
            _complete(config, tokenizer, rows, count, scorer, log)
        summary = Summary(config.model.path, rule, count)
        if rule.keep != "prompts":
            summary.left_out = sorted({name for row in rows for name in row.columns if name in DECIDING} - {"prompt"})
        with whole(out) as file:
            for row, answers in zip(rows, log.read(), strict=True):
                kept, why = rule.apply(row, answers)
                summary.add(answers, kept, why)
                file.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in kept)
        log.remove()
    return summary


def _complete(
    config: PPOConfig, tokenizer: Tokenizer, rows: Sequence[PromptRow], count: int, scorer: Scorer, log: Log
) -> None:
    """Complete and score the rows that the log does not have."""
    model, params = evaluate.open_model(config, tokenizer)
    columns = evaluate.prompt_columns(config, model, rows)
    size = -(-BATCHES * config.ppo.batch_size // count)
    console = None if config.logging.quiet else Console("generate", len(rows), every=config.logging.log_every)
    scores = [score for group in log.read() for score in _scores(group)]
    if console:
        scorer.pause(console.paused)
    try:
        if console and log.count:
            console.note(f"{log.count} of {len(rows)} prompts are scored in {log.path}; going on there")
        while log.count < len(rows):
            part = rows[log.count : log.count + size]
            rollout = evaluate.respond(config, model, params, tokenizer, part, count, columns)
            for groups in evaluate.judge(config, scorer, tokenizer, part, rollout):
                found = [[_answer(answer, scorer) for answer in group] for group in groups]
                log.append(found)
                scores += [score for group in found for score in _scores(group)]
            if console:
                console.progress(log.count, {"scores": mean(scores)} if scores else {})
    finally:
        if console:
            console.close()


def _answer(answer: Answer, scorer: Scorer) -> Answer:
    """What is kept of a completion; its score is None where no part of the reward had an opinion."""
    silent = all(answer["components"].get(f"{name}_unanswered") for name in scorer.parts)
    score = None if silent else float(str(np.float32(answer["score"])))  # 0.9 reaches a threshold of 0.9
    return {"text": answer["text"], "score": score, "finished": answer["finished"]}


def _scores(answers: Sequence[Answer]) -> list[float]:
    return [answer["score"] for answer in answers if answer["score"] is not None]


def _settings(config: PPOConfig, rows: Sequence[PromptRow], count: int) -> dict[str, Any]:
    """All that decides what is drawn and how it is scored, but for the content of models and functions."""
    reward = dataclasses.asdict(config.reward)
    for part in [reward, *reward["components"]]:
        for name in MENDING:
            part.pop(name, None)
    prompts = hashlib.sha256()
    for row in rows:
        prompts.update(repr((row.index, row.tokens, row.columns)).encode("utf-8", "backslashreplace"))
    return {
        "model": dataclasses.asdict(config.model),
        "tokenizer": dataclasses.asdict(config.tokenizer),
        "prompts": prompts.hexdigest(),
        "n": count,
        "reward": reward,
        "sampling": dataclasses.asdict(config.sampling),
        "rollout.dtype": config.rollout.dtype,
        "seed": config.seed,
    }


def _check_columns(rows: Sequence[PromptRow]) -> None:
    """Refuse columns that cannot be written, before hours have gone into what stands beside them."""
    for row in rows:
        for name, value in row.columns.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"row {row.index + 1} of the prompts: column {name!r} cannot be written as JSON "
                    f"({first_line(error)}); drop it from the data, or turn it into text"
                ) from error


def mean(values: Sequence[float]) -> float:
    """0 for no values."""
    return math.fsum(values) / max(1, len(values))
