"""Benchmark jaxrlhf, alone or against a peer on the same machine, relative to the limits of the machine.

    python scripts/bench.py generate --shape S --batch 8
    python scripts/bench.py ppo --dtype bfloat16 --peer trl --peer-python PEER/bin/python --strong

Models have random weights (bench_shapes.py). Every contestant loads and warms up in its own process and then waits for
its turns: repetitions alternate, A B A B. Before that, matrix products and memory of the machine are timed, for the
floors. Progress is printed to standard error, one JSON line to standard output:

    contestants   by name: seconds (median, min, max), tokens_per_second, waiting_percent, peak_bytes, floor_percent,
                  decode_percent, update_percent, phases (median seconds), rates, knobs, versions, settings (of TRL);
                  with --profile, for jaxrlhf, profile: the share of each kind of operation in the total time; case
                  memory: gigabytes by variant (bench_memory.py); second contestant of case plan: gigabytes by phase
    ratio         by peer: our tokens per second over theirs; of --strong under NAME-strong
    limits        GFLOP/s by dtype and GB/s, the highest measured in this run

floor_percent is the minimum time by FLOPs and bytes over the median; decode_percent is the same without prefill;
update_percent is useful FLOPs of forward and backward (recomputation does not count) over the measured matmul peak.
waiting_percent is the share of the time in which its threads could have run but other processes had the processors: a
figure of a busy machine, on which contestants with several threads that wait for one another lose most.
docs/performance.md describes the measurements.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_process import Contestant, Job, strong_knobs
from bench_shapes import SHAPES, add_percentages, write_model

from jaxrlhf import runtime

BATCH = {
    "generate": 8, "engine": 128, "prefix": 16, "logprobs": 8, "sft": 8, "reward": 8, "dpo": 8, "ppo": 16,
    "grpo": 16, "startup": 16, "memory": 16, "plan": 16,
}  # fmt: skip
CASES = ("limits", *BATCH)
PEERS = {
    "hf": ("limits", "generate", "engine", "logprobs", "sft", "reward"),
    "trl": ("dpo", "ppo", "grpo"),
    "tunix": ("generate", "dpo", "ppo", "grpo"),
}
OURS = {
    "engine": ("ours", "ours-static"),
    "prefix": ("ours", "ours-rows"),
    "startup": ("cold", "cached"),
    "plan": ("ours", "planned"),
}
DTYPES = ("float32", "bfloat16", "int8")
INT8 = ("generate", "engine", "prefix")
TORCH = ("hf", "trl")
COMMON = ("case", "shape", "dtype", "batch", "prompt", "response", "device", "rounds", "apart")
TRAINING = ("micro_batch", "remat", "peer_checkpointing")
OPTIONS = {  # of some cases only
    "engine": ("slots",),
    "prefix": ("samples",),
    "sft": TRAINING,
    "reward": TRAINING,
    "dpo": TRAINING,
    "plan": ("epochs", "lora_rank", "quantize", "rollout_dtype", "frozen_dtype", *TRAINING),
    "ppo": ("epochs", "lora_rank", "quantize", "rollout_dtype", "frozen_dtype", *TRAINING),
    "grpo": ("samples", "epochs", "lora_rank", "quantize", "rollout_dtype", "frozen_dtype", *TRAINING),
    "startup": ("epochs", *TRAINING),
    "memory": ("epochs",),
}
SETTLE = (
    1.0  # seconds before a repetition: threads of the one before spin for a fraction of one when they have finished
)
JOB = {f.name for f in dataclasses.fields(Job)}


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestants end too
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        record = measure(args, Path(work))
    line = json.dumps(record)
    print(line)
    if args.output:
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("case", choices=CASES)
    add("--shape", choices=SHAPES, default="S", help="S: SmolLM2-135M, M: Qwen2.5-0.5B, L: Qwen2.5-1.5B, T: tiny")
    add("--batch", type=int, help=f"sequences (engine, prefix: prompts); default by case: {BATCH}")
    add("--dtype", choices=DTYPES, default="float32", help="int8: weights of the rollout only")
    add("--prompt", type=int, help="tokens per prompt (default 64; prefix: 256)")
    add("--response", type=int, default=64, help="tokens per response; engine: the mean, with a maximum of 4 times it")
    add("--slots", type=int, default=32, help="engine: rows decoded at the same time")
    add("--samples", type=int, default=8, help="prefix, grpo: responses per prompt")
    add("--epochs", type=int, default=1, help="ppo, grpo: epochs per update")
    add(
        "--lora-rank",
        type=int,
        help="ppo, grpo: train LoRA adapters of this rank, also in TRL; ppo: in all roles of jaxrlhf",
    )
    add("--quantize", choices=("none", "int8", "nf4"), default="none", help="ppo, grpo: quantisation of our base model")
    add("--micro-batch", type=int, help="ppo, grpo, sft, reward, dpo: rows per forward pass, in both")
    add(
        "--rollout-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="ppo, grpo: of our rollout; auto: --dtype",
    )
    add(
        "--frozen-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="ppo: dtype of our reference and reward model; auto: --dtype",
    )
    add("--remat", choices=("auto", "none", "full", "dots"), default="auto", help="what our backward pass recomputes")
    add("--peer", nargs="+", choices=PEERS, default=[])
    add("--peer-python", nargs="+", default=[sys.executable], help="Python of the peers: one, or one for each")
    add("--peer-dtype", choices=("float32", "bfloat16"), help="default: as --dtype, float32 for int8; trl: by autocast")
    add("--peer-checkpointing", action="store_true", help="use gradient checkpointing in the peer")
    add(
        "--strong",
        action="store_true",
        help="also run torch peers with MKL's fast path and huge pages: see strong_knobs",
    )
    add("--rounds", type=int, default=3)
    add("--apart", action="store_true", help="restart contestants for every repetition: one in memory at a time")
    add("--profile", action="store_true", help="measure our time by kind of operation; slightly slower")
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--output", help="file to append the JSON line to")
    args = parser.parse_args()
    args.batch = BATCH.get(args.case, 1) if args.batch is None else args.batch
    args.prompt = (256 if args.case == "prefix" else 64) if args.prompt is None else args.prompt
    for name in ("batch", "prompt", "response", "slots", "samples", "epochs", "rounds", "micro_batch", "lora_rank"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    longest = args.prompt + args.response * (4 if args.case == "engine" else 1)
    context = SHAPES[args.shape]["max_position_embeddings"]
    if longest > context:
        parser.error(
            f"a prompt and its response come to {longest} tokens; the context of shape {args.shape} is {context}"
        )
    if args.micro_batch and args.batch % args.micro_batch:
        parser.error(f"--micro-batch {args.micro_batch} does not divide --batch {args.batch}")
    if args.case == "grpo" and args.batch % args.samples:
        parser.error(f"--samples {args.samples} does not divide --batch {args.batch}, which counts responses")
    if args.lora_rank and "tunix" in args.peer:
        parser.error("--peer tunix has no --lora-rank: it would train all its parameters")
    if args.quantize != "none" and not args.lora_rank:
        parser.error("--quantize is about what lies under adapters; give --lora-rank")
    if args.dtype == "int8" and args.case not in INT8:
        parser.error(f"--dtype int8 is for {', '.join(INT8)}; {args.case} computes in float32 or bfloat16")
    for peer in args.peer:
        if args.case not in PEERS[peer]:
            parser.error(f"--peer {peer} has no {args.case}; it has {', '.join(PEERS[peer])}")
    if args.strong and not set(args.peer) & set(TORCH):
        parser.error("--strong is about torch peers; give --peer hf or --peer trl")
    if len(args.peer_python) not in (1, len(args.peer)):
        parser.error(f"--peer-python takes one interpreter or {len(args.peer)}, one for each peer")
    for python in args.peer_python:
        if not Path(python).is_file():
            parser.error(f"--peer-python: there is no file {python}")
    return args


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The record of a case."""
    about = machine()
    write_model(work / "model", SHAPES[args.shape])
    given = {k: v for k, v in vars(args).items() if k in JOB}
    job = Job(quick=False, model=str(work / "model"), work=str(work), checkpointing=args.peer_checkpointing, **given)
    limits = {}
    if job.case != "limits":
        quick = dataclasses.replace(job, case="limits", quick=True)
        limits = merge_limits(run(field(args, quick, work), rounds=1, apart=True))
    contestants = field(args, job, work)
    results = run(contestants, args.rounds, args.apart or job.case == "startup")
    limits = limits or merge_limits(results)
    summaries = {c.name: summary(c, results[c.name]) for c in contestants}
    for contestant in contestants:
        add_percentages(summaries[contestant.name], contestant.job, limits)
    rates = {name: found["tokens_per_second"] for name, found in summaries.items()}
    return {
        **{k: getattr(args, k) for k in COMMON + OPTIONS.get(job.case, ())},
        "machine": about,
        "contestants": summaries,
        "ratio": {name: round(next(iter(rates.values())) / rate, 3) for name, rate in list(rates.items())[1:] if rate},
        "limits": limits,
    }


