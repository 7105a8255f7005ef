"""The programs of a run, compiled for the longest rows of its data without loading a model."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf import sharding, weights
from jaxrlhf.compilation import Compiled, compile_shapes
from jaxrlhf.config import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import costs
from jaxrlhf.rewards.sources.model import sequence_scores_jit, token_scores_jit
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.inference_copy import convert, copy_shardings
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.training import sft
from jaxrlhf.training.distill import update as distill_update
from jaxrlhf.training.distill.trainer import DistillTrainer
from jaxrlhf.training.dpo import update as dpo_update
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.on_policy.ahead import Ahead
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward import trainer as reward
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.samples import Samples
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.training.sft import SFTTrainer
from jaxrlhf.types import Batch, Params, Rollout

Trainer = SFTTrainer | RewardTrainer | DPOTrainer | PPOTrainer | GRPOTrainer | DistillTrainer
SAMPLES = "samples"
"""Name of the programs that draw samples for the log, the conversion of the parameters first."""


class Memory(NamedTuple):
    """Bytes of a program on one device where there is no CompiledMemoryStats of jax."""

    temp_size_in_bytes: int
    output_size_in_bytes: int = 0
    alias_size_in_bytes: int = 0


class Programs(dict[str, list[Compiled]]):
    """Compiled programs by the name of the function."""

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        """Add a program; returns the shapes of its results."""
        try:
            compiled = compile_shapes(program, *args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            needed = _too_large(str(error))
            if needed is None:
                raise
            compiled = _traced(program, args, kwargs, lambda *_: needed)
        self.setdefault(compiled.name, []).append(compiled)
        return compiled.outputs


class Traced(Programs):
    """Programs that are traced but not compiled, for devices whose compiler is not at hand."""

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        traced = _traced(program, args, kwargs, lambda jaxpr, devices: costs.live_bytes(jaxpr) // devices)
        self.setdefault(traced.name, []).append(traced)
        return traced.outputs


def _too_large(error: str) -> int | None:
    """Bytes that a program needs on one device besides its arguments, according to the TPU compiler's refusal; None for
    other errors."""
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    found = re.search(r"\bprogram +([\d.]+)([KMGT])|temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT])", error)
    number, unit = filter(None, found.groups()) if found else ("", "")
    return int(float(number) * 1024 ** " KMGT".index(unit)) if found else None


def _traced(program: Any, args: Any, kwargs: Any, needed: Callable[[Any, int], int]) -> Compiled:
    """A program that has no executable. The results of `convert` have the shardings of an inference copy, those of
    others are split by rows."""
    traced = program.trace(*args, **kwargs)
    places = (getattr(x, "sharding", None) for x in jax.tree.leaves((args, kwargs)))
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    mesh = next(mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh))

    def by_rows(x: Any) -> NamedSharding:
        rows = x.shape and x.shape[0] % sharding.row_shards(mesh) == 0
        return NamedSharding(mesh, sharding.ROWS if rows else PartitionSpec())

    if program is convert:
        _, _, inference, _, axes = args
        to = copy_shardings(traced.out_info, inference, mesh, axes)
    else:
        to = jax.tree.map(by_rows, traced.out_info)
    memory = Memory(needed(traced.jaxpr, mesh.size))
    outputs = sharding.with_shardings(traced.out_info, to)
    return Compiled(program.__name__.lstrip("_"), traced.jaxpr, memory, outputs, None)


def abstract_trainer(config: RunConfig, reward: Callable[..., Any] | None = None) -> Trainer:
    """The trainer of a run with shapes in place of parameters. Raises what the trainer raises."""
    with weights.abstract_weights():
        match config:
            case GRPOConfig():
                return GRPOTrainer(config, reward)
            case PPOConfig():
                return PPOTrainer(config, reward)
            case RewardConfig():
                return RewardTrainer(config)
            case DPOConfig():
                return DPOTrainer(config)
            case SFTConfig():
                return SFTTrainer(config)
            case DistillConfig():
                return DistillTrainer(config)


def compile_longest(trainer: Trainer, programs: Programs | None = None) -> Programs:
    """Compile every program of the run for the longest rows of its data. The trainer's parameters may be shapes.

    Raises ConfigError for an on-policy run without prompts.
    """
    programs = Programs() if programs is None else programs
    match trainer:
        case PPOTrainer() | GRPOTrainer():
            _compile_on_policy(trainer, programs)
        case DPOTrainer():
            _compile_dpo(trainer, programs)
        case SFTTrainer() | RewardTrainer():
            _compile_supervised(trainer, programs)
        case DistillTrainer():
            _compile_distill(trainer, programs)
    return programs


def _compile_supervised(trainer: SFTTrainer | RewardTrainer, programs: Programs) -> None:
    module = sft if isinstance(trainer, SFTTrainer) else reward
    state, train = trainer.state.template, trainer.config.train
    batch = trainer.collate(batching.longest(trainer.rows.train, train.batch_size))
    programs.compile(module.update, state, trainer.frozen, batch, trainer.key, spec=trainer.spec)
    params = {**trainer.frozen, **state.params[trainer.role]}
    held_out = batching.longest(trainer.rows.validation, train.eval_batch_size)
    for batch in trainer.eval_batches(held_out):
        programs.compile(module.evaluate, params, batch, model=trainer.model)
    _compile_samples(trainer.samples, params, trainer.key, programs)


def _compile_dpo(trainer: DPOTrainer, programs: Programs) -> None:
    state, train, rows = trainer.state.template, trainer.config.train, trainer.rows
    longest = batching.longest(rows.train, train.batch_size)
    batch = trainer.preferences(longest, trainer.reference[[0] * len(longest)])
    programs.compile(dpo_update.update, state, trainer.frozen, batch, trainer.key, spec=trainer.spec)
    policy = {**trainer.frozen, **state.params["policy"]}
    scored = [] if trainer.reference_known else [(trainer.frozen or policy, rows.train)]
    for params, part in [*scored, (policy, rows.validation)]:
        if part:
            pairs = trainer.collate(batching.longest(part, train.eval_batch_size))
            programs.compile(dpo_update.score, params, pairs, model=trainer.model, settings=trainer.config.dpo)
    _compile_samples(trainer.samples, policy, trainer.key, programs)


def _compile_distill(trainer: DistillTrainer, programs: Programs) -> None:
    state, train, lmbda = trainer.state.template, trainer.config.train, trainer.config.distill.lmbda
    policy = {**trainer.frozen, **state.params["policy"]}
    batches, held_out = [], batching.longest(trainer.rows.validation, train.eval_batch_size)
    if lmbda > 0:
        rows = batching.longest(trainer.prompts(trainer.rows.train), train.batch_size)
        rollout = _compile_rollout(trainer, None, policy, rows, programs)
        batches.append(Batch(rollout.tokens, rollout.mask, rollout.mask))
    if lmbda < 1:
        batches.append(trainer.collate(batching.longest(trainer.rows.train, train.batch_size)))
    for batch in batches:
        args = state, trainer.frozen, trainer.teacher, batch, trainer.key
        programs.compile(distill_update.update, *args, spec=trainer.spec)
    if held_out:
        of_prompts = jax.tree.map(
            lambda x: sharding.rows_shape(jax.ShapeDtypeStruct((len(held_out), *x.shape[1:]), x.dtype), trainer.mesh),
            batches[0],
        )
        batch = trainer.collate(held_out) if lmbda < 1 else of_prompts
        static = {"model": trainer.model, "objective": trainer.objective}
        programs.compile(distill_update.evaluate, policy, trainer.teacher, batch, **static)
    _compile_samples(trainer.samples, policy, trainer.key, programs)


def _compile_samples(samples: Samples | None, params: Params, key: jax.Array, programs: Programs) -> None:
    if samples is None:
        return
    own = copy.copy(programs)  # of the same kind
    own.clear()
    decoder_params = own.compile(convert, params, *samples.conversion)
    for program, args in engine.chunk_programs(decoder_params, samples.decoding, samples.prompts, key, 1, samples.mesh):
        own.compile(program, *args)
    programs[SAMPLES] = [one for compiled in own.values() for one in compiled]


def _compile_on_policy(trainer: PPOTrainer | GRPOTrainer, programs: Programs) -> None:
    if not trainer.data:
        raise ConfigError("data.path is empty: how long prompts are decides what an update needs; give a file of them")
    sampling, size = trainer.config.sampling, trainer.config.settings.batch_size
    rows = batching.longest(trainer.data.train, size)
    policy = {**trainer.frozen["policy"], **trainer.state.template.params["policy"]}
    rollout = _compile_rollout(trainer, trainer.ahead, policy, rows, programs)
    if trainer.ahead and rolls_out_where_it_trains(trainer):
        _compile_rollout(trainer, None, policy, rows, programs)
    columns = trainer.sampler.columns + sampling.response_length
    for component in trainer.scorer.components.values():
        model = trainer.scorer.models.get(component.name)
        if model is not None:
            program = token_scores_jit if component.per_token else sequence_scores_jit
            programs.compile(program, model.params, model.model, *model.padded_rows(columns))
    annotate, update = trainer.programs
    experience, _ = programs.compile(annotate, *trainer.annotate_arguments(rollout), spec=trainer.spec)
    programs.compile(update, *trainer.update_arguments(experience), spec=trainer.spec)


def rolls_out_where_it_trains(trainer: PPOTrainer | GRPOTrainer) -> bool:
    """Return True if devices that train roll out in spite of `rollout.devices`: for validation, and in GRPO to refill
    groups or for greedy responses."""
    config = trainer.config
    drawn = isinstance(config, GRPOConfig) and (config.grpo.refills or config.grpo.recipe.advantage == "greedy")
    return bool(trainer.validator.rows or drawn)


def _compile_rollout(
    trainer: PPOTrainer | GRPOTrainer | DistillTrainer,
    ahead: Ahead | None,
    policy: Params,
    rows: Sequence[Any],
    programs: Programs,
) -> Rollout:
    """Compile the rollout of `rows`, on devices of its own if `ahead` is given; returns its shapes on those that
    train."""
    sampler = ahead.sampler if ahead else trainer.sampler
    group = sampler.shared(len(rows))
    prompts = sampler.prompts(rows, group)
    decoder_params = programs.compile(convert, policy, *(ahead or sampler).conversion)
    if ahead:
        decoder_params = sharding.with_shardings(decoder_params, ahead.shardings(decoder_params))
    decoding = Decoding(sampler.decoder, sampler.sampling, *sampler.stops)
    if 0 < sampler.slots < len(rows):
        queue = PromptQueue(sampler.prompts_on_host(rows, group), sampler.slots, group, sampler.columns)
        ran = engine.slot_programs(decoder_params, decoding, queue, jax.random.key(0), sampler.mesh)
    else:
        ran = engine.chunk_programs(decoder_params, decoding, prompts, jax.random.key(0), group, sampler.mesh)
    for program, args in ran:
        programs.compile(program, *args)
    return trainer.sampler.shapes(rows)
