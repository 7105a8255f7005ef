"""What `jaxrlhf plan` says: whether a run fits, how long a step takes at the least, and what would need less."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pydantic

from jaxrlhf import memory, runtime
from jaxrlhf.config import DType, GRPOConfig, PPOConfig, replace
from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.plan import PARTS, Plan, RunConfig, costs, plan


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
            f"all of it once: {sum(seconds):.3g} s at the least: FLOPs and bytes of the matrix products, at the "
            f"{speeds} and {rates.bytes / 1e9:.0f} GB/s that this device reached just now; nothing else counted",
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
    match config:
        case PPOConfig():
            section, batch, micro = "ppo", config.ppo.batch_size, config.ppo.micro_rows(config.ppo.batch_size)
        case GRPOConfig():
            section, batch, micro = "grpo", config.grpo.batch_size, config.grpo.micro_rows(config.grpo.batch_size)
        case _:
            section, batch = "train", config.train.batch_size
            micro = config.train.micro_batch_size or batch
    mesh = config.mesh
    shares = mesh.fsdp * (mesh.data or devices // (mesh.fsdp * mesh.tensor))
    slower, rounded, backend = "the same result, slower", "nearly the same result", jax.default_backend()

    def wide(dtype: DType) -> bool:
        return runtime.resolve_dtype(dtype, backend) != "bfloat16"

    found = [
        (micro > shares, {f"{section}.micro_batch_size": shares}, slower),
        (runtime.resolve_remat(config.model.remat, backend) != "full", {"model.remat": "full"}, slower),
        (not config.lora.enabled, {"lora.enabled": True}, "adapters train, the model does not"),
        (
            config.lora.quantize == "none",
            {"lora.enabled": True, "lora.quantize": "nf4"},
            "adapters train, over a model in 4 bits",
        ),
        (config.lora.enabled and wide(config.model.param_dtype), {"model.param_dtype": "bfloat16"}, rounded),
        (config.optim.state_dtype != "bfloat16", {"optim.state_dtype": "bfloat16"}, rounded),
        (
            mesh.fsdp * mesh.tensor < devices,
            {"mesh.data": 1, "mesh.fsdp": devices // mesh.tensor},
            "the same result; parameters are cut, not repeated",
        ),
    ]
    if isinstance(config, PPOConfig | GRPOConfig):
        quarter, apart = max(shares, batch // 4), backend != "cpu"  # whether the host is another memory
        found += [
            (config.rollout.slots == 0 and quarter < batch, {"rollout.slots": quarter}, slower),
            (apart and not config.optim.offload, {"optim.offload": True}, slower),
            (config.rollout.dtype != "int8", {"rollout.dtype": "int8"}, "samples from a slightly other policy"),
            (
                bool(config.reward.model) and wide(config.reward.model_dtype),
                {"reward.model_dtype": "bfloat16"},
                rounded,
            ),
        ]
        if isinstance(config, PPOConfig) or config.grpo.has_reference:
            found += [
                (apart and not config.reference.offload, {"reference.offload": True}, slower),
                (
                    wide(config.reference.dtype) and not config.lora.enabled,
                    {"reference.dtype": "bfloat16"},
                    "a KL to the reference as it is rounded",
                ),
            ]
    if isinstance(config, PPOConfig):
        own = config.critic.trunk != "shared" and config.critic.init == "policy"
        found.append((own, {"critic.trunk": "shared"}, "no critic of its own"))
    return [Knob(keys, cost) for applies, keys, cost in found if applies]


def savings(config: RunConfig, devices: int, say: Callable[[str], None]) -> list[tuple[Knob, Plan]]:
    """Every knob with the plan that it leads to, what helps most first; `say` hears a line about each."""
    found = []
    for knob in knobs(config, devices):
        try:
            turned = plan(replace(config, **knob.keys))
        except (JaxrlhfError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
            say(f"{knob}: cannot be had here: {reason.splitlines()[0]}")
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
