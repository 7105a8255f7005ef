"""A rollout as text: what reward functions, logs and people see."""

import jax

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
