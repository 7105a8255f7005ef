"""What a model answers and what that is worth: random prompts, several completions of each, scored and ranked, or
compared with references."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxrlhf import runtime, weights
from jaxrlhf.config import Data, PPOConfig, replace
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows
from jaxrlhf.data.formats import answer_column
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.errors import ConfigError, DataError, quoted
from jaxrlhf.evaluation.summary import statistics
from jaxrlhf.files import write_whole
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.types import Params, Rollout

T = TypeVar("T")


def evaluate(
    config: PPOConfig,
    *,
    num_prompts: int,
    num_completions: int,
    function: Callable[..., Any] | None = None,
    references: str = "",
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """Complete `num_prompts` random prompts of `config.data` `num_completions` times each and measure what comes.

    Uses model, tokenizer, data, reward, sampling and rollout of `config`; rollout.slots completions are made at a time
    (0: ppo.batch_size) and about ppo.batch_size scored. Which prompts and completions depends on the seed alone.
    `function` stands in for `reward.function`. `references` is the column that holds a right answer to each prompt; "":
    the answer of the data's format, where it has one. `beside`: other models that are to answer the same prompts.

    Returns what `write` writes and `evaluate_report.table` shows: `statistics` and, for each prompt, its completions,
    with a reward from best to worst with their rank, score, and the parts of the score. Raises ConfigError where there
    is neither a reward nor a reference.
    """
    tokenizer, rows = read_prompts(config)
    for path in beside:
        taken = {row.index for row in read_prompts(replace(config, **{"model.path": path}))[1]}
        rows = [row for row in rows if row.index in taken]
    rewarded = bool(config.reward.parts(passed=function is not None))
    column = _reference_column(config, rows, references, rewarded)
    scorer = open_scorer(config, tokenizer, rows, function) if rewarded else None
    rows = choose(rows, num_prompts, config.seed)
    right = [reference(row, column) for row in rows]
    model, params = open_model(config, tokenizer)
    rollout = respond(config, model, params, tokenizer, rows, num_completions)
    groups = [group for part in judge(config, scorer, tokenizer, rows, rollout) for group in part]
    prompts = [_reported(*item) for item in zip(rows, groups, right, strict=True)]
    return {
        "model": config.model.path,
        "prompts_from": config.data.path,
        "references_from": column,
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
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    model, params = open_model(config, tokenizer)
    tokens = tokenizer.encode(prompt, special=True) if config.data.control_tokens else tokenizer.encode_prompt(prompt)
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
    return [prompt + text for text in decode_completions(rollout, tokenizer, config.sampling.stop_strings)[1]]


def read_prompts(config: PPOConfig) -> tuple[Tokenizer, list[PromptRow]]:
    """The tokenizer of a config, and the prompts that leave room for a response in the model's context. Reads no
    weights. Raises DataError."""
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    context = weights.load_config(config.model.path, revision=config.model.revision).max_positions
    split = prompt_rows(_fitting(config.data, context, config.sampling.response_length), tokenizer)
    for reason, places in split.report.dropped.items():
        warnings.warn(f"{len(places)} of {split.report.rows} prompts are left out: {reason}", stacklevel=2)
    return tokenizer, split.train


def open_scorer(
    config: PPOConfig,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    function: Callable[..., Any] | None,
    directory: Path | None = None,
) -> Scorer:
    """The reward of a config, after a check that it can judge these prompts; `directory` keeps what people answer.
    Raises what Scorer raises."""
    scorer = Scorer(config.reward, tokenizer, function, directory=directory)
    scorer.check([row.text for row in rows], columns(rows), [row.messages for row in rows])
    return scorer


def open_model(config: PPOConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, Params]:
    """The language model of a config as an inference copy in its rollout dtype.

    Raises DataError if model and tokenizer do not fit.
    """
    source = config.model
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
    return inference_copy(model, params, dtype if config.rollout.dtype == "auto" else config.rollout.dtype)


def respond(
    config: PPOConfig,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    count: int,
    columns: int = 0,
) -> Rollout:
    """`count` responses to each row, those of a row side by side, as host arrays. Calls with the same `columns`, the
    least room for a prompt, share their programs."""
    length = prompt_columns(config, model, rows)
    prompts = batching.prompts(rows, tokenizer.pad_id, length)
    slots = config.rollout.slots or config.ppo.batch_size
    rest = jax.random.key(config.seed), config.sampling, tokenizer.stop_ids, tokenizer.pad_id
    return engine.answer(params, model, prompts, *rest, slots=slots, group=count, columns=columns)


def prompt_columns(config: PPOConfig, model: ModelConfig, rows: Sequence[PromptRow]) -> int:
    """Room for the longest prompt of `rows`."""
    longest = max(len(row.tokens) for row in rows)
    return batching.bucket(longest, model.max_positions - config.sampling.response_length)


def choose(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` random rows without repetition, in file order; all of them where there are fewer."""
    picked = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(picked)]


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


