"""Checkpoints: exact, atomic, checked, and still there after kill -9."""

import contextlib
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import checkpoint
from jaxrlhf.checkpoint import Checkpoints, room, storage
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.errors import StorageError
from jaxrlhf.types import TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_of(seed, optimizer=OPTIMIZER):
    w = jax.random.normal(jax.random.key(seed), (16, 8))
    params = {"w": w, "b": jnp.full((8,), seed, jnp.bfloat16), "empty": jnp.zeros((0, 4))}
    opt_state = optimizer.init(params)
    return TrainState(jnp.int32(seed), {"policy": params}, {"policy": opt_state}, jnp.float32(0.1 * seed))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def filled(directory, steps, **options):
    checkpoints = Checkpoints(directory, keep=len(steps), synchronous=True, **options)
    for step in steps:
        checkpoints.save(step, state_of(step), {"position": 8 * step})
    return checkpoints


@pytest.mark.parametrize("synchronous", [True, False])
def test_restore_returns_what_was_saved(tmp_path, synchronous):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, synchronous=synchronous)
    assert checkpoints.restore(state_of(0)) is None and not checkpoint.exists(tmp_path / "c")
    extra = {"position": [3, 0.1, "é"], "nested": {"none": None, "large": 2**60}}
    checkpoints.save(3, state_of(3), extra)
    assert (checkpoints.steps == [3]) or not synchronous
    checkpoints.wait()
    reopened = Checkpoints(tmp_path / "c", keep=2, synchronous=synchronous)
    step, state, found = reopened.restore(jax.eval_shape(lambda: state_of(0)))
    assert step == 3 and found == extra and checkpoint.exists(tmp_path / "c")
    assert_same(state, state_of(3))


def test_typed_key_is_part_of_a_state(tmp_path):
    state = {"key": jax.random.key(5), "w": jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path, keep=1, synchronous=True)
    checkpoints.save(1, state, {})
    _, found, _ = checkpoints.restore(state)
    assert np.array_equal(jax.random.uniform(found["key"], (4,)), jax.random.uniform(state["key"], (4,)))


def test_donating_the_state_after_an_async_save_is_safe(tmp_path):
    make = jax.jit(lambda: [jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(8)])
    update = jax.jit(lambda state: [x * 2 + 1 for x in state], donate_argnums=0)
    expected = digests(leaves_by_name(make()))
    jax.block_until_ready(update(make()))  # compiled, so that the update below starts at once
    checkpoints = Checkpoints(tmp_path, keep=1, synchronous=False)
    state = make()
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = update(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    _, found, _ = checkpoints.restore(state)
    assert digests(leaves_by_name(found)) == expected


def test_latest_and_best_are_kept(tmp_path):
    metrics = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: None}
    for best, expected in (("max", [2, 5, 6]), ("min", [5, 6]), (None, [5, 6])):
        checkpoints = Checkpoints(tmp_path / str(best), keep=2, synchronous=True, best=best)
        for step, metric in metrics.items():
            checkpoints.save(step, state_of(step), {}, metric=metric)
        assert checkpoints.steps == expected
        reopened = Checkpoints(tmp_path / str(best), keep=2, synchronous=True, best=best)
        if best:
            step, state, _ = reopened.restore_step("best", state_of(0))
            assert step == expected[0]
            assert_same(state, state_of(step))
        else:
            with pytest.raises(StorageError, match=r"no checkpoint 'best'.*\[5, 6\]"):
                reopened.restore_step("best", state_of(0))


