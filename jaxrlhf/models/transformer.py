"""The decoder: initialisation, the forward pass over whole sequences, and the forward pass with a key-value cache.

Parameters are a plain nested dict. The leaves of all layers are stacked on their first axis, so that the whole-sequence
pass is a scan: one layer is traced and compiled, and rematerialisation saves memory. Decoding needs neither and unrolls
the layers over `unstack`ed parameters, so that no weight is sliced out of a stack at every token; on a TPU, which
slices without cost and compiles slowly, it is a scan too (`ModelConfig.scans_layers`). All run `layers.Block`.

Where some layers have attention and others a delta net, each module is stacked over the layers that have it
(`ModelConfig.layers_with`), and the scan is over the least number of layers after which the kinds repeat.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.delta import Tokens, aligned
from jaxrlhf.models.experts import router_sums
from jaxrlhf.models.heads import init_head
from jaxrlhf.models.layers import Block, Norm
from jaxrlhf.models.placement import place
from jaxrlhf.models.rope import rotations, select_rotation
from jaxrlhf.types import KVCache, Params


@partial(jax.jit, static_argnames=("model", "dtype"))  # repeated eval_shape calls trace only once
def init(model: ModelConfig, key: Array, dtype: DTypeLike = "float32") -> Params:
    """Fresh parameters of `dtype`: kernels and embeddings N(0, 0.02^2), norms 1 (in rmsnorm_1p 0, which means 1),
    biases 0; heads by `init_head`.

    Runs under `jit` (with `out_shardings`) and `eval_shape`.
    """
    embed_key, position_key, layer_key, head_key = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, model.hidden_size))
    turn = rotations(model, jnp.zeros((1, 1), jnp.int32))[0][0]

    def layer(key, with_delta=False):
        mask = Tokens(jnp.ones((1, 1), bool), None) if with_delta else jnp.ones((1, 1, 1), bool)
        return Block(model, with_delta).init(key, x, turn, mask, jnp.float32(1))["params"]

    def layers(key):
        keys = jax.random.split(key, model.num_layers)
        stacked = jax.vmap(layer)(keys)
        if model.delta is not None:  # under jit the attention of layers without it is not computed
            for module in ("attention", "delta"):
                block = partial(layer, with_delta=module == "delta")
                stacked[module] = jax.vmap(block)(keys[jnp.array(model.layers_with(module))])[module]
        return stacked

    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, (model.vocab_size, model.hidden_size))},
        "layers": layers(layer_key),
        "norm": Norm(model.norm, model.norm_eps).init(key, x)["params"],
        **init_head(model, head_key),
    }
    if model.rope is None:
        table = 0.02 * jax.random.normal(position_key, (model.max_positions, model.hidden_size))
        params["positions"] = {"embedding": table}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def forward(
    params: Params,
    model: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, float32, at every position; finite but meaningless at padding.

    `mask` marks real tokens; the padding may be anywhere. `positions` default to the number of real tokens before. With
    `segments` (packed sequences) a token attends only to its own segment, and positions must be given. `keys`, one per
    row, turn on the dropout of `model.adapters`.
    """
    return _forward(params, model, tokens, mask, positions, segments, keys)[0]


def forward_with_router(
    params: Params,
    model: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    keys: Key[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "2 E"]]]:
    """`forward`, and what the load-balancing loss needs: {"router": the `router_sums` of all layers together}, or {}
    for a model without `router_aux_loss_coef`."""
    hidden, sums = _forward(params, model, tokens, mask, positions, segments, keys, routed=model.balances_experts)
    return hidden, {"router": jnp.sum(sums, axis=0)} if model.balances_experts else {}


