"""Kill, stop, starve and damage runs for a given time, and compare what comes of them with unbroken runs.

    python scripts/torture.py --minutes 60                    # all kinds; writes torture.json and prints a table
    python scripts/torture.py --minutes 5 --kinds kill damage --seed 1

Runs are small ones of every trainer, with all weights and with adapters, through the command line's `main`, each in a
process of its own, forked from one that has imported the modules. A trial has failed if the run does not end as the
unbroken one did: records of metrics (but for times), samples and exported weights, byte for byte.

kill      SIGKILL at random moments, among them while compiling, restoring, saving and exporting, until the run ends
stop      SIGTERM at a random moment: the process ends within GRACE seconds with exit code 75, and the run goes on
full      no file can grow beyond a size for a while (ulimit -f), as on a full disk; then the run goes on
owners    a second process starts the same run: it is refused, and the first one is not disturbed
damage    a file of a checkpoint is damaged (bits, bytes, length, removed): what is restored is the latest state or the
          one before it, never another one
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STEPS = 8
GRACE = 10.0  # seconds from SIGTERM to the end of the process
DEADLINE = 600.0  # seconds after which a process counts as hung
DAMAGES = 30  # a minute, so that the processor is left to the runs
MOST_FAILURES = 20  # of a kind, after which there are no more trials of it
METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
KINDS = {"kill": 6, "stop": 2, "full": 1, "owners": 1, "damage": 0}  # how often each is tried; damage runs beside
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jaxrlhf.cli", "jaxrlhf.training", "orbax.checkpoint", "transformers", "datasets"])
SCORE = "def score(prompts, completions):\n    return [len(text) % 7 / 7 for text in completions]\n"


@dataclass
class Tally:
    """Outcomes of the trials of one kind. `events` counts kills, signals or damages, `where` what they met."""

    trials: int = 0
    events: int = 0
    failures: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)

    def bound(self) -> str:
        """Upper end of the 95 % interval of the rate of failures per event, if there was none (the rule of three)."""
        return f"{3 / self.events:.2%}" if self.events and not self.failures else "-"


class Bench:
    """The inputs of all runs in one folder, and the unbroken run of each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "programs"
        self.cases = {f"{method}{' lora' * lora}": (method, lora) for method in METHODS for lora in (False, True)}
        self._locks = {case: threading.Lock() for case in self.cases}
        self._unbroken: dict[str, tuple[Any, float]] = {}

    def prepare(self) -> None:
        """Write model, data and reward function."""
        import jax

        from jaxrlhf import load_tokenizer, weights
        from jaxrlhf.config import TokenizerSource
        from jaxrlhf.demo import pipeline
        from jaxrlhf.demo.tokenizer import write_base

        base = write_base(self.folder / "base")
        model, params = weights.load(base, init="random", key=jax.random.key(0))
        tokenizer = load_tokenizer(base, TokenizerSource())
        weights.export(self.folder / "model", model, params, source=base, tokenizer=tokenizer)
        pipeline.write_data(self.folder, seed=0)
        (self.folder / "score.py").write_text(SCORE)

    def settings(self, case: str, run: Path) -> dict[str, Any]:
        """The config of a run of `case` in `run`."""
        method, lora = self.cases[case]
        files = {"sft": "sft", "reward": "preferences", "dpo": "preferences"}
        settings: dict[str, Any] = {
            "run_dir": str(run),
            "model": {"path": str(self.folder / "model")},
            "data": {"path": str(self.folder / "data" / f"{files.get(method, 'prompts')}.jsonl"), "max_rows": 64},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
            "checkpoint": {"save_every": 2, "keep": 2},
            "logging": {"tensorboard": False, "sample_every": 3, "num_samples": 2},
        }
        if lora:
            settings["lora"] = {"enabled": True, "rank": 4}
        if method in files:
            settings["train"] = {"batch_size": 4, "max_steps": STEPS, "eval_every": 3, "eval_batch_size": 8}
            settings["data"]["validation_fraction"] = 0.25
        else:
            settings["reward"] = {"function": f"{self.folder / 'score.py'}:score"}
            settings["sampling"] = {"response_length": 8}
            settings[method] = {"batch_size": 4, "total_episodes": 4 * STEPS}
        if method == "sft":
            settings["sampling"] = {"response_length": 8}
        if method == "grpo":
            settings[method]["num_generations"] = 2
        return settings

    def start(
        self, case: str, run: Path, *, cold: bool = False, limit: int | None = None, cores: int | None = None
    ) -> Any:
        """Start or resume a run in a new process. `cold`: it compiles all programs; `limit`: bytes that a file can
        have at most; `cores`: how many of the processor's it may use."""
        file = run.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(self.settings(case, run)))
        programs = run.parent / f"cold {run.name}" if cold else self.cache
        command = [self.cases[case][0], str(file)]
        process = FORKS.Process(target=run_command, args=(command, programs, limit, run.with_suffix(".log"), cores))
        process.start()
        return process

    def unbroken(self, case: str) -> tuple[Any, float]:
        """What an unbroken run of `case` leaves, and the seconds that it takes with its programs compiled."""
        with self._locks[case]:
            if case not in self._unbroken:
                for name in ("first", "whole"):  # the first compiles
                    run = self.folder / f"{name} {case}"
                    started = time.monotonic()
                    finish(self.start(case, run), run)
                self._unbroken[case] = facts(run), time.monotonic() - started
            return self._unbroken[case]


