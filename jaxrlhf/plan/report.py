"""Output of `jaxrlhf plan`: memory per phase, whether it fits, minimum time of a step, and options that save memory."""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import memory, runtime, sharding
from jaxrlhf.checkpoint import room
from jaxrlhf.config import DType, GRPOConfig, PPOConfig, replace
from jaxrlhf.errors import JaxrlhfError, first_line
from jaxrlhf.plan import PARTS, Phase, Plan, RunConfig, costs, estimate, plan, roofline, topology
from jaxrlhf.plan.targets import Target
from jaxrlhf.training.best import checkpoints_at_once


def process_bytes() -> int:
    """Resident memory of this process (Python, libraries, compiled CPU programs); 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class AvailableMemory:
    """Memory of one device that a run can use."""

    free: int | None  # bytes, None if the device does not report it
    process: int  # bytes of `free` that the process itself takes

    def fits(self, needed: int) -> bool:
        return self.free is None or needed + self.process <= self.free


def available_memory(devices: int) -> AvailableMemory:
    """Measure the available memory. CPU devices share the host's memory with each other and with the process."""
    free, is_cpu = memory.free_on_device(), sharding.platform() == "cpu"
    process = process_bytes() if is_cpu else 0
    if free is None or not is_cpu:
        return AvailableMemory(free, process)
    return AvailableMemory((free + process) // devices, process // devices)


class _Table:
    """Lines of a table with a column for each phase."""

    def __init__(self, phases: Sequence[Phase], labels: list[str]):
        self.widths = [max(len(phase.name), 7) for phase in phases]
        self.first = max(map(len, labels))

    def line(self, label: str, cells: Iterable[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True))
        return "  ".join([label.ljust(self.first), *cells])


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}" if value >= 5e6 else "<0.01" if value else "-"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 else "<0.01" if value else "-"


def _memory(plan: Plan, labels: Iterable[str] = ()) -> tuple[_Table, list[str]]:
    parts = [part for part in PARTS if any(phase.bytes.get(part) for phase in plan.phases)]
    table = _Table(plan.phases, [*parts, "GB on each device", *labels])
    return table, [
        table.line("GB on each device", [phase.name for phase in plan.phases]),
        *(table.line(part, [_gigabytes(phase.bytes.get(part, 0)) for phase in plan.phases]) for part in parts),
        table.line("total", [_gigabytes(phase.total) for phase in plan.phases]),
    ]


def text(plan: Plan, available: AvailableMemory, rates: costs.Rates) -> str:
    """A table of memory by phase, whether the run fits, and the minimum time of a step."""
    seconds = [costs.least_seconds(phase.products, rates, phase.devices) for phase in plan.phases]
    peak = plan.peak
    process = f", and {available.process / 1e9:.2f} for the process" if available.process else ""
    if available.free is None:
        verdict = "the device does not report its free memory"
    else:
        fits = "it fits" if available.fits(peak.total) else "it does NOT fit"
        verdict = f"{available.free / 1e9:.2f} GB are free: {fits}"
    speeds = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in sorted(rates.flops.items()))
    table, lines = _memory(plan)
    return "\n".join(
        (
            plan.about,
            "",
            *lines,
            "",
            f"peak in {peak.name}: {peak.total / 1e9:.2f} GB{process}; {verdict}",
            f"a checkpoint is {plan.checkpoint / 1e9:.2f} GB; a background save holds a copy of it in memory",
            "",
            table.line("minimum seconds", map(_seconds, seconds)),
            f"all phases once: at least {sum(seconds):.3g} s, counting only matrix products at the {speeds} and "
            f"{rates.bytes / 1e9:.0f} GB/s just measured on this device",
        )
    )


PRODUCTS, NEAR, FAR = "seconds of products", "seconds of sending", "seconds of network"


