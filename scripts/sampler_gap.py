"""Compare the log-probs that the sampler computes with those that training computes for the same tokens.

    python scripts/sampler_gap.py MODEL [--dtype float32] [--rows 8 64] [--length 64]

MODEL is a folder or hub id; with --random its weights are drawn. Responses are sampled at temperature 1, after prompts
of random tokens of different lengths. A line for each number of rows: the share of response tokens whose two log-probs
have the same bits, and the mean and the maximum of their difference in nats.
"""

import argparse
import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import Sampling
from jaxrlhf.logprobs import response_states, response_tokens, token_logprobs
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout import generate
from jaxrlhf.rollout.inference_copy import RolloutDType, inference_copy
from jaxrlhf.types import Params, Prompts, Rollout

PROMPT = 32  # columns; the shortest prompt has half of them


def prompts(rows: int, vocab_size: int) -> Prompts:
    """Random tokens, left-padded."""
    chance = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= chance.integers(0, PROMPT // 2, rows)[:, None]
    tokens = np.where(mask, chance.integers(0, vocab_size, mask.shape), 0).astype(np.int32)
    index = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), index, jnp.zeros_like(index))


@partial(jax.jit, static_argnames="model")
def training_logprobs(params: Params, model: ModelConfig, rollout: Rollout) -> jax.Array:
    """As in the annotation of a rollout."""
    hidden = response_states(params, model, rollout)[:, :-1]
    return token_logprobs(params, model, hidden, response_tokens(rollout), jnp.float32(1))[0]


def gap(params: Params, model: ModelConfig, dtype: RolloutDType, rows: int, length: int) -> tuple[float, float, float]:
    """Share of equal bits, mean and maximum of the absolute difference."""
    inference, copy = inference_copy(model, params, dtype)
    sampling = Sampling(response_length=length)
    rollout = generate(copy, inference, prompts(rows, model.vocab_size), jax.random.key(1), sampling, (), 0)
    sampled, trained = np.asarray(rollout.logprobs), np.asarray(training_logprobs(params, model, rollout))
    difference = np.abs(sampled - trained)
    return float((sampled == trained).mean()), float(difference.mean()), float(difference.max())


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "int8"], help="of the sampler's weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    model, params = weights.load(
        options.model, init="random" if options.random else "pretrained", key=jax.random.key(0)
    )
    print("| sampler | rows | equal bits | mean difference | maximum |\n|---|---|---|---|---|")
    for dtype in options.dtype:
        for rows in options.rows:
            equal, mean, most = gap(params, model, dtype, rows, options.length)
            print(f"| {dtype} | {rows} | {equal:.1%} | {mean:.1e} | {most:.1e} |", flush=True)


if __name__ == "__main__":
    main()
