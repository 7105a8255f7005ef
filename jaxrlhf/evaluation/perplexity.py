"""Perplexity of a language model on texts."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import weights
from jaxrlhf.algorithms import masked
from jaxrlhf.config import SFTConfig, replace
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import SFTRow, sft_rows
from jaxrlhf.evaluation.generation import load_weights
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward
from jaxrlhf.types import Batch, Params

Result = dict[str, Any]


def measure(config: SFTConfig) -> Result:
    """Perplexity of `config.model` on the rows of `config.data`: exp of the mean of -log p over all tokens that SFT
    would train on (completions and assistant turns with their end tokens; of texts, and without `completion_only`, all
    but the first).

    Rows longer than `data.max_length` or the model's context are handled by `data.truncation`. Returns a JSON object:
    `perplexity` and `nll` (the mean, in nats per token) with standard errors over rows, `tokens`, and of each row its
    own. Raises DataError.
    """
    source = config.model
    tokenizer = weights.open_tokenizer(config.tokenizer, source)
    context = weights.load_config(source.path, revision=source.revision).max_positions
    limit = min(config.data.max_length, context)
    no_split = {"data.validation_path": "", "data.validation_split": "", "data.validation_fraction": 0.0}
    config = replace(config, **{"data.max_length": limit, **no_split})
    split = sft_rows(config.data, tokenizer, config.completion_only)
    model, params = load_weights(source, config.seed, tokenizer)
    sums = negative_log_likelihoods(params, model, split.train, tokenizer.pad_id, config.train.eval_batch_size)
    tokens = np.array([sum(row.loss_mask) for row in split.train])
    mean, error = ratio_and_error(sums, tokens)
    perplexity = _exp(mean)
    return {
        "model": source.path,
        "texts_from": config.data.path,
        "data": str(split.report).splitlines(),
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "nll": {"mean": mean, "standard_error": error},
        "perplexity": {"mean": perplexity, "standard_error": error and perplexity and perplexity * error},
        "by_row": [
            {"tokens": int(n), "nll": float(s / n), "perplexity": _exp(s / n)}
            for s, n in zip(sums, tokens, strict=True)
        ],
    }


def negative_log_likelihoods(
    params: Params, model: ModelConfig, rows: Sequence[SFTRow], pad_id: int, batch_size: int
) -> np.ndarray:
    """Sum of -log p over the tokens of each row's loss mask, float64 [N], in nats."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # batches of similar length
    sums = np.zeros(len(rows))
    for start in range(0, len(rows), batch_size):
        picked = order[start : start + batch_size]
        part = [rows[i] for i in picked]
        length = batching.bucket(max(map(batching.row_length, part)), model.max_positions)
        part += [part[-1]] * (batch_size - len(part))  # one program for each length
        found = _row_sums(params, batching.batch(part, pad_id, length), model=model)
        sums[picked] = np.asarray(found, np.float64)[: len(picked)]
    return sums


@functools.partial(jax.jit, static_argnames="model")
def _row_sums(params: Params, batch: Batch, *, model: ModelConfig) -> jax.Array:
    hidden = forward(params, model, batch.tokens, batch.mask)
    logprobs, _ = token_logprobs(params, model, hidden[:, :-1], batch.tokens[:, 1:], 1.0)
    return -jnp.sum(masked.keep(logprobs, batch.loss_mask[:, 1:]), axis=1)


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """sum(sums) / sum(counts), and its standard error over rows [N], None for one row.

    The error is that of the linearised ratio estimator (Cochran 1977, Sampling Techniques, eq. 6.9 without the finite
    population correction): sqrt(N / (N - 1) * sum((s_i - r n_i)^2)) / sum(n_i).
    """
    total, size = counts.sum(), len(counts)
    ratio = float(sums.sum() / total)
    if size < 2:
        return ratio, None
    return ratio, float(np.sqrt(size / (size - 1) * np.sum((sums - ratio * counts) ** 2)) / total)


def table(result: Result) -> str:
    """The result in a few lines for the console."""
    nll, perplexity = result["nll"], result["perplexity"]
    errors = ["" if x["standard_error"] is None else f" +- {x['standard_error']:.4f}" for x in (perplexity, nll)]
    dropped = [line for line in result["data"] if line.startswith(("dropped", "cut"))]
    lines = [
        f"perplexity    {perplexity['mean']:.4f}{errors[0]}",
        f"mean -log p   {nll['mean']:.4f}{errors[1]} nats per token",
        f"texts         {result['rows']} rows, {result['tokens']} tokens counted of {result['texts_from']}",
        *dropped,
    ]
    if result["rows"] == 1:
        lines.append("one row: the standard error over rows is unknown")
    return "\n".join(lines)


def _exp(value: float) -> float | None:
    """exp, None beyond the range of float."""
    return math.exp(value) if value < 700 else None
