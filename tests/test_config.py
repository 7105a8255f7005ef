import pytest

from jaxrlhf.config import PPOConfig

PAIRS = [("k1", "reward"), ("k2", "loss"), ("k3", "loss")]
REFUSED = [("k1", "loss", "zero"), ("k2", "reward", "lost"), ("k3", "reward", "lost")]


@pytest.mark.parametrize(("estimator", "place"), PAIRS)
def test_kl_estimators_where_their_gradient_is_right(estimator, place):
    ppo = PPOConfig(ppo={"kl_estimator": estimator, "kl_in": place}).ppo  # type: ignore[arg-type]
    assert (ppo.kl_estimator, ppo.kl_in) == (estimator, place)


@pytest.mark.parametrize(("estimator", "place", "reason"), REFUSED)
def test_other_pairs_are_refused_with_the_reason(estimator, place, reason):
    with pytest.raises(ValueError, match=f"ppo.kl_estimator {estimator} .* ppo.kl_in {place}: .*{reason}.*; use "):
        PPOConfig(ppo={"kl_estimator": estimator, "kl_in": place})  # type: ignore[arg-type]


def test_renormalising_needs_a_filter():
    with pytest.raises(ValueError, match=r"sampling\.renormalise_logprobs .* set top_k, top_p"):
        PPOConfig(sampling={"renormalise_logprobs": True})  # type: ignore[arg-type]
    for name, value in {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "min_length": 2}.items():
        PPOConfig(sampling={"renormalise_logprobs": True, name: value})  # type: ignore[arg-type]