def run_command(command: list[str], programs: Path, limit: int | None, log: Path, cores: int | None) -> None:
    """In the new process: `jaxrlhf COMMAND`, with a cache of compiled programs in `programs`."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before jax counts them
    import jax

    from jaxrlhf import cli

    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(programs), "HF_HUB_OFFLINE": "1"}
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.main(command))


def wait(process: Any) -> int:
    """The exit code of a process; its signal, negative, if it was killed. Raises TimeoutError if it hangs."""
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process has not ended within {DEADLINE:.0f} s")
    return process.exitcode


def finish(process: Any, run: Path) -> None:
    """Wait for a process that has to succeed. Raises RuntimeError with the end of its log if it does not."""
    code = wait(process)
    if code != 0:
        raise RuntimeError(f"exit code {code}: {run.with_suffix('.log').read_text(errors='replace')[-600:]}")


def facts(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What has to be the same: records without times, and the bytes of samples and weights."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]
    files = [run / "samples.jsonl", *sorted((run / "export").glob("*.safetensors"))]
    return records, {file.name: file.read_bytes() for file in files if file.exists()}


def difference(run: Path, expected: Any) -> str | None:
    """The first thing in which a run differs from the unbroken one, or None."""
    records, files = facts(run)
    if records != expected[0]:
        at = next((i for i, pair in enumerate(zip(records, expected[0], strict=False)) if pair[0] != pair[1]), -1)
        return f"metrics differ: {len(records)} records in place of {len(expected[0])}, the first one at {at}"
    changed = [name for name in files.keys() | expected[1].keys() if files.get(name) != expected[1].get(name)]
    return f"{', '.join(sorted(changed))} differ" if changed else None


def written(run: Path) -> int:
    """Bytes of the run's records."""
    file = run / "metrics.jsonl"
    return file.stat().st_size if file.exists() else -1


def phase(run: Path, before: int, cold: bool = False) -> str:
    """What a process is doing, by the files of its run. `before`: bytes of the records when it was started."""
    if any((run / "checkpoints").glob("*tmp*")):
        return "saving"
    if any(run.glob("*export*tmp*")) or any(run.glob(".*export*")):
        return "exporting"
    if (run / "export").exists():
        return "at the end"
    if written(run) != before:
        return "training"
    return "compiling" if cold else "starting" if before < 0 else "restoring"


def wait_until(condition: Callable[[], bool], process: Any, seconds: float) -> None:
    """Return once `condition` holds, the process ends or the time is over."""
    until = time.monotonic() + seconds
    while not condition() and process.exitcode is None and time.monotonic() < until:
        time.sleep(0.001)


def kill(bench: Bench, case: str, run: Path, chance: random.Random, tally: Tally) -> str | None:
    expected, seconds = bench.unbroken(case)
    for _ in range(chance.randint(3, 6)):
        cold, before = chance.random() < 0.1, written(run)
        process = bench.start(case, run, cold=cold)
        if chance.random() < 0.5:
            wait_until(lambda: False, process, chance.uniform(0, 1.1 * seconds))
        else:  # a moment of which there are few
            wanted = chance.choice(("saving", "exporting"))
            wait_until(lambda: phase(run, before) == wanted, process, 1.1 * seconds)  # noqa: B023
            time.sleep(chance.uniform(0, 0.03))
        met = phase(run, before, cold)
        process.kill()
        if wait(process) == -signal.SIGKILL:
            tally.events += 1
            tally.where[met] += 1
    finish(bench.start(case, run), run)
    return difference(run, expected)


