"""Perplexity against transformers' recorded logits, a loop over logits, and resampled rows."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import Data, ModelSource, SFTConfig, replace
from jaxrlhf.data.datasets import SFTRow
from jaxrlhf.evaluation.perplexity import _exp, measure, negative_log_likelihoods, ratio_and_error
from jaxrlhf.models import forward, lm_logits

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
END = 2  # </s> of the tiny tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params)
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


def config(folder, rows, tmp_path, **data):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTConfig(model=ModelSource(path=str(folder)), data=Data(path=str(tmp_path / "t.jsonl"), **data))


def by_hand(folder, tokens, counted):
    """-log p of each counted token, from the logits of the row alone."""
    model, params = weights.load(folder)
    ids = jnp.asarray([tokens])
    logits = np.asarray(lm_logits(params, model, forward(params, model, ids, jnp.ones(ids.shape, bool))), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-logs[i - 1, token] for i, (token, real) in enumerate(zip(tokens, counted, strict=True)) if real]


@pytest.fixture
def ids_of(folder):
    """Text -> the tiny tokenizer's ids: single characters."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return lambda text: [vocabulary[letter] for letter in text]


def test_only_completions_and_their_end_are_counted_and_each_token_weighs_the_same(folder, ids_of, tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cde"},
        {"prompt": "hello ", "completion": "a"},
        {"prompt": "x", "completion": "y" * 8},
    ]
    found, every = measure(config(folder, rows, tmp_path)), []
    for row, shown in zip(rows, found["by_row"], strict=True):
        prompt, completion = ids_of(row["prompt"]), [*ids_of(row["completion"]), END]
        values = by_hand(folder, prompt + completion, [False] * len(prompt) + [True] * len(completion))
        assert shown["tokens"] == len(completion)
        assert shown["nll"] == pytest.approx(np.mean(values), rel=1e-5)
        every += values
    assert found["tokens"] == len(every) == 4 + 2 + 9
    assert found["nll"]["mean"] == pytest.approx(np.mean(every), rel=1e-5), "weighted by tokens, not by rows"
    assert found["perplexity"]["mean"] == pytest.approx(np.exp(np.mean(every)), rel=1e-5)
    error = found["nll"]["standard_error"]
    assert found["perplexity"]["standard_error"] == pytest.approx(found["perplexity"]["mean"] * error)


def test_of_texts_all_tokens_but_the_first_are_counted(folder, ids_of, tmp_path):
    found = measure(config(folder, [{"text": "hello you"}], tmp_path))
    ids = [*ids_of("hello you"), END]
    assert found["tokens"] == len(ids) - 1 and found["nll"]["standard_error"] is None
    assert found["nll"]["mean"] == pytest.approx(np.mean(by_hand(folder, ids, [False] + [True] * 9)), rel=1e-5)
    whole = replace(config(folder, [{"prompt": "ab", "completion": "cd"}], tmp_path), completion_only=False)
    assert measure(whole)["tokens"] == 4


def test_rows_of_any_length_and_batches_of_any_size_give_the_same(folder):
    model, params = weights.load(folder)
    rng = np.random.default_rng(0)
    rows = []
    for length in (40, 3, 17, 3, 24, 2, 60):
        mask = [False, *(rng.random(length - 1) < 0.7).tolist()]
        rows.append(SFTRow(rng.integers(4, 40, length).tolist(), mask))
    whole = negative_log_likelihoods(params, model, rows, 0, 16)
    np.testing.assert_allclose(negative_log_likelihoods(params, model, rows, 0, 2), whole, rtol=1e-5, atol=1e-5)
    for row, total in zip(rows, whole, strict=True):
        assert total == pytest.approx(sum(by_hand(folder, row.tokens, row.loss_mask)), rel=1e-5, abs=1e-5)


def test_the_error_is_that_of_resampled_rows():
    """The standard deviation of the ratio over bootstrap resamples of 400 rows of unequal length."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 40, 400)
    sums = counts * rng.normal(2.0, 0.5, 400) + rng.normal(0, 3, 400)
    ratio, error = ratio_and_error(sums, counts)
    assert ratio == pytest.approx(sums.sum() / counts.sum())
    drawn = rng.integers(0, 400, (4000, 400))
    assert error == pytest.approx((sums[drawn].sum(1) / counts[drawn].sum(1)).std(), rel=0.06)
    equal, error = ratio_and_error(np.array([1.0, 3.0, 2.0]), np.array([1, 1, 1]))
    assert (equal, error) == (2.0, pytest.approx(1 / np.sqrt(3))), "rows of one token: the usual error of a mean"
    assert ratio_and_error(np.array([6.0]), np.array([3])) == (2.0, None)


def test_the_command_prints_it_and_names_dropped_rows(folder, tmp_path, capsys):
    file, out = tmp_path / "t.jsonl", tmp_path / "r.json"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "hello", "x" * 100)))
    assert main(["evaluate", str(folder), "--text", str(file), "--output", str(out)]) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert f"perplexity    {result['perplexity']['mean']:.4f} +- " in shown
    assert "2 rows, 8 tokens counted" in shown
    assert "dropped 1: longer than data.max_length (64 tokens)" in shown
    assert main(["evaluate", str(folder), "--text", str(file), "--prompts", str(file)]) == 3
    assert "give one of --prompts FILE" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_the_likelihoods_are_those_of_transformers(family):
    """From the logits that transformers computed (scripts/make_fixtures.py)."""
    golden = load_file(FIXTURES / family / "golden.safetensors")
    model, params = weights.load(FIXTURES / family, dtype="float32")
    rows = [row[:n].tolist() for row, n in zip(golden["tokens"], golden["lengths"], strict=True)]
    logits = np.split(golden["logits"].astype(np.float64), np.cumsum(golden["lengths"])[:-1])
    expected = []
    for row, scores in zip(rows, logits, strict=True):
        logs = scores - scores.max(-1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
        expected.append(-sum(logs[i, token] for i, token in enumerate(row[1:])))
    data = [SFTRow(row, [False] + [True] * (len(row) - 1)) for row in rows]
    found = negative_log_likelihoods(params, model, data, 0, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_a_perplexity_beyond_floats_is_null():
    assert _exp(1e4) is None and _exp(0.0) == 1.0
