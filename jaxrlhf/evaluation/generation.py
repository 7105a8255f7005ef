"""Generation and scoring of completions of prompts, for evaluation and selection."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.config import ModelSource, PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, Split, prompt_rows
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.errors import DataError
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout import decode, engine
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.types import Params, Rollout

Completion = dict[str, Any]


def read_prompts(config: PPOConfig) -> tuple[Tokenizer, Split[PromptRow]]:
    """Load the tokenizer and the prompts that leave room for a response in the model's context; no weights.

    Raises DataError.
    """
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    context = weights.load_config(config.model.path, revision=config.model.revision).max_positions
    room = context - config.sampling.response_length
    if room < 1:
        raise DataError(
            f"sampling.response_length is {config.sampling.response_length} and the model's context {context}: no room "
            "for a prompt; lower it"
        )
    limit = min(config.data.max_prompt_length or room, room)
    split = prompt_rows(dataclasses.replace(config.data, max_prompt_length=limit), tokenizer)
    for reason, places in split.report.dropped.items():
        warnings.warn(f"{len(places)} of {split.report.rows} prompts are left out: {reason}", stacklevel=2)
    return tokenizer, split


def open_scorer(
    config: PPOConfig,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    function: Callable[..., Any] | None,
    directory: Path | None = None,
) -> Scorer:
    """Open the reward of a config and check that it can score these prompts; human scores are kept in `directory`.

    Raises what Scorer raises.
    """
    scorer = Scorer(config.reward, tokenizer, function, directory=directory)
    scorer.check_rows(rows)
    return scorer


def open_model(config: PPOConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, Params]:
    """Load the language model of a config as an inference copy in its rollout dtype. Raises what `load_model` does."""
    return decoder(config, *load_model(config, tokenizer))


def load_model(config: PPOConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, Params]:
    """Load the language model of a config in its compute dtype. Raises DataError if it does not match the tokenizer."""
    model, params = load_weights(config.model, config.seed, tokenizer)
    check_sampling(config.sampling, model.vocab_size)
    return model, params


def load_weights(source: ModelSource, seed: int, tokenizer: Tokenizer) -> tuple[ModelConfig, Params]:
    """Load a language model in its compute dtype; `seed` is for random weights (`init`). Raises DataError if its
    vocabulary does not match the tokenizer."""
    dtype = runtime.resolve_dtype(source.compute_dtype, sharding.platform())
    model, params = weights.load(
        source.path,
        revision=source.revision,
        dtype=dtype,
        head="lm",
        compute_dtype=dtype,
        init=source.init,
        key=jax.random.key(seed),
    )
    check_vocab(tokenizer, model.vocab_size)
    return model, params


def decoder(config: PPOConfig, model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The inference copy of a model of `load_model`, in the rollout dtype."""
    return inference_copy(model, params, model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype)


def generate(
    config: PPOConfig,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    count: int,
    columns: int = 0,
) -> Rollout:
    """Generate `count` responses to each row, those of a row next to each other, as host arrays.

    `columns` is the minimum width of the prompts; calls with equal widths share their compiled programs. If all
    responses fit in `rollout.slots`, a single program generates them together.
    """
    width, responses = prompt_columns(config, model, rows), len(rows) * count
    model = for_length(model, max(len(row.tokens) for row in rows) + config.sampling.response_length)
    prompts = batching.prompts(rows, tokenizer.pad_id, width)
    key, stops = jax.random.key(config.seed), (tokenizer.stops(config.sampling.stop_strings), tokenizer.pad_id)
    if responses <= config.rollout.slots:
        engine.check_slots(model, responses, width + config.sampling.response_length)
        return jax.device_get(decode.generate(params, model, prompts, key, config.sampling, *stops, group=count))
    queue = PromptQueue(prompts, config.rollout.slots or config.ppo.batch_size, count, columns)
    return engine.generate_in_slots(params, Decoding(model, config.sampling, *stops), queue, key)


def prompt_columns(config: PPOConfig, model: ModelConfig, rows: Sequence[PromptRow]) -> int:
    """Padded width of the longest prompt of `rows`."""
    longest = max(len(row.tokens) for row in rows)
    return batching.bucket(longest, model.max_positions - config.sampling.response_length)


def score_completions(
    config: PPOConfig, scorer: Scorer | None, tokenizer: Tokenizer, rows: Sequence[PromptRow], rollout: Rollout
) -> Iterator[list[list[Completion]]]:
    """Decode and score the responses that `generate` returned for `rows`: a list of completions for each row.

    Yields batches of rows with at least `ppo.batch_size` responses. Without a `scorer` completions have no score;
    with one, the score of an unscored completion is None, and so is that of a component.
    """
    count = len(rollout.index) // len(rows)
    rows_per_batch = -(-config.ppo.batch_size // count)
    for start in range(0, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        span = slice(start * count, (start + len(batch)) * count)
        part, texts = decode_completions(
            jax.tree.map(lambda x, span=span: x[span], rollout), tokenizer, config.sampling.stop_strings
        )
        completions: list[Completion] = [
            {"text": text, "tokens": int(part.response_mask[i].sum()), "finished": bool(part.finished[i])}
            for i, text in enumerate(texts)
        ]
        if scorer is not None:
            repeated = [row for row in batch for _ in range(count)]
            scored = scorer.score_rows(repeated, texts, part)
            scores = scored.as_list()
            for note in scored.notes:
                warnings.warn(note, stacklevel=2)
            for i, completion in enumerate(completions):
                completion["score"] = scores[i]
                completion["components"] = {
                    name: None if np.isnan(values[i]) else float(values[i])
                    for name, values in scored.components.items()
                }
        yield [completions[i : i + count] for i in range(0, len(completions), count)]


def complete(config: PPOConfig, prompt: str, count: int) -> list[str]:
    """Sample `count` continuations of a text; each is returned with the text. An empty text starts from bos.

    Raises DataError if the prompt fills the model's context.
    """
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    model, params = open_model(config, tokenizer)
    tokens = tokenizer.encode(prompt, special=True) if config.data.control_tokens else tokenizer.encode_prompt(prompt)
    room = model.max_positions - len(tokens)
    if room < 1:
        raise DataError(f"the prompt has {len(tokens)} tokens and the model's context is {model.max_positions}")
    if room < config.sampling.response_length:
        warnings.warn(
            f"{config.sampling.response_length} tokens were asked for, but after a prompt of {len(tokens)} the "
            f"context of {model.max_positions} has room for {room}: at most {room} are generated",
            stacklevel=2,
        )
    sampling = dataclasses.replace(config.sampling, response_length=min(config.sampling.response_length, room))
    config = dataclasses.replace(config, sampling=sampling)
    row = PromptRow(tokens=tokens, text=prompt, columns={}, index=0)
    rollout = generate(config, model, params, tokenizer, [row], count)
    return [prompt + text for text in decode_completions(rollout, tokenizer, config.sampling.stop_strings)[1]]
