"""`jaxrlhf plan`: the memory of a run by phase and the matrix products of its steps, before it runs.

The programs are compiled for shapes, of the longest rows of the data: for the devices at hand, or for a target by the
compiler of its platform. XLA reports the memory that each program needs besides its arguments; the memory of everything
else follows from the shapes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.checkpoint.digest import leaves_by_name, total_bytes
from jaxrlhf.compilation import Compiled
from jaxrlhf.config import PPO, replace
from jaxrlhf.logprobs import logits_bytes
from jaxrlhf.plan import costs, hlo, topology
from jaxrlhf.plan.programs import SAMPLES, Programs, Traced, Trainer, abstract_trainer, compile_longest
from jaxrlhf.plan.targets import Target
from jaxrlhf.rollout.cache import cache_shapes
from jaxrlhf.training.distill.trainer import DistillTrainer
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.training.sft import SFTTrainer
from jaxrlhf.types import Params, TrainState

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
"""Kinds of memory, in the order in which they are printed."""
NOT_OF_A_STEP = ("evaluation", "samples", "other rollouts")
"""Phases that come once in many steps."""


@dataclass(frozen=True)
class Phase:
    """A phase of a step: bytes on one device by kind, and the programs that run in it."""

    name: str
    bytes: dict[str, int]
    programs: tuple[Compiled, ...]
    mesh: jax.sharding.Mesh
    trips: float = 1
    """Iterations of the loops that end by a condition on data."""
    times: int = 1

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def devices(self) -> int:
        return self.mesh.size

    @cached_property
    def islands(self) -> tuple[int, ...]:
        """On a target: the host (GPU) or slice (TPU) of each device."""
        return () if sharding.is_here(self.mesh) else tuple(map(topology.island, self.mesh.devices.flat))

    @cached_property
    def products(self) -> list[costs.Product]:
        """The matrix products of the traced programs, on all devices together."""
        found = (p for one in self.programs for p in costs.products(one.jaxpr, self.trips))
        return [p._replace(times=p.times * self.times) for p in found]

    @property
    def fits_compiler(self) -> bool:
        """True if every program was compiled: the TPU compiler refuses those that need more memory than there is."""
        return all(one.executable is not None for one in self.programs)

    @cached_property
    def texts(self) -> list[str] | None:
        """The HLO of the compiled programs; None where there is none, or jaxlib cannot read that of a newer libtpu."""
        try:
            return [one.executable.as_text() for one in self.programs] if self.fits_compiler else None
        except jax.errors.JaxRuntimeError:
            return None

    @cached_property
    def figures(self) -> hlo.Figures:
        """Work of each device in the compiled programs; none where `texts` is None."""
        found = hlo.Figures()
        for text in self.texts or ():
            found.add(hlo.read(text, self.devices, self.trips))
        return found.repeated(self.times)


@dataclass(frozen=True)
class Plan:
    """The memory and the work of a run."""

    about: str
    phases: tuple[Phase, ...]
    state: int  # bytes of a checkpoint on one device
    checkpoint: int  # bytes of a checkpoint, of all devices together
    devices: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def step(self) -> tuple[Phase, ...]:
        """The phases of which a step consists."""
        return tuple(phase for phase in self.phases if phase.name not in NOT_OF_A_STEP)

    def step_seconds(self, seconds: Callable[[Phase], float]) -> float:
        """The time of a step from those of its phases: rollouts on devices of their own run beside the others."""
        by_mesh = defaultdict[jax.sharding.Mesh, float](float)
        for phase in self.step:
            by_mesh[phase.mesh] += seconds(phase)
        return max(by_mesh.values())


def plan(config: RunConfig, target: Target | None = None) -> Plan:
    """Compile the programs of a run without loading a model, for a target if one is given.

    Raises what its trainer raises, and MissingCompiler where the compiler of the target is not installed.
    """
    if target is None:
        return plan_of(abstract_trainer(config))
    with topology.on(target):
        return plan_of(abstract_trainer(config))


def estimate(config: RunConfig, target: Target) -> Plan:
    """Plan a run for a target without its compiler: shapes and shardings are exact, what programs need besides is
    estimated from their traces, with plain attention (the kernel of cuDNN cannot be traced without cuDNN)."""
    config = replace(config, **{"model.attention": "plain"})
    with sharding.on_devices(topology.stand_ins(target), target.accelerator.memory):
        return plan_of(abstract_trainer(config), Traced())


def plan_of(trainer: Trainer, programs: Programs | None = None) -> Plan:
    """Compile the programs of a trainer, whose parameters may be shapes."""
    programs = compile_longest(trainer, programs)
    if isinstance(trainer, PPOTrainer | GRPOTrainer):
        phases = tuple(_on_policy_phases(trainer, programs))
    elif isinstance(trainer, DistillTrainer):
        phases = tuple(_distill_phases(trainer, programs))
    else:
        phases = tuple(_supervised_phases(trainer, programs))
    about = f"{trainer.config.model.path}, {trainer.total_steps} steps"
    if isinstance(trainer, PPOTrainer | GRPOTrainer) and trainer.ahead:
        about += f", the rollout on {trainer.ahead.sampler.mesh.size} devices of its own"
    devices = sum(mesh.size for mesh in {phase.mesh for phase in phases})
    state = trainer.state.template
    return Plan(about, phases, size(state), total_bytes(leaves_by_name(state)), devices)


def size(*trees: Any) -> int:
    """Bytes on one device of shapes with their shardings; an object that occurs twice counts once."""
    leaves = {id(leaf): leaf for tree in trees for leaf in jax.tree.leaves(tree)}
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves.values())


def beside(one: Compiled) -> int:
    """Bytes that a program needs besides its arguments: scratch, and results that alias no argument."""
    stats = one.memory
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def _standing(state: TrainState, *frozen: Any) -> dict[str, int]:
    """Memory that is in use all the time."""
    return {
        "trained parameters": size(state.params),
        "optimizer state": size(state.opt_state),
        "frozen models": size(frozen, state.reference),
        "kept rollouts": size(state.replay),
    }


def _gradients(state: TrainState) -> int:
    return sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))


def _phase(
    name: str,
    standing: dict[str, int],
    ran: list[Compiled],
    known: dict[str, int] | None = None,
    *,
    mesh: jax.sharding.Mesh,
    trips: float = 1,
    times: int = 1,
) -> Phase:
    """A phase of programs that run one after another, `times` times. `known` is the part of the memory they need
    besides their arguments that has a name."""
    known = known or {}
    rest = max(0, max((beside(one) for one in ran), default=0) - sum(known.values()))
    return Phase(name, {**standing, **known, "activations, rest": rest}, tuple(ran), mesh, trips, times)


def _supervised_phases(trainer: SFTTrainer | RewardTrainer | DPOTrainer, found: Programs) -> Iterator[Phase]:
    state, train = trainer.state.template, trainer.config.train
    standing, known = _standing(state, trainer.frozen), {"gradients": _gradients(state)}
    if not isinstance(trainer, RewardTrainer):
        rows = (train.micro_batch_size or train.batch_size) // sharding.row_shards(trainer.mesh)
        known["logits"] = logits_bytes(trainer.model, rows * (trainer.width - 1))
    phase = partial(_phase, mesh=trainer.mesh)
    yield phase("update", standing, found["update"], known)
    if scoring := found.get("evaluate") or found.get("score"):
        yield phase("evaluation", standing, scoring[-1:])
    if trainer.samples:
        yield _samples_phase(standing, trainer.samples, found)


def _distill_phases(trainer: DistillTrainer, found: Programs) -> Iterator[Phase]:
    state, phase = trainer.state.template, partial(_phase, mesh=trainer.mesh)
    standing = _standing(state, trainer.frozen, trainer.teacher)
    if trainer.config.distill.lmbda:
        yield _rollout_phase("rollout", standing, found["convert"][0].outputs, trainer.sampler, found)
    yield phase("update", standing, found["update"], {"gradients": _gradients(state)})
    if scoring := found.get("evaluate"):
        yield phase("evaluation", standing, scoring)
    if trainer.samples:
        yield _samples_phase(standing, trainer.samples, found)


def _on_policy_phases(trainer: PPOTrainer | GRPOTrainer, found: Programs) -> Iterator[Phase]:
    config, state, ahead = trainer.config, trainer.state.template, trainer.ahead
    phase = partial(_phase, mesh=trainer.mesh)
    settings, length = config.settings, config.sampling.response_length
    batch = settings.batch_size
    shares = sharding.row_shards(trainer.mesh)
    reward_models = [model.params for model in trainer.scorer.models.values()]
    annotating = learning = standing = _standing(state, trainer.frozen, reward_models)
    apart = sharding.platform(trainer.mesh) != "cpu"  # whether the host has memory of its own
    if config.optim.offload and apart:  # on the device for the update alone
        annotating = standing = {**standing, "optimizer state": 0}
    if config.reference.offload and apart:  # on the device for annotation alone
        others = size([part for role, part in trainer.frozen.items() if role != "reference"], reward_models)
        standing, learning = ({**parts, "frozen models": others} for parts in (standing, learning))

    yield phase("copy for decoding", standing, found["convert"][:1])
    copy = found["convert"][0].outputs
    if ahead:
        moved = sharding.with_shardings(copy, ahead.shardings(copy))
        yield _rollout_phase("rollout", {}, moved, ahead.sampler, found)
    if not ahead or len(found["convert"]) > 1:
        name = "other rollouts" if ahead else "rollout"
        yield _rollout_phase(name, standing, found["convert"][-1].outputs, trainer.sampler, found)
    experience = {"batch": size(found["annotate"][0].outputs[0])}
    if scoring := [one for name in ("last_token_scores", "token_scores_jit") for one in found.get(name, ())]:
        rows = min(model.micro_batch_size for model in trainer.scorer.models.values())
        yield phase("reward model", standing | experience, scoring, times=-(-batch // rows))
    yield phase("annotation", annotating | experience, found["annotate"])
    replay = settings.replay if isinstance(settings, PPO) else 0  # a pass over each kept experience, one at a time
    if replay:
        experience = {"batch": 2 * experience["batch"]}
    logits = logits_bytes(trainer.model, settings.micro_rows(batch) // shares * length)
    known = {"gradients": _gradients(state), "logits": logits}
    yield phase("update", learning | experience, found["update"], known, times=1 + replay)


def _samples_phase(standing: dict[str, int], samples: Samples, found: Programs) -> Phase:
    """Drawing samples for the log."""
    convert, *drawn = found[SAMPLES]
    own = type(found)({one.name: [one] for one in drawn})
    return _rollout_phase("samples", standing, convert.outputs, samples, own)


def _rollout_phase(
    name: str, standing: dict[str, int], copy: Params, sampler: Sampler | Samples, found: Programs
) -> Phase:
    """The rollout on the devices of a sampler, which hold the copy and `standing`."""
    length, slots = sampler.sampling.response_length, min(sampler.slots or sampler.batch, sampler.batch)
    held = {"decoding copy": size(copy)}
    cache = cache_shapes(sampler.decoder, slots, sampler.columns + length, sampler.mesh)
    cached = {"keys and values": size(cache)}
    drawn = [one for program in ("generate", "admit", "advance") for one in found.get(program, ())]
    drawn = [one for one in drawn if jax.tree.leaves(one.outputs)[0].sharding.mesh == sampler.mesh]
    if "advance" in found and not isinstance(found, Traced):  # an argument of that program, which it writes to
        held, cached = held | cached, {}
    times = -(-sampler.batch // slots)
    # programs with a cache that grows draw about as many tokens each
    trips = (length - 1) / max(1, sum(one.name in ("generate", "advance") for one in drawn))
    return _phase(name, standing | held, drawn, cached, mesh=sampler.mesh, trips=trips, times=times)
