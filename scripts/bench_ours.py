"""jaxrlhf as a contestant of bench.py, which starts `bench_ours.py NAME JOB`."""

import collections
import dataclasses
import functools
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bench_process import Job, Turns, characters, peak_resident, timed
from bench_shapes import SHAPES, gemms

name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
if job.case == "startup":
    cache = Path(job.work) / "xla"
    if name == "cold":
        shutil.rmtree(cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)

from jaxrlhf import runtime  # noqa: E402

runtime.configure()
runtime.restart_with_huge_pages()  # as every command does
turns = Turns()  # after the restart, because it takes over standard output

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

try:
    jax.devices()
except (RuntimeError, AssertionError) as error:  # the latter where jax has no plugin for the platform
    sys.exit(
        f"jax finds no device for --device {job.device} here ({str(error) or 'no plugin is installed'}): nothing was "
        'measured. A GPU needs its driver and pip install ".[cuda]"'
    )
from bench_memory import table  # noqa: E402

from jaxrlhf import plan, sharding, weights  # noqa: E402
from jaxrlhf.config import (  # noqa: E402
    DPO,
    GRPO,
    PPO,
    Data,
    Generation,
    GRPOConfig,
    LoRA,
    Mesh,
    ModelSource,
    Optim,
    PPOConfig,
    Reference,
    RewardConfig,
    RewardSource,
    Sampling,
)
from jaxrlhf.logprobs import token_logprobs  # noqa: E402
from jaxrlhf.models import forward  # noqa: E402
from jaxrlhf.plan import report  # noqa: E402
from jaxrlhf.rollout.decode import Decoding, generate  # noqa: E402
from jaxrlhf.rollout.engine import generate_in_slots  # noqa: E402
from jaxrlhf.rollout.inference_copy import inference_copy  # noqa: E402
from jaxrlhf.rollout.queue import PromptQueue  # noqa: E402
from jaxrlhf.training import sft  # noqa: E402
from jaxrlhf.training.dpo import update as dpo_update  # noqa: E402
from jaxrlhf.training.grpo import trainer as grpo  # noqa: E402
from jaxrlhf.training.optim import make_optimizer  # noqa: E402
from jaxrlhf.training.ppo import trainer as ppo  # noqa: E402
from jaxrlhf.training.reward import trainer as reward  # noqa: E402
from jaxrlhf.training.reward.loss import objective_of  # noqa: E402
from jaxrlhf.training.state import State  # noqa: E402
from jaxrlhf.training.step import Spec  # noqa: E402
from jaxrlhf.types import Batch, Pairs, Prompts, Responses, Rollout  # noqa: E402

Repeat = Callable[[], dict[str, Any]]
PAD = 1
CONTAINERS = ("while", "call", "conditional")  # operations that run others; those are in the profile too


def compute_dtype(job: Job) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if job.dtype == "bfloat16" else "float32"


def load(job: Job, head: str = "lm"):
    """A random model as in a trainer: parameters in float32, products in the job's dtype."""
    key = jax.random.key(0)
    dtype, remat = compute_dtype(job), runtime.resolve_remat(job.remat, jax.default_backend())
    return weights.load(job.model, init="random", key=key, head=head, dtype="float32", compute_dtype=dtype, remat=remat)


def random_tokens(job: Job, rows: int, columns: int) -> np.ndarray:
    """Random word tokens, no control tokens."""
    return np.random.default_rng(0).integers(3, SHAPES[job.shape]["vocab_size"], (rows, columns), np.int32)


def random_prompts(job: Job, rows: int, start: int = 0) -> Prompts:
    tokens = random_tokens(job, start + rows, job.prompt)[start:]
    index = jnp.arange(start, start + rows)
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), index, jnp.zeros(rows, jnp.int32))


def limits(job: Job, name: str) -> Repeat:
    """Time matrix products with float32 results and memory reads, the basis of the floors."""
    config = SHAPES[job.shape]
    product = jax.jit(functools.partial(jnp.einsum, "mk,nk->mn", preferred_element_type=jnp.float32))
    total = jax.jit(lambda x: jnp.max(x, axis=1))

    def rate(amount: float, work: Callable[[], Any]) -> float:
        jax.block_until_ready(work())
        return amount / statistics.median(timed(lambda: jax.block_until_ready(work()))[0] for _ in range(9)) / 1e9

    def measure() -> dict[str, float]:
        rates = {}
        for dtype in ("float32", "bfloat16"):
            for m, k, n in gemms(config, job.device, job.quick):
                x, w = jnp.ones((m, k), dtype), jnp.ones((n, k), dtype)
                rates[f"{dtype} {m}x{k}x{n}"] = rate(2.0 * m * k * n, lambda x=x, w=w: product(x, w))
        block = jnp.ones((256, 2**20 if job.shape != "T" else 2**14), jnp.float32)
        rates["read"] = rate(block.nbytes, lambda: total(block))
        return rates

    def repeat() -> dict[str, Any]:
        seconds, rates = timed(measure)
        return {"seconds": seconds, "rates": rates}

    return repeat