def test_a_step_is_saved_once(tmp_path):
    checkpoints = filled(tmp_path, [1])
    checkpoints.save(1, state_of(2), {}, block=True)
    assert_same(checkpoints.restore(state_of(0))[1], state_of(1))


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_is_found_and_the_step_before_is_used(tmp_path, kind):
    generator = random.Random(kind)
    filled(tmp_path / "whole", [5, 10])
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "10").rglob("*") if p.is_file())
    outcomes = []
    for trial, file in enumerate(files):
        directory = tmp_path / str(trial)
        shutil.copytree(tmp_path / "whole", directory)
        content = bytearray((directory / file).read_bytes())
        if kind == "flip" and content:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (directory / file).write_bytes(content[: len(content) // 2] if kind == "truncate" else content)
        if kind == "delete":
            (directory / file).unlink()
        # damage where nobody reads is harmless; all other damage costs one step and nothing else
        step, state, extra = Checkpoints(directory, keep=2, synchronous=True).restore(state_of(0))
        assert extra == {"position": 8 * step}
        assert_same(state, state_of(step))
        aside = [p for p in directory.iterdir() if p.name.startswith("corrupt-10-")]
        assert len(aside) == (step == 5) and all((p / "reason.txt").read_text() for p in aside)
        outcomes.append(step)
    assert set(outcomes) == {5, 10}


def test_a_flipped_bit_in_array_data_is_found(tmp_path):
    """Orbax alone returns these bits without a word."""
    checkpoints = filled(tmp_path, [5, 10])
    file = max((p for p in (tmp_path / "10").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"checkpoint 10 .* is damaged"):
        checkpoints.restore_step(10, state_of(0))
    assert checkpoints.steps == [5, 10]  # a reader renames nothing
    assert checkpoints.restore(state_of(0))[0] == 5


def test_a_checkpoint_under_a_wrong_step_is_damaged(tmp_path):
    checkpoints = filled(tmp_path, [5, 10])
    os.rename(tmp_path / "10", tmp_path / "99")
    assert checkpoints.restore(state_of(0))[0] == 5


def test_restore_raises_if_every_checkpoint_is_damaged(tmp_path):
    checkpoints = filled(tmp_path, [5, 10])
    for step in (5, 10):
        (tmp_path / str(step) / "record" / "data.json").write_text("{")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"(?s)corrupt-10-.*record cannot be read.*--fresh"):
            checkpoints.restore(state_of(0))
    assert checkpoint.exists(tmp_path)


def test_another_optimizer_or_model_is_refused_and_nothing_is_renamed(tmp_path):
    checkpoints = filled(tmp_path, [5])
    with pytest.raises(StorageError, match=r"another model or optimizer.*lacks opt_state\.policy\.0\.trace\.b"):
        checkpoints.restore(state_of(0, optax.sgd(0.1, momentum=0.9)))
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state_of(0))
    with pytest.raises(StorageError, match="float32:16x8, now bfloat16:16x8"):
        checkpoints.restore(halved)
    assert checkpoints.steps == [5]


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("synchronous", [True, False])
def test_the_third_failed_save_in_a_row_raises(tmp_path, synchronous, caplog, capfd):
    state = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    checkpoints = Checkpoints(tmp_path, keep=2, synchronous=synchronous)
    checkpoints.save(1, state, {}, block=True)
    with full_disk(50_000):
        checkpoints.save(2, state, {})
        checkpoints.wait()
    assert checkpoints.steps == [1] and "checkpoint 2 was not saved" in caplog.text
    deadline = time.monotonic() + 10
    while os.listdir(tmp_path) != ["1"] and time.monotonic() < deadline:
        time.sleep(0.05)  # other threads of the failed save may still have written
        checkpoints.remove_unfinished()
    assert os.listdir(tmp_path) == ["1"]  # the disk was given back
    checkpoints.save(3, state, {}, block=True)  # and the count starts anew
    with full_disk(50_000):
        for step in (4, 5):
            checkpoints.save(step, state, {})
            checkpoints.wait()
        with pytest.raises(StorageError, match="the last 3 saves failed"):
            checkpoints.save(6, state, {})
            checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]
    assert checkpoints.restore(state)[0] == 3
    assert "Traceback" not in capfd.readouterr().err


