"""Token records: a few sequences of an update, token by token, for the files in tokens/ of a run directory."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import runtime, sharding
from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.logprobs import response_states
from jaxrlhf.models import ModelConfig, lm_logits
from jaxrlhf.rollout.text import token_pieces
from jaxrlhf.traced import Number
from jaxrlhf.training.on_policy.inspection import on_host, token_series
from jaxrlhf.training.on_policy.rollout import ScoredRollout, padded_rollout
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.on_policy.update import sequence_logprobs
from jaxrlhf.training.step import from_micro_batches, to_micro_batches
from jaxrlhf.types import Experience, GroupExperience, Params, Rollout

SCHEMA = 1
ALTERNATIVES = 5
"""Most probable tokens recorded for each position."""
DIGITS = 5
"""Significant digits of recorded numbers."""


class Look(NamedTuple):
    """Log-probs, entropies and most probable tokens of a policy on given responses, at the sampling temperature."""

    logprobs: Array  # f32 [B, R]   as in training
    entropy: Array  # f32 [B, R]   of the whole vocabulary, before top_k, top_p and min_p; nats
    top: Array  # f32 [B, R, k]   log-probs of the most probable tokens of the whole vocabulary
    top_ids: Array  # int32 [B, R, k]


class TokenRecords:
    """Looks at the first `logging.token_samples` sequences of an update, padded to one shape, so that one program is
    compiled in a run. Draws no random number and changes nothing."""

    def __init__(self, config: PPOConfig | GRPOConfig, sampler: Sampler) -> None:
        self._sampler, self._temperature = sampler, Number(config.sampling.temperature)
        self.count = min(config.logging.token_samples, sampler.batch)
        self.tokenizer = sampler.tokenizer
        self._texts: dict[int, str] = {}
        self._context = sampler.tokenizer.encode("a")
        self._parts = max(1, math.ceil(self.count / config.settings.annotation_rows(sampler.batch)))

    def before(self, policy: Params, batch: ScoredRollout) -> "TokenRecord":
        """The record of an update on `batch`, whose policy before it is `policy`."""
        sampler = self._sampler
        rollout = batch.rollout
        if rollout.support is not None:  # the one large array
            rollout = dataclasses.replace(rollout, support=rollout.support[: self.count])
        rollout = jax.tree.map(lambda x: x[: self.count], sharding.fetch(rollout))
        width = sampler.columns, sampler.sampling.response_length
        padded = padded_rollout(rollout, width, sampler.tokenizer.pad_id)
        fill = -self.count % self._parts  # so that all forward passes have the same number of rows
        padded = jax.tree.map(lambda x: np.concatenate([x, x[:1].repeat(fill, axis=0)]), padded)
        return TokenRecord(self, batch, rollout, padded, self.look(policy, padded))

    def look(self, policy: Params, rollout: Rollout) -> Look:
        """The `Look` of `policy` at the responses, on the host. Every device computes all rows: they are few, and need
        not be a multiple of the devices."""
        placed = sharding.put_whole(rollout, self._sampler.mesh)
        arguments = {"model": self._sampler.model, "temperature": self._temperature, "parts": self._parts}
        return sharding.fetch(look(policy, placed, **arguments))

    def text(self, token: int) -> str:
        """The text of a token inside a text, or the vocabulary's entry of one that is part of a character."""
        if token not in self._texts:
            text = self.tokenizer.decode([token], after=self._context, control=True)
            whole = text and "\ufffd" not in text
            self._texts[token] = text if whole else self.tokenizer.convert_ids_to_tokens([token])[0]
        return self._texts[token]


