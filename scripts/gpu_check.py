"""Check jaxrlhf on a GPU in at most eight minutes and write one JSON file.

    python scripts/gpu_check.py gpu.json
    python scripts/gpu_check.py rehearsal.json --device cpu --tiny    # the same on a CPU, to test this script

Run it in an environment with jax for the GPU, jaxrlhf and pytest; with torch and transformers there too, Hugging Face's
generate takes turns with ours. The parts, in order:

    parity      pytest -m gpu: logits in float32 and bfloat16, decoding, cuDNN's attention, several GPUs against one,
                a run that meets a full card
    generate-*  bench.py generate: tokens per second, decode_percent (the share of memory bandwidth in a decode step)
    ppo-*       bench.py ppo: seconds by phase, update_percent (of the matmul peak measured in the same minute)
    plan-*      bench.py plan: gigabytes by phase from `jaxrlhf plan`, and the card's peak in a PPO iteration

A part that fails or takes too long is recorded as such, and one for which no time is left as left out. The file is
written after every part. Exit code 1 unless all parts passed.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from jaxrlhf import runtime

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxrlhf", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
            "nvidia-cudnn-cu13", "torch", "transformers", "flax", "optax", "numpy")  # fmt: skip
LEAST = 15  # seconds: a part with less time is left out
DEVICES = """
import json, jax
device = jax.devices()[0]
stats = device.memory_stats() or {}
print(json.dumps({"platform": device.platform, "kind": device.device_kind, "count": len(jax.devices()),
                  "memory_bytes": stats.get("bytes_limit")}))
"""


class Part(NamedTuple):
    """A command and the seconds that it may take. `tests`: the file in which it records its tests."""

    command: list[str]
    limit: float
    tests: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model in place of shapes M and L, and some of the tests"
    )
    parser.add_argument("--seconds", type=float, default=470, help="time for all parts together")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts to run; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        known = parts(args.device, args.tiny, Path(work))
        if unknown := [name for name in args.only if name not in known]:
            parser.error(f"--only: there is no part {unknown[0]}; the parts are {', '.join(known)}")
        chosen = {name: part for name, part in known.items() if name in (args.only or known)}
        sys.exit(check(chosen, args, Path(work)))


def parts(device: str, tiny: bool, work: Path) -> dict[str, Part]:
    """The parts by name. Their limits come to more than the whole: most take less."""
    tests = work / "parity.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    some = ["-k", "qwen2 or sharded or memory"] if tiny else []
    found = {"parity": Part([*pytest, *some, f"--junitxml={tests}"], 150, tests)}
    shapes = ("T",) if tiny else ("M", "L")
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    for case, limit, response in (("generate", 90, 256), ("ppo", 120, 128), ("plan", 120, 128)):
        for shape in shapes if case != "plan" else shapes[:1]:
            size = ("4", "16", "8") if tiny else ("32", "128", str(response))
            options = ["--batch", size[0], "--prompt", size[1], "--response", size[2], "--shape", shape]
            options += ["--device", device, "--dtype", "float32" if tiny else "bfloat16", "--rounds", "1"]
            if case == "generate" and has_torch and not tiny:
                options += ["--peer", "hf"]
            if case == "plan":
                options += ["--apart"]  # one in memory at a time
            found[f"{case}-{shape}"] = Part([sys.executable, "scripts/bench.py", case, *options], limit)
    return found


def check(chosen: dict[str, Part], args: argparse.Namespace, work: Path) -> int:
    """Run the parts; the exit code."""
    started = time.monotonic()
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(work / "xla"))
    }
    if args.device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "JAXRLHF_GPU_REHEARSAL": "1"}
    record: dict[str, Any] = {
        "device": devices(environment),
        "driver": driver(),
        "versions": {name: found for name in PACKAGES if (found := runtime.version(name))},
        "rehearsal": args.device == "cpu",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "parts": {},
    }
    missing = ""
    if record["device"].get("platform") != args.device:
        missing = f"jax has no {args.device}: {record['device']}"
        print(f"{missing}; nothing is run", file=sys.stderr, flush=True)
    for name, part in chosen.items():
        left = args.seconds - (time.monotonic() - started)
        if missing:
            found = {"status": "failed", "error": missing}
        elif left < LEAST:
            found = {"status": "left out", "error": f"{left:.0f} seconds were left"}
        else:
            found = run(part, min(part.limit, left), environment)
        record["parts"][name] = found
        record["seconds"] = round(time.monotonic() - started, 1)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {found['status']}, {found.get('seconds', 0)} s{summary(found)}", flush=True)
    return int(any(found["status"] != "passed" for found in record["parts"].values()))


def run(part: Part, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """The record of a part: status (passed, failed, too long), seconds, and what it reports."""
    started = time.monotonic()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    status = None
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        status = "too long"
        os.killpg(process.pid, signal.SIGKILL)  # its contestants too
        out, errors = process.communicate()
    found: dict[str, Any] = {
        "status": status or ("passed" if process.returncode == 0 else "failed"),
        "seconds": round(time.monotonic() - started, 1),
        "limit": round(limit),
        "command": " ".join([Path(part.command[0]).name, *part.command[1:]]),
    }
    if found["status"] != "passed":
        found["error"] = (errors or out)[-2000:]
    if part.tests and part.tests.exists():
        found["tests"] = outcomes(part.tests)
        if not any(outcome == "passed" for outcome in found["tests"].values()):
            found["status"] = "failed"  # all skipped
    elif not part.tests and process.returncode == 0:
        found["record"] = json.loads(out)
    return found


def outcomes(file: Path) -> dict[str, str]:
    """The outcome of each test of a JUnit file: passed, or the reason of a failure or skip."""
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        found[case.get("name", "")] = "passed" if bad is None else f"{bad.tag}: {bad.get('message', '')[:300]}"
    return found


def summary(found: dict[str, Any]) -> str:
    """What a part found, in a few words."""
    if "tests" in found:
        counts = [outcome.split(":")[0] for outcome in found["tests"].values()]
        return "".join(f", {counts.count(kind)} {kind}" for kind in dict.fromkeys(counts))
    if "record" not in found:
        return ""
    words = []
    for name, one in found["record"]["contestants"].items():
        keys = ("tokens_per_second", "decode_percent", "update_percent")
        words += [f"{name} {key} {one[key]}" for key in keys if one.get(key)]
    return "".join(f", {word}" for word in words)


def devices(environment: dict[str, str]) -> dict[str, Any]:
    """What jax sees, from a process of its own: this one must not hold the card's memory."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        return {"error": done.stderr.splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def driver() -> str | None:
    """Name, memory and driver of the cards, from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    main()
