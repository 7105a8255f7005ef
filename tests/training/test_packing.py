"""Packed or not, the same examples give the same loss, gradients and metrics; and texts in a row do not meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import config, models
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, Report, SFTRow, Split
from jaxrlhf.data.packing import pack
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.training import sft
from jaxrlhf.training.reward.loss import objective_of, response_loss, response_scores
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

MODELS = {
    "llama": tiny(),
    "gpt2": tiny(rope=None, norm="layernorm", gated_mlp=False, activation="gelu_tanh", mlp_bias=True),
    "sliding window": tiny(sliding_window=3, sliding_layers=(False, True)),
}
LENGTHS = [3, 14, 5, 8, 2, 11, 7, 4, 6, 9, 12, 5]
WIDTH = 24


def text(size, seed):
    generator = np.random.default_rng([size, seed])
    learnt = [False, *(generator.random(size - 2) < 0.7), True] if size > 1 else [False]
    return SFTRow(generator.integers(0, 29, size).tolist(), [bool(flag) for flag in learnt])


def split(rows):
    return Split(rows, [], Report("rows", "text", len(rows)))


TEXTS = [text(size, i) for i, size in enumerate(LENGTHS)]
PAIRS = [PairRow(text(size, 100 + i), text(size % 7 + 2, 200 + i)) for i, size in enumerate(LENGTHS)]
PACKED = pack(split(TEXTS), lambda row: (row,), WIDTH).train
PACKED_PAIRS = pack(split(PAIRS), lambda pair: (pair.chosen, pair.rejected), WIDTH).train


def weights_of(model):
    """Kernels large enough for log-probs that are far from flat."""
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 10 * x), models.init(model, jax.random.key(0)))


def agree(found, wanted):
    """To some roundings, of gradients those of the largest: one that is 0 in exact arithmetic has no size."""
    (values, grads), (wanted_values, wanted_grads) = found, wanted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), values, wanted_values)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * largest), grads, wanted_grads)


@pytest.mark.parametrize("name", MODELS)
def test_packed_texts_have_the_loss_and_gradients_of_texts_apart(name):
    model, count = MODELS[name], sum(sum(row.loss_mask) for row in TEXTS)
    run = jax.jit(
        jax.value_and_grad(lambda p, b: sft.loss(p, b, None, model=model, count=count, name="nll"), has_aux=True)
    )
    params = weights_of(model)
    (loss, _), grads = found = run(params, jax.tree.map(jnp.asarray, batching.packed(PACKED, 0, WIDTH)))
    wanted = run(params, jax.tree.map(jnp.asarray, batching.batch(TEXTS, 0, max(LENGTHS))))
    agree(found, wanted)
    assert len(PACKED) < len(TEXTS) / 2 and loss > 3 and all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_have_the_loss_and_gradients_of_pairs_apart(name):
    model = dataclasses.replace(MODELS[name], head="linear")

    def loss(params, pairs):
        found = response_scores(params, pairs, model, None)
        return response_loss(found, pairs.real, pairs.target, len(PAIRS), objective_of(config.RewardConfig()))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params, most = weights_of(model), max(len(row.lengths) // 2 for row in PACKED_PAIRS)
    packed = batching.packed_pairs(PACKED_PAIRS, 0, WIDTH, most)
    assert not packed.valid.all(), "not every row has the same number of pairs"
    found = run(params, jax.tree.map(jnp.asarray, packed))
    wanted = run(params, jax.tree.map(jnp.asarray, batching.responses(PAIRS, [0.0] * len(PAIRS), 0, max(LENGTHS), 2)))
    agree(found, wanted)
    assert found[0][1]["margin"].std() == 0 and np.abs(found[0][1]["margin"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_text_does_not_change_another_one_by_a_bit(name):
    model = MODELS[name]
    params, batch = weights_of(model), batching.packed(PACKED, 0, WIDTH)
    where = [jnp.asarray(x) for x in (batch.mask, batch.positions, batch.segments)]

    @jax.jit
    def run(tokens):
        hidden = models.forward(params, model, tokens, *where)
        return token_logprobs(params, model, hidden[:, :-1], tokens[:, 1:], 1.0)[0]

    row = int(np.argmax([len(row.lengths) for row in PACKED]))
    before = np.asarray(run(batch.tokens))
    for number in range(len(PACKED[row].lengths)):
        here = np.zeros(batch.mask.shape, bool)
        here[row] = batch.mask[row] & (batch.segments[row] == number)
        after = np.asarray(run(np.where(here, (batch.tokens + 3) % 29, batch.tokens)))
        real = (batch.positions > 0)[:, 1:]  # a first token is not predicted, and padding means nothing
        np.testing.assert_array_equal(after[real & ~here[:, 1:]], before[real & ~here[:, 1:]])
        assert (after != before)[real & here[:, 1:]].all()


def test_pairs_in_a_row_have_dropout_of_their_own():
    model = tiny(head="mlp")
    row = pack(split([PAIRS[2]] * 2), lambda pair: (pair.chosen, pair.rejected), 2 * WIDTH).train
    pairs = jax.tree.map(jnp.asarray, batching.packed_pairs(row, 0, 2 * WIDTH, 2))
    params = models.init(model, jax.random.key(0))
    score = jax.jit(lambda keys: jnp.moveaxis(response_scores(params, pairs, model, keys), -1, 0))
    calm, dropped = score(None), score(jax.random.split(jax.random.key(1), 1))
    np.testing.assert_allclose(calm[:, 0, 0], calm[:, 0, 1], rtol=1e-4)
    assert np.abs(dropped[:, 0, 0] - dropped[:, 0, 1]).min() > 1e-3 and np.abs(dropped - calm).min() > 1e-3


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_packed_epoch_is_the_unpacked_one(kind, supervised, tmp_path):
    """An epoch in one step each: what is logged of it, and of the rows held out afterwards."""
    logged, cls = [], {"sft": (config.SFTConfig, SFTTrainer), "reward": (config.RewardConfig, RewardTrainer)}[kind]
    supervised |= {"optim": config.Optim(learning_rate=1e-3, eps=1e-3)}
    for packing, rows, micro in ((False, 18, 9), (True, 5, 1)):
        train = config.Train(batch_size=rows, micro_batch_size=micro, eval_batch_size=4, packing=packing)
        trainer = cls[1](cls[0](run_dir=str(tmp_path / str(packing)), **supervised | {"train": train}))
        assert (f"packed: 18 examples in {rows} rows of" in trainer.describe()) == packing
        logged.append(trainer.train())
    unpacked, packed = ({k: v for k, v in record.items() if not k.startswith("perf/")} for record in logged)
    assert packed == pytest.approx(unpacked, rel=2e-5, abs=1e-6)
    assert packed["epoch"] == 1