class TokenRecord(NamedTuple):
    """Sequences of an update before it, in NumPy arrays."""

    records: TokenRecords
    batch: ScoredRollout
    rollout: Rollout  # its first sequences
    padded: Rollout
    old: Look

    def after(self, policy: Params, experience: Experience | GroupExperience, step: int) -> list[dict[str, Any]]:
        """The records of the sequences once update number `step` (from 1) has made `policy` of the experience."""
        new = self.records.look(policy, self.padded)
        experience = on_host(experience)
        series, scores = token_series(experience), self.batch.scored.as_list()
        series.pop("raw_advantage", None)
        records = []
        for i in range(self.records.count):
            ids, prompt, place = _response(self.rollout, i), self._prompt(i), self._place(experience, i)
            old, missing = self.old.logprobs[i, : len(ids)], np.full(len(ids), np.nan)
            sampled = self.rollout.response_mask[i, : len(ids)]
            numbers: dict[str, Any] = {"logprob": old}
            for name, values in series.items():
                if place is not None:
                    numbers[name] = values[place][: len(ids)]
                elif name != "logprob":
                    numbers[name] = missing
            if "ref_logprob" in numbers:
                numbers["kl"] = numbers["logprob"] - numbers["ref_logprob"]
            numbers["ratio"] = np.exp(new.logprobs[i, : len(ids)] - old)
            numbers["entropy"] = self.old.entropy[i, : len(ids)]
            records.append(
                {
                    "schema": SCHEMA,
                    "step": step,
                    "index": int(self.rollout.index[i]),
                    "sample": int(self.rollout.sample[i]),
                    "prompt": self.batch.rows[i].text,
                    "completion": self.batch.completions[i],
                    "score": _rounded(scores[i]),
                    "finished": bool(self.rollout.finished[i]),
                    "tokens": ids,
                    "pieces": token_pieces(ids, prompt, self.records.tokenizer),
                    "sampled": sampled.tolist(),
                    **{
                        name: [_rounded(x) for x in np.where(sampled, values, np.nan).tolist()]
                        for name, values in numbers.items()
                    },
                    "top": self._top(i, len(ids)),
                }
            )
        return records

    def _place(self, experience: Any, i: int) -> int | None:
        """The row of sequence i in the experience; None if it has no part in the update."""
        rollout = experience.rollout
        paired = experience.advantages.shape != rollout.response_mask.shape
        which = (self.rollout.index[i], self.rollout.sample[i])
        for place in range(len(rollout.index)) if paired else [i]:
            same = not paired or (rollout.index[place], rollout.sample[place]) == which
            if same and _response(rollout, place) == _response(self.rollout, i):
                return place
        return None

    def _prompt(self, i: int) -> list[int]:
        width = self.rollout.tokens.shape[1] - self.rollout.response_mask.shape[1]
        return self.rollout.tokens[i, :width][self.rollout.mask[i, :width]].tolist()

    def _top(self, i: int, size: int) -> list[list[tuple[str, float | None]]]:
        """The most probable tokens at each position, (text, log-prob)."""
        ids, logprobs = self.old.top_ids[i, :size].tolist(), self.old.top[i, :size].tolist()
        return [
            [(self.records.text(token), _rounded(x)) for token, x in zip(*position, strict=True)]
            for position in zip(ids, logprobs, strict=True)
        ]


@functools.partial(jax.jit, static_argnames=("model", "parts"))
def look(policy: Params, rollout: Rollout, *, model: ModelConfig, temperature: Number, parts: int) -> Look:
    """Run a policy on the responses of a rollout, over `parts` micro-batches."""

    def states(part: Rollout) -> tuple[Array, Array]:
        hidden = response_states(policy, model, part)
        return sequence_logprobs(policy, model, part, temperature.value, hidden=hidden)[0], hidden[:, :-1]

    def alternatives(state: Array) -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(lm_logits(policy, model, state) * (1 / temperature.value))
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs)
        return entropy, *jax.lax.top_k(logprobs, min(ALTERNATIVES, model.vocab_size))

    logprobs, hidden = from_micro_batches(jax.lax.map(states, to_micro_batches(rollout, parts)))
    positions = hidden.reshape(-1, hidden.shape[-1])
    at_a_time = max(1, min(len(positions), runtime.logits_alive(model.platform) // model.vocab_size))
    found = jax.lax.map(alternatives, positions, batch_size=at_a_time)  # never all logits at once
    return Look(logprobs, *(x.reshape(*logprobs.shape, *x.shape[1:]) for x in found))


@functools.partial(jax.jit, static_argnames="model")
def rollout_logprobs(policy: Params, rollout: Rollout, *, model: ModelConfig, temperature: Number) -> Array:
    """Log-probs of response tokens, f32 of the shape of the response mask, whose leading axes may be of pairs."""
    shape = rollout.response_mask.shape
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) - 1 :]), rollout)
    return sequence_logprobs(policy, model, rows, temperature.value)[0].reshape(shape)


def _response(rollout: Rollout, i: int) -> list[int]:
    """Token ids of a response, those of an environment included."""
    columns = rollout.response_mask.shape[-1]
    return rollout.tokens[i, -columns:][rollout.mask[i, -columns:]].tolist()


def _rounded(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.{DIGITS}g}")
