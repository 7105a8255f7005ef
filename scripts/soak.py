"""Train for hours and see whether memory, open files, threads or files grow.

    python scripts/soak.py --hours 2                 # prints a table and writes soak.json
    python scripts/soak.py --hours 0.1 --method grpo

A small run with everything that repeats: checkpoints, validation, samples, records of tokens, the report, and a reward
function in a worker process that is killed every KILL_EVERY seconds. The run has failed if what it holds grows after
the first quarter of the time (see `grown`).
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from torture import Bench

LOOK_EVERY = 5.0  # seconds
KILL_EVERY = 60.0  # seconds
GROWTH = 1.03  # of medians of memory
MOST_POINTS = 400  # of which all pairs are looked at
PROGRAMS = "programs compiled"
QUANTITIES = (
    "RSS, MB",
    "anonymous memory, MB",
    "descriptors",
    "threads",
    "processes",
    "checkpoint folder, MB",
    PROGRAMS,
)


def settings(bench: Bench, method: str, run: Path) -> dict[str, Any]:
    """The config of the run, which ends when it is told to."""
    found = bench.settings(method, run)
    found[method]["total_episodes"] = 4 * 10**6
    # the responses of a batch whose worker is killed get a score of 0: an update without any score would end the run
    found["reward"] = {"components": [found["reward"] | {"on_error": "value", "error_value": 0.0}]}
    found["checkpoint"] = {"save_every": 20, "keep": 2}
    found["logging"] = {"tensorboard": True, "sample_every": 20, "num_samples": 4}
    found["validation"] = {"eval_steps": 50}
    found["data"]["validation_fraction"] = 0.25
    return found


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


def look(pid: int, run: Path, log: Path) -> dict[str, float]:
    """What the run holds now: its own process, the number of its processes, and of the programs that its log names."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "RSS, MB": int(status["VmRSS"].split()[0]) / 1024,
        "anonymous memory, MB": int(status["RssAnon"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "processes": len(family(pid)),
        "checkpoint folder, MB": size(run / "checkpoints") / 2**20,
        PROGRAMS: len(re.findall(r"^(?:compiled|loaded) jit", log.read_text(errors="replace"), re.MULTILINE)),
    }


def size(folder: Path) -> int:
    """Bytes of all files under a folder, which may be removed meanwhile."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(parent, name)).st_size
    return found


def quarters(looks: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median of each quantity in each quarter of the time."""
    size = len(looks) // 4
    parts = [looks[i * size : (i + 1) * size] for i in range(4)]
    return {name: [statistics.median(look[name] for look in part) for part in parts] for name in QUANTITIES}


def grown(looks: list[dict[str, float]]) -> list[str]:
    """The quantities that grow after the first quarter of the time: memory if its median in the last quarter is more
    than GROWTH times that in the second one, counts if their trend is at least 1 and more than they change all the time
    (their interquartile range in the second quarter; threads come and go with the checkpoints). For memory the time
    begins with the last program that was compiled, unless that was in the last quarter: a width that few batches have
    may come late."""
    second, found = looks[len(looks) // 4 : len(looks) // 2], []
    after = [look for look in looks if look[PROGRAMS] == looks[-1][PROGRAMS]]
    memory = quarters(after if len(after) >= len(looks) // 4 else looks)
    for name in QUANTITIES:
        if "MB" in name:
            _, before, _, last = memory[name]
            found += [name] if last > before * GROWTH else []
        elif name != PROGRAMS:
            low, _, high = statistics.quantiles([look[name] for look in second], n=4)
            rise = trend([look[name] for look in looks[len(looks) // 4 :]])
            found += [name] if rise > max(high - low, 0.99) else []
    return found


def trend(values: list[float]) -> float:
    """The rise from the first to the last of the values, along the median slope of their pairs (Theil and Sen)."""
    places = range(0, len(values), max(1, len(values) // MOST_POINTS))
    slopes = [(values[j] - values[i]) / (j - i) for i in places for j in places if j > i]
    return statistics.median(slopes) * (len(values) - 1)


def table(medians: dict[str, list[float]], facts: str) -> str:
    """Markdown: a row for each quantity."""
    lines = ["| median in | 1st quarter | 2nd | 3rd | 4th |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{value:.4g}' for value in values)} |" for name, values in medians.items()]
    return "\n".join([*lines, "", facts])


def main() -> int:
    """Run it and return 1 if it failed or grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--method", choices=("ppo", "grpo"), default="ppo")
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bench, run, log = Bench(Path(folder)), Path(folder) / "run", Path(folder) / "log"
        bench.prepare()
        config = Path(folder) / "soak.yaml"
        config.write_text(yaml.safe_dump(settings(bench, options.method, run)))
        with log.open("w") as output:
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "jaxrlhf", options.method, str(config)]
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        started, killed, looks, chance = time.monotonic(), 0, [], random.Random(0)
        try:
            while process.poll() is None and time.monotonic() - started < 3600 * options.hours:
                time.sleep(LOOK_EVERY)
                if process.poll() is None and (run / "metrics.jsonl").exists():
                    looks.append(look(process.pid, run, log))
                if time.monotonic() - started > KILL_EVERY * (killed + 1):
                    children = family(process.pid)[1:]
                    if children:
                        os.kill(chance.choice(children), signal.SIGKILL)
                    killed += 1
        finally:
            process.terminate()
            code = process.wait()
        if code != 75:
            print(f"the run ended with exit code {code}:\n{log.read_text()[-2000:]}")
            return 1
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = records[-1]["step"]
        sizes = {file.name: file.stat().st_size / steps for file in run.glob("*.jsonl")}
        written = ", ".join(f"{name} {size:.0f}" for name, size in sorted(sizes.items()))
        medians = quarters(looks)
        facts = f"{steps:,} updates, {killed} kills of a worker; bytes per update: {written}"
        print(table(medians, facts))
        options.output.write_text(json.dumps({"facts": facts, "medians": medians, "looks": looks}))
        grew = grown(looks)
        if grew:
            print(f"it grew: {', '.join(grew)}")
        return int(bool(grew))


if __name__ == "__main__":
    sys.exit(main())
