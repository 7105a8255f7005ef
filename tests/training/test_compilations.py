"""Nothing compiles twice, what was compiled ahead is what runs, and no update takes anything from the host."""

import collections
import contextlib
import threading
import time

import jax
import pytest

from jaxrlhf import compilation, config
from jaxrlhf.errors import Preempted
from jaxrlhf.rollout import engine
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

COMPILED = "/jax/core/compile/backend_compile_duration"
SUPERVISED = {"sft": (config.SFTConfig, SFTTrainer), "reward": (config.RewardConfig, RewardTrainer)}
TRAINERS = SUPERVISED | {"dpo": (config.DPOConfig, DPOTrainer)}


@contextlib.contextmanager
def compilations():
    """Programs that jax compiled (or took from its persistent cache) in the block: name -> how often."""
    count = collections.Counter()

    def listen(event, seconds, **about):
        if event == COMPILED:
            count[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True)
def forget():
    """Programs of the tests before, which would hide a compilation."""
    jax.clear_caches()


@pytest.fixture
def one_length(tmp_path):
    """Rows that fall into one bucket, whichever of them make a batch."""
    file = tmp_path / "rows.jsonl"
    row = '{"prompt": "say red ", "completion": "red", "chosen": "red", "rejected": "no%s"}\n'
    file.write_text("".join(row % ("o" * (i % 3)) for i in range(24)))
    return str(file)


def reward(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def make(supervised, ppo, one_length, tmp_path):
    """A trainer of six steps over these rows, evaluating every other one."""

    def build(method, rollout=None, more=None, **keywords):
        base = ppo if method == "ppo" else supervised
        options = (
            base
            | (more or {})
            | {
                "run_dir": str(tmp_path / "run"),
                "data": config.replace(base["data"], path=one_length),
                "logging": config.Logging(quiet=True, tensorboard=False, sample_every=0),
            }
        )
        if method == "ppo":
            chosen = config.PPOConfig(**options, rollout=rollout or config.Generation())
            return PPOTrainer(chosen, reward=reward, **keywords)
        options["train"] = config.Train(max_steps=6, batch_size=6, eval_batch_size=4, eval_every=2)
        cls, trainer = TRAINERS[method]
        return trainer(cls(**options), **keywords)

    return build


@pytest.mark.parametrize("method", list(SUPERVISED))
def test_supervised_programs_compile_once(method, make, stop_at_two):
    """Begun before the weights are read; begun by `train`: the test below."""
    with compilations() as count:
        with pytest.raises(Preempted):
            make(method).train()
        assert count["update"] == 1 and count["evaluate"] == 1, count
        make(method).train()  # resumes in the same process, and evaluates twice more
    assert count["update"] == 1 and count["evaluate"] == 1, count


@pytest.mark.parametrize("method", list(SUPERVISED))
def test_the_first_step_waits_for_what_is_being_compiled(method, make, monkeypatch):
    """Not even a late thread is overtaken: a step that came too early would compile the same program beside it."""
    outputs, threads = compilation.compile_shapes, []

    def late(*args, **keywords):
        time.sleep(0.5)
        return outputs(*args, **keywords)

    def listen(event, seconds, **about):
        if event == COMPILED and about["fun_name"] in ("jit(update)", "jit(evaluate)"):
            threads.append(threading.current_thread().name)

    monkeypatch.setattr(compilation, "outputs", late)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        make(method).train()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(threads) == 2 and all(name.startswith("compile") for name in threads), threads


@pytest.mark.parametrize(
    ("slots", "rollout", "offload", "ahead"),
    [
        (0, ("generate",), False, False),
        (0, ("generate",), False, True),
        (3, ("_admit", "advance"), False, True),  # begun by `train`: the test below
        (0, (), True, False),
        (0, (), True, True),
    ],
)
def test_ppo_programs_compile_once(slots, rollout, offload, ahead, make, stop_at_two):
    chosen = config.Generation(slots=slots)
    more = {"optim": config.Optim(offload=offload), "reference": config.Reference(offload=offload)}
    with compilations() as count:
        with pytest.raises(Preempted):
            make("ppo", rollout=chosen, more=more, ahead=ahead).train()
        make("ppo", rollout=chosen, more=more, ahead=ahead).train()
    expected = dict.fromkeys((*rollout, "annotate", "update"), 1)
    assert {name: count[name] for name in expected} == expected, count


def test_the_engines_programs_are_compiled_ahead(make, monkeypatch):
    """By the time it is asked it only has to run, and so has the update."""
    answer, needed = engine.generate_in_slots, []

    def watched(*args, **keywords):
        with compilations() as count:
            made = answer(*args, **keywords)
        needed.append(count["_admit"] + count["advance"])
        return made

    monkeypatch.setattr(engine, "generate_in_slots", watched)
    make("ppo", rollout=config.Generation(slots=3)).train()
    assert needed == [0] * 4


@pytest.mark.parametrize("method", list(TRAINERS))
def test_a_step_takes_nothing_from_the_host_but_its_batch(method, make):
    """The batch is put in place explicitly, which the guard allows; parameters, keys and counters stay put."""
    trainer = make(method)
    trainer._update(0)
    with jax.transfer_guard("disallow"):
        metrics = [trainer._update(step) for step in (1, 2)]
    assert all(jax.tree.leaves(jax.device_get(m))[0].shape == () for m in metrics)
