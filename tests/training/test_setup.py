"""Checks of a run against its model."""

import json
import pathlib
from types import SimpleNamespace

import pytest
from support.tiny import tiny

from jaxrlhf import config, runtime, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import Rope, for_length
from jaxrlhf.training.setup import check_context, model_config, slow_products

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"


def test_lengths_beyond_the_context_or_the_rotation_of_the_run_are_refused():
    factors = {"short_factor": (1.0, 1.0), "long_factor": (2.0, 2.0)}
    model = tiny(rope=Rope(theta=1e4, kind="longrope", factor=4.0, original_max_positions=16, **factors))
    check_context(64, model, "the longest row", "data.max_length")
    with pytest.raises(ConfigError, match="the longest row comes to 65 tokens but the model's context is 64"):
        check_context(65, model, "the longest row", "data.max_length")
    short = for_length(model, 9)
    check_context(16, short, "the longest row", "data.max_length")
    with pytest.raises(ConfigError, match="17 tokens but the rotary embeddings of this run are those for up to 16"):
        check_context(17, short, "the longest row", "data.max_length")
    assert for_length(model, 17) == for_length(model, 64), "one program for all longer runs"


def model_of(folder, lora=None, **options):
    source, tokenizer = config.ModelSource(path=str(folder), **options), SimpleNamespace(added=0, size=10)
    return model_config(source, tokenizer, None, lora or config.LoRA(), sharding.make_mesh(config.Mesh()))


def test_the_load_balancing_loss_has_the_weight_of_the_option_or_of_the_file(tmp_path):
    asks = json.loads((FIXTURES / "olmoe" / "config.json").read_text()) | {"output_router_logits": True}
    (tmp_path / "config.json").write_text(json.dumps(asks | {"router_aux_loss_coef": 0.02}))
    assert model_of(tmp_path).router_aux_loss_coef == 0.02 and model_of(tmp_path).balances_experts
    assert not model_of(tmp_path, router_aux_loss_coef=0.0).balances_experts
    assert not model_of(FIXTURES / "olmoe").balances_experts
    assert model_of(FIXTURES / "olmoe", router_aux_loss_coef=0.3).router_aux_loss_coef == 0.3
    with pytest.raises(ConfigError, match="router_aux_loss_coef is 0.3, but .*llama is no mixture of experts"):
        model_of(FIXTURES / "llama", router_aux_loss_coef=0.3)


@pytest.mark.parametrize("target", ["gate", "mlp.gate", "mlp.gate.weight"])
def test_adapters_of_the_router_are_refused(target):
    with pytest.raises(ConfigError, match=f"'{target}' is the router of a qwen3_moe.*q_proj.*without lora.enabled"):
        model_of(FIXTURES / "qwen3_moe", config.LoRA(enabled=True, target_modules=(target,)))


@pytest.mark.parametrize(("option", "value"), [("dropout", 0.1), ("use_dora", True)])
@pytest.mark.parametrize("target", ["all-linear", "experts.down_proj"])
def test_adapters_of_experts_have_neither_dropout_nor_magnitudes(option, value, target):
    def model(*targets):
        return model_of(FIXTURES / "olmoe", config.LoRA(enabled=True, target_modules=targets, **{option: value}))

    with pytest.raises(ConfigError, match=rf"lora.{option} is {value}.*{target}.*experts of a olmoe.*\[q_proj, "):
        model("q_proj", target)
    assert model("q_proj", "k_proj", "v_proj", "o_proj").adapters is not None


def test_bfloat16_on_a_processor_without_it_is_warned_of(monkeypatch):
    plain = runtime.Processor("AMD EPYC 7763", 2, ("AVX2",), "avx2")
    settings = config.PPOConfig(model=config.ModelSource(path="m"), rollout=config.Generation(dtype="bfloat16"))
    monkeypatch.setattr(runtime, "processor", lambda: plain)
    (said,) = slow_products(settings, tiny(dtype="bfloat16"), "cpu")
    assert "model.compute_dtype and rollout.dtype: this processor (AMD EPYC 7763, 2 cores, with AVX2)" in said
    (said,) = slow_products(settings, tiny(), "cpu")
    assert said.startswith("warning: rollout.dtype: ")
    assert slow_products(settings, tiny(dtype="bfloat16"), "gpu") == []
    able = plain._replace(extensions=("AVX2", "AVX-512", "AVX-512 bfloat16"))
    monkeypatch.setattr(runtime, "processor", lambda: able)
    assert slow_products(settings, tiny(dtype="bfloat16"), "cpu") == []
