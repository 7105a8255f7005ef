"""Nothing compiles twice, and no update takes anything from the host."""

import typing

import jax
import pytest
from support.runs import length_reward, supervised_step
from support.traced import compilations

from jaxrlhf import config, runtime
from jaxrlhf.config import schema
from jaxrlhf.errors import Preempted
from jaxrlhf.rollout import engine
from jaxrlhf.training.distill.trainer import DistillTrainer
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer
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


@pytest.mark.parametrize(("worth", "widths"), [(1e12, 1), (0.0, 3)])
def test_a_width_is_compiled_if_it_saves_as_much_as_that_takes(worth, widths, supervised, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "say red ", "completion": "{"o" * i}"}}\n' for i in range(1, 19)))
    monkeypatch.setattr(runtime, "flops_of_compiling", lambda backend: worth)
    options = {"run_dir": str(tmp_path / "run"), "data": config.Data(path=str(file), shuffle=False)}
    trainer = SFTTrainer(config.SFTConfig(**supervised | options | {"train": config.Train(batch_size=6)}))
    assert trainer.widths == (16, 24, 32)[-widths:]
    assert f"width of batches: {' or '.join(map(str, trainer.widths))} tokens" in trainer.about()
    with compilations() as count:
        trainer.train()
    assert count["update"] == widths, count


@pytest.mark.parametrize(("worth", "widths"), [(1e12, 1), (0.0, 3)])
def test_a_width_of_prompts_is_compiled_if_it_saves_as_much(worth, widths, ppo, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "say {"o" * i}"}}\n' for i in range(1, 25)))
    monkeypatch.setattr(runtime, "flops_of_compiling", lambda backend: worth)
    options = {"run_dir": str(tmp_path / "run"), "data": config.Data(path=str(file), shuffle=False)}
    options["ppo"] = config.PPO(batch_size=8, total_episodes=24)
    options["sampling"] = config.Sampling(response_length=7)  # odd, so that `trim` leaves the responses as they are
    with compilations() as count:
        PPOTrainer(config.PPOConfig(**ppo | options), reward=length_reward).train()
    expected = dict.fromkeys(("generate", "annotate", "update"), widths)
    assert {name: count[name] for name in expected} == expected, count


