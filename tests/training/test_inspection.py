"""The table of an update's tokens: its numbers, its text, and what it leaves out."""

import dataclasses
import html
import itertools
import json
import math

import numpy as np
import pytest
from support.runs import length_reward

import jaxrlhf
from jaxrlhf import config
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.on_policy.inspection import SHOWN, TokenTable
from jaxrlhf.training.ppo.trainer import PPOTrainer

PROMPTS = ["say red ", "say blue, please ", "say red ", "say 7"]


def by_sequence(table):
    """The rows of each sequence that has any."""
    rows = iter(table.rows)
    return [[next(rows) for _ in range(sequence["tokens"])] for sequence in table.sequences if sequence["tokens"]]


@pytest.fixture
def make(ppo):
    def build(trainer="ppo", function=length_reward, **section):
        options = ppo | {"data": config.Data(), "sampling": config.Sampling(response_length=9)}
        if trainer == "ppo":
            given = config.PPO(**{"kl_coef": 0.3, "gamma": 0.9, "lam": 0.8} | section)
            return PPOTrainer(config.PPOConfig(**options | {"ppo": given}), reward=function)
        del options["ppo"]
        given = config.GRPO(**{"num_generations": 2} | section)
        return GRPOTrainer(config.GRPOConfig(grpo=given, **options), reward=function)

    return build


def test_a_table_of_ppo_obeys_its_equations(make):
    trainer = make()
    step = trainer.ppo_step(PROMPTS)
    first = step["experience"]
    step = trainer.ppo_step(PROMPTS)  # now the policy has moved
    experience = step["experience"]
    table = jaxrlhf.inspect(experience, trainer.tokenizer, new_logprobs=trainer.logprobs(experience.rollout))
    assert [sequence["completion"] for sequence in table.sequences] == step["generated_texts"]
    assert len(table.rows) == int(experience.rollout.response_mask.sum()), "a row for each token, none for padding"
    assert all(row["kl"] == 0 for row in jaxrlhf.inspect(first, trainer.tokenizer).rows)
    assert any(abs(row["ratio"] - 1) > 1e-3 for row in table.rows)
    raw, whitened = [], []
    for rows, prompt, text, score, bootstrap in zip(
        by_sequence(table), PROMPTS, step["generated_texts"], step["rewards"], experience.bootstrap, strict=True
    ):
        assert "".join(row["token"] for row in rows) == text
        assert [row["position"] for row in rows] == [*range(len(rows))]
        for before, after in itertools.pairwise(rows):
            assert after["state"] == before["state"] + before["token"]
        assert rows[0]["state"].endswith(prompt)
        for row in rows:
            assert row["kl"] == pytest.approx(row["logprob"] - row["ref_logprob"], abs=1e-6)
            assert row["return"] == pytest.approx(row["raw_advantage"] + row["value"], abs=1e-5)
        total = sum(row["reward"] + 0.3 * row["kl"] for row in rows)
        assert total == pytest.approx(score, abs=1e-5), "the score is given once, the KL is taken from every token"
        advantage, value = 0.0, float(bootstrap)
        for row in reversed(rows):
            assert row["td_error"] == pytest.approx(row["reward"] + 0.9 * value - row["value"], abs=1e-5)
            advantage = row["td_error"] + 0.9 * 0.8 * advantage
            assert row["raw_advantage"] == pytest.approx(advantage, abs=1e-5)
            value = row["value"]
        raw += [row["raw_advantage"] for row in rows]
        whitened += [row["advantage"] for row in rows]
    spread = math.sqrt(np.var(raw, ddof=1) + 1e-8)
    np.testing.assert_allclose(whitened, (np.array(raw) - np.mean(raw)) / spread, rtol=1e-4, atol=1e-5)
    assert table.columns.keys() == table.rows[0].keys()
    assert table.columns["kl"] == [row["kl"] for row in table.rows]
    assert json.loads(json.dumps(table.rows)) == table.rows, "plain Python numbers and text"


