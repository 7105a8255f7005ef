"""Generation and scoring of completions of prompts, for evaluation and selection."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.config import ModelSource, PPOConfig
from jaxrlhf.data import batching, datasets
from jaxrlhf.data.datasets import PromptRow, Split, prompt_rows
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.environments.episodes import check_columns
from jaxrlhf.environments.worker import WorkerEpisodes
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout import engine, turns
from jaxrlhf.rollout.cache import check_slots
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions, turn_texts
from jaxrlhf.types import Params, Prompts, Rollout

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
    """Open the reward of a config and check that it can score these prompts, and that its environment, if it has one,
    can play them; human scores are kept in `directory`.

    Raises what Scorer and `open_episodes` raise.
    """
    environment = config.environment
    scorer = Scorer(
        config.reward,
        tokenizer,
        function,
        directory=directory,
        required=config.needs_reward,
        environment=environment,
    )
    scorer.check_rows(rows)
    scorer.probe_rows(rows)
    if environment.function:
        with open_episodes(config, rows):
            pass
    return scorer


@contextlib.contextmanager
def open_episodes(config: PPOConfig, rows: Sequence[PromptRow]) -> Iterator[WorkerEpisodes]:
    """The environment of a config in a process of its own, for the block. Raises ConfigError for one that was given in
    Python, RewardError if it cannot be loaded or needs a column that the rows do not have."""
    if config.environment.function == "passed":
        raise ConfigError(
            "environment.function is passed: the run was given its environment in Python, and its config does not "
            "name it. Give its class (--environment.function FILE.py:NAME), or --environment.function '' for single "
            "turns without it"
        )
    with contextlib.closing(WorkerEpisodes(config.environment)) as episodes:
        check_columns(episodes.signature, datasets.columns(rows), episodes.name)
        yield episodes


def open_model(config: PPOConfig, tokenizer: Tokenizer, responses: int) -> tuple[ModelConfig, Params]:
    """Load the language model of a config as its `decoder` for so many responses. Raises what `load_model` does."""
    return decoder(config, *load_model(config, tokenizer), responses)


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


def decoder(config: PPOConfig, model: ModelConfig, params: Params, responses: int) -> tuple[ModelConfig, Params]:
    """The inference copy of a model of `load_model`, in the rollout dtype, to generate `responses` in all."""
    dtype = model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
    rows = min(config.rollout.slots or config.ppo.batch_size, responses)
    return inference_copy(model, params, dtype, rows)


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
    responses fit in `rollout.slots`, they are generated together. With an environment a response is an
    episode; those of a row have the same seed. Raises what `open_episodes` does.
    """
    length = config.sampling.response_length
    model = for_length(model, max(len(row.tokens) for row in rows) + length)
    key, stops = jax.random.key(config.seed), tokenizer.stops(config.sampling.stop_strings)
    decoding = Decoding(model, config.sampling, stops, tokenizer.pad_id)

    def draw(prompts: Prompts, group: int) -> Rollout:
        responses = len(prompts.index) * group
        if responses <= config.rollout.slots:
            check_slots(model, responses, prompts.tokens.shape[1] + length)
            return jax.device_get(engine.generate_in_chunks(params, decoding, prompts, key, group))
        queue = PromptQueue(prompts, config.rollout.slots or config.ppo.batch_size, group, columns)
        return engine.generate_in_slots(params, decoding, queue, key)

    width = prompt_columns(config, model, rows)
    if not config.environment.function:
        return draw(batching.prompts(rows, tokenizer.pad_id, width), count)
    each = [row for row in rows for _ in range(count)]
    prompts = batching.prompts(each, tokenizer.pad_id, width, [*range(count)] * len(rows))
    with open_episodes(config, rows) as episodes:
        return turns.play(
            draw,
            episodes,
            config.environment,
            each,
            prompts,
            turns.episode_seeds(prompts, key, count),
            tokenizer,
            length=length,
            context=model.max_positions,
            stop_strings=config.sampling.stop_strings,
            group=count,
        )


def decoded(config: PPOConfig, tokenizer: Tokenizer, rollout: Rollout) -> tuple[Rollout, list[str]]:
    """A rollout of `generate` cut at stop strings, which with an environment end turns and are cut already, and the
    texts of its responses."""
    return decode_completions(rollout, tokenizer, () if config.environment.function else config.sampling.stop_strings)


def prompt_columns(config: PPOConfig, model: ModelConfig, rows: Sequence[PromptRow]) -> int:
    """Padded width of the longest prompt of `rows`."""
    longest = max(len(row.tokens) for row in rows)
    return batching.bucket(longest, model.max_positions - config.sampling.response_length)


def score_completions(
    config: PPOConfig, scorer: Scorer | None, tokenizer: Tokenizer, rows: Sequence[PromptRow], rollout: Rollout
) -> Iterator[list[list[Completion]]]:
    """Decode and score the responses that `generate` returned for `rows`: a list of completions for each row.

    Yields batches of rows with at least `ppo.batch_size` responses. Without a `scorer` completions have no score;
    with one, the score of an unscored completion is None, and so is that of a component. With an environment they have
    `turns`, the texts of the policy and of the environment in turn, and their text is the one that rewards read.
    """
    count = len(rollout.index) // len(rows)
    rows_per_batch = -(-config.ppo.batch_size // count)
    for start in range(0, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        span = slice(start * count, (start + len(batch)) * count)
        part, texts = decoded(config, tokenizer, jax.tree.map(lambda x, span=span: x[span], rollout))
        completions: list[Completion] = [
            {"text": text, "tokens": int(part.response_mask[i].sum()), "finished": bool(part.finished[i])}
            for i, text in enumerate(texts)
        ]
        if config.environment.function:
            for completion, said in zip(completions, turn_texts(part, tokenizer), strict=True):
                completion["turns"] = said
                if config.environment.completion == "last":
                    completion["text"] = said[-1]
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
    model, params = open_model(config, tokenizer, count)
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
    return [prompt + text for text in decoded(config, tokenizer, rollout)[1]]
