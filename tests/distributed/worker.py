"""One of several processes of a test: `worker.py NUMBER ADDRESS FOLDER`. Writes what it finds to FOLDER/NUMBER.json."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import resource
import signal
import sys
import time
from typing import Any

number, address, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])

from jaxrlhf import distributed  # noqa: E402

distributed.start(address, 2, number, heartbeat_timeout=20)

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxrlhf import PPOTrainer, SFTTrainer, config, runs, sharding, weights  # noqa: E402
from jaxrlhf.checkpoint import Checkpoints, storage  # noqa: E402
from jaxrlhf.checkpoint.digest import digests, leaves_by_name  # noqa: E402
from jaxrlhf.config.file import load_config  # noqa: E402
from jaxrlhf.errors import ConfigError, DataError, Preempted, RewardError, StorageError  # noqa: E402
from jaxrlhf.rollout import engine  # noqa: E402
from jaxrlhf.training import setup  # noqa: E402
from jaxrlhf.weights import safetensors  # noqa: E402

found: dict[str, Any] = {}


def refusal(call: Any) -> str:
    try:
        call()
    except (ConfigError, DataError) as error:
        assert error.in_all_processes
        return str(error)
    return ""


# What processes tell each other
values = [None, "ä", 0.1 + number, float("nan"), [1, {"b": number}]]
found["gather"] = json.dumps(distributed.gather(values))
found["on_primary"] = distributed.on_primary(lambda: number + 7)
found["other_error"] = refusal(
    lambda: distributed.shared(lambda: 1 // number if number else safetensors.scan(folder / "none"))
)
request, seen = distributed.Request(), []
for step in range(6):
    seen.append(request.seen(number == 1 and step == 2))
found["request"] = seen
started = time.perf_counter()
for _ in range(50):
    request.seen(False)
found["request_ms"] = (time.perf_counter() - started) / 50 * 1e3

# Rows by global index
mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=4))
rows = np.arange(48, dtype=np.float32).reshape(16, 3)
placed = sharding.put_rows(rows, mesh)
found["own_rows"] = sorted({int(shard.data[0, 0]) // 3 for shard in placed.addressable_shards})
found["fetched"] = bool((sharding.fetch(placed) == rows).all())

# Disagreement
ppo = load_config("ppo", folder / "ppo.yaml", [])
other = dataclasses.replace(ppo, seed=ppo.seed + number)
found["config"] = refusal(lambda: runs.check_processes(other))
found["data"] = refusal(lambda: setup.check_data(None, [1, 2 + number]))  # type: ignore[arg-type]
package = folder / f"package-{number}"
package.mkdir()
(package / "code.py").write_text(f"x = {number}")
here, distributed.__file__ = distributed.__file__, str(package / "distributed.py")
found["code"] = refusal(distributed.require_same_code)
distributed.__file__ = here
found["mesh"] = ""
try:
    sharding.make_mesh(config.Mesh(data=1, fsdp=4))
except ConfigError as error:
    found["mesh"] = str(error)

# Weights: bytes read, and what they are
read: list[int] = []
original = safetensors._read_from
safetensors._read_from = lambda stream, entry, begin, raw: (
    read.append(raw.nbytes),
    original(stream, entry, begin, raw),
)[1]  # type: ignore[assignment]
for name, shape in {"fsdp": config.Mesh(data=1, fsdp=8), "tensor": config.Mesh(data=1, fsdp=2, tensor=4)}.items():
    read.clear()
    grid = sharding.make_mesh(shape)
    _, params = weights.load(folder / "weights", mesh=grid)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    found[f"bytes_{name}"] = [sum(read), total]
    found[f"digest_{name}"] = digests(leaves_by_name(params))
safetensors._read_from = original
largest: list[int] = []
from jaxrlhf.weights import mapping  # noqa: E402

to_host = mapping._to_host
mapping._to_host = lambda *args: (array := to_host(*args), largest.append(array.nbytes))[0]  # type: ignore[assignment]
weights.export(folder / "exported", *weights.load(folder / "weights", mesh=grid), max_shard_size=4000)
found["gathered"] = [len(largest), max(largest)]
mapping._to_host = to_host

# A checkpoint that one process with 8 devices has saved, and one for it
template = sharding.with_shardings(params, sharding.shardings(params, grid))
step, state, _ = Checkpoints(folder / "checkpoints-of-1", 3, True).restore_step(4, template)
found["restored"] = digests(leaves_by_name(state))
checkpoints = Checkpoints(folder / "checkpoints-of-2", 3, False)
checkpoints.save(5, state, {"note": "two"})
checkpoints.wait()
found["steps"] = checkpoints.steps

# A disk that is full for process 1, until the fourth save
full = Checkpoints(folder / "checkpoints-full", 3, True)
said: list[str] = []
listener = logging.Handler()
listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("jaxrlhf.checkpoint").addHandler(listener)
room = resource.getrlimit(resource.RLIMIT_FSIZE)
started = time.monotonic()
for step in (6, 7, 8):
    if number:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, room[1]))
    try:
        full.save(step, state, {})
    except StorageError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, room)
found["full_seconds"] = time.monotonic() - started
full.save(9, state, {})
found["full"], found["saved_later"] = list(said), full.steps

# PPO, with a reward that is told which rows each process has scored
scored: list[int] = []


def reward(prompts: Any, completions: Any) -> list[float]:
    scored.append(len(completions))
    return [0.1 * len(text) + 0.01 * (sum(map(ord, text)) % 7) for text in completions]


trainer = PPOTrainer(ppo, reward)
found["ppo"] = trainer.train()
found["rows_scored"] = scored
found["params"] = digests(leaves_by_name(trainer.state.value))
found["reward_error"] = ""


def failing(prompts: Any, completions: Any) -> list[float]:
    if number:
        raise ValueError("no score today")
    return [0.0] * len(completions)


try:
    PPOTrainer(dataclasses.replace(ppo, run_dir=f"{ppo.run_dir}-failing"), failing).train()
except RewardError as error:
    found["reward_error"] = str(error)

# A signal to process 1 after the first update: before its validation, and after it
found["stopped"] = []
for end_first in (False, True):
    stopped = dataclasses.replace(ppo, run_dir=f"{ppo.run_dir}-stopped-{end_first}")
    trainer = PPOTrainer(stopped, reward)
    end = trainer._end_update

    def signalled(*arguments: Any, end: Any = end, end_first: bool = end_first) -> None:
        end(*arguments) if end_first else None
        if number:
            os.kill(os.getpid(), signal.SIGTERM)
        end(*arguments) if not end_first else None

    trainer._end_update = signalled
    try:
        trainer.train()
    except Preempted as error:
        saved = Checkpoints(f"{stopped.run_dir}/checkpoints", 3, True).steps
        trainer = PPOTrainer(stopped, reward)
        trainer.train()
        found["stopped"].append([str(error), saved, digests(leaves_by_name(trainer.state.value)) == found["params"]])

# A signal to process 1 while SFT draws samples after its first step, two tokens in a program
engine.CHUNK, advance, calls = 2, engine._advance, []


def signalled_once(*arguments: Any) -> Any:
    calls.append(1)
    if number and len(calls) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return advance(*arguments)


sft = config.SFTConfig(
    model=ppo.model,
    data=config.Data(path=str(folder / "rows.jsonl")),
    mesh=config.Mesh(data=4, fsdp=2),
    train=config.Train(batch_size=8, max_steps=2),
    sampling=config.Sampling(response_length=9),
    checkpoint=config.Checkpoint(save_every=5),
    logging=config.Logging(tensorboard=False, report=False, sample_every=1, num_samples=3),
)
engine._advance = signalled_once
found["stopped_sampling"] = ""
try:
    SFTTrainer(config.replace(sft, run_dir=str(folder / "sft-stopped"))).train()
except Preempted as error:
    found["stopped_sampling"] = f"{error}, {len(calls)} programs"
for name in ("sft-stopped", "sft"):
    SFTTrainer(config.replace(sft, run_dir=str(folder / name))).train()

# A save that does not begin in process 1. Last, as Orbax counts saves, and has now counted differently
said.clear()
if number:
    storage._orbax = lambda: (None, contextlib.nullcontext())
full.save(10, state, {})
full.wait()
found["not_begun"] = said
(folder / f"{number}.json").write_text(json.dumps(found))
print("done", os.getpid())
