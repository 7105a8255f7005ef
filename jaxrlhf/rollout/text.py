"""A rollout as text: what reward functions, logs and people see."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.types import Rollout


def response_ids(rollout: Rollout) -> list[list[int]]:
    """Token ids of each response, without the stop token that ended it."""
    tokens, mask, finished = jax.device_get((rollout.tokens, rollout.response_mask, rollout.finished))
    rows = zip(tokens[:, -mask.shape[1] :], mask, finished, strict=True)
    return [row[real][: -1 if ended else None].tolist() for row, real, ended in rows]


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Each response as the text that it adds to its prompt, without control tokens."""
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    width = tokens.shape[1] - rollout.response_mask.shape[1]
    prompts = [row[real].tolist() for row, real in zip(tokens[:, :width], mask[:, :width], strict=True)]
    return [tokenizer.decode(ids, after=prompt) for ids, prompt in zip(response_ids(rollout), prompts, strict=True)]


def decode_completions(
    rollout: Rollout, tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> tuple[Rollout, list[str]]:
    """The rollout, and its responses as texts.

    With `stop_strings` the rollout comes back on the host, each response cut after the token that completes the first
    of them, which finishes it; its text ends before that string.
    """
    texts = response_texts(rollout, tokenizer)
    if not stop_strings:
        return rollout, texts
    rollout, cut = jax.device_get(rollout), list(texts)
    mask, finished = rollout.response_mask.copy(), rollout.finished.copy()
    prompt_columns = rollout.tokens.shape[1] - mask.shape[1]
    for i, (ids, text) in enumerate(zip(response_ids(rollout), texts, strict=True)):
        found = [at for string in stop_strings if (at := text.find(string)) >= 0]
        if not found:
            continue
        cut[i] = text[: min(found)]
        prompt = rollout.tokens[i, :prompt_columns][rollout.mask[i, :prompt_columns]].tolist()
        low, high = 1, len(ids)  # the fewest tokens whose text has one of the strings
        while low < high:
            middle = (low + high) // 2
            part = tokenizer.decode(ids[:middle], after=prompt)
            low, high = (low, middle) if any(string in part for string in stop_strings) else (middle + 1, high)
        mask[i, low:] = False
        finished[i] = True
    real = np.concatenate([rollout.mask[:, :prompt_columns], mask], axis=1)
    return (
        dataclasses.replace(
            rollout,
            tokens=np.where(real | (np.arange(real.shape[1]) < prompt_columns), rollout.tokens, tokenizer.pad_id),
            mask=real,
            response_mask=mask,
            logprobs=np.where(mask, rollout.logprobs, np.float32(0)),
            finished=finished,
            support=None if rollout.support is None else np.where(mask[..., None], rollout.support, np.uint8(0)),
        ),
        cut,
    )


def token_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
    """The text that each response token adds, the one that ended it (no text) included. A token that is a part of a
    character reads as U+FFFD."""
    tokens, mask, response = jax.device_get((rollout.tokens, rollout.mask, rollout.response_mask))
    width = tokens.shape[1] - response.shape[1]
    texts = []
    for row, real, said in zip(tokens, mask, response, strict=True):
        ids = [*row[:width][real[:width]].tolist(), *row[width:][said].tolist()]
        start = len(ids) - int(said.sum())
        texts.append([tokenizer.decode(ids[i : i + 1], after=ids[:i]) for i in range(start, len(ids))])
    return texts