def _forward(
    params: Params,
    model: ModelConfig,
    tokens: Array,
    mask: Array,
    positions: Array | None,
    segments: Array | None,
    keys: Array | None,
    routed: bool = False,
) -> tuple[Array, Any]:
    """Hidden states, and if `routed` the `router_sums` of every layer [L, 2, E]."""
    if positions is None:
        assert segments is None, "packed sequences need `positions`"
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    back = None
    if model.delta is not None:
        order, back = aligned(mask)
        tokens, mask, positions = (jnp.take_along_axis(each, order, axis=1) for each in (tokens, mask, positions))
        segments = None if segments is None else jnp.take_along_axis(segments, order, axis=1)
    full, windowed = _may_attend(model, positions, positions, mask, segments)
    turns, kinds = rotations(model, positions)

    by_row = full, windowed, turns, mask, segments, keys

    def layer(x, inputs, with_delta=False, rows=by_row):
        full, windowed, turns, mask, segments, keys = rows
        weights, adapters, number, scale, sliding, kind = inputs
        layer_keys = None if keys is None else jax.vmap(partial(jax.random.fold_in, data=number))(keys)
        variables = {"params": weights, "lora": adapters}
        may_attend, turn = jnp.where(sliding, windowed, full), select_rotation(turns, kind)
        mutable = ["intermediates"] if routed else False
        may_attend = Tokens(mask, segments) if with_delta else may_attend
        block = Block(model, with_delta)
        applied: Any = block.apply(variables, x, turn, may_attend, scale, keys=layer_keys, mutable=mutable)
        sums = None
        if routed:
            applied, sown = applied
            probabilities, chosen = sown["intermediates"]["experts"]["routing"][0]
            sums = router_sums(probabilities, chosen, mask)
        x, _ = applied
        return place(x, model, "rows", None, None), sums

    scales = jnp.array(_attention_scales(model), jnp.float32)
    adapters = adapters_of_all_layers(params, model)
    numbers, sliding = jnp.arange(model.num_layers), jnp.array(model.sliding_layers)
    inputs = params["layers"], adapters, numbers, scales, sliding, _traced(kinds, turns)
    x = place(_embed(params, model, tokens, positions), model, "rows", None, None)
    if model.micro_batch_rows is not None:
        assert model.delta is None, "layers of one kind"
        x, sums = jax.lax.scan(_rematerialised(_in_micro_batches(layer, by_row, model), model), x, inputs)
    elif model.delta is None:
        x, sums = jax.lax.scan(_rematerialised(layer, model), x, inputs)
    else:
        x, sums = _scan_periods(layer, model, x, inputs)
    x = _apply(Norm(model.norm, model.norm_eps), params["norm"], x)
    return x if back is None else jnp.take_along_axis(x, back[..., None], axis=1), sums


def _in_micro_batches(layer: Any, by_row: Any, model: ModelConfig) -> Any:
    """The layer as a loop over parts of `micro_batch_rows` rows; `by_row` are its arguments for all rows. Each part is
    rematerialised by itself, so that the activations of only one are in memory."""

    def whole(x: Array, inputs: Any) -> tuple[Array, Any]:
        def part(rows: Any) -> tuple[Array, Any]:
            return layer(rows[0], inputs, rows=rows[1])

        parts = jax.tree.map(lambda each: each.reshape(-1, model.micro_batch_rows, *each.shape[1:]), (x, by_row))
        y, sums = jax.lax.map(_rematerialised(part, model), parts)
        return y.reshape(x.shape), jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)

    return whole


