"""Every family and option against transformers itself, in float32, on inputs that the golden files do not hold."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import models
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
        expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
        assert set(ours) == set(expected)
        relative = {
            name: np.linalg.norm(ours[name] - value) / np.linalg.norm(value) for name, value in expected.items()
        }
        worst = max(relative, key=relative.__getitem__)
        print(f"{language_model.folder.name} {side}: logits {difference:.1e}, gradient {relative[worst]:.1e} ({worst})")
        assert difference < 1e-4
        assert relative[worst] < 1e-4, worst


def test_greedy_continuation_with_a_cache(language_model, rows, padded):
    model, theirs = language_model.model, reference(language_model.folder)
    prompts = rows[1:]
    width = max(map(len, prompts)) + 2
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
