"""Every family and option against transformers itself, in float32, on inputs that the golden files do not hold."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import models
from jaxrlhf.algorithms.router import load_balancing_loss
from jaxrlhf.weights import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
LENGTHS, NEW_TOKENS = (24, 15, 5), 64


def reference(folder):
    """The model of a folder as transformers loads it, config.json and names included."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    loaded, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return loaded.eval()


def as_torch(tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    numbers = (np.asarray(a).astype(np.int64) for a in (tokens, mask, positions))
    return dict(zip(("input_ids", "attention_mask", "position_ids"), map(torch.tensor, numbers), strict=True))


def as_stored(name, array, model):
    """What files hold of a parameter that transformers 5 renames, or joins, when it reads them."""
    prefix, _, module = name.rpartition(".")
    if prefix.endswith("experts"):
        kinds = ["gate_proj", "up_proj"] if module == "gate_up_proj" else ["down_proj"]
        parts = dict(zip(kinds, np.split(array, len(kinds), axis=1), strict=True))
        return {f"{prefix}.{i}.{kind}.weight": parts[kind][i] for kind in kinds for i in range(len(array))}
    return {name.replace("lm_head.", "embed_out.") if model.family == "gpt_neox" else name: array}


@pytest.fixture
def rows(padded):
    generator = np.random.default_rng(7)
    return [generator.integers(3, 64, length) for length in LENGTHS]


def test_logits_and_gradients(language_model, rows, padded):
    model, theirs = language_model.model, reference(language_model.folder)

    @jax.jit
    def run(params, tokens, mask):
        learns = mask[:, 1:] & mask[:, :-1]

        def loss(params):
            logits = models.lm_logits(params, model, models.forward(params, model, tokens, mask))
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.where(learns, picked, 0).sum() / learns.sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    for side in ("right", "left"):
        tokens, mask = padded(rows, side, max(LENGTHS) + 3)
        theirs.zero_grad()
        inputs, real = as_torch(tokens, mask), np.asarray(mask)
        found = theirs(**inputs).logits
        logprobs = torch.log_softmax(found[:, :-1], -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        (-logprobs[torch.tensor(real[:, 1:] & real[:, :-1])].mean()).backward()
        gradient, logits = run(language_model.params, tokens, mask)
        difference = np.abs(np.asarray(logits)[real] - found.detach().numpy()[real]).max()
        ours = language_model.named(gradient)
        expected = {}
        for name, weight in theirs.named_parameters():
            expected |= as_stored(name, weight.grad.numpy(), model)
        assert set(ours) == set(expected)
        relative = {
            name: np.linalg.norm(ours[name] - value) / np.linalg.norm(value) for name, value in expected.items()
        }
        worst = max(relative, key=relative.__getitem__)
        print(f"{language_model.folder.name} {side}: logits {difference:.1e}, gradient {relative[worst]:.1e} ({worst})")
        assert difference < 1e-4
        assert relative[worst] < 1e-4, worst


@pytest.mark.parametrize("language_model", ["qwen3_moe", "olmoe"], indirect=True)
def test_load_balancing_loss_and_its_gradient(language_model, rows, padded):
    model, theirs = (
        dataclasses.replace(language_model.model, router_aux_loss_coef=1.0),
        reference(language_model.folder),
    )

    @jax.jit
    def run(params, tokens, mask):
        def loss(params):
            choices, probabilities = models.forward_with_router(params, model, tokens, mask)[1]["router"]
            return load_balancing_loss(choices, probabilities, model.experts_per_token)

        return jax.value_and_grad(loss)(params)

    for side in ("right", "left"):
        tokens, mask = padded(rows, side, max(LENGTHS) + 3)
        theirs.zero_grad()
        expected = theirs(**as_torch(tokens, mask), output_router_logits=True).aux_loss
        expected.backward()
        found, gradient = run(language_model.params, tokens, mask)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        ours, checked = language_model.named(gradient), 0
        for name, weight in theirs.named_parameters():
            for key, value in as_stored(
                name, (0 * weight if weight.grad is None else weight.grad).detach().numpy(), model
            ).items():
                np.testing.assert_allclose(ours[key], value, atol=1e-6, rtol=1e-3, err_msg=key)
                checked += key.endswith("mlp.gate.weight") and np.abs(value).max() > 1e-4
        assert checked == model.num_layers


def test_greedy_continuation_with_a_cache(language_model, rows, padded):
    model, theirs = language_model.model, reference(language_model.folder)
    prompts = rows[1:]
    width = max(map(len, prompts)) + 2
    model = models.for_length(model, width + NEW_TOKENS)
    tokens, mask = padded(prompts, "left", width)
    theirs.generation_config.eos_token_id = None
    inputs = as_torch(tokens, mask)
    del inputs["position_ids"]
    expected = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).numpy()[:, width:]

    @jax.jit
    def run(params):
        unstacked = models.unstack(params, model)
        cache = models.empty_cache(model, len(prompts), width + NEW_TOKENS)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        hidden, cache = models.forward_cached(unstacked, model, tokens, mask, positions, cache, 0)

        def step(carry, slot):
            last, position, cache = carry
            token = jnp.argmax(models.lm_logits(params, model, last), -1).astype(jnp.int32)[:, None]
            real = jnp.ones_like(token, bool)
            hidden, cache = models.forward_cached(unstacked, model, token, real, position + 1, cache, slot)
            return (hidden[:, -1], position + 1, cache), (token[:, 0], hidden[:, -1])

        start = hidden[:, -1], positions[:, -1:], cache
        _, (written, hidden) = jax.lax.scan(step, start, width + jnp.arange(NEW_TOKENS))
        return written.T, hidden.swapaxes(0, 1)

    written, hidden = run(language_model.params)
    np.testing.assert_array_equal(written, expected)
    everything = jnp.concatenate([tokens, written], axis=1)
    real = jnp.concatenate([mask, jnp.ones_like(written, bool)], axis=1)
    whole = jax.jit(models.forward, static_argnums=1)(language_model.params, model, everything, real)
    np.testing.assert_allclose(hidden, whole[:, width:], atol=1e-4, rtol=0)


LONGROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 16}