def generation(job: Job, name: str) -> Repeat:
    """Generate a batch to its full length. The inference copy is made before and timed separately."""
    model, params = load(job)
    prompts = random_prompts(job, job.batch)

    def copy():
        return jax.block_until_ready(inference_copy(model, params, job.dtype, job.batch))

    def run(copied, length: int, seed: int) -> Rollout:
        small, weights_ = copied
        sampling = Sampling(response_length=length)
        return jax.block_until_ready(
            generate(weights_, small, prompts, jax.random.key(seed), sampling, stop_ids=(), pad_id=PAD)
        )

    seed = 0

    def repeat() -> dict[str, Any]:
        nonlocal seed
        seed += 1
        copying, copied = timed(copy)
        prefill, _ = timed(lambda: run(copied, 1, seed))
        seconds, rollout = timed(lambda: run(copied, job.response, seed))
        tokens = int(rollout.response_mask.sum())
        return {"seconds": seconds, "tokens": tokens, "phases": {"inference_copy": copying, "prefill": prefill}}

    repeat()
    return repeat


def ragged(job: Job, name: str) -> Repeat:
    """Generate for more prompts than slots, with geometric lengths: every `response`-th token id ends a response.

    Probabilities of a random model are nearly uniform, so a token ends a response with probability 1 / `response`.
    """
    model, params = load(job)
    small, copied = inference_copy(model, params, job.dtype, job.slots)
    stop_ids = tuple(range(0, model.vocab_size, job.response))
    sampling = Sampling(response_length=4 * job.response)

    def static(seed: int) -> int:
        tokens = 0
        for start in range(0, job.batch, job.slots):
            prompts = random_prompts(job, min(job.slots, job.batch - start), start)
            rollout = generate(copied, small, prompts, jax.random.key(seed), sampling, stop_ids, PAD)
            tokens += int(rollout.response_mask.sum())
        return tokens

    def engine(seed: int) -> int:
        queue = PromptQueue(random_prompts(job, job.batch), job.slots)
        rollout = generate_in_slots(copied, Decoding(small, sampling, stop_ids, PAD), queue, jax.random.key(seed))
        return int(rollout.response_mask.sum())

    run = engine if name == "ours" else static
    seed = 0

    def repeat() -> dict[str, Any]:
        nonlocal seed
        seed += 1
        seconds, tokens = timed(lambda: run(seed))
        return {"seconds": seconds, "tokens": tokens}

    repeat()
    return repeat


def prefix(job: Job, name: str) -> Repeat:
    """Sample `samples` responses of one token per prompt, prefilled once, or ("ours-rows") once for each response."""
    model, params = load(job)
    small, copied = inference_copy(model, params, job.dtype)
    prompts, sampling = random_prompts(job, job.batch), Sampling(response_length=1)
    group = job.samples
    if name == "ours-rows":
        prompts, group = jax.tree.map(lambda x: jnp.repeat(x, job.samples, axis=0), prompts), 1

    def run() -> Rollout:
        rollout = generate(copied, small, prompts, jax.random.key(0), sampling, stop_ids=(), pad_id=PAD, group=group)
        return jax.block_until_ready(rollout)

    def repeat() -> dict[str, Any]:
        return {"seconds": timed(run)[0], "tokens": job.batch * job.samples * job.prompt}

    repeat()
    return repeat


def scoring(job: Job, name: str) -> Repeat:
    """Compute log-probs and entropy of responses by one forward pass."""
    model, params = load(job)
    tokens = jnp.asarray(random_tokens(job, job.batch, job.prompt + job.response))

    @jax.jit
    def logprobs(params, tokens):
        hidden = forward(params, model, tokens, jnp.ones(tokens.shape, bool))[:, -job.response - 1 : -1]
        return token_logprobs(params, model, hidden, tokens[:, -job.response :], 1.0)

    def repeat() -> dict[str, Any]:
        seconds, _ = timed(lambda: jax.block_until_ready(logprobs(params, tokens)))
        return {"seconds": seconds, "tokens": tokens.size}

    repeat()
    return repeat


