"""Nothing compiles twice, and no update takes anything from the host."""

import jax
import pytest
from support.runs import supervised_step
from support.traced import compilations

from jaxrlhf import config
from jaxrlhf.errors import Preempted
from jaxrlhf.rollout import engine
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

SUPERVISED = {"sft": (config.SFTConfig, SFTTrainer), "reward": (config.RewardConfig, RewardTrainer)}
TRAINERS = SUPERVISED | {"dpo": (config.DPOConfig, DPOTrainer)}


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

    def build(method, rollout=None, more=None, logging=None, **keywords):
        base = ppo if method == "ppo" else supervised
        options = (
            base
            | (more or {})
            | {
                "run_dir": str(tmp_path / "run"),
                "data": config.replace(base["data"], path=one_length),
                "logging": logging or config.Logging(quiet=True, tensorboard=False, sample_every=0),
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
    with compilations() as count:
        with pytest.raises(Preempted):
            make(method).train()
        assert count["update"] == 1 and count["evaluate"] == 1, count
        make(method).train()  # resumes in the same process, and evaluates twice more
    assert count["update"] == 1 and count["evaluate"] == 1, count


@pytest.mark.parametrize(
    ("slots", "chunk", "rollout", "offload"),
    [
        (0, 64, ("generate",), False),
        (0, 2, ("_admit", "_advance", "_rollout"), False),
        (3, 64, ("_admit", "_advance"), False),
        (0, 64, (), True),
    ],
)
def test_ppo_programs_compile_once(slots, chunk, rollout, offload, make, stop_at_two, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", chunk)
    chosen = config.Generation(slots=slots)
    more = {"optim": config.Optim(offload=offload), "reference": config.Reference(offload=offload)}
    with compilations() as count:
        with pytest.raises(Preempted):
            make("ppo", rollout=chosen, more=more).train()
        make("ppo", rollout=chosen, more=more).train()
    expected = dict.fromkeys((*rollout, "annotate", "update"), 1)
    assert {name: count[name] for name in expected} == expected, count


def test_samples_of_the_first_prompts_and_token_records_compile_one_program(make):
    """The one that looks at the recorded sequences; completing the first prompts again takes none."""
    logging = config.Logging(quiet=True, tensorboard=False, sample_every=1, token_samples=3)
    with compilations() as count:
        make("ppo", logging=logging).train()
    expected = dict.fromkeys(("generate", "annotate", "update", "look"), 1)
    assert {name: count[name] for name in expected} == expected, count


@pytest.mark.parametrize("method", list(TRAINERS))
def test_a_step_takes_nothing_from_the_host_but_its_batch(method, make):
    """The batch is put in place explicitly, which the guard allows; parameters, keys and counters stay put."""
    trainer = make(method)
    supervised_step(trainer, 0)
    with jax.transfer_guard("disallow"):
        metrics = [supervised_step(trainer, step) for step in (1, 2)]
    assert all(jax.tree.leaves(jax.device_get(m))[0].shape == () for m in metrics)
