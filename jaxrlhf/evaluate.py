"""What a model answers and what that is worth: random prompts, several completions of each, scored and ranked."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxrlhf import runtime, weights
from jaxrlhf.config import Data, PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.errors import DataError
from jaxrlhf.files import write_whole
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import read
from jaxrlhf.text_metrics import distinct
from jaxrlhf.types import Params, Rollout

T = TypeVar("T")
Z95 = 1.959964  # two-sided 95 % of a normal distribution


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n) with the n - 1 variance; the error of a single value is 0."""
    data = np.asarray(list(values), np.float64)
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(len(data))) if len(data) > 1 else 0.0


def wilson(successes: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return min(max(0.0, low), share), max(min(1.0, high), share)  # rounding must not put the share outside


def evaluate(
    config: PPOConfig,
    *,
    num_prompts: int,
    num_completions: int,
    function: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Complete `num_prompts` random prompts of `config.data` `num_completions` times each and score them.

    Uses model, tokenizer, data, reward, sampling and rollout of `config`; rollout.slots completions are made at a time
    (0: ppo.batch_size) and ppo.batch_size scored. Which prompts and completions depends on the seed alone.
    `function` stands in for `reward.function`. Returns what `write` writes and `table` shows: `statistics` and, for
    each prompt, its completions from best to worst with their rank, score, the parts of the score, and length.
    """
    model, params, tokenizer = open_model(config)
    scorer = Scorer(config.reward, tokenizer, function)
    fitting = prompt_rows(_fitting(config.data, model.max_positions, config.sampling.response_length), tokenizer).train
    scorer.check([row.text for row in fitting], columns(fitting), [row.messages for row in fitting])
    rows = choose(fitting, num_prompts, config.seed)
    rollout = respond(config, model, params, tokenizer, rows, num_completions)
    repeated = [row for row in rows for _ in range(num_completions)]
    answers: list[dict[str, Any]] = []
    for start in range(0, len(repeated), config.ppo.batch_size):
        span = slice(start, start + config.ppo.batch_size)
        part = jax.tree.map(lambda x, span=span: x[span], rollout)
        answers += _score(scorer, tokenizer, repeated[span], part, config.sampling.stop_strings)
    groups = [answers[i : i + num_completions] for i in range(0, len(answers), num_completions)]
    prompts = [_ranked(row, group) for row, group in zip(rows, groups, strict=True)]
    return {
        "model": config.model.path,
        "prompts_from": config.data.path,
        "reward": dataclasses.asdict(config.reward)
        | {"components": [dataclasses.asdict(component) for component in config.reward.components]},
        "sampling": dataclasses.asdict(config.sampling)
        | {"stop_token_ids": list(config.sampling.stop_token_ids), "stop_strings": list(config.sampling.stop_strings)},
        "seed": config.seed,
        "statistics": statistics(prompts),
        "prompts": prompts,
    }


def complete(config: PPOConfig, prompt: str, count: int) -> list[str]:
    """`count` continuations of a plain text, each with the text itself; an empty one starts from bos."""
    model, params, tokenizer = open_model(config)
    tokens = tokenizer.encode(prompt, special=True) if config.data.control_tokens else tokenizer.prompt_ids(prompt)
    room = model.max_positions - len(tokens)
    if room < 1:
        raise DataError(f"the prompt has {len(tokens)} tokens and the model's context is {model.max_positions}")
    if room < config.sampling.response_length:
        warnings.warn(
            f"{config.sampling.response_length} tokens were asked for, but after a prompt of {len(tokens)} the context "
            f"of {model.max_positions} has room for {room}: at most so many will come",
            stacklevel=2,
        )
    sampling = dataclasses.replace(config.sampling, response_length=min(config.sampling.response_length, room))
    config = dataclasses.replace(config, sampling=sampling)
    row = PromptRow(tokens=tokens, text=prompt, columns={}, index=0)
    rollout = respond(config, model, params, tokenizer, [row], count)
    return [prompt + text for text in read(rollout, tokenizer, config.sampling.stop_strings)[1]]


def open_model(config: PPOConfig) -> tuple[ModelConfig, Params, Tokenizer]:
    """The language model of a config as an inference copy in its rollout dtype, with its tokenizer.

    Raises DataError if they do not fit.
    """
    source = config.model
    tokenizer = weights.open_tokenizer(config.tokenizer, source)
    dtype = runtime.resolve_dtype(source.compute_dtype, jax.default_backend())
    model, params = weights.load(
        source.path,
        revision=source.revision,
        dtype=dtype,
        head="lm",
        compute_dtype=dtype,
        init=source.init,
        key=jax.random.key(config.seed),
    )
    check_vocab(tokenizer, model.vocab_size)
    check_sampling(config.sampling, model.vocab_size)
    model, params = inference_copy(model, params, dtype if config.rollout.dtype == "auto" else config.rollout.dtype)
    return model, params, tokenizer


def respond(
    config: PPOConfig, model: ModelConfig, params: Params, tokenizer: Tokenizer, rows: Sequence[PromptRow], count: int
) -> Rollout:
    """`count` responses to each row, those of a row side by side, as host arrays."""
    sampling = config.sampling
    length = batching.bucket(max(len(row.tokens) for row in rows), model.max_positions - sampling.response_length)
    prompts = batching.prompts(rows, tokenizer.pad_id, length)
    slots = config.rollout.slots or config.ppo.batch_size
    key = jax.random.key(config.seed)
    rest = key, sampling, tokenizer.stop_ids, tokenizer.pad_id
    return engine.answer(params, model, prompts, *rest, slots=slots, group=count)


def choose(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` random rows without repetition, in file order; all of them where there are fewer."""
    picked = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(picked)]


def statistics(prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures over all completions. Completions of one prompt are not independent, so the standard error of the mean is
    that of the prompts' means."""
    answers = [answer for prompt in prompts for answer in prompt["completions"]]
    scores = np.array([answer["score"] for answer in answers])
    texts = [answer["text"] for answer in answers]
    finished = sum(answer["finished"] for answer in answers)
    lengths = np.array([answer["tokens"] for answer in answers])
    mean, error = mean_and_error(prompt["mean"] for prompt in prompts)
    return {
        "prompts": len(prompts),
        "completions": len(answers),
        "mean": mean,
        "standard_error": error,
        "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        "min": float(scores.min()),
        "max": float(scores.max()),
        "spread_within_prompt": float(np.mean([prompt["spread"] for prompt in prompts])),
        "best_of_n_mean": float(np.mean([prompt["completions"][0]["score"] for prompt in prompts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "identical_completions": 1 - len(set(texts)) / len(texts),
        "tokens_mean": float(lengths.mean()),
        "finished": finished / len(answers),
        "finished_interval_95": list(wilson(finished, len(answers))),
        "components": {name: _component(prompts, name) for name in answers[0]["components"]},
    }


def _component(prompts: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    means = [float(np.mean([answer["components"][name] for answer in prompt["completions"]])) for prompt in prompts]
    return dict(zip(("mean", "standard_error"), mean_and_error(means), strict=True))


def table(result: dict[str, Any], width: int = 100) -> str:
    """The result for a console: every prompt with its ranked completions, then the statistics."""
    lines = []
    for prompt in result["prompts"]:
        lines += ["", _one_line(prompt["prompt"], width)]
        for answer in prompt["completions"]:
            lines.append(f"  {answer['rank']:<6} {answer['score']:>9.3f}  {_one_line(answer['text'], width - 19)}")
    stats = result["statistics"]
    low, high = stats["finished_interval_95"]
    lines += [
        "",
        f"{stats['prompts']} prompts, {stats['completions']} completions of {result['model']}",
        f"score         {stats['mean']:.4f} +- {stats['standard_error']:.4f} (standard error over prompts)",
        f"              std {stats['std']:.4f}, from {stats['min']:.4f} to {stats['max']:.4f}",
        f"per prompt    best - worst {stats['spread_within_prompt']:.4f}, mean best {stats['best_of_n_mean']:.4f}",
        f"length        {stats['tokens_mean']:.1f} tokens, finished {stats['finished']:.2f} [{low:.2f}, {high:.2f}]",
        f"variety       distinct-1 {stats['distinct_1']:.2f}, distinct-2 {stats['distinct_2']:.2f}, "
        f"identical {stats['identical_completions']:.2f}",
    ]
    lines += [
        f"from {name:<8} {part['mean']:.4f} +- {part['standard_error']:.4f}"
        for name, part in stats["components"].items()
        if part["mean"] or not name.endswith(("_truncated", "_unanswered"))  # said only where it happened
    ]
    return "\n".join(lines).lstrip("\n")


def write(result: dict[str, Any], path: Path) -> Path:
    """Write the result as JSON, whole or not at all. Raises StorageError."""
    return write_whole(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _fitting(data: Data, context: int, response: int) -> Data:
    """`data` with prompts limited to the room that the response leaves in the context."""
    room = context - response
    if room < 1:
        raise DataError(
            f"sampling.response_length is {response} and the model's context {context}: no room for a prompt; lower it"
        )
    return dataclasses.replace(data, max_prompt_length=min(data.max_prompt_length or room, room))


def _score(
    scorer: Scorer, tokenizer: Tokenizer, rows: Sequence[PromptRow], rollout: Rollout, stop_strings: Sequence[str]
) -> list[dict[str, Any]]:
    rollout, texts = read(rollout, tokenizer, stop_strings)
    asked = [row.text for row in rows], texts, rollout, columns(rows)
    scored = scorer.score(*asked, messages=[row.messages for row in rows])
    for note in scored.notes:
        warnings.warn(note, stacklevel=2)
    return [
        {
            "score": float(scored.totals[i]),
            "components": {name: float(values[i]) for name, values in scored.components.items()},
            "text": texts[i],
            "tokens": int(rollout.response_mask[i].sum()),
            "finished": bool(rollout.finished[i]),
        }
        for i in range(len(rows))
    ]


def _ranked(row: PromptRow, answers: list[dict[str, Any]]) -> dict[str, Any]:
    ranked = sorted(answers, key=lambda answer: -answer["score"])
    names = ["BEST", *["MEDIUM"] * (len(ranked) - 2), "WORST"][: len(ranked)]
    scores = [answer["score"] for answer in ranked]
    return {
        "prompt": row.text,
        "index": row.index,
        "mean": float(np.mean(scores)),
        "spread": scores[0] - scores[-1],
        "completions": [{"rank": name, **answer} for name, answer in zip(names, ranked, strict=True)],
    }


def _one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
