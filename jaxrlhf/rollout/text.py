"""Text of a rollout, for reward functions and logs."""

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
    """Text that each response adds to its prompt, without control tokens."""
    rows = zip(response_ids(rollout), _prompt_ids(rollout), strict=True)
    return [tokenizer.decode(ids, after=prompt) for ids, prompt in rows]


def decode_completions(
    rollout: Rollout, tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> tuple[Rollout, list[str]]:
    """Return the rollout and its completions, both cut at the first stop string.

    A response is cut after the token that completes the stop string, and counts as finished; its completion ends before
    the string. With `stop_strings` the rollout is returned as numpy arrays.
    """
    texts = response_texts(rollout, tokenizer)
    if not stop_strings:
        return rollout, texts
    rollout = jax.device_get(rollout)
    mask, finished = rollout.response_mask.copy(), rollout.finished.copy()
    rows = list(zip(response_ids(rollout), _prompt_ids(rollout), texts, strict=True))
    for i, (ids, prompt, text) in enumerate(rows):
        starts = [text.find(string) for string in stop_strings if string in text]
        if not starts:
            continue
        texts[i] = text[: min(starts)]
        low, high = 1, len(ids)  # bisection for the shortest prefix whose text has a stop string
        while low < high:
            middle = (low + high) // 2
            prefix = tokenizer.decode(ids[:middle], after=prompt)
            low, high = (low, middle) if any(string in prefix for string in stop_strings) else (middle + 1, high)
        mask[i, low:] = False
        finished[i] = True
    width = rollout.tokens.shape[1] - mask.shape[1]
    real = np.concatenate([rollout.mask[:, :width], mask], axis=1)
    rollout = dataclasses.replace(
        rollout,
        tokens=np.where(real | (np.arange(real.shape[1]) < width), rollout.tokens, tokenizer.pad_id),
        mask=real,
        response_mask=mask,
        logprobs=np.where(mask, rollout.logprobs, np.float32(0)),
        finished=finished,
        support=None if rollout.support is None else np.where(mask[..., None], rollout.support, np.uint8(0)),
    )
    return rollout, texts


def token_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
    """Text that each response token adds, including the stop token (no text). Part of a character reads as U+FFFD."""
    tokens, mask = jax.device_get((rollout.tokens, rollout.response_mask))
    texts = []
    for prompt, row, real in zip(_prompt_ids(rollout), tokens[:, -mask.shape[1] :], mask, strict=True):
        ids = prompt + row[real].tolist()
        texts.append([tokenizer.decode(ids[i : i + 1], after=ids[:i]) for i in range(len(prompt), len(ids))])
    return texts


def _prompt_ids(rollout: Rollout) -> list[list[int]]:
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    width = tokens.shape[1] - rollout.response_mask.shape[1]
    return [row[real].tolist() for row, real in zip(tokens[:, :width], mask[:, :width], strict=True)]
