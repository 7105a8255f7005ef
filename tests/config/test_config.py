import copy
import dataclasses
import pathlib
import pickle
from pathlib import Path

import pytest

from jaxrlhf.config import (
    PPO,
    Component,
    DPOConfig,
    GRPOConfig,
    ModelSource,
    PPOConfig,
    RewardSource,
    Sampling,
    SFTConfig,
    Train,
    replace,
)
from jaxrlhf.config.spelling import did_you_mean_path
from jaxrlhf.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PPO(kl_coef=-1), "PPO: kl_coef: must be at least 0, got -1. KL penalty coefficient"),
        (lambda: PPO(kl_cof=1), "PPO: unknown key 'kl_cof'; did you mean 'kl_coef'?"),  # type: ignore[call-arg]
        (lambda: PPO(ppo_epochs=1), "PPO: unknown key 'ppo_epochs'; TRL's ppo_epochs is num_ppo_epochs here"),  # type: ignore[call-arg]
        (lambda: PPOConfig(ppo={"kl_cof": 1}), "unknown key 'ppo.kl_cof'; did you mean 'ppo.kl_coef'?"),  # type: ignore[arg-type]
        (lambda: PPOConfig(learning_rate=1e-5), "unknown key 'learning_rate'; did you mean 'optim.learning_rate'"),  # type: ignore[call-arg]
        (
            lambda: PPOConfig(model="m"),  # type: ignore[arg-type]
            "model: must be a section, a mapping of keys to values, got 'm'; did you mean 'model.path'?",
        ),
        (lambda: PPOConfig(ppo=3), "ppo: must be a section"),  # type: ignore[arg-type]
        (lambda: PPOConfig(3), "PPOConfig: 3 has no name; options are given by name, run_dir=..."),  # type: ignore[misc]
        (
            lambda: PPOConfig(reward={"components": [{"model": "m", "micro_batch_size": 0}]}),  # type: ignore[arg-type]
            "reward.components.0.micro_batch_size: must be at least 1, got 0. model: rows per forward pass.",
        ),
        (
            lambda: Sampling(top_k=None),  # type: ignore[arg-type]
            "top_k: must be a whole number, got nothing (null). Sample from the k most probable tokens only. 0: ",
        ),
        (lambda: Sampling(temperature="1"), "temperature: must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: ModelSource(path=pathlib.Path("m")), "path: must be text, got PosixPath('m'); write str(path)"),  # type: ignore[arg-type]
        (lambda: replace(GRPOConfig(), **{"grpo.method": "gpdo"}), "; did you mean 'gdpo'?"),
        (lambda: replace(DPOConfig(), **{"dpo.loss": "WPO"}), "an option of its own: dpo.use_weighting, with any loss"),
        (
            lambda: ModelSource(remat="ful"),  # type: ignore[arg-type]
            "remat: 'ful' is not one of 'auto', 'none', 'full', 'dots'; did you mean 'full'?",
        ),
        (
            lambda: SFTConfig(train=Train(micro_batch_size=3)),
            "train.micro_batch_size (3) must divide train.batch_size (8)",
        ),
        (lambda: dataclasses.replace(PPO(), kl_coef=-1), "PPO: kl_coef: must be at least 0, got -1"),
        (lambda: dataclasses.replace(PPO(), kl_cof=1), "PPO: unknown key 'kl_cof'"),
        (lambda: replace(PPOConfig(), **{"ppo.kl_coef": -1}), "PPO: kl_coef: must be at least 0, got -1"),
        (lambda: replace(PPOConfig(), **{"ppo.kl_cof": 1}), "unknown key 'kl_cof'; did you mean 'kl_coef'?"),
        (lambda: replace(PPOConfig(), **{"seed.x": 1}), "unknown key 'seed.x'"),
        (lambda: Sampling(top_k=-1, top_p=2.0), "Sampling cannot be used:\n  top_k: must be"),
    ],
)
def test_every_mistake_in_python_is_a_config_error_with_key_value_and_remedy(make, said):
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_configs_are_copied_and_pickled():
    config = PPOConfig(ppo=PPO(kl_coef=0.2), reward={"components": [{"model": "m"}]})  # type: ignore[arg-type]
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


PAIRS = [("k1", "reward"), ("k2", "loss"), ("k3", "loss")]
REFUSED = [("k1", "loss", "zero"), ("k2", "reward", "lost"), ("k3", "reward", "lost")]


@pytest.mark.parametrize(("estimator", "place"), PAIRS)
def test_kl_estimators_where_their_gradient_is_right(estimator, place):
    ppo = PPOConfig(ppo={"kl_estimator": estimator, "kl_in": place}).ppo  # type: ignore[arg-type]
    assert (ppo.kl_estimator, ppo.kl_in) == (estimator, place)


@pytest.mark.parametrize(("estimator", "place", "reason"), REFUSED)
def test_a_kl_estimator_whose_gradient_is_wrong_in_its_place_is_refused(estimator, place, reason):
    with pytest.raises(ValueError, match=f"ppo.kl_estimator {estimator} .* ppo.kl_in {place}: .*{reason}.*; use "):
        PPOConfig(ppo={"kl_estimator": estimator, "kl_in": place})  # type: ignore[arg-type]


