"""What XLA's compilers make of our programs for eight H100 GPUs and eight TPU v5e chips, none of which is here.

Every program of a run is lowered for its longest rows on an abstract mesh and looked up in record.json, which holds
what the compiler made of it; a program that is not there is compiled.
"""

import dataclasses
import json
import math
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_shapes import SHAPES, write_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from support import compiled, layers
from support.compiled import Facts, Recorded, dims_of, size_of
from support.runs import length_reward
from support.tiny import tiny

from jaxrlhf import config, models, sharding, weights
from jaxrlhf.logprobs import SHARES, token_logprobs
from jaxrlhf.plan import hlo, programs, roofline
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.decode import Decoding, empty_slots
from jaxrlhf.rollout.inference_copy import convert, inference_model

pytestmark = pytest.mark.compiled

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
TARGETS = ("h100:8", "v5e:2x4")
MESHES = {
    "data": config.Mesh(data=8),
    "fsdp": config.Mesh(data=1, fsdp=8),
    "tensor": config.Mesh(data=1, fsdp=4, tensor=2),
}
KINDS = {
    "data": {"all-reduce"},
    "fsdp": {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"},
    "tensor": {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"},
}
"""Collectives that a mesh needs: sums of gradients; weights gathered, gradients scattered, and embeddings sent from
where a part of the table is to where the row is; activations exchanged between the halves of a layer."""
UNNOTICED = 16 * 1024
"""Bytes of collectives of any kind: masks, counts, tokens."""


class Sizes(NamedTuple):
    rows: int
    prompt: int
    response: int


# sizes that occur once, so that a shape says what it is
TINY = SHAPES["T"] | {
    "vocab_size": 1536, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 320,
}  # fmt: skip
FEW = Sizes(rows=64, prompt=24, response=32)
ADAPTERS = {"enabled": True, "rank": 8}
RUNS = {
    "sft": ("tensor", config.SFTConfig, {}),
    "sft-int8-base": ("tensor", config.SFTConfig, {"lora": ADAPTERS | {"quantize": "int8"}}),
    "reward": ("fsdp", config.RewardConfig, {}),
    "dpo": ("data", config.DPOConfig, {}),
    "distill": ("fsdp", config.DistillConfig, {}),
    "ppo": ("tensor", config.PPOConfig, {}),
    "grpo-nf4-base-int8-slots": (
        "fsdp",
        config.GRPOConfig,
        {"lora": ADAPTERS | {"quantize": "nf4"}, "rollout": {"dtype": "int8", "slots": 32}},
    ),
}
FAMILIES = (
    "gpt2", "llama-biases", "mistral-window", "qwen2", "qwen3-window-biases", "gemma2", "gemma3", "gpt_neox", "granite",
    "ministral3-window", "olmo2", "olmo3", "olmoe", "phi3", "qwen3_5", "qwen3_moe", "smollm3-window",
)  # fmt: skip
ROUTER = "/experts/btd,de->bte", "/experts/bte,"
DELTA = "/delta/while/", "/delta/...", "/delta/dot_general", "/delta/triangular_solve"
IN_FLOAT32 = (*ROUTER, *DELTA)
"""Products that are computed so on purpose: those of a router, and of the rule of a delta net."""
ON_CHIP = ("olmo2", "olmo3", "olmoe")
"""Families whose keys or values, which are small, a TPU brings to its on-chip memory before it decodes, and back."""
SCRATCH = {"h100:8": 0.5, "v5e:2x4": 3.5}
"""Of decoding, at most, in multiples of a device's keys and values. Those of GPUs are an argument; prefill may keep the
float32 products of q, k and v of all layers besides, until they are written. On a TPU they are inside: it pads the 64
numbers of a head to 128, and has a matrix of all layers in two layouts at the start."""
WORKSPACE = {"h100:8": 32 * 2**20, "v5e:2x4": 0}
"""Bytes that XLA gives to cuBLAS on Hopper, whatever the program (`GetWorkspaceSize` in its gemm rewriter)."""
SECONDS = 120
"""Processor time of compiling a program, at most: unrolled layers would take a TPU's compiler several times that."""


def settings(
    kind: type, folder: pathlib.Path, mesh: str, options: dict[str, Any], shape: dict[str, Any], sizes: Sizes
) -> Any:
    """A run of the kind, of random weights."""
    write_model(folder / "model", shape)
    row = {"prompt": " ".join(["w7"] * sizes.prompt), "completion": " w8" * 20}
    row |= {"chosen": row["completion"], "rejected": " w9" * 20}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(2 * sizes.rows)))
    sections: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "init": "random", "compute_dtype": "bfloat16"},
        "data": {"path": str(folder / "rows.jsonl"), "validation_fraction": 0.0},
        "run_dir": str(folder / "run"),
        "logging": {"quiet": True, "tensorboard": False},
    }
    if issubclass(kind, config.PPOConfig | config.GRPOConfig):
        name = "ppo" if issubclass(kind, config.PPOConfig) else "grpo"
        sections["sampling"] = {"response_length": sizes.response}
        sections[name] = {"batch_size": sizes.rows, "total_episodes": sizes.rows}
    else:
        sections["data"]["validation_fraction"] = 0.5
        sections["train"] = {"batch_size": sizes.rows, "eval_batch_size": sizes.rows, "max_steps": 1}
    if issubclass(kind, config.DistillConfig):
        sections |= {"teacher": {"path": str(folder / "model")}, "sampling": {"response_length": sizes.response}}
    return kind(**sections | options, mesh=MESHES[mesh])