def test_a_device_that_fails_costs_a_save_and_says_so(tmp_path, monkeypatch, caplog):
    checkpoints = filled(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        checkpoints.save(2, state_of(2), {})
        assert "checkpoint 2 was not saved" in caplog.text and "I/O error" in caplog.text
    checkpoints.save(3, state_of(3), {}, block=True)
    assert checkpoints.steps == [3] and checkpoints.restore(state_of(0))[0] == 3


def test_a_save_in_the_place_of_a_file(tmp_path, monkeypatch, caplog):
    """One dot, and no word of the coroutine that Orbax leaves."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        storage._orbax.__wrapped__()  # sets the filters
        (tmp_path / "1").write_text("")
        Checkpoints(tmp_path, keep=1, synchronous=True).save(1, state_of(1), {})
        gc.collect()
    assert "already exists. Training continues" in caplog.text
    assert not [str(warning.message) for warning in seen if "never awaited" in str(warning.message)]


def test_what_a_kill_leaves_of_a_record_that_is_replaced_is_removed(tmp_path):
    checkpoints = filled(tmp_path, [1])
    left = tmp_path / "1" / "record" / ".data.json.part"
    left.write_text("{")
    files = {path for path in tmp_path.rglob("*") if path != left}
    checkpoints.remove_unfinished()
    assert set(tmp_path.rglob("*")) == files and checkpoints.restore(state_of(0))[0] == 1


def test_a_failed_blocking_save_raises(tmp_path):
    checkpoints = filled(tmp_path, [1])
    with full_disk(10), pytest.raises(StorageError, match="checkpoint 2 was not saved"):
        checkpoints.save(2, state_of(2), {}, block=True)


def test_too_little_disk_space_is_noticed_before_writing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    Checkpoints(tmp_path, keep=1, synchronous=True).save(1, state_of(1), {})
    assert "the disk has 0 MB free" in caplog.text and os.listdir(tmp_path) == []


def test_temporary_folders_are_removed_by_a_save_and_kept_by_a_reader(tmp_path):
    checkpoints = filled(tmp_path, [1])
    (tmp_path / f"2{checkpoint.TEMPORARY}").mkdir()
    reader = Checkpoints(tmp_path, keep=1, synchronous=True)
    assert reader.restore_step(1, state_of(0))[0] == 1 and reader.steps == [1]
    assert (tmp_path / f"2{checkpoint.TEMPORARY}").exists()
    writer = Checkpoints(tmp_path, keep=1, synchronous=True)
    writer.save(3, state_of(3), {})
    assert sorted(os.listdir(tmp_path)) == ["3"]
    assert checkpoints.steps == [3]


def test_short_of_memory():
    assert not checkpoint.short_of_memory({"w": jnp.ones(4)})
    huge = {"w": jax.ShapeDtypeStruct((2**22, 2**22), jnp.float32)}
    assert checkpoint.short_of_memory(huge) or not Path("/proc/meminfo").exists()


def test_saved_on_eight_devices_restored_on_other_meshes(tmp_path):
    def placed(shape, spec):
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        return {"w": NamedSharding(mesh, spec), "step": NamedSharding(mesh, P())}

    def make():
        return {"w": jax.random.normal(jax.random.key(0), (16, 64)), "step": jnp.int32(3)}

    state = jax.jit(make, out_shardings=placed((8, 1), P("a")))()
    checkpoints = Checkpoints(tmp_path, keep=2, synchronous=False)
    checkpoints.save(1, state, {}, block=True)
    one = digests(leaves_by_name(jax.device_put(state, jax.devices()[0])))
    for shape, spec in (((2, 4), P("a", "b")), ((4, 2), P("b", "a")), ((1, 8), P(None, "b")), ((8, 1), P())):
        where = placed(shape, spec)
        template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
        _, found, _ = checkpoints.restore(template)
        assert found["w"].sharding == where["w"]
        assert digests(leaves_by_name(found)) == one


TRAINER = """
import sys, hashlib, jax, jax.numpy as jnp, numpy as np, optax
from pathlib import Path
from jaxrlhf.checkpoint import Checkpoints
from jaxrlhf.config import Checkpoint, Logging, SFTConfig
from jaxrlhf.metrics import Logger
from jaxrlhf.runs import open_run

STEPS, SIZE = 40, 512
optimizer = optax.adamw(1e-2)

def initial():
    params = {"w": jax.random.normal(jax.random.key(1), (SIZE, SIZE)) * 0.05, "b": jnp.zeros(SIZE, jnp.bfloat16)}
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

def update(state, x):
    key = jax.random.fold_in(jax.random.key(2), state["step"])
    def loss(params):
        hidden = jnp.tanh(x @ params["w"] + params["b"].astype(jnp.float32))
        return jnp.mean((hidden - jax.random.normal(key, hidden.shape)) ** 2)
    value, gradient = jax.value_and_grad(loss)(state["params"])
    change, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], change)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, value

update = jax.jit(update, donate_argnums=0)
config = SFTConfig(run_dir=sys.argv[1], logging=Logging(quiet=True, tensorboard=False))
with open_run(config, "sft", fresh=False) as run:
    logger = Logger(run.directory, config.logging, "sft", STEPS)
    checkpoints = Checkpoints(run.directory / "checkpoints", keep=2, synchronous=False)
    restored = checkpoints.restore(jax.eval_shape(initial))
    start, state, extra = restored or (0, initial(), {"rows": 0})
    logger.rewind(start)
    print("start", start, flush=True)
    rows = extra["rows"]
    for step in range(start + 1, STEPS + 1):
        x = np.random.default_rng([7, rows]).standard_normal((8, SIZE)).astype(np.float32)
        rows += 8
        state, loss = update(state, x)
        logger.log(step, {"loss": loss})
        if step % 4 == 0:
            checkpoints.save(step, state, {"rows": rows}, block=step == STEPS)
    logger.close()
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    print("done", digest.hexdigest(), flush=True)
"""


def started(script, directory):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
    command, pipe = [sys.executable, str(script), str(directory)], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(directory, process, visible, count):
    """Until the `count`th new name that is `visible` appears among the checkpoints, or the process ends."""
    seen = set(os.listdir(directory)) if directory.exists() else set()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        names = set(os.listdir(directory)) if directory.exists() else set()
        count -= len({name for name in names - seen if visible(name)})
        seen |= names
        if count <= 0:
            return
        time.sleep(0.0005)


def test_kill_and_resume_is_bit_identical(tmp_path):
    """SIGKILL while a checkpoint is being written, just after one, and at any moment; then let it finish."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    reference = started(script, tmp_path / "reference")
    generator = random.Random(0)
    killed, starts = tmp_path / "killed", []
    for visible, count in ((lambda n: n.endswith(checkpoint.TEMPORARY), 2), (str.isdigit, 2), (str.isdigit, 1)):
        process = started(script, killed)
        wait_for(killed / "checkpoints", process, visible, count)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, (output, errors)
        starts.append(int(output.split()[1]))
    process = started(script, killed)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", errors  # orbax is silent
    starts.append(int(output.split()[1]))

    expected, errors = reference.communicate(timeout=120)
    assert reference.returncode == 0, errors
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] > 0, starts
    assert output.split()[-2:] == expected.split()[-2:]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("reference", "killed")]
    assert metrics[0] == metrics[1] and metrics[0].count(b"\n") == 40
    assert len(json.loads((killed / "run.json").read_text())["starts"]) >= 3