@pytest.mark.parametrize(
    ("slots", "chunk", "rollout", "offload"),
    [
        (0, 64, {"generate": 1}, False),
        (0, 2, {"_admit": 1, "_advance": 2, "_rollout": 1}, False),  # with half of the cache, and all of it
        (3, 64, {"_admit": 1, "_advance": 1}, False),
        (0, 64, {}, True),
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
    expected = rollout | {"annotate": 1, "update": 1}
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


NUMBERS: dict[str, tuple[float, float]] = {
    "optim.learning_rate": (1e-3, 2e-3),
    "optim.warmup_steps": (1, 2),
    "optim.final_lr_fraction": (0.1, 0.2),
    "optim.weight_decay": (0.1, 0.2),
    "optim.beta1": (0.8, 0.9),
    "optim.beta2": (0.9, 0.99),
    "optim.eps": (1e-4, 1e-5),
    "optim.momentum": (0.9, 0.8),
    "optim.max_grad_norm": (0.5, 2.0),
    "sampling.temperature": (0.9, 0.8),
    "sampling.top_k": (20, 30),
    "sampling.top_p": (0.9, 0.8),
    "sampling.min_p": (0.01, 0.02),
    "sampling.min_length": (1, 2),
    "label_smoothing": (0.1, 0.2),
    "center_rewards_coefficient": (0.01, 0.02),
    "nu": (0.4, 0.6),
    "dpo.beta": (0.2, 0.3),
    "dpo.beta_final": (0.4, 0.5),
    "dpo.label_smoothing": (0.1, 0.2),
    "dpo.discopop_tau": (0.1, 0.2),
    "dpo.alpha": (0.3, 0.4),
    "dpo.ld_alpha": (0.7, 0.8),
    "dpo.sft_coef": (0.1, 0.2),
    "dpo.simpo_gamma": (0.3, 0.4),
    "dpo.desirable_weight": (1.1, 1.2),
    "dpo.undesirable_weight": (1.3, 1.4),
    "distill.beta": (0.3, 0.6),
    "distill.temperature": (0.9, 0.8),
    "reference.sync_alpha": (0.5, 0.4),
    "reference.sync_every": (1, 2),
    "scores.scale": (0.5, 0.6),
    "scores.shift": (0.1, 0.2),
    "scores.clip": (2.0, 3.0),
    "scores.missing_eos_penalty": (0.2, 0.3),
    "scores.overlong_buffer": (2, 3),
    "scores.overlong_penalty": (0.4, 0.5),
    "critic.learning_rate": (1e-3, 2e-3),
    "critic.max_grad_norm": (0.5, 2.0),
    "critic.warmup_updates": (1, 2),
    "ppo.kl_coef": (0.1, 0.2),
    "ppo.kl_target": (5.0, 6.0),
    "ppo.kl_horizon": (1000.0, 2000.0),
    "ppo.cliprange": (0.2, 0.3),
    "ppo.cliprange_high": (0.3, 0.4),
    "ppo.dual_clip": (3.0, 4.0),
    "ppo.target_kl": (0.5, 0.6),
    "ppo.cliprange_value": (0.2, 0.3),
    "ppo.vf_coef": (0.1, 0.2),
    "ppo.entropy_coef": (0.01, 0.02),
    "ppo.gamma": (0.99, 0.98),
    "ppo.lam": (0.9, 0.8),
    "ppo.lam_alpha": (0.1, 0.2),
    "grpo.kl_coef": (0.1, 0.2),
    "grpo.cliprange": (0.2, 0.3),
    "grpo.cliprange_high": (0.3, 0.4),
    "grpo.entropy_coef": (0.01, 0.02),
    "grpo.entropy_target": (0.5, 0.6),
    "grpo.entropy_coef_delta": (0.01, 0.02),
    "grpo.entropy_coef_min": (0.005, 0.006),
    "grpo.entropy_coef_max": (0.8, 0.9),
    "grpo.top_entropy_quantile": (0.5, 0.6),
    "grpo.sapo_temperature_pos": (1.1, 1.2),
    "grpo.sapo_temperature_neg": (1.3, 1.4),
    "grpo.cov_ratio": (0.1, 0.2),
    "grpo.clip_cov_low": (-2.0, -3.0),
    "grpo.clip_cov_high": (2.0, 3.0),
    "grpo.kl_cov_coef": (0.5, 0.6),
    "grpo.gamma": (0.99, 0.98),
    "grpo.beta": (0.2, 0.3),
    **{f"{method}.log_ratio_clamp": (10.0, 11.0) for method in ("ppo", "grpo")},
    **{f"{method}.kl_beta": (0.3, 0.6) for method in ("ppo", "grpo")},
    **{f"{method}.sampler_cap": (2.0, 2.5) for method in ("ppo", "grpo")},
    **{f"{method}.sampler_floor": (0.4, 0.3) for method in ("ppo", "grpo")},
}
"""Two values of every number that programs take. Another value of it compiles nothing."""
LISTS = {"dpo.loss_weights": ((0.5, 0.6), (0.7, 0.8))}
NOT_IN_PROGRAMS = (
    "data.max_gz_ratio",
    "data.validation_fraction",
    "data.mix_temperature",
    "checkpoint.save_minutes",
    "checkpoint.grace",
    "train.num_train_epochs",
    "ppo.num_train_epochs",
    "grpo.num_train_epochs",
    "distill.lmbda",
    "reward.model_weight",
    "reward.function_weight",
    "environment.timeout",
    "alarms.kl",
    "alarms.entropy",
    "alarms.length_correlation",
    "alarms.finished",
)
OF_THE_MODEL = ("model.router_aux_loss_coef", "lora.alpha", "lora.dropout")
"""Part of the architecture, which programs are compiled for."""
CONFIGS = {
    "sft": (config.SFTConfig, SFTTrainer),
    "reward": (config.RewardConfig, RewardTrainer),
    "dpo": (config.DPOConfig, DPOTrainer),
    "distill": (config.DistillConfig, DistillTrainer),
    "ppo": (config.PPOConfig, PPOTrainer),
    "grpo": (config.GRPOConfig, GRPOTrainer),
}
UNUSED = {  # by what the options of `numbered` choose
    "ppo.lam_alpha",
    "ppo.kl_beta",
    "grpo.kl_beta",
    *(f"dpo.{key}" for key in ("discopop_tau", "simpo_gamma", "desirable_weight", "undesirable_weight")),
    "optim.momentum",
    "nu",
    *(f"grpo.{key}" for key in ("sapo_temperature_pos", "sapo_temperature_neg", "kl_cov_coef", "gamma", "beta")),
}
"""Numbers that only some choices of other options use."""


def is_float(annotation) -> bool:
    parts = typing.get_args(annotation)
    return annotation is float or any(map(is_float, parts[:1] if hasattr(annotation, "__metadata__") else parts))


def test_every_float_option_is_accounted_for():
    """A new one belongs to one of the lists above."""
    found = {key for cls, _ in CONFIGS.values() for key, annotation in schema.keys(cls) if is_float(annotation)}
    assert found <= {*NUMBERS, *LISTS, *NOT_IN_PROGRAMS, *OF_THE_MODEL}, "unknown"
    assert {*LISTS, *NOT_IN_PROGRAMS, *OF_THE_MODEL} <= found and not {*NOT_IN_PROGRAMS, *OF_THE_MODEL} & {*NUMBERS}


@pytest.mark.parametrize("method", list(CONFIGS))
def test_other_numbers_and_seeds_compile_nothing(method, parts, one_length, teacher, tmp_path):
    """Two runs that differ in every number at once, in their length and in their seed."""

    def run(which):
        cls, trainer = CONFIGS[method]
        values = {key: both[which] for key, both in (NUMBERS | LISTS).items() if key not in UNUSED}
        known = dict(schema.keys(cls))
        trainer(
            config.replace(
                cls(
                    run_dir=str(tmp_path / f"run {which}"),
                    seed=which,
                    model=parts["model"],
                    data=config.Data(path=one_length, validation_fraction=0.25),
                    logging=config.Logging(quiet=True, tensorboard=False, sample_every=1, token_samples=2),
                    **CHOICES[method](which, str(teacher)),
                ),
                **{key: value for key, value in values.items() if key in known},
            ),
            **{"reward": length_reward} if method in ("ppo", "grpo") else {},
        ).train()

    run(0)
    with compilations() as count:
        run(1)
    del count["init"]  # the program that draws random parameters is each trainer's own
    assert not count, count


def _train(which):
    return config.Train(max_steps=2 + which, batch_size=6, eval_batch_size=6, eval_every=1)


CHOICES = {
    "sft": lambda which, _: {"train": _train(which)},
    "reward": lambda which, _: {"train": _train(which)},
    "dpo": lambda which, _: {
        "train": _train(which),
        "dpo": config.DPO(
            loss=("sigmoid", "ipo"),
            loss_weights=(0.1, 0.1),
            beta_schedule="cosine",
            beta_final=0.5,
            divergence="alpha_divergence",
        ),
    },
    "distill": lambda which, teacher: {
        "train": _train(which),
        "teacher": config.Teacher(path=teacher),
        "distill": config.Distill(lmbda=1.0),
        "sampling": config.Sampling(response_length=8),
    },
    "ppo": lambda which, _: {
        "ppo": config.PPO(batch_size=8, total_episodes=24 + 8 * which, sampler_correction="token_mask"),
        "sampling": config.Sampling(response_length=7),
        "scores": config.Scores(normalise="running"),
        "validation": config.Validation(eval_steps=1),
    },
    "grpo": lambda which, _: {
        "grpo": config.GRPO(
            method="clip_cov",
            batch_size=8,
            num_generations=4,
            num_iterations=2,
            total_episodes=24 + 8 * which,
            sampler_correction="token_mask",
            entropy_coef=0.1,
            entropy_target=1.0,
        ),
        "sampling": config.Sampling(response_length=7),
    },
}
"""Options that make use of numbers. Responses of 7 columns are of one width: `trim` halves even numbers."""