def compiled_run(run, target, devices, record, chosen, skip=()) -> tuple[Any, Recorded]:
    """The trainer and its programs."""
    found = Recorded(run, target, record, skip)
    with sharding.on_devices(devices(target)):
        trainer = programs.abstract_trainer(chosen, length_reward if hasattr(chosen, "rollout") else None)
        programs.compile_longest(trainer, found)
    return trainer, found


def check(what: str, facts: Facts, trainer: Any, mesh: str, sizes: Sizes) -> None:
    """What holds for every program of a run."""
    assert facts.aliased == facts.donated, f"{what}: {facts.donated} arrays are donated, {facts.aliased} reused"
    if not what.endswith("convert"):  # which merges adapters in float32
        assert not facts.wide, f"{what}: products of float32: {facts.wide}"
    check_copies(what, facts, trainer, sizes)
    check_collectives(what, facts, trainer.model, mesh, sizes)


def check_copies(what: str, facts: Facts, trainer: Any, sizes: Sizes) -> None:
    """No copy of a decoding cache, nor of half of the state; on a TPU of a real size nor of all of it."""
    state = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(trainer.state.template)]
    shapes = {tuple(sorted(shape)) for shape in state}
    copied = sum(size_of(s) * n for s, n in facts.copies.items() if tuple(sorted(dims_of(s))) in shapes)
    share = 0.5 if sizes is FEW or "h100" in what else 1.0  # a TPU computes with narrow shards in another layout
    assert copied < share * sum(4 * math.prod(shape) for shape in state), f"{what}: copies {facts.copies}"
    tiled = sizes is not FEW or "h100" in what  # a TPU moves a few rows of narrow heads to another layout
    if tiled and ("generate" in what or "advance" in what):
        for shape in facts.copies:
            cached = len(dims_of(shape)) > 3 and sizes.prompt + sizes.response in dims_of(shape)
            assert not cached, f"{what}: a copy of a cache, {shape}"


def check_collectives(what: str, facts: Facts, model: Any, mesh: str, sizes: Sizes) -> None:
    """Collectives are those of the mesh, and carry neither logits nor the activations of the whole batch."""
    split = MESHES[mesh].tensor
    for kind, shapes in facts.collectives.items():
        for shape in shapes:
            dims = dims_of(shape)
            if size_of(shape) < UNNOTICED:
                continue
            assert kind in KINDS[mesh], f"{what}: {kind} of {shape} on a mesh of {mesh}"
            vocabulary = part_of_vocabulary(dims, model.vocab_size, split)
            positions = math.prod(dims) / vocabulary  # or the width of a weight
            assert vocabulary == 1 or positions <= model.hidden_size, f"{what}: {kind} of logits, {shape}"
            whole = sizes.rows in dims and math.prod(dims) >= sizes.rows * sizes.response * model.hidden_size
            assert not whole, f"{what}: {kind} of a whole batch, {shape}"


