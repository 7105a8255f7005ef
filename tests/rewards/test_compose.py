"""The score of a run: the weighted sum of its parts, with what went into it."""

import numpy as np
import pytest

from jaxrlhf.config import RewardSource
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rewards.model import RewardModel


def lengths(completions):
    return [None if len(c) == 1 else len(c) for c in completions]


def test_the_sum_is_weighted_and_its_parts_are_not(reward_folder, policy_tokenizer, make_rollout, talk):
    source = RewardSource(model=str(reward_folder), model_weight=2.0, function_weight=-0.5, model_dtype="float32")
    made = make_rollout(policy_tokenizer)
    scores, parts = Scorer(source, policy_tokenizer, lengths).score(talk.prompts, talk.completions, made, {})
    judge = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=16)
    assert set(parts) == {"model", "model_truncated", "lengths", "lengths_unanswered"}
    np.testing.assert_allclose(parts["model"], judge.score_rollout(made)[0], rtol=1e-5)
    assert parts["lengths"].tolist() == [6, 27, 0]
    assert parts["lengths_unanswered"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(scores, 2 * parts["model"] - 0.5 * parts["lengths"], rtol=1e-6)
    assert scores.dtype == np.float32


def test_with_another_tokenizer_the_text_is_scored(reward_folder, other_tokenizer, make_rollout, talk):
    source = RewardSource(model=str(reward_folder), model_dtype="float32")
    theirs = make_rollout(other_tokenizer)
    scores, _ = Scorer(source, other_tokenizer).score(talk.prompts, talk.completions, theirs, {})
    judge = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=16)
    np.testing.assert_allclose(scores, judge.score_texts(*talk)[0], rtol=1e-5)
    assert np.abs(scores - judge.score_rollout(theirs)[0]).max() > 0.1, "its ids would have scored something else"


def test_columns_and_the_step_reach_the_function(policy_tokenizer, make_rollout, talk):
    def reward(prompts, completions, answer):
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    scorer = Scorer(RewardSource(), policy_tokenizer, reward)
    made = make_rollout(policy_tokenizer)
    assert scorer.score(talk.prompts, talk.completions, made, {"answer": ["cat", "no", "x"]})[0].tolist() == [1, 0, 1]
    with pytest.raises(RewardError, match=r"reward reward \(step 7\) needs 'answer'"):
        scorer.score(talk.prompts, talk.completions, made, {}, step=7)


def test_none_and_two_functions_are_refused(policy_tokenizer):
    with pytest.raises(ConfigError, match="no reward"):
        Scorer(RewardSource(), policy_tokenizer)
    with pytest.raises(ConfigError, match="two reward functions"):
        Scorer(RewardSource(function="math:fsum"), policy_tokenizer, lengths)
    with pytest.raises(RewardError, match="there is no file"):
        Scorer(RewardSource(function="none.py:f"), policy_tokenizer)