def judge(
    config: PPOConfig, scorer: Scorer | None, tokenizer: Tokenizer, rows: Sequence[PromptRow], rollout: Rollout
) -> Iterator[list[list[dict[str, Any]]]]:
    """The responses to `rows`, as `respond` makes them, for each row a list; without a `scorer` they have no score.

    They come, and are scored, in batches of whole rows with at least ppo.batch_size responses.
    """
    count = len(rollout.index) // len(rows)
    rows_of_batch = -(-config.ppo.batch_size // count)
    for start in range(0, len(rows), rows_of_batch):
        asked = rows[start : start + rows_of_batch]
        span = slice(start * count, (start + len(asked)) * count)
        part, texts = decode_completions(
            jax.tree.map(lambda x, span=span: x[span], rollout), tokenizer, config.sampling.stop_strings
        )
        answers: list[dict[str, Any]] = [
            {"text": text, "tokens": int(part.response_mask[i].sum()), "finished": bool(part.finished[i])}
            for i, text in enumerate(texts)
        ]
        if scorer is not None:
            repeated = [row for row in asked for _ in range(count)]
            of_data, messages = columns(repeated), [row.messages for row in repeated]
            scored = scorer.score([row.text for row in repeated], texts, part, of_data, messages=messages)
            for note in scored.notes:
                warnings.warn(note, stacklevel=2)
            for i, answer in enumerate(answers):
                answer["score"] = float(scored.totals[i])
                answer["components"] = {name: float(values[i]) for name, values in scored.components.items()}
        yield [answers[i : i + count] for i in range(0, len(answers), count)]


def _reference_column(config: PPOConfig, rows: Sequence[PromptRow], asked: str, rewarded: bool) -> str:
    """The column of references; "" where there is none but a reward."""
    names = list(columns(rows))
    if asked:
        if asked not in names:
            raise ConfigError(f"there is no column {asked!r} in {config.data.path}; it has {', '.join(names)}")
        return asked
    column = answer_column(names, config.data, config.data.path)
    if not (column or rewarded):
        raise ConfigError(
            f"nothing to measure completions by: give a reward (--reward, --reward-model, --reward.KEY), or say which "
            f"column of {config.data.path} has a right answer (--references); it has {', '.join(names)}"
        )
    return column


def reference(row: PromptRow, column: str) -> str | None:
    """The text of `column`: of a conversation its last assistant turn; None where the row has none."""
    value = row.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"row {row.index + 1} of the prompts: column {column!r} is {quoted(value)}; text, a number or a conversation "
        "that ends with the assistant was expected"
    )


def _reported(row: PromptRow, answers: list[dict[str, Any]], right: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": row.text, "index": row.index, "reference": right, "completions": answers}
    if "score" not in answers[0]:
        return found
    ranked = sorted(answers, key=lambda answer: -answer["score"])
    names = ["BEST", *["MEDIUM"] * (len(ranked) - 2), "WORST"][: len(ranked)]
    scores = [answer["score"] for answer in ranked]
    return found | {
        "mean": float(np.mean(scores)),
        "spread": scores[0] - scores[-1],
        "completions": [{"rank": name, **answer} for name, answer in zip(names, ranked, strict=True)],
    }
