import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny
from support.traced import largest_array

from jaxrlhf import logprobs, models, runtime, sharding
from jaxrlhf.config import Mesh
from jaxrlhf.logprobs import last_token_scores, response_states, token_logprobs
from jaxrlhf.types import Rollout

TINY = tiny(hidden_size=12)


def spread(params):
    """Kernels large enough for distributions that are far from flat; norms as they are."""
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 20 * x), params)


def case(model, rows=3, columns=7):
    rng = np.random.default_rng(0)
    params = spread(models.init(model, jax.random.key(0)))
    hidden = jnp.asarray(rng.normal(size=(rows, columns, model.hidden_size)).astype(np.float32))
    return params, hidden, jnp.asarray(rng.integers(0, model.vocab_size, (rows, columns)))


def materialised(params, model, hidden, targets, temperature, inside=None):
    logits = models.lm_logits(params, model, hidden) / temperature
    logp = jax.nn.log_softmax(logits if inside is None else jnp.where(inside, logits, -jnp.inf))
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logp) * jnp.where(jnp.isfinite(logp), logp, 0), axis=-1)


def cut_at(monkeypatch, tokens):
    """Pieces of about so many tokens, for the 21 positions of a case."""
    monkeypatch.setattr(runtime, "logits_alive", lambda backend: 21 * tokens)
    monkeypatch.setattr(logprobs, "MIN_CHUNK", 1)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "pieces"), [(29, 1, 3), (29, 2**24, 1), (128, 1, 2), (192, 64, 3), (5, 1, 1), (97, 40, 3)]
)
@pytest.mark.parametrize(("tied", "temperature"), [(True, 1.0), (False, 0.6)])
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, vocabulary, tokens, pieces, tied, temperature):
    cut_at(monkeypatch, tokens)
    model = dataclasses.replace(TINY, tie_embeddings=tied, vocab_size=vocabulary)
    assert logprobs._chunks("tvd", model, 21, False, ()).count == pieces
    params, hidden, targets = case(model)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=targets.shape).astype(np.float32))

    def run(function):
        def loss(params, hidden):
            picked, entropy = function(params, model, hidden, targets, temperature)
            return jnp.sum(weights * picked), (picked, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, hidden)

    ours, theirs = run(token_logprobs), run(materialised)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, theirs)
    assert ours[0][1][0].std() > 0.5  # the case is not trivial


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "tied"), [(29, 1, True), (29, 2**24, False), (128, 1, True), (192, 64, False)]
)
def test_on_a_support_they_are_those_of_log_softmax_over_it(monkeypatch, vocabulary, tokens, tied):
    """The last columns have an empty support, as in padding: nothing of it may reach a gradient."""
    cut_at(monkeypatch, tokens)
    model = dataclasses.replace(TINY, tie_embeddings=tied, vocab_size=vocabulary)
    params, hidden, targets = case(model)
    rng = np.random.default_rng(1)
    inside = (rng.random((*targets.shape, vocabulary)) < 0.3) | (np.arange(vocabulary) == targets[..., None])
    empty = inside & (np.arange(7) < 5)[:, None]
    support = jnp.packbits(jnp.asarray(empty), axis=-1)
    weights = jnp.asarray(np.where(np.arange(7) < 5, rng.normal(size=targets.shape), 0).astype(np.float32))

    def run(function, over):
        def loss(params, hidden):
            picked, entropy = function(params, model, hidden, targets, 0.6, over)
            return jnp.sum(weights * picked), (picked[:, :5], entropy[:, :5])

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, hidden)

    ours, theirs, full = run(token_logprobs, support), run(materialised, inside), run(token_logprobs, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, theirs)
    assert np.abs(ours[0][1][0] - full[0][1][0]).max() > 0.1
    everything = jnp.packbits(jnp.ones(inside.shape, bool), axis=-1)
    whole = run(token_logprobs, everything)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), whole, full)


@pytest.mark.parametrize(("vocabulary", "tokens"), [(29, 2**24), (192, 64)])
def test_divided_and_capped_logits(monkeypatch, vocabulary, tokens):
    """Values and gradients, where the support leaves tokens out, in one piece and in three."""
    cut_at(monkeypatch, tokens)
    model = dataclasses.replace(TINY, vocab_size=vocabulary, logits_divisor=0.7, logits_softcap=2.0)
    params, hidden, targets = case(model)
    inside = (np.random.default_rng(1).random((*targets.shape, vocabulary)) < 0.5) | (
        np.arange(vocabulary) == targets[..., None]
    )
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, *targets.shape)).astype(np.float32))
    raw = jnp.einsum("brd,vd->brv", hidden, params["embed"]["embedding"])
    np.testing.assert_allclose(models.lm_logits(params, model, hidden), 2 * np.tanh(raw / 0.7 / 2), atol=1e-5)

    def run(function, over, **more):
        def loss(params, hidden):
            picked, entropy = function(params, model, hidden, targets, 0.6, over, **more)
            return jnp.sum(weights[0] * picked + weights[1] * entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, hidden)

    ours = run(token_logprobs, jnp.packbits(jnp.asarray(inside), axis=-1), entropy_gradient=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), ours, run(materialised, inside))