def part_of_vocabulary(dims: list[int], size: int, split: int) -> int:
    """Tokens in a shape: of the vocabulary, a device's part of it, or a chunk that has all of each share; 1 if none."""
    for part in (size, size // split):
        if part in dims:
            return part
    shares = {SHARES, SHARES // split} & set(dims)
    return max(shares) * (size // SHARES) if shares and size // SHARES in dims else 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run", RUNS)
def test_every_trainer(run, target, devices, record, tmp_path):
    mesh, kind, options = RUNS[run]
    chosen = settings(kind, tmp_path, mesh, options, TINY, FEW)
    # samples for the log are made like rollouts, and evaluation is the forward half of an update
    skip = () if hasattr(chosen, "rollout") else ("convert", "generate", "admit", "advance", "evaluate", "score")
    trainer, found = compiled_run(run, target, devices, record, chosen, skip)
    for program, several in found.facts.items():
        for facts in several:
            check(f"{run} on {target}: {program}", facts, trainer, mesh, FEW)
            assert facts.donated or program not in ("update", "advance", "admit")
            if program == "update" and target.startswith("h100"):
                assert any("cudnn" in kernel and "Backward" in kernel for kernel in facts.kernels)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, target, devices, record):
    """Gradients of log-probs, and a step of decoding, on one device."""
    (device, *_), platform = devices(target), "gpu" if target.startswith("h100") else "tpu"
    model = weights.load_config(FIXTURES / family, compute_dtype="bfloat16", platform=platform)
    # heads as wide as a TPU's tiles: it keeps narrower ones in other layouts
    model = dataclasses.replace(model, head_dim=128, attention="cudnn" if platform == "gpu" else "plain")
    decoder = inference_model(model, "bfloat16")
    here = SingleDeviceSharding(device)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = place(jax.eval_shape(lambda: models.init(model, jax.random.key(0))))
    copy = place(jax.eval_shape(lambda params: convert(params, model, decoder), params))
    tokens = place(jax.ShapeDtypeStruct((8, 16), jnp.int32))
    decoding = Decoding(decoder, config.Sampling(response_length=16), (2,), 0)
    slots = place(jax.eval_shape(lambda: empty_slots(decoding, 8, 16)))

    @jax.jit
    def learn(params, tokens):
        def total(params):
            hidden = models.forward(params, model, tokens, tokens > 0)
            return token_logprobs(params, model, hidden, tokens, 1.0)[0].sum()

        return jax.grad(total)(params)

    for name, lowered in {
        "learn": learn.lower(params, tokens),
        "advance": engine._advance.lower(copy, decoding, slots, place(jax.ShapeDtypeStruct((), jnp.int32)), 16),
    }.items():
        facts, what = compiled.recorded(f"{family}: {name}", lowered, target, record), f"{family} on {target}: {name}"
        wide = [product for product in facts.wide if not any(part in product for part in IN_FLOAT32)]
        assert facts.products and not wide, f"{what}: products of float32: {wide}"
        assert not facts.collectives, what
        assert facts.aliased == facts.donated, f"{what}: {facts.donated} arrays are donated, {facts.aliased} reused"
        if name == "advance":
            held = {tuple(sorted(x.shape)) for x in jax.tree.leaves((slots.cache.k, slots.cache.v))}
            copied = sum(n for shape, n in facts.copies.items() if tuple(sorted(dims_of(shape))) in held)
            assert copied <= (2 if platform == "tpu" and family in ON_CHIP else 0), f"{what}: copies of a cache"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (12, 2, 128)])
def test_a_step_of_slots_copies_no_cache(heads, groups, width, target, devices, record):
    """Widths of real models, 32 slots of 384 tokens: beside its arguments a step needs less than a layer's keys."""
    here = SingleDeviceSharding(devices(target)[0])
    model = tiny(
        vocab_size=4096, hidden_size=heads * width, num_heads=heads, num_kv_heads=groups, head_dim=width, mlp_size=1536,
        max_positions=2048, dtype="bfloat16", platform="gpu" if target.startswith("h100") else "tpu",
    )  # fmt: skip
    decoder = inference_model(model, "bfloat16")
    decoding = Decoding(decoder, config.Sampling(response_length=256), (0,), 1)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = jax.eval_shape(lambda: convert(models.init(model, jax.random.key(0)), model, decoder))
    slots, number = jax.eval_shape(lambda: (empty_slots(decoding, 32, 128), jnp.int32(0)))
    lowered = engine._advance.lower(place(params), decoding, place(slots), place(number), 128)
    facts = compiled.recorded(f"slots of {groups} x {width}", lowered, target, record)
    assert facts.aliased == facts.donated
    assert facts.scratch < 2 * 32 * groups * 384 * width, f"{facts.scratch} bytes of scratch; copies {facts.copies}"