def field(args: argparse.Namespace, job: Job, work: Path) -> list[Contestant]:
    """Ours first, then the peers; of limits, torch stands for every peer that is made of it."""
    here, environment = Path(__file__).parent, device_environment(args.device)
    chosen = {}
    for name in OURS.get(job.case, ("ours", "ours-full") if job.case == "ppo" and job.lora_rank else ("ours",)):
        command = [sys.executable, str(here / "bench_ours.py"), name]
        mine = dataclasses.replace(job, lora_rank=None, quantize="none") if name == "ours-full" else job
        chosen[name] = Contestant(name, command, environment, mine, "stock", work)
    pythons = args.peer_python * len(args.peer) if len(args.peer_python) == 1 else args.peer_python
    theirs = args.peer_dtype or ("float32" if job.dtype == "int8" else job.dtype)
    for peer, python in zip(args.peer, pythons, strict=True):
        if job.case == "limits" and peer not in TORCH:
            continue
        kind = "hf" if job.case == "limits" else peer
        for knobs in ("stock", "strong") if args.strong and peer in TORCH else ("stock",):
            name = kind if knobs == "stock" else f"{kind}-strong"
            chosen[name] = Contestant(
                name,
                [python, str(here / ("bench_tunix.py" if kind == "tunix" else "bench_peers.py")), kind],
                environment | (strong_knobs(work) if knobs == "strong" else {}),
                dataclasses.replace(job, dtype=theirs),
                knobs,
                work,
            )
    return list(chosen.values())


