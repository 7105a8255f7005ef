"""Runs of adapters on the experts of a mixture: resumed, planned, and begun when `all-linear` left experts out."""

import json
import shutil

import jax
import numpy as np
import pytest
from support.runs import equal, length_reward, records

import jaxrlhf
from jaxrlhf import config, plan, weights
from jaxrlhf.errors import Preempted, StorageError
from jaxrlhf.plan import programs
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.export import export
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXTURES = {
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 16, "norm_topk_prob": True},
    "olmoe": {"architectures": ["OlmoeForCausalLM"], "intermediate_size": 16},
}


@pytest.fixture(scope="session")
def mixture(tiny_model, tmp_path_factory):
    """mixture(family): the tiny model with two of four experts for every token, with weights."""

    def write(family):
        folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp(family) / "config")
        file = folder / "config.json"
        sizes = {"model_type": family, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        file.write_text(json.dumps(json.loads(file.read_text()) | MIXTURES[family] | sizes))
        model, params = jaxrlhf.load(folder, init="random", key=jax.random.key(7))
        tokenizer = jaxrlhf.load_tokenizer(folder, config.TokenizerSource())
        return weights.export(folder.parent / "model", model, params, source=folder, tokenizer=tokenizer)

    made = {}
    return lambda family: made[family] if family in made else made.setdefault(family, write(family))


@pytest.fixture
def trainer(supervised, ppo, mixture, tmp_path):
    """trainer(method, name, family, **changes): a run of adapters of all linear layers, in the folder `name`."""

    def make(method, name="run", family="qwen3_moe", **changes):
        options = {"sft": supervised, "dpo": supervised}.get(method, ppo) | {
            "run_dir": str(tmp_path / name),
            "model": config.ModelSource(path=str(mixture(family))),
            "lora": config.LoRA(enabled=True, rank=2, alpha=8.0),
        }
        if method == "grpo":
            del options["ppo"]
            settings = {"num_generations": 4, "num_iterations": 2, "kl_coef": 0.1}
            options["grpo"] = config.GRPO(batch_size=8, total_episodes=24, **settings)
        classes = {
            "sft": (config.SFTConfig, SFTTrainer),
            "dpo": (config.DPOConfig, DPOTrainer),
            "ppo": (config.PPOConfig, PPOTrainer),
            "grpo": (config.GRPOConfig, GRPOTrainer),
        }
        settings, kind = classes[method]
        rewarded = {} if method in ("sft", "dpo") else {"reward": length_reward}
        return kind(settings(**options | changes), **rewarded)

    return make


@pytest.mark.parametrize(
    ("method", "family"), [("sft", "olmoe"), ("dpo", "qwen3_moe"), ("ppo", "qwen3_moe"), ("grpo", "olmoe")]
)
def test_a_stopped_run_goes_on_bit_for_bit(method, family, trainer, tmp_path, request):
    whole = trainer(method, "whole", family)
    before = jax.device_get((whole.frozen, whole.state.value.params["policy"]["lora"]))
    whole.train()
    equal(whole.frozen, before[0])
    trained = whole.state.value.params["policy"]["lora"]
    for name in ("gate", "up", "down"):
        now, old = (tree["layers"]["experts"][name] for tree in (trained, before[1]))
        assert all(np.any(a != b, axis=(2, 3)).all() for a, b in zip(now.values(), old.values(), strict=True)), name
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted):
        trainer(method, "parts", family).train()
    resumed = trainer(method, "parts", family)
    resumed.train()
    log = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == log
    equal(resumed.state.value, whole.state.value)
    if method in ("ppo", "grpo"):
        assert log[0]["objective/kl"] == 0 and log[-1]["objective/kl"] != 0
        assert all(record["val/first_log_ratio_max"] < 1e-5 for record in log)
        assert all(record["val/sampler_logprob_gap_max"] < 1e-4 for record in log), "decoded as it is trained"
    else:
        assert log[-1]["loss"] < log[0]["loss"]
    # gate and up lie in one pair of matrices of twice the rank in a folder of adapters
    merged = jaxrlhf.load(export(tmp_path / "parts", tmp_path / "out", merge_lora=True))[1]
    adapters = jaxrlhf.load(tmp_path / "whole")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, adapters)


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_its_plan_has_the_bytes_that_the_run_holds(method, trainer):
    real = trainer(method)
    outlined = programs.abstract_trainer(real.config, None if method == "dpo" else length_reward)

    def held(*trees):
        arrays = {id(x): x for tree in trees for x in jax.tree.leaves(tree)}
        return sum(x.nbytes for x in arrays.values())

    assert plan.size(outlined.state.template) == held(real.state.value)
    assert plan.size(outlined.frozen) == held(real.frozen), "what roles share counts once"


def test_a_run_begun_before_all_linear_had_the_experts_is_told_what_to_name(trainer, tmp_path, request):
    adapters = config.LoRA(enabled=True, rank=2, alpha=8.0, target_modules=ATTENTION)
    whole = trainer("sft", "whole", lora=adapters)
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted):
        trainer("sft", "parts", lora=adapters).train()
    file = tmp_path / "parts" / "config.yaml"
    written = file.read_text()
    names = "  target_modules:\n" + "".join(f"  - {name}\n" for name in ATTENTION)
    assert names in written
    file.write_text(written.replace(names, "  target_modules: [all-linear]\n"))
    with pytest.raises(StorageError, match=r"it lacks .*experts.*did not include the experts.*\[q_proj, k_proj, v_pr"):
        trainer("sft", "parts").train()
    file.write_text(written)  # as the message says
    resumed = trainer("sft", "parts", lora=adapters)
    resumed.train()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(resumed.state.value, whole.state.value)