@pytest.mark.parametrize("target", TARGETS)
def test_ppo_of_a_real_size(target, devices, record, tmp_path):
    """SmolLM2-135M, 32 prompts of 128 tokens and responses of 256, split over eight devices."""
    sizes = Sizes(rows=32, prompt=128, response=256)
    chosen = settings(config.PPOConfig, tmp_path, "fsdp", {}, SHAPES["S"], sizes)
    trainer, found = compiled_run("S", target, devices, record, chosen)
    decoding = ("generate",) if "v5e" in target else ("admit", "advance")
    assert set(found.facts) == {"convert", *decoding, "annotate", "update"}
    for program, several in found.facts.items():
        what = f"S on {target}: {program}"
        for facts in several:
            check(what, facts, trainer, "fsdp", sizes)
            assert facts.seconds < SECONDS, f"{what}: compiling took {facts.seconds} s"
    model, columns = trainer.model, sizes.prompt + sizes.response
    cache = 2 * 2 * model.num_layers * sizes.rows // 8 * columns * model.num_kv_heads * model.head_dim
    heads = model.num_heads + 2 * model.num_kv_heads
    products = 4 * model.num_layers * sizes.rows // 8 * sizes.prompt * heads * model.head_dim
    for program in decoding:
        limit = SCRATCH[target] * cache + WORKSPACE[target] + (products if program == "admit" else 0)
        for facts in found.facts[program]:
            assert facts.scratch < limit, f"{program}: {facts.scratch} bytes of scratch, {cache} of keys and values"
    if target.startswith("h100"):
        check_kernels(found, model.num_layers)
    logits = 4 * sizes.rows // 8 * sizes.response * model.vocab_size
    (facts,) = found.facts["annotate"]
    assert facts.scratch < logits, f"{facts.scratch} bytes of scratch; the logits of a device's rows are {logits}"


def check_kernels(found: Recorded, layers: int) -> None:
    """Kernels that a GPU launches, each of which takes microseconds however little it computes: for a token of every
    row, and for a layer of policy and critic, forward and backward. Both have cuDNN's attention."""
    (update,) = found.facts["update"]
    assert len(found.facts["advance"]) == 2  # for half of the response, and for all of it
    for decoding in found.facts["advance"]:
        ((_, step),) = decoding.loops
        assert step <= 14.5 * layers, f"{step} kernels for a token"
    passes = [kernels for count, kernels in update.loops if count == layers]
    assert len(passes) == 4 and sum(passes) <= 2 * 92, (
        f"{passes} kernels for a layer, forward and backward, of two roles"
    )
    attention = {name.split("$")[1]: count for name, count in update.kernels.items() if name.startswith("__cudnn$")}
    assert attention == {"fmhaScaleBiasSoftmax": 4, "fmhaScaleBiasSoftmaxBackward": 2}  # and once more in the backward


@pytest.mark.parametrize("target", TARGETS)
def test_the_record_is_what_the_compiler_makes(target, devices, record):
    """A program with something of everything that is recorded, always compiled."""
    lowered = with_faults(devices(target))
    made = compiled.facts_of(lowered)
    if compiled.key_of(lowered, target) in record:
        known = compiled.recorded("", lowered, target, record)
        assert dataclasses.replace(known, seconds=0) == dataclasses.replace(made, seconds=0)
    else:
        compiled.recorded("with faults", lowered, target, record)
    assert (made.donated, made.aliased) == (2, 1)
    assert made.products == {"f32 x f32": 1} and len(made.wide) == 1
    assert sum(made.collectives["all-gather"].values()) == 1
    assert dims_of(next(iter(made.collectives["all-gather"]))) == [64, 1536]


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_the_bytes_that_a_program_sends_are_those_of_a_hand_count(target, devices):
    """Its sibling that always runs reads a file: tests/plan/test_hlo.py."""
    text = layers.lowered(devices(target)).compile().as_text()
    sent, whole = roofline.traffic(hlo.read(text, layers.DEVICES, 99), (0,) * layers.DEVICES), layers.bytes_exchanged()
    if target.startswith("h100"):  # which gathers backward what it recomputes with, once more
        more = 2 * layers.LAYERS * layers.HIDDEN * (layers.HIDDEN + 2 * layers.INNER)
        assert sent.near == 7 / 8 * (whole + more)
    else:
        assert 7 / 8 * whole <= sent.near <= 9 / 8 * whole


def with_faults(devices: list[Any]) -> Any:
    """A lowered program that gathers logits from a product of float32, and is given an array that it cannot reuse."""
    mesh = Mesh(np.asarray(devices), ("fsdp",))
    by_rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["fsdp"], []))

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(by_rows, whole))
    def program(reused, unused, hidden, head):
        logits = jnp.matmul(hidden, head, precision="highest")
        return reused + unused.sum(), logits

    shapes = ((64, 8), by_rows), ((64, 16), by_rows), ((64, 128), by_rows), ((128, 1536), whole)
    return program.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=to) for shape, to in shapes))