def device_environment(device: str) -> dict[str, str]:
    """A contestant sees the device it is to use, and takes memory of it as it needs it."""
    if device == "cpu":
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def run(contestants: list[Contestant], rounds: int, apart: bool) -> dict[str, list[dict[str, Any]]]:
    """The repetitions of each contestant, in turns."""
    results: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contestants}
    try:
        for contestant in contestants if not apart else ():
            contestant.start()
        for number in range(rounds):
            for contestant in contestants:
                if apart:
                    contestant.start()
                time.sleep(SETTLE)
                result = contestant.repeat()
                results[contestant.name].append(result)
                progress = f"{contestant.job.case} {number + 1}/{rounds} {contestant.name}"
                log(f"{progress}: {result['seconds']:.3f} s, {100 * result['waiting']:.0f} % waiting")
                if apart:
                    contestant.finish()
        for contestant in contestants if not apart else ():
            contestant.finish()
    finally:
        for contestant in contestants:
            contestant.kill()
    return results


def summary(contestant: Contestant, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of a contestant's repetitions."""
    seconds = [r["seconds"] for r in results]
    rate = statistics.median(r.get("tokens", 0) / r["seconds"] if r["seconds"] > 0 else 0 for r in results)
    found: dict[str, Any] = {
        "seconds": {
            "median": round(statistics.median(seconds), 4),
            "min": round(min(seconds), 4),
            "max": round(max(seconds), 4),
        },
        "tokens_per_second": round(rate, 2),
        "waiting_percent": round(100 * statistics.median(r["waiting"] for r in results), 1),
        "peak_bytes": contestant.peak_bytes,
    }
    for kind in ("phases", "rates", "profile"):
        names = dict.fromkeys(name for r in results for name in r.get(kind, {}))
        if names:
            found[kind] = {n: round(statistics.median(r[kind][n] for r in results), 4) for n in names}
    if "gigabytes" in results[0]:
        found["gigabytes"] = results[0]["gigabytes"]  # sizes, the same at every repetition
    return found | {"dtype": contestant.job.dtype, "knobs": contestant.knobs, **contestant.about}


def merge_limits(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The best of everybody's rates: GFLOP/s by dtype, and GB/s under "read"."""
    best: dict[str, float] = {}
    for result in (r for repetitions in results.values() for r in repetitions):
        for name, rate in result["rates"].items():
            kind = name.split()[0]
            best[kind] = round(max(rate, best.get(kind, 0)), 1)
    return best


def machine() -> dict[str, Any]:
    """What the figures are worth without: processor, cores, memory, and whether others were at work."""
    processor = runtime.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = round(os.getloadavg()[2], 1)
    return {
        "processor": processor.name,
        "instructions": list(processor.extensions),
        "cores": processor.cores,
        "memory_bytes": memory,
        "load_15_minutes": load,
    }


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
