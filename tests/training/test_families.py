"""Every family of models in a run: its plan, and the programs that it compiles. What the models compute is compared in
tests/models, files and exports in tests/weights."""

import pathlib
import shutil

import jax
import pytest
from safetensors.numpy import load_file
from support.runs import length_reward
from training.test_compilations import compilations

from jaxrlhf import config, plan
from jaxrlhf.doctor import examine
from jaxrlhf.errors import Preempted
from jaxrlhf.plan import programs
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.weights.families import FAMILIES

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
RENAMED: dict[str, str] = {
    "gemma3_text": "gemma3",
    "qwen3_5_text": "qwen3_5",
    "mistral": "mistral-window",
    "phi3": "phi3-longrope",
}


@pytest.fixture
def of_family(tiny_model, tmp_path):
    """of_family(name): a folder with a small model of the family and the tokenizer of `tiny_model`."""

    def copy(name: str) -> pathlib.Path:
        folder = pathlib.Path(shutil.copytree(FIXTURES / RENAMED.get(name, name), tmp_path / "model"))
        for file in tiny_model.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_has_two_models_of_every_family(family, ppo, of_family):
    """A PPO run trains policy and critic, with two moments each, and keeps a reference."""
    folder = of_family(family)
    options = ppo | {"model": config.ModelSource(path=str(folder))}
    trainer = programs.abstract_trainer(config.PPOConfig(**options), length_reward)
    assert trainer.model.family == family
    sizes = {name: array.size for name, array in load_file(folder / "model.safetensors").items()}
    policy = sum(sizes.values())
    critic = policy - sum(sizes.get(name, 0) for name in ("lm_head.weight", "embed_out.weight"))
    critic += trainer.model.hidden_size
    phases = plan.plan_of(trainer, programs.Traced()).phases
    for phase in phases:
        assert phase.bytes["trained parameters"] == 4 * (policy + critic)
        assert phase.bytes["frozen models"] == 4 * policy
    assert {phase.name for phase in phases} >= {"rollout", "annotation", "update"}


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_programs_of_every_family_compile_once(family, ppo, of_family, tmp_path, request):
    """Stopped and resumed in one process, which reads the model's description again."""
    request.getfixturevalue("stop_at_two")
    options = {name: part for name, part in ppo.items() if name != "ppo"}
    options |= {
        "run_dir": str(tmp_path / "run"),
        "model": config.ModelSource(path=str(of_family(family))),
        "data": config.replace(ppo["data"], max_prompt_length=16),
        "grpo": config.GRPO(batch_size=8, total_episodes=32, num_generations=4, kl_coef=0.1),
        "logging": config.Logging(quiet=True, tensorboard=False, sample_every=0, report=False),
    }
    jax.clear_caches()
    with compilations() as count:
        with pytest.raises(Preempted):
            GRPOTrainer(config.GRPOConfig(**options), length_reward).train()
        GRPOTrainer(config.GRPOConfig(**options), length_reward).train()
    expected = dict.fromkeys(("generate", "annotate", "update"), 1)
    assert {name: count[name] for name in expected} == expected, count


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_finds_nothing_wrong_with_any_family(family, of_family, capsys):
    source = config.ModelSource(path=str(of_family(family)))
    assert examine(config.PPOConfig(model=source, sampling=config.Sampling(response_length=8))), capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.count("\nok ") > 8 and "FAIL" not in said
