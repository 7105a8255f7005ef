"""`--dry-run` of a trainer: what a run would do, need and write. Reads no weights and writes nothing of the run; the
speed of the disk is measured with a file that has no name."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.checkpoint import room
from jaxrlhf.config import replace
from jaxrlhf.config import text as config_text
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.labelled import LabelledRow, ScoredRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.doctor import loss_mask
from jaxrlhf.errors import counted, visible
from jaxrlhf.metrics.console import duration
from jaxrlhf.plan import Phase, Plan, costs, plan_of
from jaxrlhf.plan.programs import Trainer, abstract_trainer
from jaxrlhf.plan.report import available_memory, disk
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.training.timing import interruptible_timings

ROWS = 3  # of the first batch
TOKENS = 300  # of a row


def show(config: RunConfig, *, fresh: bool = False, colour: bool = False) -> None:
    """Print the resolved config, the run in words, its first batch, the memory and the least time it needs, and the
    files it would write. Raises what its trainer raises; RewardError at the end if a server or judge is down."""
    trainer = abstract_trainer(replace(config, **{"model.merged_path": ""}))  # an error comes without the long config
    print(visible(config_text.dump(config)))
    print(visible(trainer.summary()))
    print("\n".join(first_batch(trainer, colour=colour)), flush=True)
    plan = plan_of(trainer)
    rates = costs.measure({product.dtype for phase in plan.step for product in phase.products})
    print("\n".join(needs(plan, rates, trainer.total_steps, config)), flush=True)
    print("\n".join(checkpoints(plan, rates, config, fresh=fresh)), flush=True)
    print("\n".join(writes(config, fresh=fresh)), flush=True)
    if isinstance(trainer, PPOTrainer | GRPOTrainer) and trainer.data:
        trainer.scorer.probe_rows(trainer.data.train)


def first_batch(trainer: Trainer, *, colour: bool) -> Iterator[str]:
    """The first rows of the first batch, as text, with what is learnt marked."""
    if isinstance(trainer, PPOTrainer | GRPOTrainer):
        if trainer.data is None:
            return
        prompts = list({row.index: row for row in trainer.prompts(0)}.values())
        yield f"\nfirst batch, {len(prompts)} prompts; the responses to them are sampled, and all of each is learnt"
        yield from _rows(prompts, trainer.tokenizer, colour=colour)
    else:
        rows = [trainer.rows.train[i] for i in trainer.order(0)]
        yield f"\nfirst batch, {len(rows)} rows, {loss_mask.legend(colour)}"
        yield from _rows(rows, trainer.tokenizer, colour=colour)


def _rows(rows: list[Any], tokenizer: Tokenizer, *, colour: bool) -> Iterator[str]:
    for number, row in enumerate(rows[:ROWS], 1):
        if isinstance(row, PromptRow):
            yield f"{number}: {_text(row.tokens, [False] * len(row.tokens), tokenizer, colour=colour)}"
            continue
        texts = batching.texts(row)
        names = ["chosen", "rejected"] if len(texts) == 2 else [f"rank {k + 1}" for k in range(len(texts))]
        if len(texts) == 1:
            names = ["good" if row.label else "bad"] if isinstance(row, LabelledRow) else [""]
            names = [f"score {row.score:g}"] if isinstance(row, ScoredRow) else names
        for name, text in zip(names, texts, strict=True):
            label = f"{number} {name}".strip()
            yield f"{label}: {_text(text.tokens, text.loss_mask, tokenizer, colour=colour)}"
    if len(rows) > ROWS:
        yield f"... and {len(rows) - ROWS} more"


def _text(tokens: list[int], mask: list[bool], tokenizer: Tokenizer, *, colour: bool) -> str:
    text = loss_mask.marked(tokens[:TOKENS], mask[:TOKENS], tokenizer, colour=colour)
    return text + (f" ... ({len(tokens) - TOKENS} more tokens)" if len(tokens) > TOKENS else "")


def needs(plan: Plan, rates: costs.Rates, steps: int, config: RunConfig) -> Iterator[str]:
    """The peak of memory, and the least time of a step and of all, with a warning if a step, without its rollout
    where a signal to stop is seen in it, takes longer than `checkpoint.grace`."""
    available, peak = available_memory(plan.devices), plan.peak
    free = "the device does not report its free memory"
    if available.free is not None:
        process = f", and {available.process / 1e9:.2f} GB for the process" if available.process else ""
        fits = "it fits" if available.fits(peak.total) else "it does NOT fit"
        free = f"{available.free / 1e9:.2f} GB are free{process}: {fits}"
    yield f"\nmemory: at most {peak.total / 1e9:.2g} GB on each device, in the phase {peak.name}; {free}"
    yield "`jaxrlhf plan` shows the parts, and what saves memory"
    least = functools.partial(_least_seconds, rates=rates)
    seconds = plan.step_seconds(least)
    speeds = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in sorted(rates.flops.items()))
    yield (
        f"time: about {seconds:.2g} s for the matrix products of a step whose rows are all as long as the longest, at "
        f"the speed just measured on this device ({speeds}); {duration(seconds * steps)} for {steps} steps. Everything "
        "else comes on top (compilation, other operations, reward functions, evaluation, saving) and is not estimated: "
        "a run prints its own estimate (eta) after the second step"
    )
    apart, grace = bool(interruptible_timings(config)), config.checkpoint.grace
    if plan.step_seconds(lambda phase: 0.0 if apart and "rollout" in phase.name else least(phase)) > grace:
        yield (
            f"warning: a step{', rollout aside,' if apart else ''} takes longer than checkpoint.grace ({grace:g} s): "
            "a signal to stop may be seen only at its end, and a run that is killed loses the steps since its last "
            "checkpoint"
        )


def _least_seconds(phase: Phase, rates: costs.Rates) -> float:
    return costs.least_seconds(phase.products, rates, phase.devices)


def checkpoints(plan: Plan, rates: costs.Rates, config: RunConfig, *, fresh: bool) -> Iterator[str]:
    """The size of a checkpoint, the time to write it beside that of the steps in between, and the room for those that
    are kept."""
    every, each = config.checkpoint.save_every, f"checkpoints: {plan.checkpoint / 1e9:.2g} GB each"
    try:
        speed = room.write_speed(Path(config.run_dir))
    except OSError as error:
        yield f"{each}; warning: no file can be written in {config.run_dir}: {error.strerror or error}"
        return
    where = "" if config.checkpoint.synchronous == "always" else " in the background"
    steps = every * plan.step_seconds(functools.partial(_least_seconds, rates=rates))
    beside = f", after every {counted(every, 'step')} of {steps / every:.2g} s or more" if every else ""
    yield (
        f"{each}, written in about {plan.checkpoint / speed:.2g} s{where}{beside}, at the {speed / 1e6:.0f} MB/s "
        f"just measured on the disk of {config.run_dir}"
    )
    yield from disk(plan, config, fresh=fresh)


def writes(config: RunConfig, *, fresh: bool) -> Iterator[str]:
    """Files that a run would write, and what becomes of an existing run."""
    directory, every, keep = Path(config.run_dir), config.checkpoint.save_every, config.checkpoint.keep
    often = f"every {every} steps, the last {keep}" if every else "at the end and when the run is stopped"
    files = ["config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"] + ["report.html"] * config.logging.report
    files += ["tokens/"] * (config.method in ("ppo", "grpo") and config.logging.token_samples > 0)
    files += ["tensorboard/"] * config.logging.tensorboard + [f"checkpoints/ ({often})", "export/ (the model)"]
    yield f"\nwould write to {directory}: {', '.join(files)}"
    if config.model.merged_path:
        yield f"would write the merged model to {config.model.merged_path}"
    saved = [int(path.name) for path in (directory / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    if fresh and directory.is_dir():
        yield f"{directory} exists: with --fresh it would be renamed to {directory.name}.old-N"
    elif saved:
        yield f"{directory} has a run, saved at step {max(saved)}: it would be resumed (--fresh starts over)"
    yield "nothing of the run was written, and no weights were read"