def _scan_periods(layer: Any, model: ModelConfig, x: Array, inputs: tuple[Any, ...]) -> tuple[Array, Any]:
    """Scan over the layers, with those of one period after another in its body."""
    count = model.num_layers // model.period
    layers = [_rematerialised(partial(layer, with_delta=delta), model) for delta in model.delta_layers[: model.period]]

    def period(x, inputs):
        weights, adapters, *others = inputs
        results = []
        for i, run in enumerate(layers):
            parts = layer_of(weights, model, i), layer_of(adapters, model, i)
            x, result = run(x, (*parts, *jax.tree.map(lambda each, i=i: each[i], others)))
            results.append(result)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *results)

    inputs = jax.tree.map(lambda each: each.reshape(count, len(each) // count, *each.shape[1:]), inputs)
    x, results = jax.lax.scan(period, x, inputs)
    return x, jax.tree.map(lambda each: each.reshape(model.num_layers, *each.shape[2:]), results)


def layer_of(layers: Params, model: ModelConfig, number: int, first: int = 0) -> Params:
    """Parameters of layer `number`, from stacks of those from layer `first` on."""
    found = {}
    for name, module in layers.items():
        stacked = [i for i in model.layers_with(name) if i >= first]
        if number in stacked:
            at = stacked.index(number)
            found[name] = jax.tree.map(lambda leaf, at=at: leaf[at], module)
    return found


def adapters_of_all_layers(params: Params, model: ModelConfig) -> Params:
    """Stacked adapters, padded for layers without adapters: with zeros and a magnitude of NaN, which have no effect."""
    adapters = params.get("lora", {}).get("layers", {})
    if model.adapted_layers == (0, model.num_layers):
        return adapters

    def pad(path: tuple[Any, ...], x: Array) -> Array:
        first, last = model.adapted_in(path[0].key)
        padding = first, len(model.layers_with(path[0].key)) - last
        fill = jnp.nan if path[-1].key == "magnitude" else 0
        return jnp.pad(x, [padding, *[(0, 0)] * (x.ndim - 1)], constant_values=fill)

    return jax.tree_util.tree_map_with_path(pad, adapters)


def empty_cache(model: ModelConfig, batch: int, slots: int) -> KVCache:
    """Empty cache, with keys and values in `model.dtype`."""
    heads, width = model.num_kv_heads, model.head_dim

    def zeros(columns: int) -> tuple[Array, ...] | Array:
        if model.scans_layers:
            return jnp.zeros((model.num_layers, slots, heads, batch, width), model.dtype)
        shape = (slots, width) if columns == 2 else (width, slots)
        return tuple(jnp.zeros((batch, heads, *shape), model.dtype) for _ in model.layers_with("attention"))

    def state() -> tuple[Array, Array]:
        net = model.delta
        assert net is not None
        shape = batch, net.value_heads, net.key_size, net.value_size
        return jnp.zeros((batch, net.conv_width - 1, net.channels)), jnp.zeros(shape)

    return KVCache(
        k=zeros(model.key_columns),
        v=zeros(2),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        states=tuple(state() for _ in model.layers_with("delta")),
    )


def unstack(params: Params, model: ModelConfig) -> Params:
    """Parameters with "layers" a tuple of one tree per layer; stacked as they are for a model that scans layers. Call
    it inside jit but outside the decode loop."""
    if model.scans_layers:
        return params
    return {**params, "layers": tuple(layer_of(params["layers"], model, i) for i in range(model.num_layers))}


def forward_cached(
    unstacked: Params,
    model: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    slot: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """`forward` for T more tokens, written to slots `slot` .. `slot` + T - 1, which attend to every earlier valid slot.

    Padding changes no state of a delta net. In a model with delta nets the real tokens are written first.
    Adapters must be merged. `slot` + T must not exceed the cache, which is not checked: the write would be moved back.
    A model whose rotation depends on the length needs a fixed one (`for_length`).
    """
    assert "lora" not in unstacked
    assert model.rope is None or not model.rope.depends_on_length or model.rope.length, "a length for the rotation"
    back = None
    if model.delta is not None and tokens.shape[1] > 1:
        order, back = aligned(mask)
        tokens, mask, positions = (jnp.take_along_axis(each, order, axis=1) for each in (tokens, mask, positions))
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    key_positions, valid = write(cache.positions, positions), write(cache.valid, mask)
    full, windowed = _may_attend(model, positions, key_positions, valid, None)
    turns, kinds = rotations(model, positions)
    x = _embed(unstacked, model, tokens, positions)
    scales = _attention_scales(model)
    states = list(cache.states)
    if model.scans_layers:

        def layer(carry, inputs):
            x, pair = carry  # the stacks are carried: as inputs and outputs of the scan they would be copied
            weights, number, scale, sliding, kind = inputs
            may_attend, turn = jnp.where(sliding, windowed, full), select_rotation(turns, kind)
            return _apply(Block(model), weights, x, turn, may_attend, scale, pair, slot, None, number), None

        numbers, sliding = jnp.arange(model.num_layers), jnp.array(model.sliding_layers)
        inputs = unstacked["layers"], numbers, jnp.array(scales, jnp.float32), sliding, _traced(kinds, turns)
        (x, (keys, values)), _ = jax.lax.scan(layer, (x, (cache.k, cache.v)), inputs)
    else:
        pairs = [*zip(cache.k, cache.v, strict=True)]
        for i, weights in enumerate(unstacked["layers"]):
            with_delta, turn = model.delta_layers[i], turns[kinds[i]]
            may_attend = windowed if model.sliding_layers[i] else full
            may_attend, caches = (Tokens(mask, None), states) if with_delta else (may_attend, pairs)
            j = model.layers_with("delta" if with_delta else "attention").index(i)
            x, caches[j] = _apply(
                Block(model, with_delta), weights, x, turn, may_attend, jnp.float32(scales[i]), caches[j], slot
            )
        keys, values = zip(*pairs, strict=True)
    x = _apply(Norm(model.norm, model.norm_eps), unstacked["norm"], x)
    x = x if back is None else jnp.take_along_axis(x, back[..., None], axis=1)
    return x, KVCache(k=keys, v=values, positions=key_positions, valid=valid, states=tuple(states))


def _traced(kinds: tuple[int, ...], turns: tuple[Any, ...]) -> Array | None:
    """The numbers of the layers' rotations, for a scan over them; None if all have the same."""
    return None if len(turns) == 1 else jnp.array(kinds)


def _apply(module: nn.Module, weights: Params, *args: Any) -> Any:
    return module.apply({"params": weights}, *args)


def _embed(params: Params, model: ModelConfig, tokens: Array, positions: Array) -> Array:
    # Rounded like the operands of products, so that a copy stored in `model.dtype` gives exactly the same result.
    table, rows = params["embed"]["embedding"], params.get("lora", {}).get("rows", {}).get("embedding")
    x = table[tokens].astype(model.dtype).astype(jnp.float32)
    if rows is not None:
        assert model.adapters is not None
        count = len(model.adapters.tokens)
        row = jnp.full(len(table), count).at[jnp.array(model.adapters.tokens)].set(jnp.arange(count))[tokens]
        trained = rows.at[row].get(mode="fill", fill_value=0).astype(model.dtype).astype(jnp.float32)
        x = jnp.where((row < count)[..., None], trained, x)
    if model.kernels == "int8":
        x = x * params["embed"]["scale"][tokens][..., None]
    if model.embedding_multiplier != 1:  # rounded as in transformers, where it is a tensor of the model's dtype
        x = x * jnp.array(model.embedding_multiplier, model.dtype).astype(jnp.float32)
    if model.rope is None:
        x = x + params["positions"]["embedding"][positions].astype(model.dtype)
    return x


def _attention_scales(model: ModelConfig) -> list[float]:
    """Factor on q k of every layer."""
    scale = model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale
    return [scale / (i + 1) if model.attention_scale_by_layer else scale for i in range(model.num_layers)]


def _may_attend(
    model: ModelConfig, queries: Array, keys: Array, valid: Array, segments: Array | None
) -> tuple[Array, Array]:
    """Attention masks [B, T, S] of full and of sliding-window layers; `queries` and `keys` are positions."""
    distance = queries[:, :, None] - keys[:, None, :]
    full = (distance >= 0) & valid[:, None, :]
    if segments is not None:
        full &= segments[:, :, None] == segments[:, None, :]
    return full, full if model.sliding_window is None else full & (distance < model.sliding_window)


def _rematerialised(layer, model: ModelConfig):
    if model.remat == "none":
        return layer
    # "dots" keeps the results of matrix products with weights and recomputes the rest, attention included
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if model.remat == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # common subexpressions are not merged inside a scan
