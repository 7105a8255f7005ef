"""Time from the command to the end of the first update of a run of PPO or GRPO, by phases.

    python scripts/first_update.py ppo demo/ppo/config.yaml

Runs the command in a process of its own, once with an empty compilation cache (cold) and once with the cache that this
leaves (warm), and stops it after the first update. Seconds of the clock and of the processor, the latter of all threads
together, to the end of

    imports     of Python's modules
    loading     tokenizer, prompts, models and their fingerprints
    rollout     the first responses and their scores, with the compilation of their programs and, in other threads, of
                those of the update
    update      what is left of that, annotation, update and the first records
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("imports", "loading", "rollout", "update")


def measured(method: str, config: str, cache: str) -> dict[str, list[float]]:
    """[seconds, processor seconds] to the end of each phase, in a new process with this compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        code = [sys.executable, __file__, method, config, "--inside", str(Path(folder, "run")), repr(time.time())]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        done = subprocess.run(code, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def inside(method: str, config: str, directory: str, started: float) -> None:
    """Run the command, print the times as JSON and exit after the first update."""
    times: dict[str, list[float]] = {}

    def mark(phase: str) -> None:
        times[phase] = [round(time.time() - started, 2), round(time.process_time(), 2)]

    from jaxrlhf import runtime

    runtime.configure()
    import jax

    from jaxrlhf.cli import main
    from jaxrlhf.training.grpo import GRPOTrainer
    from jaxrlhf.training.on_policy.trainer import OnPolicyTrainer
    from jaxrlhf.training.ppo import PPOTrainer

    mark("imports")
    rollout = OnPolicyTrainer.generate_and_score

    def timed_rollout(self: OnPolicyTrainer, *args: object, **options: object) -> object:
        mark("loading")
        batch = rollout(self, *args, **options)  # type: ignore[arg-type]
        mark("rollout")
        return batch

    def timed_update(self: PPOTrainer | GRPOTrainer, *args: object) -> None:
        jax.block_until_ready(self.state.value.params)
        mark("update")
        print(json.dumps(times), flush=True)
        os._exit(0)

    OnPolicyTrainer.generate_and_score, OnPolicyTrainer._end_update = timed_rollout, timed_update  # type: ignore[method-assign]
    sys.exit(main([method, config, "--run_dir", directory, "--logging.quiet", "true"]))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("ppo", "grpo"))
    parser.add_argument("config", help="a config file")
    parser.add_argument("--times", type=int, default=1, help="cold and warm runs, in turns")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.method, args.config, args.inside[0], float(args.inside[1]))
    for _ in range(args.times):
        cache = tempfile.mkdtemp()
        try:
            for name in ("cold", "warm"):
                times, before = measured(args.method, args.config, cache), [0.0, 0.0]
                parts = []
                for phase in PHASES:
                    seconds, processor = (now - past for now, past in zip(times[phase], before, strict=True))
                    parts.append(f"{phase} {seconds:.1f} ({processor:.1f})")
                    before = times[phase]
                print(f"{name}: {before[0]:.1f} s ({before[1]:.1f} s of the processor): {', '.join(parts)}", flush=True)
        finally:
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    run()
