"""Is everything here as it should be: this computer, a model, a data file. Prints what it finds; needs no torch. What
PPO does with the model is checked in doctor_ppo.py."""

import contextlib
import itertools
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import runtime, weights
from jaxrlhf.config import PPOConfig, SFTConfig
from jaxrlhf.data import datasets, formats, sources
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from jaxrlhf.doctor.ppo import Outcome, Trial
from jaxrlhf.errors import DataError, JaxrlhfError, quoted
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, empty_cache, forward, forward_cached, unstack
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy", "safetensors")
TOLERANCE = 1e-3  # relative, of float32 hidden states computed in two ways
EXPORT_LIMIT = 8 * 2**30  # bytes; a larger model is not written to disk for a check


def examine(config: PPOConfig) -> bool:
    """Print the state of this computer and, if `config` names one, of its model and of PPO with it; whether every check
    passed (if not: exit code 1)."""
    for line in computer():
        print(line)
    if not config.model.path:
        return True
    print()
    return examine_model(config)


def computer() -> list[str]:
    """Versions, devices, memory, disk, hub and what was set before jax started, a line each."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    devices = jax.devices()
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    lines = [
        f"jaxrlhf {_version('jaxrlhf')}, python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"packages: {versions}",
        f"devices: {len(devices)} x {', '.join(kinds)}; {os.cpu_count()} processors",
        f"memory: {_memory()}",
    ]
    for device in devices[:1]:
        if stats := device.memory_stats():
            free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
            lines.append(f"device memory: {free / 2**30:.1f} GiB free of {stats.get('bytes_limit', 0) / 2**30:.1f}")
    disk = shutil.disk_usage(".")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    lines += [
        f"disk: {disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} here",
        "hub: offline (HF_HUB_OFFLINE is set); local folders and what is cached still work"
        if offline
        else "hub: online; HF_HUB_OFFLINE=1 keeps everything local",
        f"dtype auto: {runtime.resolve_dtype('auto', devices[0].platform)}",
        *(f"setting {line}" for line in runtime.report()),
    ]
    if devices[0].platform == "cpu" and Path("/proc/driver/nvidia/version").exists():
        lines.append('note: there is an NVIDIA driver but jax sees no GPU: pip install "jaxrlhf[cuda]"')
    return lines


def examine_model(config: PPOConfig) -> bool:
    """Load the model in float32, print what it is, and run checks that need nothing but itself, then those of PPO with
    what else `config` says; whether all passed."""
    path, revision = config.model.path, config.model.revision
    whole, _ = weights.described_by(weights.resolve(path, revision), weights=True)  # of adapters, what they are for
    model, params = weights.load(path, revision=revision, dtype="float32", compute_dtype="float32")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"model {path}: {model.family}, {size:,} parameters, head {model.head}, context {model.max_positions}")
    results = [_try("tokenizer", lambda: _tokenizer(config, model))]
    tokens, mask = _sample(model)
    if model.head == "lm":
        results.append(_try("decode equals forward", lambda: decode_equals_forward(params, model, tokens, mask)))
        results.append(_try("KL of a copy is zero", lambda: copy_has_no_divergence(params, model, tokens, mask)))
    results.append(_try("padding changes nothing", lambda: padding_is_invisible(params, model, tokens, mask)))
    results.append(_try("load and export", lambda: export_is_identical(whole)))
    del params  # PPO's checks take the room of several models
    if model.head != "lm" or not results[0]:
        _try("PPO", lambda: (None, "needs a language model" if results[0] else "needs a tokenizer that fits the model"))
    else:
        results += [_try(*check) for check in Trial(config).checks()]
    return all(passed is not False for passed in results)


def _try(name: str, check: Callable[[], Outcome]) -> bool | None:
    """Run a check and print its lines."""
    try:
        passed, found = check()
    except JaxrlhfError as error:
        passed, found = False, str(error)
    first, *more = found.splitlines()
    print(f"{ {True: 'ok', False: 'FAIL', None: 'skip'}[passed]:<5} {name}: {first}", flush=True)
    for line in more:
        print(f"      {line}", flush=True)
    return passed


def _tokenizer(config: PPOConfig, model: ModelConfig) -> Outcome:
    tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
    if not tokenizer.added:  # training makes room for tokens that are added
        check_vocab(tokenizer, model.vocab_size)
    text = "Hello, world. It costs 12.50, she said."
    back = tokenizer.decode(tokenizer.encode(text))
    lines = [f"{tokenizer.size:,} tokens for {model.vocab_size:,} embeddings, stop ids {list(tokenizer.stop_ids)}"]
    lines += tokenizer.notes
    if back.strip() != text:  # lossy tokenizers exist; a person should know, and nothing is broken
        lines.append(f"note: {text!r} comes back as {back!r}")
    return True, "\n".join(lines)


def _sample(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [3, T] and a mask with rows of different length, left-padded."""
    length = min(24, model.max_positions)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (3, length), dtype=np.int32)
    mask = np.arange(length) >= np.array([[0], [length // 3], [length // 2]])
    return tokens, mask


def _difference(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray, where: np.ndarray) -> Outcome:
    x, y = (np.where(where, np.asarray(hidden), 0) for hidden in (a, b))
    worst = float(np.max(np.abs(x - y)))
    relative = worst / max(float(np.max(np.abs(x))), 1e-30)
    return bool(relative <= TOLERANCE), f"largest difference {worst:.1e}, relative {relative:.1e}"


def decode_equals_forward(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Hidden states with a cache (most at once, the last token by token) and without are the same to rounding."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    length = tokens.shape[1]
    cuts = [0, *range(length - 4, length + 1)]

    @jax.jit
    def cached(params):
        cache = empty_cache(model, tokens.shape[0], length)
        layers, parts = unstack(params, model), []
        for a, b in itertools.pairwise(cuts):
            at = slice(a, b)
            hidden, cache = forward_cached(
                layers, model, jnp.array(tokens[:, at]), jnp.array(mask[:, at]), jnp.array(positions[:, at]), cache, a
            )
            parts.append(hidden)
        return jnp.concatenate(parts, axis=1)

    whole = jax.jit(forward, static_argnums=1)(params, model, tokens, mask)
    return _difference(whole, cached(params), mask[..., None])


def padding_is_invisible(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Hidden states of the same rows padded on the left and on the right are the same to rounding."""
    hidden = jax.jit(forward, static_argnums=1)
    order = np.argsort(~mask, axis=1, kind="stable")  # real tokens first
    right, right_mask = np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
    left = np.take_along_axis(np.asarray(hidden(params, model, tokens, mask)), order[..., None], 1)
    return _difference(left, hidden(params, model, right, right_mask), right_mask[..., None])


def copy_has_no_divergence(params: Params, model: ModelConfig, tokens: np.ndarray, mask: np.ndarray) -> Outcome:
    """Log-probabilities under the model and under a copy of it, in one program, are equal bit for bit."""

    @jax.jit
    def divergence(params, copy):
        def score(p):
            hidden = forward(p, model, jnp.array(tokens), jnp.array(mask))
            return token_logprobs(p, model, hidden[:, :-1], jnp.array(tokens[:, 1:]), 1.0)[0]

        return jnp.max(jnp.where(mask[:, 1:] & mask[:, :-1], jnp.abs(score(params) - score(copy)), 0.0))

    worst = float(divergence(params, jax.tree.map(jnp.copy, params)))
    return worst == 0.0, f"largest |log ratio| {worst:.1e}"


def export_is_identical(folder: Path) -> Outcome:
    """Tensors of the folder, loaded and exported to a temporary folder, come back bit for bit."""
    entries = safetensors.scan_folder(folder)
    size = sum(entry.nbytes for entry in entries.values())
    if size > min(EXPORT_LIMIT, shutil.disk_usage(tempfile.gettempdir()).free // 2):
        return None, f"{size / 2**30:.1f} GiB would have to be written"
    with tempfile.TemporaryDirectory() as temporary:
        target = weights.export(Path(temporary) / "export", *weights.load(folder), source=folder)
        written = safetensors.scan_folder(target)
        missing = sorted(entries.keys() - written.keys())
        changed = [name for name in entries if name in written and not safetensors.same(entries[name], written[name])]
    if changed:
        return False, f"{len(changed)} of {len(entries)} tensors changed: {', '.join(changed[:5])}"
    left_out = f"; not written again: {', '.join(missing[:5])}" if missing else ""
    return True, f"{len(entries) - len(missing)} tensors bit for bit the same{left_out}"


def examine_data(config: SFTConfig) -> str:
    """What a data file holds: columns, how each method would read it, the first row; with a tokenizer also token counts
    and the first row in tokens. Raises DataError if the file cannot be read."""
    rows = sources.read_rows(config.data)
    lines = [f"data {rows.source}: {len(rows.rows):,} rows with columns {', '.join(rows.columns)}"]
    readable: dict[formats.Task, formats.Format] = {}
    methods: tuple[tuple[formats.Task, str], ...] = (("sft", "sft"), ("pairs", "reward, dpo"), ("prompts", "ppo, grpo"))
    for task, method in methods:
        try:
            readable[task] = formats.recognise(rows.columns, task, config.data, rows.source)
            lines.append(f"jaxrlhf {method}: {readable[task]}")
        except DataError as error:
            lines.append(f"jaxrlhf {method}: no. {error}")
    judged: tuple[tuple[formats.Task, str], ...] = (
        ("labels", "classification, dpo --dpo.loss kto"), ("scores", "regression"), ("rankings", "ranking")
    )  # fmt: skip
    for task, loss in judged:
        with contextlib.suppress(DataError):  # rare, so only what it is is said
            reading = formats.recognise(rows.columns, task, config.data, rows.source)
            lines.append(f"jaxrlhf reward --loss {loss}: {reading}")
    first = "\n".join(f"  {name}: {quoted(value, 200)}" for name, value in rows.rows[0].items())
    lines.append(f"first row:\n{first}")
    place = config.tokenizer.path or config.model.path
    if not place:
        return "\n".join(
            [*lines, "with --model.path DIR or --tokenizer.path DIR: lengths in tokens, and what is learnt"]
        )
    tokenizer = load_tokenizer(weights.resolve(place, weights=False), config.tokenizer)
    for task in readable:
        lines += ["", _in_tokens(task, config, tokenizer)]
    return "\n".join(lines)


def _in_tokens(task: formats.Task, config: SFTConfig, tokenizer: Tokenizer) -> str:
    if task == "sft":
        split = datasets.sft_rows(config.data, tokenizer, config.completion_only)
        return f"{split.report}\nfirst row, what is learnt in [[ ]]:\n{_marked(split.train[0], tokenizer)}"
    if task == "pairs":
        pairs = datasets.pair_rows(config.data, tokenizer)
        chosen, rejected = (_marked(row, tokenizer) for row in (pairs.train[0].chosen, pairs.train[0].rejected))
        return f"{pairs.report}\nfirst pair, chosen:\n{chosen}\nrejected:\n{rejected}"
    prompts = datasets.prompt_rows(config.data, tokenizer)
    return f"{prompts.report}\nfirst prompt:\n{''.join(tokenizer.convert_ids_to_tokens(prompts.train[0].tokens))}"


def _marked(row: datasets.SFTRow, tokenizer: Tokenizer) -> str:
    """The pieces of a row, stretches to learn between [[ and ]]."""
    text, learning = "", False
    for piece, learnt in zip(tokenizer.convert_ids_to_tokens(row.tokens), row.loss_mask, strict=True):
        text += ("[[" if learnt else "]]") if learnt != learning else ""
        text, learning = text + piece, learnt
    return text + ("]]" if learning else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    """Free and total memory of this computer."""
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free, total = (int(fields[name].split()[0]) / 2**20 for name in ("MemAvailable", "MemTotal"))
        return f"{free:.1f} GiB free of {total:.1f}"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
