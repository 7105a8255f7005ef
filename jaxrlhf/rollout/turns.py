"""Responses of several turns: the policy and an environment take turns until the environment ends the episode.

Turns of a batch are rounds: all rows that go on generate until their turn ends, and the environment answers them. What
was sampled stays as it is, token for token; the environment's texts are tokenised by themselves and put in between. A
turn reads everything before it again, as its prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array

from jaxrlhf import distributed, sharding
from jaxrlhf.config import Environment
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError
from jaxrlhf.rollout.text import first_stop
from jaxrlhf.types import Prompts, Rollout

FEWER = 4
"""Rows that go on are generated in a quarter of the batch, a quarter of that and so on, once they fit there."""
EPISODES = 2**31  # folded into the key of a rollout in place of a prompt's index
_MARKER = "qzkmarkvx"


@runtime_checkable
class Partner(Protocol):
    """The environment of a batch (`jaxrlhf.environments.episodes.Episodes`)."""

    def reset(self, prompts: Sequence[str], columns: dict[str, list], seeds: Sequence[int]) -> None: ...

    def step(self, rows: Sequence[int], completions: Sequence[str]) -> Sequence[tuple[str | None, float]]: ...


Draw = Callable[[Prompts, int], Rollout]
"""(prompts, the number of rows that share the prefill of each) -> a turn of each row, as `decode.generate` returns
it."""


def episode_seeds(prompts: Prompts, key: Array, group: int) -> list[int]:
    """The seed of each row's episode, the same in a group of responses: they differ by what the policy does."""
    key = jax.random.fold_in(key, EPISODES)
    seeds = jax.vmap(lambda i, s: jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, i), s)))
    return sharding.fetch(seeds(np.asarray(prompts.index), np.asarray(prompts.sample) // group)).tolist()


def play(
    draw: Draw,
    partner: Partner,
    config: Environment,
    rows: Sequence[PromptRow],
    prompts: Prompts,
    seeds: Sequence[int],
    tokenizer: Tokenizer,
    *,
    length: int,
    context: int,
    stop_strings: Sequence[str],
    group: int = 1,
    shards: int = 1,
) -> Rollout:
    """Play an episode for each row and return the rollout, on the host, with `turn_rewards`.

    A response is `finished` if the environment ended it after a turn that ended by itself. It is truncated if a turn
    reaches `length` tokens, if the environment's text leaves no room for another token of the policy, or after
    `config.max_turns` turns: then the text that would follow is left out.

    Args:
        prompts: the prompts of all rows, on the host.
        seeds: for the environment, one for each row.
        context: the most tokens that the model reads.
        group: number of rows next to each other with one prompt, whose first turns share its prefill.
        shards: number of parts that rows are split into.
    """
    count = len(rows)
    tokens, sampled = np.full((count, length), tokenizer.pad_id, np.int32), np.zeros((count, length), bool)
    logprobs, rewards = np.zeros((2, count, length), np.float32)
    support = None
    used, turns, finished = np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, bool)
    distributed.on_primary(lambda: partner.reset([row.text for row in rows], columns(rows), seeds))
    going = np.arange(count)
    while len(going):
        filled = _filled(going, count, shards)
        contexts = [rows[i].tokens + tokens[i, : used[i]].tolist() for i in filled]
        each = 1 if used.any() else group
        before = [dataclasses.replace(rows[i], tokens=ids) for i, ids in zip(filled, contexts, strict=True)][::each]
        width = batching.bucket(max(map(len, contexts)), context)
        turn = batching.prompts(before, tokenizer.pad_id, width, np.asarray(prompts.sample)[filled[::each]].tolist())
        drawn = sharding.fetch(draw(dataclasses.replace(turn, given=used[filled[::each]]), each))
        if drawn.support is not None and support is None:
            support = np.zeros((count, *drawn.support.shape[1:]), np.uint8)
        ended, completions = [], []
        for place, i in enumerate(going):
            real = drawn.response_mask[place]
            ids, stopped = drawn.tokens[place, -length:][real].tolist(), bool(drawn.finished[place])
            said = ids[:-1] if stopped else ids
            cut, text = first_stop(said, contexts[place], tokenizer, stop_strings)
            if cut <= len(said):
                ids, stopped = ids[:cut], True
            else:
                text = tokenizer.decode(said, after=contexts[place])
            new = slice(used[i], used[i] + len(ids))
            tokens[i, new], sampled[i, new], logprobs[i, new] = ids, True, drawn.logprobs[place, new]
            if support is not None and drawn.support is not None:
                support[i, new] = drawn.support[place, new]
            used[i], turns[i] = new.stop, turns[i] + 1
            ended.append(stopped)
            completions.append(text)
        numbers = going.tolist()
        replies = distributed.on_primary(lambda: [*partner.step(numbers, completions)])  # noqa: B023 - called at once
        further = []
        for i, stopped, (text, reward) in zip(numbers, ended, replies, strict=True):
            rewards[i, used[i] - 1] = reward
            finished[i] = stopped and text is None
            if text is None or not stopped or turns[i] == config.max_turns:
                continue
            ids = reply_ids(text, tokenizer, config.role if rows[i].messages else None, int(tokens[i, used[i] - 1]))
            if used[i] + len(ids) < length:
                tokens[i, used[i] : used[i] + len(ids)] = ids
                used[i] += len(ids)
                further.append(i)
        going = np.array(further, int)
    real = np.arange(length) < used[:, None]
    return Rollout(
        tokens=np.concatenate([prompts.tokens, tokens], axis=1),  # type: ignore[arg-type]
        mask=np.concatenate([prompts.mask, real], axis=1),  # type: ignore[arg-type]
        response_mask=sampled,  # type: ignore[arg-type]
        logprobs=logprobs,  # type: ignore[arg-type]
        finished=finished,  # type: ignore[arg-type]
        index=prompts.index,
        sample=prompts.sample,
        support=support,  # type: ignore[arg-type]
        turn_rewards=rewards,  # type: ignore[arg-type]
    )


def reply_ids(text: str, tokenizer: Tokenizer, role: str | None, last: int) -> list[int]:
    """The tokens of an environment's text after a turn that ended with the token `last`.

    With a `role`, it is a message of that role and the policy's next turn is opened, as the chat template writes them
    after an assistant turn, whose end token is added if `last` is another. Control tokens spelt in the text are
    ordinary text. Raises DataError if the chat template leaves assistant turns out.
    """
    if role is None:
        return tokenizer.encode_batch([tokenizer.escape(text)], [True])[0]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _MARKER},
        {"role": role, "content": text},
    ]
    _, found, rest = tokenizer.render(messages, generation=True).partition(_MARKER)
    if not found:
        raise DataError("the chat template leaves out assistant turns, so that an environment cannot answer them")
    if tokenizer.turn_end and last == tokenizer.control_tokens[tokenizer.turn_end]:
        rest = rest[tokenizer.find_turn_end(rest, 0) :]
    return tokenizer.encode_batch([rest], [True])[0]


def turn_metrics(rollout: Rollout, max_turns: int) -> dict[str, float]:
    """Metrics of the turns of a rollout of an environment, on the host."""
    sampled = np.asarray(rollout.response_mask)
    turns = (sampled & ~np.pad(sampled, ((0, 0), (1, 0)))[:, :-1]).sum(axis=1)
    cut, between = ~np.asarray(rollout.finished), np.asarray(rollout.mask)[:, -sampled.shape[1] :] & ~sampled
    return {
        "turns/mean": float(turns.mean()),
        "turns/max": float(turns.max()),
        "turns/truncated": float((cut & (turns == max_turns)).mean()),
        "turns/overlong": float((cut & (turns < max_turns)).mean()),
        "turns/environment_tokens": float(between.sum(axis=1).mean()),
    }


def _filled(going: np.ndarray, count: int, shards: int) -> np.ndarray:
    """The rows that go on, filled up by repeating the first to one of few sizes, so that few programs are compiled."""
    size = count
    while size % (FEWER * shards) == 0 and size // FEWER >= len(going):
        size //= FEWER
    return np.concatenate([going, np.repeat(going[:1], size - len(going))])