def test_the_experience_of_a_single_step_is_complete(make):
    """It is that of several steps, which annotate before they train, and of the update's own metrics."""
    single, several = make(num_ppo_epochs=1), make(num_ppo_epochs=2)
    (step, other) = (trainer.ppo_step(PROMPTS) for trainer in (single, several))
    assert single.spec.one_step(4) and not several.spec.one_step(4)
    for field in dataclasses.fields(step["experience"]):
        absent = "features", "ref_hidden", "weights", "token_scores"
        if field.name not in ("rollout", "gamma", "lam", "lam_alpha", *absent):
            new, old = (np.asarray(getattr(run["experience"], field.name)) for run in (step, other))
            np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5, err_msg=field.name)
            assert field.name in ("values", "bootstrap") or np.any(new != 0), field.name
    mask = np.asarray(step["experience"].rollout.response_mask)
    returns = np.asarray(step["experience"].returns)
    assert step["val/advantage_mean"] == pytest.approx(float(returns.sum() / mask.sum()), abs=1e-5), "values are 0"


@pytest.mark.parametrize("method", ["grpo", "online_dpo"])
def test_a_table_of_groups_has_the_log_probs_of_the_policy(make, method):
    def by_number(completions):  # no ties: both are in the pair
        return [float(i) for i in range(len(completions))]

    trainer = make("grpo", by_number, method=method, kl_coef=None if method == "online_dpo" else 0.04)
    step = trainer.grpo_step(PROMPTS[:2])
    experience = step["experience"]
    table = jaxrlhf.inspect(experience, trainer.tokenizer, new_logprobs=trainer.logprobs(experience.rollout))
    assert sorted(sequence["completion"] for sequence in table.sequences) == sorted(step["generated_texts"])
    assert [sequence["index"] for sequence in table.sequences] == [0, 0, 1, 1]
    assert ("advantage" in table.columns) == (method == "grpo") and "value" not in table.columns
    np.testing.assert_allclose(table.columns["kl"], 0, atol=1e-5)  # the policy was the reference
    assert min(table.columns["logprob"]) < 0 and any(abs(x - 1) > 1e-4 for x in table.columns["ratio"])


def test_a_response_without_a_score_has_no_rows(make):
    trainer = make(function=lambda completions: [None if i == 1 else 1.0 for i in range(len(completions))])
    table = jaxrlhf.inspect(trainer.ppo_step(PROMPTS)["experience"], trainer.tokenizer)
    assert [sequence["tokens"] > 0 for sequence in table.sequences] == [True, False, True, True]
    assert {row["index"] for row in table.rows} == {0, 2, 3}
    assert "prompt 1, sample 0" in str(table) and "left out of the update" in str(table)


def test_what_is_printed_is_inert_and_ends():
    """Markup and terminal escapes stay text; a large table names what it leaves out."""
    hostile = "<script>alert(1)</script>\x1b[31m\n&"
    rows = [
        {"index": 0, "sample": 0, "position": i, "state": hostile, "token": hostile, "id": 7, "kl": 0.5}
        for i in range(SHOWN + 3)
    ]
    sequences = [
        {"index": 0, "sample": 0, "prompt": hostile, "completion": hostile, "finished": True, "tokens": len(rows)}
    ]
    table = TokenTable(rows, sequences, ["\\n" if i else html.escape("<b>") for i in range(len(rows))])
    for text in (str(table), table._repr_html_()):
        assert "\x1b" not in text and "3 more tokens" in text
    assert "<script>" not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()
    assert "&amp;lt;b" in table._repr_html_() and str(table).count("\n") == SHOWN + 2
    assert str(TokenTable([], [], [])) == "" and TokenTable([], [], []).columns == {}


def test_the_result_of_a_step_is_not_an_experience():
    with pytest.raises(TypeError, match=r'not dict: inspect\(result\["experience"\]'):
        jaxrlhf.inspect({"experience": None}, None)