def target_text(plan: Plan, target: Target, compiler: str) -> str:
    """The tables of `text` for devices that are not here, and the collectives of the compiled programs. `compiler` says
    where the figures come from."""
    one, phases = target.accelerator, plan.phases
    figures = [phase.figures for phase in phases]
    least = [roofline.least(phase, target) for phase in phases]
    kinds = sorted({c.kind for figure in figures for c in figure.collectives})
    table, lines = _memory(plan, [*kinds, PRODUCTS])
    peak, usable = plan.peak, one.memory
    fits = "it fits" if peak.total <= usable else "it does NOT fit"
    total = plan.step_seconds(lambda phase: roofline.least(phase, target).total)
    used = roofline.utilisation(plan.step, total, plan.devices, target)
    lines = [f"{plan.about}, on {plan.devices} x {one.title} ({target}); {compiler}", "", *lines, ""]
    if plan.devices < target.devices:
        used_part = f"the mesh uses {plan.devices} of the {target.devices} devices"
        lines[1:1] = [f"{used_part}; a mesh with an axis of -1 would use all that the others leave"]
    if any(phase.fits_compiler for phase in phases):
        if refused := [phase.name for phase in phases if not phase.fits_compiler]:
            lines += [f"the compiler refused {', '.join(refused)}: it needs more memory than the device has", ""]
        if unread := [phase.name for phase in phases if phase.fits_compiler and phase.texts is None]:
            reason = "jaxlib cannot read what this libtpu compiled; install the version that jax[tpu] names"
            lines += [f"the collectives of {', '.join(unread)} are not known: {reason}", ""]
    lines += [
        f"peak in {peak.name}: {peak.total / 1e9:.2f} GB of {usable / 1e9:.2f} GB that a run can use: {fits}",
        f"a checkpoint is {plan.checkpoint / 1e9:.2f} GB, {plan.state / 1e9:.2f} GB of each device",
        "",
    ]
    if any(phase.texts for phase in phases):
        traffic = [roofline.traffic(phase.figures, phase.islands) for phase in phases]

        def known(cells: Iterable[str]) -> list[str]:
            """Cells with a question mark for phases whose programs cannot be read."""
            return [cell if phase.texts is not None else "?" for phase, cell in zip(phases, cells, strict=True)]

        lines.append(table.line("collectives", [phase.name for phase in phases]))
        for kind in kinds:
            times = (sum(c.times for c in figure.collectives if c.kind == kind) for figure in figures)
            lines.append(table.line(kind, known(f"{count:.0f}" if count else "-" for count in times)))
        lines.append(table.line("GB sent by each", known(_gigabytes(one.near + one.far) for one in traffic)))
        if any(one.far for one in traffic):
            lines.append(table.line("of it by network", known(_gigabytes(one.far) for one in traffic)))
        lines.append("")
    lines.append(table.line("at least", [phase.name for phase in phases]))
    lines.append(table.line(PRODUCTS, (_seconds(bound.products) for bound in least)))
    if any(bound.near for bound in least):
        lines.append(table.line(NEAR, (_seconds(bound.near) for bound in least)))
    if any(bound.far for bound in least):
        lines.append(table.line(FAR, (_seconds(bound.far) for bound in least)))
    if any(figure.cycles for figure in figures):
        lines.append(table.line("TPU's estimate", (_seconds(figure.cycles / one.clock) for figure in figures)))
    place, peak = "host" if one.platform == "gpu" else "slice", one.flops["bfloat16"] / 1e12
    lines.append(
        f"a step takes at least {total:.3g} s, {used:.0%} of the bfloat16 peak (MFU); of each phase the longest "
        f"counts: products at {peak:.0f} TFLOP/s in bfloat16 and {one.bandwidth / 1e9:.0f} GB/s of memory, sending at "
        f"{one.link / 1e9:.0f} GB/s in a {place} and {one.network / 1e9:.3g} GB/s beyond it. These "
        "speeds are published ones; nothing has run"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Knob:
    """Options that save memory, and their side effect."""

    keys: dict[str, Any]
    effect: str

    def __str__(self) -> str:
        return " ".join(
            f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in self.keys.items()
        )


def knobs(config: RunConfig, devices: int, backend: sharding.Platform) -> list[Knob]:
    """The memory-saving options that the config does not use yet, on devices of this platform."""
    if isinstance(config, PPOConfig | GRPOConfig):
        section, batch = config.method, config.settings.batch_size
        micro, devices = config.settings.micro_rows(batch), devices - config.rollout.devices
    else:
        section, batch = "train", config.train.batch_size
        micro = config.train.micro_batch_size or batch
    mesh, lora = config.mesh, config.lora
    sizes = sharding.mesh_sizes(mesh, devices)
    row_shards = math.prod(sizes[axis] for axis in sharding.ROW_AXES)
    slower, rounded, adapters = "same result, slower", "nearly the same result", "trains adapters, not the model"

    def is_wide(dtype: DType) -> bool:
        return runtime.resolve_dtype(dtype, backend) != "bfloat16"

    may_keep_products = (
        config.model.remat == "auto"
        and section == "train"
        and not lora.enabled
        and runtime.keeps_products(backend, "float32", 1, 1)
    )
    candidates: list[tuple[bool, dict[str, Any], str]] = [
        (micro > row_shards, {f"{section}.micro_batch_size": row_shards}, slower),
        (
            runtime.resolve_remat(config.model.remat, backend) != "full" or may_keep_products,
            {"model.remat": "full"},
            slower,
        ),
        (not lora.enabled, {"lora.enabled": True}, adapters),
        (lora.quantize == "none", {"lora.enabled": True, "lora.quantize": "nf4"}, f"{adapters}, on 4-bit weights"),
        (lora.enabled and is_wide(config.model.param_dtype), {"model.param_dtype": "bfloat16"}, rounded),
        (config.optim.state_dtype != "bfloat16", {"optim.state_dtype": "bfloat16"}, rounded),
        (
            sizes["fsdp"] * sizes["tensor"] < devices,
            {
                **({"mesh.replica": 1} if mesh.replica != 1 else {}),
                "mesh.data": 1,
                "mesh.fsdp": devices // sizes["tensor"],
            },
            "same result; parameters are sharded instead of replicated",
        ),
    ]
    if isinstance(config, PPOConfig | GRPOConfig):
        slots, can_offload = max(row_shards, batch // 4), backend != "cpu"
        candidates += [
            (config.rollout.slots == 0 and slots < batch, {"rollout.slots": slots}, slower),
            (can_offload and not config.optim.offload, {"optim.offload": True}, slower),
            (config.rollout.dtype != "int8", {"rollout.dtype": "int8"}, "samples from a slightly different policy"),
            (
                bool(config.reward.model) and is_wide(config.reward.model_dtype),
                {"reward.model_dtype": "bfloat16"},
                rounded,
            ),
        ]
        if isinstance(config, PPOConfig) or config.grpo.has_reference:
            candidates += [
                (can_offload and not config.reference.offload, {"reference.offload": True}, slower),
                (
                    is_wide(config.reference.dtype) and not lora.enabled,
                    {"reference.dtype": "bfloat16"},
                    "KL to a rounded reference",
                ),
            ]
    if isinstance(config, PPOConfig):
        has_own_trunk = config.critic.trunk != "shared" and config.critic.init == "policy"
        candidates.append((has_own_trunk, {"critic.trunk": "shared"}, "the critic shares the policy's trunk"))
    return [Knob(keys, effect) for applies, keys, effect in candidates if applies]


def savings(config: RunConfig, devices: int, target: Target | None = None) -> list[tuple[Knob, Plan]]:
    """Plan the run with each knob alone, and print a line for each. Returns the plans by peak memory, lowest first."""
    plans = []
    for knob in knobs(config, devices, target.accelerator.platform if target else sharding.platform()):
        try:
            changed = plan(replace(config, **knob.keys), target)
        except (JaxrlhfError, ValueError) as error:
            print(f"{knob}: not possible here: {first_line(error)}", flush=True)
            continue
        print(f"{knob}: {changed.peak.total / 1e9:.2f} GB, peak in {changed.peak.name} ({knob.effect})", flush=True)
        plans.append((knob, changed))
    return sorted(plans, key=lambda pair: pair[1].peak.total)


def disk(plan: Plan, config: RunConfig, *, fresh: bool = False) -> list[str]:
    """Lines about the checkpoints that the run has on disk at once, and the room there. `fresh`: not those of an
    earlier start, which stay beside them."""
    folder, number = Path(config.run_dir) / "checkpoints", checkpoints_at_once(config)
    there = 0 if fresh or not folder.is_dir() else sum(path.name.isdecimal() for path in folder.iterdir())
    best = " and the best" if number > config.checkpoint.keep + 1 else ""
    line = (
        f"up to {number} of them are on disk at once (the last {config.checkpoint.keep}{best}, and the next while it "
        f"is written): {number * room.needed(plan.checkpoint) / 1e9:.2g} GB"
    )
    with contextlib.suppress(OSError):
        line += f"; {room.free(folder) / 1e9:.2g} GB are free on the disk of {config.run_dir}"
    return [line, *filter(None, [room.shortage(folder, plan.checkpoint, number, there)])]


def examine(config: RunConfig, *, every_knob: bool) -> bool:
    """Print the plan of a run, with the options that save the most memory if it does not fit or `every_knob`. Returns
    True if it fits."""
    current = plan(config)
    available = available_memory(current.devices)
    dtypes = {product.dtype for phase in current.phases for product in phase.products}
    print("\n".join([text(current, available, costs.measure(dtypes)), *disk(current, config)]), flush=True)
    fits = available.fits(current.peak.total)
    if every_knob or not fits:
        _show_savings(config, current, available, None)
    return fits


def examine_target(config: RunConfig, target: Target, *, every_knob: bool) -> bool:
    """`examine` for devices that are not here. Without the compiler of the target, the plan is an estimate, which is
    said. Returns True if the run fits."""
    try:
        current, compiler = plan(config, target), "compiled by XLA for it"
    except topology.MissingCompiler as error:
        print(f"estimated from shapes, because {error}\n", flush=True)
        current, compiler = estimate(config, target), "not compiled: activations are estimated, collectives unknown"
    available = AvailableMemory(target.accelerator.memory, 0)
    print(target_text(current, target, compiler), flush=True)
    if every_knob:
        _show_savings(config, current, available, target)
    return available.fits(current.peak.total)


def _show_savings(config: RunConfig, current: Plan, available: AvailableMemory, target: Target | None) -> None:
    print("\noptions that save memory, each on its own:", flush=True)
    plans = savings(config, target.devices if target else jax.device_count(), target)
    best = [(knob, changed) for knob, changed in plans if changed.peak.total < current.peak.total]
    print("\nlargest savings:" if best else "none of them helps")
    for knob, changed in best[:3]:
        enough = "it would fit" if available.fits(changed.peak.total) else "not enough alone"
        print(
            f"  {knob}: {changed.peak.total / 1e9:.2f} GB instead of {current.peak.total / 1e9:.2f}; {enough}; "
            f"{knob.effect}"
        )
