"""Checks of this computer and of a model, printed one per line; those of PPO are in ppo.py. Needs no torch."""

import itertools
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import distributed, memory, runtime, sharding, weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.tokenizer import check_vocab
from jaxrlhf.doctor.data import examine_data
from jaxrlhf.doctor.ppo import Outcome, Trial
from jaxrlhf.errors import JaxrlhfError, visible
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, empty_cache, for_length, forward, forward_cached, unstack
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors

__all__ = ["examine", "examine_data"]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy", "safetensors")
TOLERANCE = 1e-3  # relative difference between float32 hidden states computed in two ways
EXPORT_LIMIT = 8 * 2**30  # bytes; the export of a larger model is not checked


def examine(config: PPOConfig) -> bool:
    """Report on this computer and, if `config` names a model, check it and PPO with it; True if every check passed."""
    for line in computer():
        print(line)
    if not config.model.path:
        return True
    print()
    return examine_model(config)


def computer() -> list[str]:
    """Versions, devices, memory, disk, hub access and environment settings, one per line."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    devices = sharding.available()
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    lines = [
        f"jaxrlhf {_version('jaxrlhf')}, python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"packages: {versions}",
        f"devices: {len(devices)} x {', '.join(kinds)}",
        f"processor: {runtime.processor()}",
        f"processes: {_processes()}",
        f"memory: {_free_of(memory.free_on_host(), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}",
    ]
    if stats := devices[0].memory_stats():
        lines.append(f"device memory: {_free_of(memory.free_on_device(), stats.get('bytes_limit', 0))}")
    disk = shutil.disk_usage(".")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    lines += [
        f"disk: {_free_of(disk.free, disk.total)} in this folder",
        "hub: offline (HF_HUB_OFFLINE is set); local folders and cached repositories still work"
        if offline
        else "hub: online; set HF_HUB_OFFLINE=1 to use only local and cached files",
        *_chosen(devices[0].platform),
        *(f"setting {line}" for line in runtime.report()),
    ]
    if devices[0].platform == "cpu" and Path("/proc/driver/nvidia/version").exists():
        lines.append('note: this computer has an NVIDIA driver but jax finds no GPU; run: pip install "jaxrlhf[cuda]"')
    return lines


def _chosen(platform: str) -> list[str]:
    """Values of `auto` options on this kind of device, and the layout of an inference copy for few rows."""
    dtype = runtime.resolve_dtype("auto", platform)
    attention = runtime.resolve_attention("auto", platform, dtype)
    left = runtime.weights_left(platform, dtype, runtime.LEFT_ROWS)
    layout = f"left operand of products, for up to {runtime.LEFT_ROWS} rows" if left else "right operand of products"
    by_column = runtime.keys_by_column(platform, dtype, runtime.COLUMN_ROWS)
    keys = f"by column, from {runtime.COLUMN_ROWS} rows on" if by_column else "by row"
    remat = runtime.resolve_remat("auto", platform)
    if runtime.keeps_products(platform, dtype, 1, 1):
        remat += f" (dots for supervised steps of up to {runtime.KEPT_TOKENS} x hidden_size tokens)"
    return [
        f"auto: dtype {dtype}, model.remat {remat}, model.attention {attention}",
        f"weights while decoding in {dtype}: {layout}; keys of the cache: {keys}",
    ]


def _processes() -> str:
    if job := distributed.job():
        kind, number = job
        return f"this one alone, of {number} in a job of {kind}; training commands join them with --distributed"
    return "this one alone; docs/hosts.md says how several hosts train together"


def examine_model(config: PPOConfig) -> bool:
    """Check the model alone, in float32, then PPO with the rest of `config`; True if every check passed."""
    path, revision, init = config.model.path, config.model.revision, config.model.init
    key = jax.random.key(config.seed)
    model, params = weights.load(path, revision=revision, dtype="float32", compute_dtype="float32", init=init, key=key)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"model {path}: {model.family}, {size:,} parameters, head {model.head}, context {model.max_positions}")
    results = [_run("tokenizer", lambda: _tokenizer(config, model))]
    tokens, mask = _random_rows(model)
    if model.head == "lm":
        results.append(_run("decode equals forward", lambda: decode_equals_forward(params, model, tokens, mask)))
        results.append(_run("KL of a copy is zero", lambda: copy_has_no_divergence(params, model, tokens, mask)))
    results.append(_run("padding changes nothing", lambda: padding_is_invisible(params, model, tokens, mask)))
    if init == "random":
        _run("load and export", lambda: (None, "model.init is random: there are no weights to compare"))
    else:
        base, _ = weights.base_and_adapters(weights.resolve(path, revision), weights=True)  # the base model of adapters
        results.append(_run("load and export", lambda: export_is_identical(base)))
    del params  # PPO's checks need the memory of several models
    if model.head != "lm" or not results[0]:
        _run("PPO", lambda: (None, "needs a language model" if results[0] else "needs a tokenizer that fits the model"))
    else:
        results += [_run(*check) for check in Trial(config).checks()]
    return all(passed is not False for passed in results)


def _run(name: str, check: Callable[[], Outcome]) -> bool | None:
    """Run a check and print its outcome."""
    try:
        passed, message = check()
    except JaxrlhfError as error:
        passed, message = False, str(error)
    first, *more = visible(message).splitlines()
    print(f"{ {True: 'ok', False: 'FAIL', None: 'skip'}[passed]:<5} {name}: {first}", flush=True)
    for line in more:
        print(f"      {line}", flush=True)
    return passed


def _tokenizer(config: PPOConfig, model: ModelConfig) -> Outcome:
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    if not tokenizer.added:  # for added tokens, training resizes the embedding
        check_vocab(tokenizer, model.vocab_size)
    text = "Hello, world. It costs 12.50, she said."
    back = tokenizer.decode(tokenizer.encode(text))
    lines = [f"{tokenizer.size:,} tokens for {model.vocab_size:,} embeddings, stop ids {list(tokenizer.stop_ids)}"]
    lines += tokenizer.notes
    if back.strip() != text:  # a lossy tokenizer is no error
        lines.append(f"note: the tokenizer is lossy: {text!r} decodes to {back!r}")
    return True, "\n".join(lines)


def _random_rows(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and mask [3, T] of left-padded rows of different lengths."""
    length = min(24, model.max_positions)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (3, length), dtype=np.int32)
    mask = np.arange(length) >= np.array([[0], [length // 3], [length // 2]])
    return tokens, mask


def _compare(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray, mask: np.ndarray) -> Outcome:
    x, y = (np.where(mask, np.asarray(hidden), 0) for hidden in (a, b))
    worst = float(np.max(np.abs(x - y)))
    relative = worst / max(float(np.max(np.abs(x))), 1e-30)
    passed = bool(relative <= TOLERANCE)
    limit = "" if passed else f"; the limit is {TOLERANCE:g}, please report the model as a bug"
    return passed, f"largest difference {worst:.1e}, relative {relative:.1e}{limit}"


def decode_equals_forward(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Compare hidden states with a cache (a prefill, then single tokens) to those without, up to rounding."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    length = tokens.shape[1]
    model = for_length(model, length)
    cuts = [0, *range(length - 4, length + 1)]

    @jax.jit
    def cached(params):
        cache = empty_cache(model, tokens.shape[0], length)
        layers, pieces = unstack(params, model), []
        for start, end in itertools.pairwise(cuts):
            token, real, position = (jnp.array(x[:, start:end]) for x in (tokens, mask, positions))
            hidden, cache = forward_cached(layers, model, token, real, position, cache, start)
            pieces.append(hidden)
        return jnp.concatenate(pieces, axis=1)

    uncached = jax.jit(forward, static_argnums=1)(params, model, tokens, mask)
    return _compare(uncached, cached(params), mask[..., None])


def padding_is_invisible(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Compare hidden states of rows padded on the left to those of rows padded on the right, up to rounding."""
    hidden = jax.jit(forward, static_argnums=1)
    order = np.argsort(~mask, axis=1, kind="stable")  # real tokens first
    right, right_mask = np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
    left = np.take_along_axis(np.asarray(hidden(params, model, tokens, mask)), order[..., None], 1)
    return _compare(left, hidden(params, model, right, right_mask), right_mask[..., None])


def copy_has_no_divergence(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Check that log-probabilities under the model and a copy of it, in one program, are equal bit for bit."""

    @jax.jit
    def divergence(params, copy):
        def logprobs(params):
            hidden = forward(params, model, jnp.array(tokens), jnp.array(mask))
            return token_logprobs(params, model, hidden[:, :-1], jnp.array(tokens[:, 1:]), 1.0)[0]

        return jnp.max(jnp.where(mask[:, 1:] & mask[:, :-1], jnp.abs(logprobs(params) - logprobs(copy)), 0.0))

    worst = float(divergence(params, jax.tree.map(jnp.copy, params)))
    advice = "" if worst == 0.0 else "; it must be 0: this jax or its device is not deterministic, try another version"
    return worst == 0.0, f"largest |log ratio| {worst:.1e}{advice}"


def export_is_identical(folder: Path) -> Outcome:
    """Load the model and export it to a temporary folder; every tensor must be equal bit for bit."""
    entries = weights.tensors_of(folder)
    size = sum(entry.nbytes for entry in entries.values())
    if size > min(EXPORT_LIMIT, shutil.disk_usage(tempfile.gettempdir()).free // 2):
        return None, f"the model is too large to export here ({size / 2**30:.1f} GiB)"
    with tempfile.TemporaryDirectory() as temporary:
        target = weights.export(Path(temporary) / "export", *weights.load(folder), source=folder)
        written = safetensors.scan_folder(target)
        missing = sorted(entries.keys() - written.keys())
        changed = [name for name in entries if name in written and not safetensors.same(entries[name], written[name])]
    if changed:
        return False, (
            f"{len(changed)} of {len(entries)} tensors changed: {', '.join(changed[:5])}; exports of this model would "
            "be wrong, please report it as a bug"
        )
    left_out = f"; not exported: {', '.join(missing[:5])}" if missing else ""
    return True, f"{len(entries) - len(missing)} tensors equal bit for bit{left_out}"


def _version(name: str) -> str:
    return runtime.version(name) or "not installed"


def _free_of(free: int | None, total: int) -> str:
    return f"{'unknown' if free is None else f'{free / 2**30:.1f} GiB'} free of {total / 2**30:.1f}"
