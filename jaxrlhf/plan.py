"""What a run will hold in memory and how long its steps take at the least, before anything of it runs: `jaxrlhf plan`.

Its programs are compiled for arrays that do not exist, of the longest rows there are. XLA then says what each program
needs besides its arguments; what else lies in memory while it runs is known from the shapes.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import costs, memory, programs
from jaxrlhf.config import PPOConfig, RewardConfig, SFTConfig, replace
from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.logprobs import logits_bytes
from jaxrlhf.models import empty_cache
from jaxrlhf.programs import Compiled
from jaxrlhf.training.ppo import PPOTrainer
from jaxrlhf.training.reward import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer
from jaxrlhf.types import TrainState

RunConfig = SFTConfig | RewardConfig | PPOConfig
PARTS = (
    "trained parameters",
    "optimizer state",
    "frozen models",
    "kept rollouts",
    "batch",
    "decoding copy",
    "keys and values",
    "gradients",
    "logits",
    "activations, rest",
)
"""What lies in memory, in the order in which it is shown."""


@dataclass(frozen=True)
class Phase:
    """A part of a step: bytes on one device by part, and the least seconds it takes on a device."""

    name: str
    bytes: dict[str, int]
    products: list[costs.Product]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    about: str
    phases: tuple[Phase, ...]
    state: int  # bytes of a checkpoint, on one device
    devices: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def plan(config: RunConfig) -> Plan:
    """Compile the programs of a run without loading a model. Raises what its trainer would raise."""
    with _compiled() as found:
        match config:
            case PPOConfig():
                trainer = PPOTrainer(config, abstract=True)
            case RewardConfig():
                trainer = RewardTrainer(config, abstract=True)
            case SFTConfig():
                trainer = SFTTrainer(config, abstract=True)
        trainer.compile_longest()
    phases = _ppo(trainer, found) if isinstance(trainer, PPOTrainer) else _supervised(trainer, found)
    about = f"{trainer.config.model.path}, {trainer.total_steps} steps"
    return Plan(about, tuple(phases), size(trainer.state.template), trainer.mesh.size)


@contextlib.contextmanager
def _compiled() -> Iterator[dict[str, list[Compiled]]]:
    """What is compiled while the block runs, by the name of the function."""
    found: dict[str, list[Compiled]] = {}
    with programs.watched(lambda one: found.setdefault(one.program.__name__.lstrip("_"), []).append(one)):
        yield found


def size(*trees: Any) -> int:
    """Bytes on one device of shapes with their places; one that is there twice counts once."""
    leaves = {id(leaf): leaf for tree in trees for leaf in jax.tree.leaves(tree)}
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves.values())


def _beside(one: Compiled) -> int:
    """What a program needs besides its arguments: scratch, and results that take no argument's place."""
    stats = one.memory
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def _standing(state: TrainState, *frozen: Any) -> dict[str, int]:
    """What is in memory all the time."""
    return {
        "trained parameters": size(state.params),
        "optimizer state": size(state.opt_state),
        "frozen models": size(frozen, state.reference),
        "kept rollouts": size(state.replay),
    }


def _gradients(state: TrainState) -> int:
    return sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))


def _phase(name: str, standing: dict[str, int], ran: list[Compiled], trips: float = 1, **known: int) -> Phase:
    """A phase of programs that run one after another; `known` is what they are known to have of what they need besides
    their arguments, underscores for spaces."""
    named = {key.replace("_", " "): value for key, value in known.items()}
    beside = max((_beside(one) for one in ran), default=0)
    rest = {
        "activations, rest": max(0, beside - sum(v for k, v in named.items() if k not in ("batch", "decoding copy")))
    }
    found = [product for one in ran for product in costs.products(one.jaxpr, trips)]
    return Phase(name, {**standing, **named, **rest}, found)


def _supervised(trainer: SFTTrainer | RewardTrainer, found: dict[str, list[Compiled]]) -> Iterator[Phase]:
    state, train = trainer.state.template, trainer.config.train
    standing, logits, samples = _standing(state, trainer.frozen), 0, []
    if isinstance(trainer, SFTTrainer):
        shares = trainer.mesh.shape["data"] * trainer.mesh.shape["fsdp"]
        rows = (train.micro_batch_size or train.batch_size) // shares
        logits = logits_bytes(trainer.model, rows * (trainer.width - 1))
        copy, length = size(found["convert"][0].outputs), trainer.config.sampling.response_length
        samples = [_phase("samples", standing, found["generate"], length, decoding_copy=copy)]
    yield _phase("update", standing, found["update"], gradients=_gradients(state), logits=logits)
    if "evaluate" in found:
        yield _phase("evaluation", standing, found["evaluate"])
    yield from samples


