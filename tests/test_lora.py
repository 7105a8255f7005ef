"""Adapters begin as nothing, merged they are what they were beside the model, and each option does what it says."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support.tiny import tiny

import jaxrlhf
from jaxrlhf import lora
from jaxrlhf.errors import DataError
from jaxrlhf.models import Adapters, DeltaNet, empty_cache, forward, forward_cached, init, lm_logits, unstack
from jaxrlhf.models.layers import dropout
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.weights import peft
from jaxrlhf.weights.peft import keys

FAMILIES = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": True, "tie_embeddings": False},
    "gpt2": {
        "family": "gpt2", "norm": "layernorm", "activation": "gelu_tanh", "gated_mlp": False, "rope": None,
        "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": 4, "mlp_size": 64,
    },
}  # fmt: skip


def adapted(family="llama", *, magnitudes=False, targets=("all-linear",), move=True, num_layers=2, **adapters):
    """(model, base, adapters) with adapters that do something, unless they are not to `move`."""
    layers = {"num_layers": num_layers, "sliding_layers": (False,) * num_layers}
    options = FAMILIES[family] if isinstance(family, str) else family
    model = tiny(**options, **layers, adapters=Adapters(**{"rank": 3, "alpha": 6.0} | adapters))
    base = init(model, jax.random.key(0))
    added = lora.init(model, base, peft.modules(model, targets), jax.random.key(1), magnitudes=magnitudes)
    if move:
        leaves, structure = jax.tree.flatten(added)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        added = jax.tree.unflatten(
            structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )
    return model, base, added


def hidden(params, model, keys=None):
    tokens = jax.random.randint(jax.random.key(3), (2, 7), 0, model.vocab_size)
    return forward(params, model, tokens, jnp.ones((2, 7), bool).at[1, 5:].set(False), keys=keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("magnitudes", [False, True])
def test_new_adapters_change_nothing(family, magnitudes):
    model, base, added = adapted(family, magnitudes=magnitudes, move=False)
    np.testing.assert_allclose(hidden({**base, **added}, model), hidden(base, model), rtol=1e-5, atol=1e-5)


MIXTURE = {"family": "qwen3_moe", "qk_norm": True, "num_experts": 4, "experts_per_token": 2, "mlp_size": 12}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("all-linear",), None),
        (("gate_up_proj", "mlp.experts.down_proj"), (1, 2)),
        (("up_proj", "o_proj"), None),
        (("experts.down_proj",), None),
    ],
)
def test_adapters_of_experts_beside_merged_and_in_files(targets, layers, tmp_path):
    model, base, added = adapted(MIXTURE, targets=targets, layers=layers, rank_stabilised=True)
    assert not any(path[:2] == ("experts", "router") for path in lora.modules_of(added["lora"]["layers"]))
    params = {**base, **added}
    beside = hidden(params, model)
    assert np.abs(beside - hidden(base, model)).max() > 1e-2
    np.testing.assert_allclose(hidden(lora.merge(params, model), model), beside, rtol=1e-4, atol=1e-5)
    peft.write(tmp_path, model, params, "some/base")
    found, back = peft.read(tmp_path, model)
    again = dataclasses.replace(model, adapters=found)
    np.testing.assert_allclose(hidden({**base, **back}, again), beside, rtol=1e-4, atol=1e-5)


OPTIONS = [(family, family != "qwen3", layers) for family in FAMILIES for layers in (None, (1, 2))]


@pytest.mark.parametrize(
    ("family", "magnitudes", "layers"), [*OPTIONS, ("llama", False, None), ("gpt2", False, (1, 2))]
)
def test_merged_is_what_they_were_beside_the_model(family, magnitudes, layers):
    model, base, added = adapted(family, magnitudes=magnitudes, layers=layers)
    whole = {**base, **added}
    merged = lora.merge(whole, model)
    assert "lora" not in merged
    np.testing.assert_allclose(hidden(merged, model), hidden(whole, model), rtol=2e-4, atol=2e-5)
    assert not np.allclose(hidden(base, model), hidden(whole, model), atol=1e-2)
    for name in ("attention", "mlp"):
        for matrix in ("q", "o") if name == "attention" else ("up", "down"):
            before, after = (np.asarray(p["layers"][name][matrix]["kernel"]) for p in (base, merged))
            assert np.any(before[1] != after[1]) and np.all(before[0] == after[0]) == (layers is not None)


@pytest.mark.parametrize("layers", [None, (1, 3), (2, 3)])
def test_layers_of_two_kinds_have_stacks_of_their_own(layers, tmp_path):
    net = DeltaNet(layers=(True, False) * 2, key_heads=2, value_heads=4, key_size=6, value_size=4, conv_width=3)
    model = tiny(
        **{"family": "qwen3_5_text", "num_layers": 4, "sliding_layers": (False,) * 4, "delta": net},
        **{"attention_gate": True, "qk_norm": True, "norm": "rmsnorm_1p", "norm_eps": 1e-2},
        adapters=Adapters(3, 6.0, layers=layers),
    )
    base = init(model, jax.random.key(0))
    added = lora.init(model, base, peft.modules(model, ["all-linear"]), jax.random.key(1), magnitudes=True)
    added = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), added)
    counts = {name: len(jax.tree.leaves(module)[0]) for name, module in added["lora"]["layers"].items()}
    first, last = layers or (0, 4)
    expected = {"mlp": last - first, "delta": len(range(first, last)[first % 2 :: 2])}
    expected["attention"] = expected["mlp"] - expected["delta"]
    assert counts == {name: count for name, count in expected.items() if count}
    whole = {**base, **added}
    apart = hidden(whole, model)
    assert np.abs(apart - hidden(base, model)).max() > 1e-2
    np.testing.assert_allclose(hidden(lora.merge(whole, model), model), apart, rtol=2e-4, atol=2e-5)
    inference, copy = inference_copy(model, whole, "float32")
    unstacked = jax.tree.map(np.asarray, unstack(lora.merge(whole, model), model)["layers"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), copy["layers"], unstacked)
    peft.write(tmp_path, model, whole, "base")
    static, read = peft.read(tmp_path, model)
    assert static.layers == layers
    jax.tree.map(np.testing.assert_array_equal, read["lora"], added["lora"])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_new_tokens_stand_in_place_of_the_tables(family):
    tokens = jax.random.randint(jax.random.key(3), (2, 7), 0, 29).at[:, 2:4].set(jnp.array([28, 5]))
    mask = jnp.ones((2, 7), bool)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params, model):
        return lm_logits(params, model, forward(params, model, tokens, mask))

    model, base, added = adapted(family, tokens=(28, 5), move=False)
    np.testing.assert_array_equal(logits({**base, **added}, model), logits(base, model))
    model, base, added = adapted(family, tokens=(28, 5))
    apart, merged = logits({**base, **added}, model), lora.merge({**base, **added}, model)
    np.testing.assert_allclose(logits(merged, model), apart, rtol=2e-4, atol=2e-5)
    table = np.asarray(base["embed"]["embedding"]).copy()
    table[[28, 5]] = added["lora"]["rows"]["embedding"]
    np.testing.assert_array_equal(merged["embed"]["embedding"], table)
    assert ("kernel" in added["lora"]["rows"]) == (not model.tie_embeddings)
    trunk = lora.merge({k: v for k, v in ({**base, **added}).items() if k != "lm_head"}, model)  # as a critic shares it
    np.testing.assert_array_equal(trunk["embed"]["embedding"], table)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    inference, copy = inference_copy(model, {**base, **added}, "float32")
    decoded, _ = forward_cached(copy, inference, tokens, mask, positions, empty_cache(inference, 2, 7), 0)
    np.testing.assert_allclose(lm_logits(copy, inference, decoded), apart, rtol=2e-4, atol=2e-5)
    assert np.abs(logits({**base, "lora": {"layers": added["lora"]["layers"]}}, model) - apart).max() > 1e-2, (
        "the rows do something"
    )


def test_the_product_is_that_of_the_paper():
    """W' = W + (alpha / r) A B in float64, and DoRA's m W' / |W'| by columns."""
    for magnitudes in (False, True):
        model, base, added = adapted(magnitudes=magnitudes)
        merged = lora.merge({**base, **added}, model)
        one = {k: np.asarray(v[0], np.float64) for k, v in added["lora"]["layers"]["mlp"]["up"].items()}
        full = np.asarray(base["layers"]["mlp"]["up"]["kernel"][0], np.float64) + 2.0 * one["a"] @ one["b"]
        if magnitudes:
            full *= one["magnitude"] / np.linalg.norm(full, axis=0)
        np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"][0], full, rtol=1e-5, atol=1e-6)


def test_the_rank_stabilised_scale_divides_by_the_root():
    assert Adapters(16, 32.0).scale == 2.0
    assert Adapters(16, 32.0, rank_stabilised=True).scale == 8.0


def test_gradients_go_to_the_adapters_of_the_layers_that_have_them():
    model, base, added = adapted(magnitudes=True, layers=(1, 2), targets=("q_proj", "mlp.down_proj"))
    grads = jax.grad(lambda a: jnp.sum(jnp.square(hidden({**base, **a}, model))))(added)
    assert sorted(lora.modules_of(grads["lora"]["layers"])) == [("attention", "q"), ("mlp", "down")]
    for leaf in jax.tree.leaves(grads):
        assert leaf.shape[0] == 1 and np.any(np.asarray(leaf) != 0)


def test_dropout_depends_on_the_row_and_on_nothing_beside_it():
    model, base, added = adapted(dropout=0.5)
    params, keys = {**base, **added}, jax.random.split(jax.random.key(4), 2)
    both = hidden(params, model, keys)
    assert not np.allclose(both, hidden(params, model))
    tokens = jax.random.randint(jax.random.key(3), (2, 7), 0, model.vocab_size)
    alone = forward(params, model, tokens[:1], jnp.ones((1, 7), bool), keys=keys[:1])
    np.testing.assert_allclose(alone[0], both[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden(base, model, keys), hidden(base, model), err_msg="the base has no dropout")


def test_dropout_keeps_the_mean_and_differs_from_place_to_place():
    x, keys = jnp.ones((2, 100, 100)), jax.random.split(jax.random.key(0), 2)
    here, there = dropout(x, keys, 0.25, "q"), dropout(x, keys, 0.25, "k")
    assert abs(float(jnp.mean(here)) - 1) < 0.02 and set(np.unique(here)) == {0, np.float32(1 / 0.75)}
    assert np.mean(np.asarray(here[0]) == np.asarray(here[1])) < 0.7 > np.mean(np.asarray(here) == np.asarray(there))


def test_a_merged_bfloat16_model_is_rounded_once():
    model, base, added = adapted()
    merged = lora.merge({**base, **added}, model)
    half = lora.merge({**jax.tree.map(lambda x: x.astype(jnp.bfloat16), base), **added}, model)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(half), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, b.astype(jnp.float32), rtol=1.6e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("family", "bits", "double", "magnitudes"),
    [
        ("llama", "int8", False, False), ("llama", "nf4", False, True),
        ("qwen3", "nf4", True, True), ("gpt2", "nf4", False, False),
    ],
)  # fmt: skip
def test_a_packed_base_is_the_model_that_is_left_of_it(family, bits, double, magnitudes):
    model, base, added = adapted(family, magnitudes=magnitudes)
    packed = lora.pack(base, bits, double)
    left = lora.unpack(packed)
    assert jax.tree.structure(left) == jax.tree.structure(base)
    np.testing.assert_allclose(hidden(packed, model), hidden(left, model), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        hidden({**packed, **added}, model), hidden({**left, **added}, model), rtol=1e-3, atol=1e-4
    )
    merged = lora.merge({**packed, **added}, model)
    np.testing.assert_allclose(hidden(merged, model), hidden({**packed, **added}, model), rtol=1e-3, atol=1e-4)
    grads = [jax.grad(lambda a, b=b: jnp.sum(jnp.square(hidden({**b, **a}, model))))(added) for b in (packed, left)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3), *grads)


@pytest.mark.parametrize(("family", "magnitudes", "layers"), OPTIONS)
def test_adapters_come_back_from_their_files(family, magnitudes, layers, tmp_path):
    model, base, added = adapted(family, magnitudes=magnitudes, layers=layers, rank_stabilised=True, tokens=(28, 5))
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    assert peft.is_adapter(tmp_path) and peft.base_of(tmp_path) == ("some/base", None)
    found, back = peft.read(tmp_path, model)
    other = tiny(**FAMILIES[family] | {"num_layers": 1, "sliding_layers": (False,), "mlp_size": 32})
    with pytest.raises(DataError, match=r"do not fit the model .*\n.*(unexpected|wrong shape): "):
        peft.read(tmp_path, other)
    again = dataclasses.replace(model, adapters=found)
    assert found.tokens == (28, 5)
    jax.tree.map(np.testing.assert_array_equal, back["lora"]["rows"], added["lora"]["rows"])
    np.testing.assert_allclose(hidden({**base, **back}, again), hidden({**base, **added}, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'; expected one of CAUSAL_LM, SEQ_CLS"),
        ({"bias": "all"}, "trained biases are not supported; merge the adapters in PEFT"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save .* embed_tokens cannot be read"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', .*path_initial_model_for_weight_conversion="),
        ({"init_lora_weights": "OLoRA"}, "'OLoRA', .*path_initial_model_for_weight_conversion="),
        ({"init_lora_weights": "corda"}, "'corda', .*path_initial_model_for_weight_conversion="),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga', .*path_initial_model_for_weight_conversion="),
        ({"init_lora_weights": "loftq"}, "'loftq', .*belong to a quantised base model"),
        ({"init_lora_weights": "other"}, "'other'; expected true, false or one of gaussian"),
        *(({key: [[0, 1]]}, rf"{key} is \[\[0, 1\]\], which is not supported; ") for key in keys.REFUSED),
        ({"use_something_new": True}, "use_something_new is True, a key that jaxrlhf does not know"),
    ],
    ids=str,
)
def test_an_adapter_config_that_means_something_else_is_refused_before_its_base_model_is_read(changes, said, tmp_path):
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "/no/such/folder")
    edit_config(tmp_path, changes)
    with pytest.raises(DataError, match=said):
        jaxrlhf.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r is 0; expected a whole number of at least 1"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters is .*for mixtures of experts only; merge"),
        ({"rank_pattern": {"(a+)+$": 3}}, "regular expressions without a repeated group"),
        ({"rank_pattern": {"q_(proj": 3}}, "rank_pattern .* regular expressions of module names"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern .* numbers above 0 by names of modules"),
        (
            {"rank_pattern": {"down_proj": 2}},
            r"wrong shape: layer 0, mlp.down_proj, lora_A is \[3, 16\], not \[2, 16\]",
        ),
        ({"use_dora": True}, r"missing: layer 0, self_attn.q_proj, lora_magnitude_vector \[16\]"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; expected a number"),
        ({"trainable_token_indices": [3, 29]}, "ids under 29, none twice, and the same for every table"),
        ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}, "the same for every table"),
        (
            {"trainable_token_indices": [3]},
            r"missing: model.embed_tokens.token_adapter.trainable_tokens_delta \[1, 16\]",
        ),
    ],
    ids=str,
)
def test_an_adapter_config_that_does_not_fit_its_tensors_or_the_model_is_refused(changes, said, tmp_path):
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    edit_config(tmp_path, changes)
    with pytest.raises(DataError, match=said):
        peft.read(tmp_path, model)


def test_keys_without_effect_change_nothing(tmp_path):
    """The values are those of other methods and of training, as PEFT 0.21 writes them beside plain LoRA."""
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    _, plain = peft.read(tmp_path, model)
    values = {key: {"a": 1} for key in keys.WITHOUT_EFFECT} | dict.fromkeys(keys.REFUSED) | {"new_switch": False}
    edit_config(tmp_path, values | {"init_lora_weights": "gaussian", "task_type": None, "modules_to_save": ["score"]})
    jax.tree.map(np.testing.assert_array_equal, peft.read(tmp_path, model)[1], plain)


def edit_config(folder, changes):
    file = folder / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("magnitudes", [False, True])
def test_a_layer_without_adapters_between_layers_with_adapters_is_the_base_models(magnitudes, tmp_path):
    """And a magnitude that training moved to 0 silences its output."""
    model, base, added = adapted(magnitudes=magnitudes, num_layers=3)
    if magnitudes:
        added["lora"]["layers"]["mlp"]["up"]["magnitude"] = (
            added["lora"]["layers"]["mlp"]["up"]["magnitude"].at[:, 4].set(0)
        )
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    safetensors.numpy.save_file(kept, tmp_path / peft.WEIGHTS)
    static, back = peft.read(tmp_path, model)
    again, whole = dataclasses.replace(model, adapters=static), {**base, **back}
    merged, full = lora.merge(whole, again), lora.merge({**base, **added}, model)

    def check(merged, full, before):
        np.testing.assert_array_equal(merged[1], before[1])
        np.testing.assert_allclose(merged[::2], full[::2], rtol=1e-5, atol=1e-6)

    jax.tree.map(check, merged["layers"], full["layers"], base["layers"])
    assert not magnitudes or not np.any(merged["layers"]["mlp"]["up"]["kernel"][0, :, 4])
    np.testing.assert_allclose(hidden(whole, again), hidden(merged, again), rtol=2e-4, atol=2e-5)
    inference, copy = inference_copy(again, whole, "float32")
    np.testing.assert_allclose(copy["layers"][1]["mlp"]["up"]["kernel"], base["layers"]["mlp"]["up"]["kernel"][1])


def test_adapters_in_a_pickle_are_not_opened(tmp_path):
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    (tmp_path / peft.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match=r"only adapter_model\.bin, which jaxrlhf never opens"):
        peft.read(tmp_path, model)


def test_a_config_json_beside_adapters_does_not_hide_them(tmp_path):
    """Some trainers write the base model's config.json beside the adapters."""
    model, base, added = adapted("llama")
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    (tmp_path / "config.json").write_text("{}")
    assert peft.is_adapter(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match="holds adapters .* and the weights of a whole model"):
        peft.is_adapter(tmp_path)
    (tmp_path / peft.WEIGHTS).unlink()
    assert not peft.is_adapter(tmp_path), "a config of adapters that are not there"


def test_a_score_head_of_more_than_two_outputs_is_refused(tmp_path):
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "some/base")
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    tensors["base_model.model.score.weight"] = np.zeros((3, 16), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / peft.WEIGHTS)
    with pytest.raises(DataError, match="the score head has 3 outputs; a reward model has one"):
        peft.num_labels(tmp_path)


def test_adapters_without_their_model_say_which_it_is(tmp_path):
    model, base, added = adapted()
    peft.write(tmp_path, model, {**base, **added}, "/no/such/folder")
    with pytest.raises(DataError, match="adapters for '/no/such/folder'"):
        jaxrlhf.load(tmp_path)
