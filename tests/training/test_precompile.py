"""The programs of the first update are compiled in other threads, and found when it calls them."""

import itertools
import subprocess
import sys
import threading
from concurrent import futures

import jax
import jax.numpy as jnp
import pytest
from support.runs import length_reward

from jaxrlhf import config, runtime, stopping
from jaxrlhf.errors import Interrupted
from jaxrlhf.sharding import make_mesh
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.on_policy import precompile
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.types import Rollout


@pytest.fixture
def threads():
    """Names of the threads in which each program was compiled, in a process that has compiled none."""
    jax.clear_caches()
    found: dict[str, list[str]] = {}

    def listen(event, duration_secs, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            name = about["fun_name"].removeprefix("jit(").removesuffix(")")
            found.setdefault(name, []).append(threading.current_thread().name.split("_")[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def options(ppo, tmp_path, monkeypatch):
    known = runtime.processor()
    monkeypatch.setattr(runtime, "processor", lambda: known._replace(cores=2))
    return ppo | {
        "run_dir": str(tmp_path / "run"),
        "ppo": config.PPO(batch_size=4, total_episodes=8),
        "sampling": config.Sampling(response_length=7),  # odd, so that `trim` leaves the responses as they are
        "logging": config.Logging(quiet=True, tensorboard=False, sample_every=0),
    }


PPO_RUNS = {
    "plain": {},
    "replay": {"ppo": config.PPO(batch_size=4, total_episodes=8, replay=1)},
    "support": {"sampling": config.Sampling(response_length=7, top_k=5, renormalise_logprobs=True)},
    "slots": {"rollout": config.Generation(slots=2)},
}


@pytest.mark.parametrize("run", PPO_RUNS)
def test_ppo_finds_programs_that_other_threads_compiled(run, options, threads):
    PPOTrainer(config.PPOConfig(**options | PPO_RUNS[run]), reward=length_reward).train()
    replays = ["MainThread"] if run == "replay" else []  # a program of their own
    assert threads["annotate"] == ["compile"] and threads["update"] == ["compile", *replays]


@pytest.mark.parametrize("method", ["grpo", "remax"])
def test_grpo_finds_them_too(method, options, threads):
    del options["ppo"]
    grpo = config.GRPO(method=method, batch_size=4, num_generations=2, total_episodes=8)
    GRPOTrainer(config.GRPOConfig(**options, grpo=grpo), reward=length_reward).train()
    assert threads["annotate"] == threads["update"] == ["compile"]


def test_a_program_that_could_not_be_compiled_is_compiled_when_it_is_called(options, threads, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(precompile, "compile_shapes", broken)
    PPOTrainer(config.PPOConfig(**options), reward=length_reward).train()
    assert threads["annotate"] == threads["update"] == ["MainThread"]


def test_a_step_of_ones_own_prompts_compiles_nothing_ahead(options, threads):
    PPOTrainer(config.PPOConfig(**options), reward=length_reward).ppo_step(["say red"] * 4)
    assert threads["annotate"] == threads["update"] == ["MainThread"]


def test_a_request_to_stop_ends_the_wait():
    waiting = precompile.BackgroundCompiler.__new__(precompile.BackgroundCompiler)
    waiting._rollout, waiting._submitted = rollout(4), [futures.Future()]  # never done
    stopping.request()
    try:
        with stopping.armed(), pytest.raises(Interrupted):
            waiting.wait(rollout(4))
    finally:
        stopping.request(False)
    waiting.wait(rollout(2))  # another program


def rollout(columns):
    tokens, rows = jnp.zeros((3, 4 + columns), jnp.int32), jnp.zeros(3, jnp.int32)
    response = jnp.zeros((3, columns))
    return Rollout(tokens, tokens > 0, response > 0, response, rows > 0, rows, rows)


WAITING = """
import sys, time
from jaxrlhf import runtime
from jaxrlhf.cli import main
from jaxrlhf.training.on_policy import precompile

known = runtime.processor()
runtime.processor = lambda: known._replace(cores=2)
precompile.compile_shapes = lambda *args, **kwargs: (print("compiling", flush=True), time.sleep(300))
sys.exit(main())
"""


def test_a_command_that_is_stopped_does_not_wait_for_a_program(tiny_model, rows, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def reward(prompts, completions):\n    return [0.0] * len(completions)\n")
    options = {"model.path": tiny_model, "model.init": "random", "data.path": rows, "reward.function": f"{file}:reward"}
    options |= {"ppo.batch_size": 4, "sampling.response_length": 4, "run_dir": tmp_path / "run", "mesh.data": 1}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-c", WAITING, "ppo", *arguments]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert started.stdout
    lines = iter(started.stdout)
    printed = "".join(itertools.takewhile(lambda line: line != "compiling\n", lines))
    started.terminate()
    try:
        assert started.wait(120) == 75, printed + "".join(lines)
    finally:
        started.kill()


def test_only_where_it_gains(monkeypatch):
    known, one, two = runtime.processor(), make_mesh(config.Mesh(data=1)), make_mesh(config.Mesh(data=2))
    monkeypatch.setattr(runtime, "processor", lambda: known._replace(cores=2))
    assert precompile.pays_off(one) and not precompile.pays_off(two)
    monkeypatch.setattr(runtime, "processor", lambda: known._replace(cores=1))
    assert not precompile.pays_off(one)