def stop(bench: Bench, case: str, run: Path, chance: random.Random, tally: Tally) -> str | None:
    expected, seconds = bench.unbroken(case)
    process = bench.start(case, run)
    wait_until(lambda: False, process, chance.uniform(0.2, 1.0) * seconds)
    met = phase(run, -1)
    asked = time.monotonic()
    process.terminate()
    code = wait(process)
    took = time.monotonic() - asked
    if code != 0:  # else it had ended
        tally.events += 1
        tally.where[met] += 1
    problem = None
    if code not in (0, 75, -signal.SIGTERM) or (code == -signal.SIGTERM and met != "starting"):
        problem = f"exit code {code} after SIGTERM {met}"
    elif took > GRACE:
        problem = f"{took:.1f} s from SIGTERM to the end, {met}"
    finish(bench.start(case, run), run)
    return problem or difference(run, expected)


def full(bench: Bench, case: str, run: Path, chance: random.Random, tally: Tally) -> str | None:
    expected, _ = bench.unbroken(case)
    process = bench.start(case, run, limit=1024 * chance.choice((20, 100, 300)))
    code = wait(process)
    tally.events += 1
    tally.where[f"exit code {code}"] += 1
    log = run.with_suffix(".log").read_text(errors="replace")
    finish(bench.start(case, run), run)
    return "a traceback" if "Traceback" in log else difference(run, expected)


def owners(bench: Bench, case: str, run: Path, chance: random.Random, tally: Tally) -> str | None:
    expected, seconds = bench.unbroken(case)
    first = bench.start(case, run)
    wait_until((run / ".lock").exists, first, DEADLINE)
    time.sleep(chance.uniform(0, 0.3) * seconds)
    second = bench.start(case, run)
    refused = wait(second)
    tally.events += 1
    tally.where[f"the second ends with {refused}"] += 1
    finish(first, run)
    # it may come when the first has ended; then it repeats the end
    both = refused == 0 and f"step {STEPS} of {STEPS} is done" not in run.with_suffix(".log").read_text()
    return "two processes owned the run" if both else difference(run, expected)


TRIALS: dict[str, Callable[[Bench, str, Path, random.Random, Tally], str | None]] = {
    "kill": kill,
    "stop": stop,
    "full": full,
    "owners": owners,
}


