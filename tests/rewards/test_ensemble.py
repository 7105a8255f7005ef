"""Ensembles of reward models: the combined score against numpy and against each model alone."""

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.config import Component, RewardSource
from jaxrlhf.rewards.compose import Scorer, combine_scores

SCORES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [
        ("mean", [sum(column) / 3 for column in SCORES.T]),
        ("min", [min(column) for column in SCORES.T]),
        (
            "mean_minus_std",
            [sum(c) / 3 - 0.7 * (sum((x - sum(c) / 3) ** 2 for x in c) / 3) ** 0.5 for c in SCORES.T.tolist()],
        ),
    ],
)
def test_combined_scores(combine, wanted):
    found = combine_scores(SCORES, combine, 0.7)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert (combine_scores(SCORES, "min", 1.0) <= combine_scores(SCORES, "mean", 1.0)).all()
    np.testing.assert_array_equal(combine_scores(SCORES[:1], combine, 0.7), SCORES[0])


@pytest.fixture(scope="module")
def folders(tiny_model, reward_folder, tmp_path_factory):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(2), head="linear")
    params["score"]["kernel"] = params["score"]["kernel"] * 30
    other = weights.export(tmp_path_factory.mktemp("other") / "m", model, params, source=tiny_model)
    return str(reward_folder), str(other)


def test_an_ensemble_is_one_component_of_the_reward(folders, policy_tokenizer, make_rollout, talk):
    first, second = folders
    options = {"combine": "mean_minus_std", "spread_coef": 0.5}
    source = RewardSource(
        model=first, components=(Component(name="judges", model=first, ensemble=(second,), weight=2.0, **options),)
    )
    scorer, rollout = Scorer(source, policy_tokenizer), make_rollout(policy_tokenizer)
    scored = scorer.score(talk.prompts, talk.completions, rollout, {})
    alone = [scored.components[f"judges_{k}"] for k in (1, 2)]
    np.testing.assert_array_equal(alone[0], scored.components["model"])
    assert np.abs(alone[0] - alone[1]).min() > 1e-3
    together = np.mean(alone, axis=0) - 0.5 * np.std(alone, axis=0)
    np.testing.assert_allclose(scored.components["judges"], together, rtol=1e-5)
    np.testing.assert_allclose(scored.components["judges_spread"], np.std(alone, axis=0), rtol=1e-5)
    np.testing.assert_allclose(scored.totals, alone[0] + 2 * together, rtol=1e-5)
    assert scored.metrics.keys() == {*scorer.metric_keys()}


def test_an_ensemble_is_unscored_where_a_member_is(folders, policy_tokenizer, make_rollout, talk, monkeypatch):
    component = Component(model=folders[0], ensemble=folders[1:], combine="min", on_error="skip")
    source = RewardSource(components=(component,))
    scorer, rollout = Scorer(source, policy_tokenizer), make_rollout(policy_tokenizer)
    says = {"model_1": [np.nan, 2.0, 3.0], "model_2": [-5.0, 1.0, 4.0]}
    for name, judge in scorer.models.items():
        found = np.array(says[name], np.float32)
        monkeypatch.setattr(judge, "score_rollout", lambda rollout, found=found: (found, np.zeros(3, bool)))
    scored = scorer.score(talk.prompts, talk.completions, rollout, {})
    assert scored.as_list() == [None, 1.0, 3.0] and len(scored.notes) == 1
    assert scored.metrics["rewards/model/mean"] == 2 and scored.metrics["rewards/model_spread/mean"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"function": "a.py:b", "ensemble": ("m",)}, "ensemble .* only with model"),
        ({"model": "m", "combine": "min"}, "combine is min, but there is no ensemble to combine"),
        ({"model": "m", "ensemble": ("n",), "spread_coef": 2.0}, "spread_coef is 2, but combine is mean"),
        ({"model": "m", "ensemble": ("m",)}, "names a model twice"),
        ({"model": "m", "name": "a_spread"}, "_spread"),
    ],
)
def test_invalid_ensembles_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Component(**options)
