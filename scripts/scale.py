"""Plan PPO of 8B and 70B models on GPUs and TPUs that are not here: a row of docs/scale.md for each case.

    pip install -e ".[plan-gpu,plan-tpu]"
    JAX_PLATFORMS=cpu python scripts/scale.py                  # every case, most of an hour on two cores
    JAX_PLATFORMS=cpu python scripts/scale.py 70b-lora@h100:8  # cases by name

The programs are those of `jaxrlhf plan --devices`, compiled for the target. Only decoding on a GPU and the copy of the
model for it, in which every layer is written out, are compiled with 2 and with 4 layers and extrapolated: layers are
alike.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from jaxrlhf import plan, runtime
from jaxrlhf.config import PPOConfig
from jaxrlhf.config.file import load_config
from jaxrlhf.demo.tokenizer import write_base
from jaxrlhf.plan import Phase, roofline, targets, topology
from jaxrlhf.plan.programs import Programs, Traced, abstract_trainer, compile_longest
from jaxrlhf.training.ppo.trainer import PPOTrainer

# Public numbers of Llama 3.1 (https://arxiv.org/abs/2407.21783, table 3)
SIZES = {
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
BATCH, LENGTH = 256, 512  # prompts of an update; tokens of a prompt, and of a response
DEPTHS = 2, 4

CASES: dict[str, str] = {
    "8b-full@h100:8": "fsdp=8",
    "8b-full@h100:64": "replica=8 fsdp=8",
    "8b-full@v5e:4x8": "fsdp=32",
    "8b-full@v5p:2x2x4": "fsdp=16",
    "8b-lora@h100:8": "fsdp=8",
    "8b-lora@v5e:4x4": "fsdp=4 tensor=4",
    "70b-full@h100:8": "tensor=8",
    "70b-full@h100:64": "fsdp=8 tensor=8",
    "70b-full@v5e:16x16": "fsdp=32 tensor=8",
    "70b-full@v5p:4x4x4": "fsdp=16 tensor=4",
    "70b-lora@h100:8": "tensor=8",
    "70b-lora@h100:64": "replica=8 tensor=8",
    "70b-lora@v5p:2x2x4": "fsdp=4 tensor=4",
}
"""Mesh by case: size, parameters that are trained, devices."""


def write_inputs(folder: Path, size: str, layers: int | None) -> None:
    """Write config.json of the model, a small tokenizer and prompts of LENGTH words. No weights are needed."""
    write_base(folder)
    known = json.loads((folder / "config.json").read_text())
    tokens = {name: known[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    shape = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    (folder / "config.json").write_text(json.dumps(CONFIG | tokens | shape))
    row = json.dumps({"prompt": " ".join(["word"] * (LENGTH - 8))})
    (folder / "prompts.jsonl").write_text("\n".join([row] * BATCH))
    (folder / "reward.py").write_text("def reward(completions, **_):\n    return [0.0] * len(completions)\n")


def config_of(folder: Path, case: str, layers: int | None = None, layout: str = "auto") -> PPOConfig:
    """PPO with Adam in float32: all parameters of policy and critic, or LoRA of rank 16 on a bfloat16 model."""
    size, _, kind = case.split("@")[0].partition("-")
    write_inputs(folder, size, layers)
    mesh = {f"mesh.{axis}": number for axis, number in (part.split("=") for part in CASES[case].split())}
    rows = math.prod(int(number) for axis, number in mesh.items() if axis != "mesh.tensor")
    options = {
        "run_dir": str(folder / "run"),
        "model.path": str(folder),
        "model.init": "random",
        "model.remat": "full",
        "data.path": str(folder / "prompts.jsonl"),
        "data.max_prompt_length": str(LENGTH),
        "sampling.response_length": str(LENGTH),
        "reward.function": f"{folder / 'reward.py'}:reward",
        "reference.dtype": "bfloat16",
        "rollout.layout": layout,
        "ppo.batch_size": str(BATCH),
        "ppo.total_episodes": str(BATCH),
        "ppo.num_mini_batches": "1",
        "ppo.num_ppo_epochs": "1",
        "ppo.micro_batch_size": str(rows),  # a row on each device at a time
        "mesh.data": "1",
        **mesh,
    }
    if kind == "lora":
        options |= {"lora.enabled": "true", "model.param_dtype": "bfloat16"}
    return load_config("ppo", None, list(options.items()))


class _Done(Exception):
    pass


UNROLLED = {"copy for decoding": ("convert",), "rollout": ("_admit", "_advance")}
"""By phase: programs in which every layer is written out on a GPU."""


class _Scanned(Traced):
    """Compiles all programs but those that are `UNROLLED`."""

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        if any(program.__name__ in names for names in UNROLLED.values()):
            return super().compile(program, *args, **kwargs)
        return Programs.compile(self, program, *args, **kwargs)


class _Unrolled(Programs):
    """Compiles the `UNROLLED` programs alone, and ends after the last."""

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        if all(program.__name__ not in names for names in UNROLLED.values()):
            raise _Done
        return super().compile(program, *args, **kwargs)


@dataclasses.dataclass
class Row:
    """Figures of a phase on one device."""

    total: float
    near: float
    far: float
    least: float
    cycles: float

    @classmethod
    def of(cls, phase: Phase, target: targets.Target) -> "Row":
        moved = roofline.traffic(phase.figures, phase.islands)
        return cls(phase.total, *moved, roofline.least(phase, target).total, phase.figures.cycles)

    def further(self, other: "Row", steps: float) -> "Row":
        """Extrapolate the line through two depths."""
        values = (a + (b - a) * steps for a, b in zip(*map(dataclasses.astuple, (self, other)), strict=True))
        return Row(*values)


def unrolled(folder: Path, case: str, target: targets.Target, layers: int, layout: str) -> dict[str, Row]:
    """The phases of the `UNROLLED` programs with a model of few layers; their bytes are those beside the arguments."""
    with topology.on(target):
        trainer = abstract_trainer(config_of(folder, case, layers, layout))
        programs = _Unrolled()
        with contextlib.suppress(_Done):
            compile_longest(trainer, programs)
        rows = {}
        for name, among in UNROLLED.items():
            ran = tuple(one for program in among for one in programs[program.lstrip("_")])
            beside = max(plan.beside(one) for one in ran)
            trips = (LENGTH - 1) / max(1, sum(one.name == "advance" for one in ran))  # of about equal length
            rows[name] = Row.of(Phase(name, {"beside": beside}, ran, trainer.mesh, trips), target)
        return rows


def examine(case: str, folder: Path, *, compiled: bool) -> dict[str, Any]:
    """Plan a case, or estimate it without a compiler; figures by phase, bytes and seconds."""
    started, before = time.time(), time.process_time()
    target = targets.parse(case.split("@")[1])
    config, shallow = config_of(folder, case), compiled and target.accelerator.platform == "gpu"
    if compiled:
        with topology.on(target):
            trainer = abstract_trainer(config)
            made = plan.plan_of(trainer, _Scanned() if shallow else None)
        assert isinstance(trainer, PPOTrainer)
        # "auto" would choose another layout for few layers
        layout = "sharded" if "fsdp" in trainer.sampler.conversion[-1] else "replicated"
    else:
        made, layout = plan.estimate(config, target), "auto"
    rows = {phase.name: Row.of(phase, target) for phase in made.phases}
    if shallow:
        few, more = (unrolled(folder, case, target, depth, layout) for depth in DEPTHS)
        layers = SIZES[case.split("-")[0]]["num_hidden_layers"]
        for phase in made.phases:
            if phase.name not in few:
                continue
            name, known = phase.name, phase.total - phase.bytes["activations, rest"]
            rows[name] = few[name].further(more[name], (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))
            if name == "rollout":  # scratch, to which the cache does not belong, is not linear in the depth
                rows[name].total = more[name].total
            rows[name].total += known
    seconds = made.step_seconds(lambda phase: rows[phase.name].least)
    used = roofline.utilisation(made.step, seconds, made.devices, target)
    return {
        "case": case,
        "compiled": compiled,
        "mesh": CASES[case],
        "usable": target.accelerator.memory,
        "phases": {name: dataclasses.asdict(row) for name, row in rows.items()},
        "parts": {phase.name: phase.bytes for phase in made.phases},
        "seconds": seconds,
        "mfu": used,
        "minutes": (time.time() - started) / 60,
        "processor_seconds": time.process_time() - before,
        "versions": {name: runtime.version(name) for name in ("jax", "libtpu", "jax-cuda13-plugin")},
    }


def line(found: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    phases = found["phases"]
    names = ("rollout", "annotation", "update")
    memory = " / ".join(f"{phases[name]['total'] / 1e9:.1f}" for name in names)
    peak = max(row["total"] for row in phases.values())
    near, far = (sum(row[key] for row in phases.values()) / 1e9 for key in ("near", "far"))
    seconds = " / ".join(f"{phases[name]['least']:.1f}" for name in names)
    fits = "fits" if peak <= found["usable"] else "**no**"
    model, _, devices = found["case"].partition("@")
    sent = f"{near:.0f} / {far:.0f}" if found["compiled"] else "estimate"
    cells = (model, devices, found["mesh"], memory, fits, sent, seconds)
    return f"| {' | '.join(cells)} | {found['seconds']:.1f} | {found['mfu']:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--estimate", action="store_true", help="shapes and traces only: no compiler, a minute a case")
    parser.add_argument("--output", type=Path, help="file to which the figures are added, a JSON object per line")
    arguments = parser.parse_args()
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = examine(case, Path(folder), compiled=not arguments.estimate)
        print(line(found), flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
