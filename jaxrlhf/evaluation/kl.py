"""KL of a model to another, estimated on its own completions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import masked
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation.prompts import Questions
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.traced import Number
from jaxrlhf.types import Params, Rollout

ROWS = 16  # per forward pass


def response_logprobs(params: Params, model: ModelConfig, rollout: Rollout, temperature: float) -> np.ndarray:
    """Log-probability of each response, summed over its tokens, float64 [B], at the temperature it was sampled at.

    Normalised over the rollout's `support` if it has one, as the metric objective/kl of a run.
    """
    count, length = len(rollout.index), rollout.response_mask.shape[1]
    longest_prompt = int(np.asarray(rollout.mask)[:, :-length].sum(axis=1).max())
    model = for_length(model, longest_prompt + length)  # as it was sampled
    sums = []
    for start in range(0, count, ROWS):
        rows = np.minimum(np.arange(start, start + ROWS), count - 1)  # the last batch repeats a row: one program
        part = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], rollout)
        sums.append(np.asarray(_sums(params, part, model=model, temperature=Number(temperature)), np.float64))
    return np.concatenate(sums)[:count]


@functools.partial(jax.jit, static_argnames="model")
def _sums(params: Params, rollout: Rollout, *, model: ModelConfig, temperature: Number) -> jax.Array:
    hidden, mask = response_states(params, model, rollout)[:, :-1], rollout.response_mask
    targets = rollout.tokens[:, -mask.shape[1] :]
    logprobs, _ = token_logprobs(params, model, hidden, targets, temperature.value, rollout.support)
    return jnp.sum(masked.keep(logprobs, mask), axis=1)


def obstacle(first: Questions, other: Questions, first_model: ModelConfig, rollout: Rollout, *, greedy: bool) -> str:
    """Reason why the KL of the model that sampled `rollout` for `other` to the model of `first` is unknown; "" if it
    can."""
    if greedy:
        return "the completions are greedy, and a KL is a mean over random ones"
    if not equal_ids(first.tokenizer, other.tokenizer):
        return "the tokenizers differ"
    pairs = zip(first.rows, other.rows, strict=True)
    if any(a.tokens != b.tokens for a, b in pairs):
        return "the same prompts have other tokens (the chat templates differ)"
    if int(np.max(rollout.tokens)) >= first_model.vocab_size or (
        rollout.support is not None and rollout.support.shape[-1] != -(-first_model.vocab_size // 8)
    ):
        return "the vocabularies differ in size"
    return ""


def equal_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """True if token ids mean the same to both tokenizers, as far as both have them."""
    larger, smaller = (a, b) if a.size >= b.size else (b, a)
    return larger.has_ids_of(smaller)
