"""Text of a rollout, for reward functions and logs."""

import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.types import Rollout


def response_ids(rollout: Rollout) -> list[list[int]]:
    """Token ids of each response, those of an environment included, without the stop token that ended it."""
    return [response for _, response, _ in _token_ids(rollout)]


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Text that each response adds to its prompt, that of an environment included, without control tokens."""
    return [tokenizer.decode(response, after=prompt) for prompt, response, _ in _token_ids(rollout)]


def turn_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
    """The text of each turn of each response: the policy's and the environment's in turn, beginning and ending with the
    policy's."""
    rollout = sharding.fetch(rollout)
    texts = []
    for i, (prompt, response, stop) in enumerate(_token_ids(rollout)):
        ids = prompt + response + stop
        sampled = rollout.response_mask[i, : len(response) + len(stop)]
        edges = [0, *(np.flatnonzero(np.diff(sampled)) + 1).tolist(), len(sampled)]
        spans = [(len(prompt) + a, min(len(prompt) + b, len(prompt) + len(response))) for a, b in pairwise(edges)]
        texts.append([tokenizer.decode(ids[a:b], after=ids[:a]) for a, b in spans])
    return texts


def decode_completions(
    rollout: Rollout, tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> tuple[Rollout, list[str]]:
    """Return the rollout and its completions, both cut at the first stop string.

    A response is cut after the token that completes the stop string, and counts as finished; its completion ends before
    the string. Control tokens in a stop string are matched by their ids. With `stop_strings` the rollout is returned as
    numpy arrays.
    """
    texts = response_texts(rollout, tokenizer)
    if not stop_strings:
        return rollout, texts
    rollout = sharding.fetch(rollout)
    mask, finished = rollout.response_mask.copy(), rollout.finished.copy()
    for i, (prompt, ids, _) in enumerate(_token_ids(rollout)):
        length, text = first_stop(ids, prompt, tokenizer, stop_strings)
        if length <= len(ids):
            texts[i], finished[i] = text, True
            mask[i, length:] = False
    return shortened(rollout, mask, finished, tokenizer.pad_id), texts


def first_stop(ids: list[int], prompt: list[int], tokenizer: Tokenizer, stop_strings: Sequence[str]) -> tuple[int, str]:
    """(number of tokens up to the one that completes the first of `stop_strings`, the text before that string); (the
    number of `ids` + 1, "") without one."""
    found = [
        _first_stop(ids, prompt, tokenizer, strings, control=control)
        for control in (False, True)
        if (strings := [text for text in stop_strings if tokenizer.spells_control_token(text) == control])
    ]
    return min(found, key=lambda stop: (stop[0], len(stop[1])), default=(len(ids) + 1, ""))


def shortened(rollout: Rollout, mask: jax.Array | np.ndarray, finished: jax.Array | np.ndarray, pad_id: int) -> Rollout:
    """The rollout, on the host, with the shorter response mask bool [B, R] and `finished` bool [B]."""
    width = rollout.tokens.shape[1] - mask.shape[1]
    columns = np.arange(mask.shape[1])
    last = np.max(np.where(mask, columns, -1), axis=1, keepdims=True)  # what is between sampled tokens stays
    real = np.concatenate([rollout.mask[:, :width], rollout.mask[:, width:] & (columns <= last)], axis=1)
    return dataclasses.replace(
        rollout,
        tokens=np.where(real | (np.arange(real.shape[1]) < width), rollout.tokens, pad_id),
        mask=real,
        response_mask=mask,
        logprobs=np.where(mask, rollout.logprobs, np.float32(0)),
        finished=finished,
        support=None if rollout.support is None else np.where(mask[..., None], rollout.support, np.uint8(0)),
    )


def _first_stop(
    ids: list[int], prompt: list[int], tokenizer: Tokenizer, stop_strings: Sequence[str], *, control: bool
) -> tuple[int, str]:
    """(number of tokens up to the one that completes the first stop string, the text before that string); (the number
    of `ids` + 1, "") without one. The strings are looked for in the text with control tokens if `control`."""

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], after=prompt, control=control)

    text = decode(len(ids))
    starts = [text.find(string) for string in stop_strings if string in text]
    if not starts:
        return len(ids) + 1, ""
    start = min(starts)
    # bisections for the shortest prefix whose text has a stop string, and for the first that reaches beyond its start
    length = bisect_left(range(len(ids)), True, key=lambda n: any(string in decode(n) for string in stop_strings))
    if not control:
        return length, text[:start]
    whole = bisect_left(range(len(ids)), True, key=lambda n: len(decode(n)) > start) - 1
    return length, tokenizer.decode(ids[:whole], after=prompt) + text[len(decode(whole)) : start]


def token_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
    """Text that each sampled token adds, including the stop token (no text). Part of a character reads as U+FFFD."""
    rollout = sharding.fetch(rollout)
    texts = []
    for row, (prompt, response, stop) in enumerate(_token_ids(rollout)):
        ids, sampled = prompt + response + stop, np.flatnonzero(rollout.response_mask[row]) + len(prompt)
        texts.append([tokenizer.decode(ids[i : i + 1], after=ids[:i]) for i in sampled.tolist()])
    return texts


def token_pieces(ids: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of a response in one piece per token: joined, they are the decoded response.

    A character whose bytes are split over tokens belongs to the last of them; the others have "", as have control
    tokens.
    """
    ids, prompt = list(ids), list(prompt)
    pieces, start = [""] * len(ids), 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[start : i + 1], after=prompt + ids[:start])
        if i + 1 == len(ids) or not text.endswith("\ufffd"):
            pieces[i], start = text, i + 1
    whole = tokenizer.decode(ids, after=prompt)
    if "".join(pieces) == whole:
        return pieces
    ends = [0]  # a decoder that rewrites what it wrote before: a token ends where its prefix leaves the whole text
    for i in range(1, len(ids)):
        text = tokenizer.decode(ids[:i], after=prompt)
        kept = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text.rstrip("\ufffd"), whole, strict=False))
        ends.append(max(ends[-1], sum(1 for _ in kept)))
    return [whole[a:b] for a, b in pairwise([*ends, len(whole)])]


def _token_ids(rollout: Rollout) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of each row: (prompt, response, the stop token that ended it or none)."""
    rollout = sharding.fetch(rollout)
    width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
    for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished, strict=True):
        prompt = tokens[:width][mask[:width]].tolist()
        response = tokens[width:][mask[width:]].tolist()
        end = len(response) - int(finished)
        yield prompt, response[:end], response[end:]
