"""Every family and option against what transformers computed, and adapters against PEFT (scripts/make_fixtures.py),
without torch."""

import dataclasses
import json
import pathlib
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxrlhf
from jaxrlhf import models
from jaxrlhf.algorithms.router import load_balancing_loss
from jaxrlhf.weights import peft

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"

NEW_TOKENS = 64
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}  # halves the time of these tests, most of which is compilation


def digest(gradient: np.ndarray) -> np.ndarray:
    """The norm of a gradient, and its products with four fixed directions; as in the script."""
    flat = gradient.astype(np.float64).ravel()
    directions = [np.cos((i + 1) * np.arange(flat.size)) for i in range(4)]
    return np.array([np.linalg.norm(flat), *(flat @ direction for direction in directions)])


def test_language_model_matches_transformers(language_model, padded):
    model, golden = language_model.model, language_model.golden
    rows = [row[:length] for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    prompts = [row[len(row) - n :] for row, n in zip(golden["prompts"], golden["prompt_lengths"], strict=True)]
    written = [np.concatenate(pair) for pair in zip(prompts, golden["greedy"], strict=True)]
    width = max(map(len, written)) + 1
    # one batch, one compilation: the sequences padded right and left, then prompts with their continuation
    parts = [padded(rows, "right", width), padded(rows, "left", width), padded(written, "left", width)]
    tokens, mask = (jnp.concatenate(column) for column in zip(*parts, strict=True))
    learns = mask[:, :-1] & mask[:, 1:] & (jnp.arange(len(tokens)) < 2 * len(rows))[:, None]

    @partial(jax.jit, compiler_options=QUICKLY_COMPILED)
    def run(params):
        def loss(params):
            logits = models.lm_logits(params, model, models.forward(params, model, tokens, mask))
            logprobs = jax.nn.log_softmax(logits[:, :-1])
            picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.where(learns, picked, 0).sum() / learns.sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradient, logits = run(language_model.params)
    logits, mask = np.asarray(logits), np.asarray(mask)
    for i in range(2):
        at = slice(i * len(rows), (i + 1) * len(rows))
        np.testing.assert_allclose(logits[at][mask[at]], golden["logits"], atol=1e-4, rtol=0)
    # token by token the likeliest, hence the greedy continuation
    best = logits[2 * len(rows) :, -NEW_TOKENS - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(best, golden["greedy"])
    ours = language_model.named(gradient)
    assert set(ours) == {key.removeprefix("gradient/") for key in golden if key.startswith("gradient/")}
    for key, value in ours.items():
        theirs = golden[f"gradient/{key}"]
        np.testing.assert_allclose(digest(value), theirs, atol=1e-4 * theirs[0], rtol=0, err_msg=key)


@pytest.mark.parametrize(
    ("language_model", "recorded"), [("qwen3_moe", 2.5397629738), ("olmoe", 3.0437719822)], indirect=["language_model"]
)
def test_load_balancing_loss_matches_transformers(language_model, recorded, padded):
    """`aux_loss` of transformers 5.24 for the recorded sequences and their mask; test_parity.py computes others."""
    golden = language_model.golden
    rows = [row[:length] for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    model = dataclasses.replace(language_model.model, router_aux_loss_coef=1.0)
    sums = jax.jit(partial(models.forward_with_router, model=model), compiler_options=QUICKLY_COMPILED)
    for side in ("right", "left"):
        tokens, mask = padded(rows, side, golden["tokens"].shape[1] + 3)
        _, found = sums(language_model.params, tokens=tokens, mask=mask)
        loss = load_balancing_loss(*found["router"], model.experts_per_token)
        assert loss == pytest.approx(recorded, rel=1e-5)


def test_classifier_matches_transformers(classifier, padded):
    model, params, golden = classifier.model, classifier.params, classifier.golden
    rows = [row[:length] for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    tokens, mask = padded(rows, "right", golden["tokens"].shape[1])
    hidden = jax.jit(models.forward, static_argnums=1, compiler_options=QUICKLY_COMPILED)(params, model, tokens, mask)
    last = hidden[np.arange(len(rows)), golden["lengths"] - 1]
    expected = golden["scores"]
    np.testing.assert_allclose(models.label_logits(params, model, last), expected, atol=1e-4, rtol=0)
    score = expected[:, 0] if model.num_labels == 1 else 1 / (1 + np.exp(expected[:, 0] - expected[:, 1]))
    np.testing.assert_allclose(models.scalar_head(params, model, last), score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2-dora-rslora", "llama-lora", "qwen3_moe-experts"])
def test_adapters_match_peft(name, padded, tmp_path):
    """Merged as they are read, and beside their base. Rows of tokens are in them, with a tied head and without."""
    shutil.copytree(FIXTURES / "adapters" / name, tmp_path / name)
    file = tmp_path / name / peft.CONFIG
    said = json.loads(file.read_text())
    folder = FIXTURES / "models" / said["base_model_name_or_path"]
    file.write_text(json.dumps(said | {"base_model_name_or_path": str(folder)}))
    golden = load_file(tmp_path / name / "golden.safetensors")
    rows = [row[:length] for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    tokens, mask = padded(rows, "right", golden["tokens"].shape[1])

    @partial(jax.jit, static_argnums=1, compiler_options=QUICKLY_COMPILED)
    def run(params, model):
        return models.lm_logits(params, model, models.forward(params, model, tokens, mask))

    model, base = jaxrlhf.load(folder, dtype="float32")
    adapters, added = peft.read(tmp_path / name, model)
    apart = run({**base, **added}, dataclasses.replace(model, adapters=adapters))
    merged = run(jaxrlhf.load(tmp_path / name, dtype="float32")[1], model)
    for logits in (apart, merged):
        np.testing.assert_allclose(np.asarray(logits)[np.asarray(mask)], golden["logits"], atol=1e-4, rtol=0)
    assert np.abs(np.asarray(run(base, model))[np.asarray(mask)] - golden["logits"]).max() > 1