@pytest.mark.parametrize(("vocabulary", "tokens", "supported"), [(29, 2**24, False), (128, 1, True), (192, 64, False)])
def test_a_gradient_through_the_entropy_where_it_is_asked_for(monkeypatch, vocabulary, tokens, supported):
    cut_at(monkeypatch, tokens)
    model = dataclasses.replace(TINY, vocab_size=vocabulary)
    params, hidden, targets = case(model)
    rng = np.random.default_rng(1)
    inside = (rng.random((*targets.shape, vocabulary)) < 0.3) | (np.arange(vocabulary) == targets[..., None])
    inside |= not supported
    support = jnp.packbits(jnp.asarray(inside), axis=-1) if supported else None
    weights = jnp.asarray(rng.normal(size=(2, *targets.shape)).astype(np.float32))

    def run(function, over, **more):
        def loss(params, hidden):
            picked, entropy = function(params, model, hidden, targets, 0.6, over, **more)
            return jnp.sum(weights[0] * picked + weights[1] * entropy)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, hidden)

    ours, theirs = run(token_logprobs, support, entropy_gradient=True), run(materialised, inside)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), ours, theirs)
    assert np.abs(ours[1] - run(token_logprobs, support)[1]).max() > 0.01


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "tied", "supported"),
    [(29, 1, True, False), (128, 1, True, True), (192, 64, False, False), (97, 2**24, False, True)],
)
def test_rows_of_their_own_are_rows_of_the_table(monkeypatch, vocabulary, tokens, tied, supported):
    """Wherever in a piece they are, also in the overlap of two: values, and the gradient, which the table under them
    does not get."""
    cut_at(monkeypatch, tokens)
    own = tuple({0, 7, 8, 15, vocabulary // 2, vocabulary - 2, vocabulary - 1})
    adapters = models.Adapters(1, 1.0, tokens=own)
    model = dataclasses.replace(TINY, tie_embeddings=tied, vocab_size=vocabulary, adapters=adapters)
    params, hidden, targets = case(model)
    part, leaf = ("embed", "embedding") if tied else ("lm_head", "kernel")
    table, at = params[part][leaf], jnp.array(own) if tied else (slice(None), jnp.array(own))
    rows = table[at] + jax.random.normal(jax.random.key(1), table[at].shape)
    rng = np.random.default_rng(1)
    inside = (rng.random((*targets.shape, vocabulary)) < 0.3) | (np.arange(vocabulary) == targets[..., None])
    inside |= not supported
    support = jnp.packbits(jnp.asarray(inside), axis=-1) if supported else None
    weights = jnp.asarray(rng.normal(size=(2, *targets.shape)).astype(np.float32))

    def ours(table, rows, hidden):
        whole = {**params, part: {leaf: table}, "lora": {"rows": {leaf: rows}}}
        return token_logprobs(whole, model, hidden, targets, 0.6, support, entropy_gradient=True)

    def theirs(table, rows, hidden):
        return materialised({part: {leaf: table.at[at].set(rows)}}, model, hidden, targets, 0.6, inside)

    def run(function):
        def loss(*arguments):
            made = function(*arguments)
            return sum(jnp.sum(w * m) for w, m in zip(weights, made, strict=True)), made

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(table, rows, hidden)

    a, b = run(ours), run(theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4), a, b)
    assert np.all(np.any(np.asarray(a[1][1]) != 0, axis=1 if tied else 0)), "every row has a gradient"


def test_entropy_is_a_measurement_without_gradient():
    params, hidden, targets = case(TINY)
    gradient = jax.grad(lambda p: token_logprobs(p, TINY, hidden, targets, 1.0)[1].sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("tied", "on_support"), [(True, False), (False, False), (True, True)])
def test_logits_of_the_whole_batch_never_exist(tied, on_support):
    rows, columns, size = 8, 512, 50_304
    model = dataclasses.replace(TINY, vocab_size=size, tie_embeddings=tied)
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    hidden = jax.ShapeDtypeStruct((rows, columns, model.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    support = jax.ShapeDtypeStruct((rows, columns, size // 8), jnp.uint8) if on_support else None

    def gradient(function, *support):
        grad = jax.grad(lambda p, h, t, *s: function(p, model, h, t, 1.0, *s)[0].sum(), argnums=(0, 1))
        return largest_array(jax.make_jaxpr(grad)(params, hidden, targets, *support).jaxpr)

    assert gradient(token_logprobs, support) <= max(
        4 * rows * columns * logprobs.MIN_CHUNK, support.size if support else 0
    )
    assert gradient(materialised) >= 4 * rows * columns * size  # what the count would show


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_have_the_precision_of_the_models(dtype, precision):
    """Left to the default, a GPU rounds float32 operands to 10 bits, here and not in the sampler's logits."""
    model = dataclasses.replace(TINY, dtype=dtype)
    params, hidden, targets = case(model)

    def precisions(function):
        gradient = jax.grad(lambda p, h: function(p, h).sum(), argnums=(0, 1))
        return set(
            re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", jax.jit(gradient).lower(params, hidden).as_text())
        )

    trainer = precisions(lambda p, h: token_logprobs(p, model, h, targets, 1.0)[0])
    assert trainer == precisions(lambda p, h: models.lm_logits(p, model, h)) == {(precision, precision)}


def test_compiled_memory_is_that_of_a_chunk(monkeypatch):
    monkeypatch.setattr(runtime, "logits_alive", lambda backend: 2**18)
    model = dataclasses.replace(TINY, vocab_size=2**15)
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))["embed"]
    hidden = jax.ShapeDtypeStruct((4, 64, model.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    gradient = jax.jit(jax.grad(lambda p, h, t: token_logprobs({"embed": p}, model, h, t, 1.0)[0].sum()))
    memory = gradient.lower(params, hidden, targets).compile().memory_analysis()
    logits = 4 * 64 * 2**15 * 4
    assert memory is not None and memory.temp_size_in_bytes < logits / 4


def test_bfloat16_products_keep_float32_results():
    model = dataclasses.replace(TINY, dtype="bfloat16")
    params, hidden, targets = case(model)
    hidden = 0.3 * hidden
    run = jax.jit(lambda p, h: token_logprobs(p, model, h, targets, 1.0))
    picked, entropy = run(params, hidden)
    exact, _ = materialised(params, TINY, hidden, targets, 1.0)
    assert picked.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(picked, exact, atol=0.05)
    assert (picked != exact).any()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    gradient = jax.grad(lambda p: run(p, hidden)[0].sum())(half)["embed"]["embedding"]
    expected = jax.grad(lambda p: materialised(p, TINY, hidden, targets, 1.0)[0].sum())(params)["embed"]["embedding"]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=0.05)


def test_kl_of_a_policy_and_its_copy_is_exactly_zero():
    params, hidden, targets = case(TINY)
    copy = jax.tree.map(jnp.copy, params)

    @jax.jit
    def difference(params, copy, temperature):
        return (
            token_logprobs(params, TINY, hidden, targets, temperature)[0]
            - token_logprobs(copy, TINY, hidden, targets, temperature)[0]
        )

    assert not difference(params, copy, 0.7).any()


def test_kl_of_a_copy_is_exactly_zero_although_only_the_entropy_of_one_is_used():
    """As in annotation: the compiler may not round the reference, whose entropy nobody asks for, in its own way."""
    model = dataclasses.replace(TINY, vocab_size=512)
    params = models.init(model, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (4, 16, model.hidden_size))
    targets = jax.random.randint(jax.random.key(2), (4, 16), 0, 512)
    params = jax.tree.map(lambda x: 20 * x, params)

    @jax.jit
    def both(params, copy):
        logprobs, entropy = token_logprobs(params, model, hidden, targets, 0.7)
        return logprobs - token_logprobs(copy, model, hidden, targets, 0.7)[0], entropy

    assert not both(params, jax.tree.map(jnp.copy, params))[0].any()


def padded(rows, side, width):
    """Rows of tokens at one side of a width; what fills the rest is a real token's id, to be caught if it is read."""
    tokens, mask = np.full((len(rows), width), 5, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def rollout_of(prompts, responses, prompt_width, response_width):
    left, left_mask = padded(prompts, "left", prompt_width)
    right, right_mask = padded(responses, "right", response_width)
    none = jnp.zeros(len(prompts))
    return Rollout(
        tokens=jnp.concatenate([left, right], axis=1),
        mask=jnp.concatenate([left_mask, right_mask], axis=1),
        response_mask=right_mask,
        logprobs=jnp.zeros(right.shape),
        finished=none > 0,
        index=none,
        sample=none,
    )


def test_response_logprobs_depend_on_real_tokens_only():
    """With any padding on either side, the log-probability of each token given the real ones before it."""
    params, *_ = case(TINY)
    tokens = np.random.default_rng(3).integers(0, 29, (3, 7))
    cuts = (1, 6, 4)
    prompts = [row[:n] for row, n in zip(tokens, cuts, strict=True)]
    responses = [row[n:] for row, n in zip(tokens, cuts, strict=True)]

    @jax.jit
    def run(rollout):
        hidden = response_states(params, TINY, rollout)[:, :-1]
        return token_logprobs(params, TINY, hidden, rollout.tokens[:, -hidden.shape[1] :], 1.0)[0]

    hidden = jax.jit(lambda x: models.forward(params, TINY, x, jnp.ones(x.shape, bool)))(jnp.asarray(tokens))
    expected = materialised(params, TINY, hidden[:, :-1], jnp.asarray(tokens[:, 1:]), 1.0)[0]
    narrow, wide = run(rollout_of(prompts, responses, 6, 6)), run(rollout_of(prompts, responses, 9, 8))
    for i, n in enumerate(cuts):
        np.testing.assert_allclose(narrow[i, : 7 - n], expected[i, n - 1 :], atol=1e-5)
        np.testing.assert_allclose(wide[i, : 7 - n], expected[i, n - 1 :], atol=1e-5)


@pytest.mark.parametrize(("head", "labels"), [("linear", 1), ("linear", 2), ("mlp", 1)])
def test_scores_are_read_at_the_last_real_token(head, labels):
    model = dataclasses.replace(TINY, head=head, num_labels=labels)
    params = models.init(model, jax.random.key(1))
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 29, n) for n in (1, 7, 4)]
    everywhere = jax.jit(lambda x, m: models.scalar_head(params, model, models.forward(params, model, x, m)))
    expected = np.asarray(everywhere(*padded(rows, "right", 7)))[[0, 1, 2], [0, 6, 3]]
    assert np.std(expected) > 1e-3
    run = jax.jit(lambda x, m: last_token_scores(params, model, x, m))
    for side, width in (("left", 7), ("right", 9)):
        np.testing.assert_allclose(run(*padded(rows, side, width)), expected, atol=1e-5)


def test_a_row_without_tokens_has_a_finite_score():
    model = dataclasses.replace(TINY, head="linear")
    params = models.init(model, jax.random.key(1))
    tokens, mask = padded([[], [1, 2]], "right", 4)
    assert jnp.isfinite(jax.jit(lambda x, m: last_token_scores(params, model, x, m))(tokens, mask)).all()


@pytest.mark.parametrize(
    ("shape", "vocabulary", "tied", "supported"),
    [
        (Mesh(data=2, tensor=4), 512, True, False),
        (Mesh(data=2, tensor=4), 512, False, True),
        (Mesh(fsdp=4, tensor=2), 512, True, False),
        (Mesh(tensor=8), 512, False, False),
        (Mesh(fsdp=4, tensor=2), 509, False, True),
        (Mesh(fsdp=2, tensor=4), 509, True, False),
        (Mesh(tensor=8), 509, True, False),
    ],
)
def test_a_vocabulary_that_is_spread_over_tensor_is_never_gathered(monkeypatch, shape, vocabulary, tied, supported):
    """Neither weight nor logits, forward and backward, whether or not the vocabulary can be divided; over fsdp a device
    gathers its share of the weight. 509 is prime: such a weight is stored split along the hidden size."""
    monkeypatch.setattr(runtime, "logits_alive", lambda backend: 2**12)
    monkeypatch.setattr(logprobs, "MIN_CHUNK", 64)
    mesh = sharding.make_mesh(shape)
    model = dataclasses.replace(TINY, vocab_size=vocabulary, tie_embeddings=tied, hidden_size=48)
    params, hidden, targets = case(model, rows=8, columns=32)
    head = {"embed": params["embed"]} if tied else {"lm_head": params["lm_head"]}
    placed = jax.device_put(head, sharding.shardings(head, mesh))
    (stored,) = jax.tree.leaves(placed)
    assert stored.addressable_shards[0].data.size * shape.fsdp * shape.tensor == stored.size
    inside = np.random.default_rng(1).random((*targets.shape, vocabulary)) < 0.3
    inside |= np.arange(vocabulary) == targets[..., None]
    support = jnp.packbits(jnp.asarray(inside), axis=-1) if supported else None
    rows = sharding.put_rows((hidden, targets, support), mesh)

    def gradient(params, hidden, targets, support, *, model):
        def loss(params, hidden):
            picked, entropy = token_logprobs(params, model, hidden, targets, 1.0, support, entropy_gradient=True)
            return jnp.sum(picked) + jnp.sum(entropy)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

    run = jax.jit(gradient, static_argnames="model")
    compiled = run.lower(placed, *rows, model=dataclasses.replace(model, mesh=mesh)).compile()
    shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(size) for size in text.split(",")]) for text in shapes)
    positions = 8 * 32 // sharding.row_shards(mesh)
    share = 512 // shape.tensor
    assert largest == max(48 * share, 48 * positions), "the share of the weight, the hidden states"
    assert largest < min(48 * vocabulary, positions * share), "the whole weight, the share of all logits"
    together, alone = compiled(placed, *rows), run(head, hidden, targets, support, model=model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), together, alone)