def _ppo(trainer: PPOTrainer, found: dict[str, list[Compiled]]) -> Iterator[Phase]:
    config, state, sampler = trainer.config, trainer.state.template, trainer.sampler
    standing = _standing(state, trainer.frozen, [judge.params for judge in trainer.scorer.models.values()])
    rows = trainer.mesh.shape["data"] * trainer.mesh.shape["fsdp"]
    length, columns = config.sampling.response_length, sampler.columns + config.sampling.response_length
    copy = size(found["convert"][0].outputs)
    yield _phase("copy for decoding", standing, found["convert"])
    drawn = [one for name in ("generate", "admit", "advance") for one in found.get(name, ())]
    model, slots = sampler.inference, min(sampler.slots or config.ppo.batch_size, config.ppo.batch_size)
    cache = jax.eval_shape(lambda: empty_cache(model, slots, columns))
    cached = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // rows
    known = {"decoding_copy": copy, "keys_and_values": cached}
    yield _phase("rollout", standing, drawn, length - 1, **known)
    batch = size(found["annotate"][0].outputs[0])
    scoring = [one for name in ("last_token_scores", "token_scores") for one in found.get(name, ())]
    if scoring:
        yield _phase("reward model", standing, scoring, batch=batch)
    yield _phase("annotation", standing, found["annotate"], batch=batch)
    logits = logits_bytes(trainer.model, config.ppo.micro_rows(config.ppo.batch_size) * length // rows)
    yield _phase("update", standing, found["update"], batch=batch, gradients=_gradients(state), logits=logits)


def process_bytes() -> int:
    """What this process holds by now: Python, libraries, and on a CPU compiled programs. 0 where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class Room:
    """What one device has."""

    free: int | None  # bytes for a run, None where the device does not say
    process: int  # bytes of `free` that go to the process itself

    def holds(self, needed: int) -> bool:
        return self.free is None or needed + self.process <= self.free


def room(devices: int) -> Room:
    """What there is now. A CPU's devices share its memory, and the process lies in it too."""
    free, host = memory.free_on_device(), jax.default_backend() == "cpu"
    held = process_bytes() if host else 0
    if free is None or not host:
        return Room(free, held)
    return Room((free + held) // devices, held // devices)


def text(plan: Plan, room: Room, rates: costs.Rates) -> str:
    """A table of what lies in memory in each phase, whether it fits, and the least time of a step."""
    names = [part for part in PARTS if any(phase.bytes.get(part) for phase in plan.phases)]
    heads = [phase.name for phase in plan.phases]
    widths = [max(len(head), 7) for head in heads]
    first = max(map(len, [*names, "GB on each device"]))

    def line(label: str, cells: list[str]) -> str:
        return "  ".join([label.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    def amount(value: int) -> str:
        return f"{value / 1e9:.2f}" if value >= 5e6 else "<0.01" if value else "-"

    seconds = [costs.least_seconds(phase.products, rates, plan.devices) for phase in plan.phases]
    peak = plan.peak
    process = f", and {room.process / 1e9:.2f} for the process" if room.process else ""
    have = "is not said by the device" if room.free is None else f"is {room.free / 1e9:.2f}"
    verdict = "" if room.free is None else ": it fits" if room.holds(peak.total) else ": it does NOT fit"
    speeds = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in sorted(rates.flops.items()))
    return "\n".join(
        (
            plan.about,
            "",
            line("GB on each device", heads),
            *(line(name, [amount(phase.bytes.get(name, 0)) for phase in plan.phases]) for name in names),
            line("together", [amount(phase.total) for phase in plan.phases]),
            "",
            f"most in {peak.name}: {peak.total / 1e9:.2f} GB{process}; what is free {have}{verdict}",
            f"a checkpoint is {plan.state / 1e9:.2f} GB, copied for as long as it is written in the background",
            "",
            line("least seconds", [f"{s:.2f}" if s >= 0.005 else "<0.01" if s else "-" for s in seconds]),
            f"together {sum(seconds):.3g} s at the least: FLOPs and bytes of the matrix products, at the {speeds} and "
            f"{rates.bytes / 1e9:.0f} GB/s that this device reached just now; nothing else counted",
        )
    )


@dataclass(frozen=True)
class Knob:
    """Keys to set, and what they cost."""

    keys: dict[str, Any]
    cost: str

    def __str__(self) -> str:
        return " ".join(
            f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in self.keys.items()
        )


def knobs(config: RunConfig, devices: int) -> list[Knob]:
    """What could be set to need less memory, of what is not set."""
    ppo = isinstance(config, PPOConfig)
    section, batch = ("ppo", config.ppo.batch_size) if ppo else ("train", config.train.batch_size)
    micro = config.ppo.micro_rows(batch) if ppo else config.train.micro_batch_size or batch
    shares = config.mesh.data * config.mesh.fsdp
    slower, rounded = "the same result, slower", "nearly the same result"
    found = [
        (micro > shares, {f"{section}.micro_batch_size": shares}, slower),
        (config.model.remat != "full", {"model.remat": "full"}, slower),
        (not config.lora.enabled, {"lora.enabled": True}, "adapters train, the model does not"),
        (
            config.lora.quantize == "none",
            {"lora.enabled": True, "lora.quantize": "nf4"},
            "adapters train, over a model in 4 bits",
        ),
        (config.lora.enabled and config.model.param_dtype != "bfloat16", {"model.param_dtype": "bfloat16"}, rounded),
        (
            devices > shares * config.mesh.tensor,
            {"mesh.fsdp": devices // config.mesh.tensor, "mesh.data": 1},
            "the same result",
        ),
    ]
    if ppo:
        quarter = max(shares, batch // 4)
        found += [
            (config.rollout.slots == 0 and quarter < batch, {"rollout.slots": quarter}, slower),
            (config.rollout.dtype != "int8", {"rollout.dtype": "int8"}, "samples from a slightly other policy"),
            (
                config.reference.dtype != "bfloat16" and not config.lora.enabled,
                {"reference.dtype": "bfloat16"},
                "a KL to the reference as it is rounded",
            ),
            (
                config.critic.trunk != "shared" and config.critic.init == "policy",
                {"critic.trunk": "shared"},
                "no critic of its own",
            ),
            (
                bool(config.reward.model) and config.reward.model_dtype != "bfloat16",
                {"reward.model_dtype": "bfloat16"},
                rounded,
            ),
        ]
    return [Knob(keys, cost) for applies, keys, cost in found if applies]


def savings(config: RunConfig, devices: int, say: Callable[[str], None]) -> list[tuple[Knob, Plan]]:
    """Every knob with the plan that it leads to, what helps most first; `say` hears a line about each."""
    found = []
    for knob in knobs(config, devices):
        try:
            turned = plan(replace(config, **knob.keys))
        except (JaxrlhfError, ValueError) as error:
            say(f"{knob}: cannot be had here: {str(error).splitlines()[0]}")
            continue
        say(f"{knob}: {turned.peak.total / 1e9:.2f} GB, most in {turned.peak.name} ({knob.cost})")
        found.append((knob, turned))
    return sorted(found, key=lambda pair: pair[1].peak.total)


def examine(config: RunConfig, *, every_knob: bool) -> bool:
    """Print the plan of a run, and what would help most if it does not fit; whether it fits."""
    made = plan(config)
    here = room(made.devices)
    dtypes = {product.dtype for phase in made.phases for product in phase.products}
    print(text(made, here, costs.measure(dtypes)), flush=True)
    fits = here.holds(made.peak.total)
    if fits and not every_knob:
        return fits
    print("\nwhat would need less, one at a time:", flush=True)
    best = [pair for pair in savings(config, jax.device_count(), print) if pair[1].peak.total < made.peak.total]
    print("\nwhat helps most:" if best else "nothing of it helps")
    for knob, turned in best[:3]:
        enough = "it would fit" if here.holds(turned.peak.total) else "not enough alone"
        print(
            f"  {knob}: {turned.peak.total / 1e9:.2f} GB instead of {made.peak.total / 1e9:.2f}; {enough}; {knob.cost}"
        )
    return fits