class Damage:
    """Restores of damaged checkpoints, in this process: a run would spend its time starting."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._loaded: dict[str, Any] = {}

    def _known(self, case: str) -> tuple[Path, Any, dict[int, Any]]:
        """Checkpoints of an unbroken run, the template of its state, and the digests of the state of each step."""
        if case not in self._loaded:
            import jaxrlhf
            from jaxrlhf.checkpoint import Checkpoints
            from jaxrlhf.checkpoint.digest import digests, leaves_by_name
            from jaxrlhf.config.file import METHODS as CONFIGS
            from jaxrlhf.config.file import load_config

            self.bench.unbroken(case)
            run, method = self.bench.folder / f"whole {case}", self.bench.cases[case][0]
            config = load_config(method, run.with_suffix(".yaml"), [("run_dir", str(run) + " again")])
            trainer = getattr(jaxrlhf, CONFIGS[method].__name__.replace("Config", "Trainer"))(config)
            template = trainer.state.template
            kept = Checkpoints(run / "checkpoints", 2, True)
            states = {step: digests(leaves_by_name(kept.restore_step(step, template)[1])) for step in kept.steps}
            self._loaded[case] = run / "checkpoints", template, states
        return self._loaded[case]

    def trial(self, case: str, folder: Path, chance: random.Random, tally: Tally) -> str | None:
        """Damage one file of the latest checkpoint and restore."""
        from jaxrlhf.checkpoint import Checkpoints
        from jaxrlhf.checkpoint.digest import digests, leaves_by_name

        source, template, states = self._known(case)
        shutil.copytree(source, folder)
        latest = max(states)
        files = sorted(file for file in (folder / str(latest)).rglob("*") if file.is_file())
        kind = damage(chance.choice(files), chance)
        tally.events += 1
        found = Checkpoints(folder, 2, True).restore(template)
        if found is None:
            return f"{kind}: nothing was restored"
        step, state, _ = found
        tally.where["the latest, unharmed" if step == latest else "the one before"] += 1
        return None if digests(leaves_by_name(state)) == states[step] else f"{kind}: another state as step {step}"


def damage(file: Path, chance: random.Random) -> str:
    """Damage a file in one of the ways that disks and people do, and name it."""
    content = bytearray(file.read_bytes())
    kind = chance.choice(("a bit", "a byte", "a zeroed block", "cut off", "longer", "empty", "removed"))
    at = chance.randrange(len(content)) if content else 0
    if kind == "a bit" and content:
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "a byte" and content:
        content[at] = (content[at] + chance.randrange(1, 256)) % 256
    elif kind == "a zeroed block":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "cut off":
        del content[at:]
    elif kind == "longer":
        content += chance.randbytes(chance.randrange(1, 64))
    elif kind == "empty":
        content.clear()
    file.write_bytes(content)
    if kind == "removed":
        file.unlink()
    return f"{kind} of {file.name}"


def run_trials(kinds: list[str], bench: Bench, minutes: float, seed: int, jobs: int, output: Path) -> dict[str, Tally]:
    """Trials of all kinds in turns until the time is over. What is known so far is in `output` after each."""
    tallies = {kind: Tally() for kind in kinds}
    damages, numbers = Damage(bench), iter(range(10**9))
    lock, started = threading.Lock(), time.monotonic()

    def elapsed() -> float:
        return (time.monotonic() - started) / 60

    def trial(kind: str) -> None:
        with lock:
            number = next(numbers)
        chance = random.Random(f"{seed} {number}")
        case = chance.choice(list(bench.cases))
        folder = bench.folder / f"{number} {kind} {case}".replace(" ", "-")
        tally = tallies[kind]
        try:
            if kind == "damage":
                problem = damages.trial(case, folder, chance, tally)
            else:
                problem = TRIALS[kind](bench, case, folder, chance, tally)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        tally.trials += 1
        if problem:
            tally.failures.append(f"trial {number}, {case}: {problem}")
            print(f"{kind}: {tally.failures[-1]}; its files are kept: {folder}", flush=True)
        else:
            for path in bench.folder.glob(f"*{folder.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with lock:
            found = {kind: vars(tally) | {"where": dict(tally.where)} for kind, tally in tallies.items()}
            output.write_text(json.dumps({"seed": seed, "minutes": elapsed(), "kinds": found}, indent=2))

    def runs() -> None:
        chance = random.Random(seed)
        while elapsed() < minutes:
            tried = [k for k in kinds if k != "damage" and len(tallies[k].failures) < MOST_FAILURES]
            if not tried:
                return
            trial(chance.choices(tried, [KINDS[kind] for kind in tried])[0])

    def checkpoints() -> None:
        while elapsed() < minutes and len(tallies["damage"].failures) < MOST_FAILURES:
            if tallies["damage"].trials < DAMAGES * elapsed():
                trial("damage")
            else:
                time.sleep(0.1)

    with ThreadPoolExecutor(jobs + 1) as pool:
        workers = [pool.submit(runs) for _ in range(jobs)]
        if "damage" in kinds:
            workers.append(pool.submit(checkpoints))
        for each in workers:
            each.result()
    return tallies


def table(tallies: dict[str, Tally], minutes: float) -> str:
    """Markdown: a row for each kind."""
    lines = ["| kind | trials | events | failures | 95 % bound per event | met |", "|---|---|---|---|---|---|"]
    for kind, tally in tallies.items():
        met = ", ".join(f"{name} {count}" for name, count in tally.where.most_common())
        lines.append(f"| {kind} | {tally.trials} | {tally.events} | {len(tally.failures)} | {tally.bound()} | {met} |")
    return "\n".join([*lines, f"\n{minutes:.0f} minutes"])


def main() -> int:
    """Run trials and return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="time for trials; one that has begun is finished")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("torture.json"))
    options = parser.parse_args()
    started = time.monotonic()
    logging.disable()  # of what each damage makes of a restore
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        bench = Bench(Path(folder))
        bench.prepare()
        tallies = run_trials(options.kinds, bench, options.minutes, options.seed, options.jobs, options.output)
        print(table(tallies, (time.monotonic() - started) / 60))
        failed = any(tally.failures for tally in tallies.values())
        if failed:
            kept = Path.cwd() / "torture-failed"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"the files of failed trials are in {kept}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