def supervised(job: Job, name: str) -> Repeat:
    """Run an optimizer step of SFT on all tokens, of a reward model on pairs, or of DPO on pairs.

    DPO includes the log-probs of the reference (phase `reference`), which a run computes once for each pair: from the
    policy, as before a first step.
    """
    role, head = ("reward", "linear") if job.case == "reward" else ("policy", "lm")
    model, params = load(job, head)
    width = job.prompt + job.response
    tokens_at_once = (job.micro_batch or job.batch) * width * (1 if job.case == "sft" else 2)
    if job.remat == "auto" and runtime.keeps_products(model.platform, model.dtype, tokens_at_once, model.hidden_size):
        model = dataclasses.replace(model, remat="dots")  # as a run does
    mesh = sharding.make_mesh(Mesh())
    optimizer = make_optimizer(Optim(learning_rate=1e-6), 1e-6, 10**6)
    state = State({role: params}, {role: optimizer}, mesh)
    del params
    tokens = jnp.asarray(random_tokens(job, 2 * job.batch, width))
    learn = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    first = Batch(tokens[: job.batch], jnp.ones((job.batch, width), bool), learn[: job.batch])
    group = tokens.reshape(2, job.batch, width).swapaxes(0, 1)
    everywhere = jnp.ones(group.shape, bool)
    both = Responses(group, everywhere, everywhere[..., 0], jnp.zeros(job.batch))
    said = jnp.ones(first.mask.shape, bool).at[:, : job.prompt].set(False)
    sides = (Batch(x, first.mask, said) for x in (first.tokens, tokens[job.batch :]))
    scored = dpo_update.Preferences(Pairs(*sides), jnp.zeros((job.batch, 2)), everywhere[:, 0, 0])
    preferences = DPO(), dpo_update.beta_schedule(DPO(), 10**6)
    objective = {"sft": "nll", "dpo": preferences, "reward": objective_of(RewardConfig())}[job.case]
    spec = Spec(model, optimizer, job.batch // (job.micro_batch or job.batch), mesh, objective)
    update, batch = {"sft": (sft.update, first), "dpo": (dpo_update.update, scored), "reward": (reward.update, both)}[
        job.case
    ]

    def reference() -> None:
        fixed = dataclasses.replace(model, remat="none")
        jax.block_until_ready(dpo_update.score(state.value.params[role], scored.pairs, model=fixed, settings=DPO()))

    def step() -> None:
        state.value, _ = update(state.value, {}, batch, jax.random.key(0), spec=spec)
        jax.block_until_ready(state.value)

    def repeat() -> dict[str, Any]:
        tokens = job.batch * width * (1 if job.case == "sft" else 2)
        phases = {"reference": timed(reference)[0]} if job.case == "dpo" else {}
        phases["update"], _ = timed(step)
        return {"seconds": sum(phases.values()), "tokens": tokens, "phases": phases}

    repeat()
    return repeat


def random_texts(job: Job) -> list[str]:
    """Random prompts of `job.prompt` words."""
    return [" ".join(f"w{i}" for i in row) for row in random_tokens(job, job.batch, job.prompt)]


def reward_model(job: Job) -> RewardSource:
    """A random reward model in a folder."""
    judge = Path(job.work) / "reward"
    if not judge.exists():
        weights.export(judge, *load(dataclasses.replace(job, dtype="float32"), "linear"), source=job.model)
    dtype = compute_dtype(job) if job.frozen_dtype == "auto" else job.frozen_dtype
    return RewardSource(model=str(judge), model_dtype=dtype)


def sections(job: Job) -> dict[str, Any]:
    """Config sections shared by runs on random models."""
    return {
        "model": ModelSource(path=job.model, init="random", compute_dtype=compute_dtype(job), remat=job.remat),
        "reference": Reference(dtype=job.frozen_dtype),
        "rollout": Generation(dtype=job.rollout_dtype),
        "sampling": Sampling(response_length=job.response, min_length=job.response),
        "optim": Optim(learning_rate=1e-6, schedule="constant", eps=1e-5),
        "lora": LoRA(enabled=bool(job.lora_rank), rank=job.lora_rank or 16, quantize=job.quantize),
    }


def ppo_config(job: Job, as_a_run: bool = False) -> tuple[PPOConfig, list[str]]:
    """Config of PPO on random models, critic from the policy, and its prompts (also in a file if `as_a_run`)."""
    texts = random_texts(job)
    file = Path(job.work) / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = PPOConfig(
        data=Data(path=str(file) if as_a_run else ""),
        ppo=PPO(batch_size=job.batch, num_ppo_epochs=job.epochs, micro_batch_size=job.micro_batch),
        reward=reward_model(job),
        **sections(job),
    )
    return config, texts


def make_ppo(job: Job, as_a_run: bool = False) -> tuple[ppo.PPOTrainer, list[str]]:
    """A PPO trainer and prompts; with `as_a_run`, with a data file, as in `jaxrlhf ppo`."""
    config, texts = ppo_config(job, as_a_run)
    return ppo.PPOTrainer(config), texts


def planned(job: Job, name: str) -> Repeat:
    """Run PPO iterations, or ("planned") compute the gigabytes of `jaxrlhf plan` by phase and with the process, to
    compare with the measured peak."""
    if name != "planned":
        return iteration(job, name)

    def repeat() -> dict[str, Any]:
        seconds, made = timed(lambda: plan.plan(ppo_config(job, as_a_run=True)[0]))
        process = report.process_bytes()
        together = {phase.name: phase.total for phase in made.phases} | {"process": process}
        together["peak"] = made.peak.total + process
        return {"seconds": seconds, "phases": {part: count / 1e9 for part, count in together.items()}}

    return repeat


def iteration(job: Job, name: str) -> Repeat:
    """Run one iteration of PPO with a reward model, or of GRPO with a reward function and `samples` responses per
    prompt; phases: rollout, update, and scoring (the reward, and annotation before the update)."""
    if job.case == "grpo":
        sizes = {"batch_size": job.batch, "num_generations": job.samples, "micro_batch_size": job.micro_batch}
        config = GRPOConfig(grpo=GRPO(num_iterations=job.epochs, **sizes), **sections(job))
        trainer = grpo.GRPOTrainer(config, reward=characters)
        module, step = grpo, functools.partial(trainer.grpo_step, random_texts(job)[:: job.samples])
    else:
        trainer, prompts = make_ppo(job)
        module, step = ppo, functools.partial(trainer.ppo_step, prompts)
    spent: dict[str, float] = {}

    def clocked(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            spent[name], result = timed(lambda: jax.block_until_ready(inner(*args, **kwargs)))
            return result

        setattr(owner, name, outer)

    step()  # compiles; must call the jitted functions themselves
    clocked(trainer.sampler, "generate")
    clocked(module, "update")

    def repeat() -> dict[str, Any]:
        seconds, _ = timed(step)
        rollout, update = spent["generate"], spent["update"]
        phases = {"rollout": rollout, "scoring": seconds - rollout - update, "update": update}
        return {"seconds": seconds, "tokens": job.batch * job.response, "phases": phases}

    return repeat


def startup(job: Job, name: str) -> Repeat:
    """Time that compilation adds to the first PPO iteration, with an empty cache or the one from the cold run."""
    loading, (trainer, prompts) = timed(lambda: make_ppo(job, as_a_run=True))

    def repeat() -> dict[str, Any]:
        first, _ = timed(lambda: trainer.ppo_step(prompts))
        second, _ = timed(lambda: trainer.ppo_step(prompts))
        return {"seconds": first - second, "phases": {"loading": loading, "first": first, "second": second}}

    return repeat


def memory(job: Job, name: str) -> Repeat:
    """Memory with each option (bench_memory.py); the seconds are those of compiling."""

    def repeat() -> dict[str, Any]:
        seconds, found = timed(lambda: table(job))
        return {"seconds": seconds, "gigabytes": found}

    return repeat


CASES: dict[str, Callable[[Job, str], Repeat]] = {
    "limits": limits,
    "generate": generation,
    "engine": ragged,
    "prefix": prefix,
    "logprobs": scoring,
    "sft": supervised,
    "reward": supervised,
    "dpo": supervised,
    "ppo": iteration,
    "grpo": iteration,
    "startup": startup,
    "memory": memory,
    "plan": planned,
}


def profiled(repeat: Repeat) -> Repeat:
    """Run `repeat` under jax's profiler and add a "profile" to its record: the share of each kind of operation in the
    total time, if at least a hundredth. Threads are added up; operations called by an operation are not part of it."""

    def repetition() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                record = repeat()
            (file,) = Path(folder).rglob("*.trace.json.gz")
            events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        spent: collections.Counter[str] = collections.Counter()
        for event in events:
            if "hlo_op" in event.get("args", {}) and not event["name"].startswith(CONTAINERS):
                spent[event["name"].rstrip(".0123456789")] += event["dur"]
        return record | {
            "profile": {n: us / spent.total() for n, us in spent.most_common() if us > 0.01 * spent.total()}
        }

    return repetition


def peak_bytes(job: Job) -> int:
    """Peak memory of the device, if it has its own memory, otherwise of this process."""
    if job.device == "cpu":
        return peak_resident()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    repeat = CASES[job.case](job, name)
    if job.profile:
        repeat = profiled(repeat)
    turns.ready("jaxrlhf", "jax", "jaxlib")
    turns.serve(repeat, lambda: peak_bytes(job))
