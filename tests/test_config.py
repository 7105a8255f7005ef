import pytest

from jaxrlhf.config import PPOConfig

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