def test_renormalising_needs_a_filter():
    with pytest.raises(ValueError, match=r"sampling\.renormalise_logprobs .* set top_k, top_p"):
        PPOConfig(sampling={"renormalise_logprobs": True})  # type: ignore[arg-type]
    for name, value in {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "min_length": 2}.items():
        PPOConfig(sampling={"renormalise_logprobs": True, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "exactly one of model, function, url, judge and human; this one has none of them"),
        ({"model": "m", "url": "http://x"}, "this one has model 'm' and url 'http://x'"),
        ({"function": "r.py"}, "function is 'r.py'; write it as path.py:name"),
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd'; it must begin with http"),
        ({"model": "m", "name": "a/b"}, "name is 'a/b'; use letters"),
        ({"model": "m", "name": "x_unanswered"}, "no ending that is reserved for metrics"),
        ({"model": "m", "options": {"a": 1}}, r"options \({'a': 1}\) has no meaning for a component with model, only"),
        ({"function": "a:b", "add_eos": "false"}, r"add_eos \('false'\) has no meaning .* only with model"),
        (
            {"model": "m", "add_eos": False, "template": "{response}"},
            "add_eos is false, but with template the text ends",
        ),
        ({"model": "m", "add_eos": True, "per_token": True}, "add_eos is true, but with per_token the text ends"),
        ({"model": "m", "add_eos": "maybe"}, "add_eos: 'maybe' is not one of 'auto', 'true', 'false'"),
        ({"model": "m", "timeout": 3.0}, r"timeout \(3.0\) has no meaning .* only with function or url or judge"),
        ({"url": "http://x", "micro_batch_size": 3}, "micro_batch_size .* only with model"),
        ({"human": "score", "per_token": True}, "per_token .* only with model or function or url"),
        ({"model": "m", "on_error": "value"}, "on_error is 'value' and error_value is None"),
        ({"model": "m", "error_value": 1.0}, "on_error is 'fail' and error_value is 1.0"),
        (
            {"function": "r.py:f", "per_token": True, "template": "{prompt}"},
            "per_token and template do not go together",
        ),
    ],
)
def test_components_that_make_no_sense_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        Component(**given)


def test_the_short_form_is_components_too():
    source = RewardSource(
        model="m",
        model_weight=2.0,
        revision="r",
        model_dtype="bfloat16",
        micro_batch_size=3,
        function="r.py:good",
        function_weight=0.5,
        components=({"url": "http://x"}, {"human": "pick", "enabled": False}),  # type: ignore[arg-type]
    )
    model, function, url = source.parts()
    assert model == Component(model="m", weight=2.0, revision="r", dtype="bfloat16", micro_batch_size=3)
    assert function == Component(function="r.py:good", weight=0.5)
    assert [part.label for part in source.parts()] == ["model", "good", "endpoint"]
    assert RewardSource(function_weight=3.0).parts(passed=True) == (Component(function="passed", weight=3.0),)
    asks = Component(function="passed", timeout=1.0)
    assert RewardSource(components=(asks,)).parts(passed=True) == (asks,)
    assert Component(function="r.py:model").label == Component(function="r.py:naïve").label == "function"


def test_a_critic_may_start_from_a_model_among_the_components():
    PPOConfig(critic={"init": "reward"}, reward={"components": [{"model": "m"}]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward\.model is empty"):
        PPOConfig(critic={"init": "reward"}, reward={"components": [{"url": "http://x"}]})  # type: ignore[arg-type]


def test_a_temperature_of_zero_is_refused_and_greedy_is_a_switch_of_its_own():
    with pytest.raises(ValueError, match="temperature"):
        PPOConfig(sampling={"temperature": 0.0})  # type: ignore[arg-type]
    assert PPOConfig(sampling={"greedy": True}).sampling.temperature == 1  # type: ignore[arg-type]


def test_ppo_has_the_defaults_of_the_n_implementation_details():
    """https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/"""
    config = PPOConfig()
    ppo = config.ppo
    assert config.optim.eps == 1e-5 and config.optim.schedule == "linear" and config.optim.final_lr_fraction == 0
    assert (ppo.gamma, ppo.lam, ppo.num_ppo_epochs, ppo.vf_coef) == (1, 0.95, 4, 0.1)
    assert (ppo.cliprange, ppo.cliprange_value, ppo.cliprange_high, ppo.kl_estimator) == (0.2, 0.2, None, "k1")


def test_add_eos_may_be_a_boolean():
    assert RewardSource(model="m", add_eos=False).parts()[0].add_eos == "false"  # type: ignore[arg-type]
    assert RewardSource(model="m").parts()[0].add_eos == "auto"


def test_paths_that_exist_are_suggested_for_those_that_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.jsonl").touch()
    for wrong in ("mine/promts.jsonl", "mien/prompts.jsonl"):
        assert did_you_mean_path(Path(wrong)) == "; did you mean 'mine/prompts.jsonl'?"
    for wrong in ("mine/answers.csv", "mien/answers.csv", "mine/prompts.jsonl/x"):
        assert did_you_mean_path(Path(wrong)) == ""