@pytest.mark.parametrize("options", [{"factor": 4.0}, LONGROPE], ids=["dynamic", "longrope"])
def test_each_row_is_rotated_as_if_it_were_alone(options, rows, padded, tmp_path):
    """Frequencies that depend on the length: transformers takes that of the longest row of a batch."""
    config = json.loads((FOLDER / "llama" / "config.json").read_text())
    kind = "dynamic" if "factor" in options else "longrope"
    config |= {
        "rope_scaling": {"rope_type": kind, **options},
        "max_position_embeddings": 16 if kind == "dynamic" else 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(FOLDER / "llama" / "model.safetensors", tmp_path)
    model, params = jaxrlhf.load(tmp_path, dtype="float32")
    assert model.max_positions == 64
    tokens, mask = padded(rows, "left", max(LENGTHS) + 3)
    run = jax.jit(models.forward, static_argnums=1)
    ours = models.lm_logits(params, model, run(params, model, tokens, mask))
    for row, logits, real in zip(rows, ours, np.asarray(mask), strict=True):
        expected = reference(tmp_path)(**as_torch(row[None], np.ones((1, len(row)), bool))).logits[0].detach().numpy()
        np.testing.assert_allclose(logits[real], expected, atol=1e-4, rtol=0)
    # fixed for the longest row, as in a run: the first row is the same, the last one, of 5 tokens, is not
    fixed = models.for_length(model, max(LENGTHS))
    again = models.lm_logits(params, model, run(params, fixed, tokens, mask))
    np.testing.assert_allclose(again[0], ours[0], atol=1e-4, rtol=0)
    assert np.abs(again[2] - ours[2])[np.asarray(mask)[2]].max() > 1e-2


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores(classifier, rows, padded, side):
    model, theirs = classifier.model, reference(classifier.folder)
    tokens, mask = padded(rows, side, max(LENGTHS) + 3)
    with torch.no_grad():
        expected = theirs(**as_torch(tokens, mask)).logits
    hidden = models.forward(classifier.params, model, tokens, mask)
    last = np.asarray(mask).shape[1] - 1 - np.asarray(mask)[:, ::-1].argmax(1)
    ours = models.scalar_head(classifier.params, model, hidden[np.arange(len(rows)), last])
    wanted = expected[:, 0] if model.num_labels == 1 else torch.softmax(expected, -1)[:, 1]
    np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-4, rtol=0)


def test_config_json_of_either_side_means_the_same(tmp_path):
    for folder in sorted(FOLDER.iterdir()):
        model = families.parse(json.loads((folder / "config.json").read_text()), folder.name)
        transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
        assert families.parse(json.loads((tmp_path / "config.json").read_text()), folder.name) == model
        (tmp_path / "config.json").write_text(json.dumps(families.render(model, {})))
        transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert families.parse(json.loads((tmp_path / "config.json").read_text()), folder.name) == model
