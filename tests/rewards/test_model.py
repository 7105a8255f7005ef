"""Reward models: scores do not depend on micro-batches, padding or the way the text arrives."""

import copy
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import sharding, weights
from jaxrlhf.config import Component, Mesh, TokenizerSource
from jaxrlhf.data.batching import bucket
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.models import forward
from jaxrlhf.rewards.component import RewardComponent
from jaxrlhf.rewards.sources import model
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.rewards.sources.protocol import ScoreRequest


@pytest.fixture(scope="module")
def judge(reward_folder) -> RewardModel:
    return RewardModel(str(reward_folder), dtype="float32", micro_batch_size=2)


def expected(judge: RewardModel, rows: list[list[int]]) -> list[float]:
    """One row at a time without any padding, the head applied by hand."""
    scores = []
    for row in rows:
        hidden = forward(judge.params, judge.model, jnp.array([row]), jnp.ones((1, len(row)), bool))
        scores.append(float(hidden[0, -1] @ judge.params["score"]["kernel"][:, 0]))
    return scores


def test_a_rollout_scores_as_its_unpadded_rows_do(judge, policy_tokenizer, make_rollout):
    made = make_rollout(policy_tokenizer)
    scores, truncated = judge.score_rollout(made)
    rows = [t[m].tolist() for t, m in zip(made.tokens, made.mask, strict=True)]
    np.testing.assert_allclose(scores, expected(judge, rows), rtol=1e-4, atol=1e-5)
    assert np.ptp(scores) > 0.1
    assert scores.dtype == np.float32
    assert not truncated.any()


def test_rows_of_like_length_are_read_together(judge, policy_tokenizer, make_rollout, monkeypatch):
    """In slices of two rows, each as wide as its longer row needs; scores stay with their rows."""
    prompts, completions = ["a" * n for n in (30, 1, 40, 2, 20)], ["x"] * 5
    made = make_rollout(policy_tokenizer, prompts, completions, [False] * 5)
    widths, scores = [], model.sequence_scores_jit
    monkeypatch.setattr(model, "sequence_scores_jit", lambda *args: widths.append(args[2].shape) or scores(*args))
    rows = [t[m].tolist() for t, m in zip(made.tokens, made.mask, strict=True)]
    np.testing.assert_allclose(judge.score_rollout(made)[0], expected(judge, rows), rtol=1e-4, atol=1e-5)
    sizes = sorted(map(len, rows))
    assert widths == [(2, bucket(sizes[i], judge.model.max_positions)) for i in (1, 3, 4)]
    assert widths[0] < widths[-1]
    assert [tuple(part.shape for part in judge.padded_rows(sizes[i])) for i in (1, 3, 4)] == [(w, w) for w in widths]


def test_text_in_its_own_tokens_scores_the_same(judge, policy_tokenizer, make_rollout, talk):
    by_text, _ = judge.score_texts(*talk)
    np.testing.assert_allclose(by_text, judge.score_rollout(make_rollout(policy_tokenizer))[0], rtol=1e-4, atol=1e-5)
    unfinished, _ = judge.score_texts(talk.prompts, talk.completions, [False] * 3)
    assert (np.abs(unfinished - by_text) > 1e-3).tolist() == talk.finished


def test_a_mesh_and_its_rows_do_not_matter(reward_folder, judge, policy_tokenizer, make_rollout):
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    spread = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=1, mesh=mesh)
    assert spread.micro_batch_size == 4
    made = make_rollout(policy_tokenizer)
    np.testing.assert_allclose(spread.score_rollout(made)[0], judge.score_rollout(made)[0], rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_context_loses_its_beginning_and_is_counted(judge, policy_tokenizer, make_rollout):
    long = "a" * 30 + " the end of a text that is much too long to fit"
    scores, truncated = judge.score_texts(["", "hi "], [long, "x"], [False, False])
    assert truncated.tolist() == [True, False]
    kept = policy_tokenizer.encode(long)[-judge.model.max_positions :]
    assert scores[0] == pytest.approx(expected(judge, [kept])[0], rel=1e-4)
    made = make_rollout(policy_tokenizer, ["", "hi "], [long, "x"], [False, False])
    again, truncated = judge.score_rollout(made)
    np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-5)
    assert truncated.tolist() == [True, False]


def test_tokenizers_are_told_apart(judge, policy_tokenizer, other_tokenizer):
    assert judge.shares_tokenizer(policy_tokenizer)
    assert not judge.shares_tokenizer(other_tokenizer)


def test_a_language_model_is_not_a_reward_model(tiny_model):
    with pytest.raises(DataError, match="is a language model, not a reward model"):
        RewardModel(str(tiny_model), micro_batch_size=1)


def test_two_labels_score_the_probability_of_label_one(tiny_model, tmp_path, talk):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1), head="linear")
    kernel = jax.random.normal(jax.random.key(2), (model.hidden_size, 2))
    two = dataclasses.replace(model, num_labels=2)
    folder = weights.export(tmp_path / "m", two, params | {"score": {"kernel": kernel}}, source=tiny_model)
    scores, _ = RewardModel(str(folder), dtype="float32", micro_batch_size=4).score_texts(*talk)
    assert ((scores > 0) & (scores < 1)).all()
    assert np.ptp(scores) > 0.01


def test_a_model_reads_no_more_than_max_length(judge, reward_folder, policy_tokenizer):
    short = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=2, max_length=5)
    scores, truncated = short.score_texts(["hello "], ["world"], [False])
    assert truncated.tolist() == [True]
    assert scores[0] == pytest.approx(expected(judge, [policy_tokenizer.encode("world")])[0], rel=1e-4)
    assert RewardModel(str(reward_folder), micro_batch_size=2, max_length=10**6).max_length == judge.model.max_positions


TURNS = [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "why"},
]


def test_a_conversation_keeps_its_turns(judge, reward_folder, tmp_path, policy_tokenizer):
    """In a chat format of the model's own, and as a transcript where it has none."""
    folder = shutil.copytree(reward_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    chat = RewardModel(str(folder), dtype="float32", micro_batch_size=2)
    found, _ = chat.score_texts(["ignored", "bare"], ["so", "so"], [True, True], [TURNS, None])
    eos = [policy_tokenizer.eos_id]

    def said(*texts: str) -> list[int]:
        return [token for text in texts for token in policy_tokenizer.encode(text) + eos]

    rows = [
        said("system: brief", "user: hi", "assistant: yes?", "user: why", "assistant: so"),
        said("user: bare", "assistant: so"),
    ]
    assert len(rows[0]) <= judge.model.max_positions
    np.testing.assert_allclose(found, expected(judge, rows), rtol=1e-4)
    found, _ = judge.score_texts(["ignored"], ["so"], [False], [TURNS[1:]])
    text = "User: hi\n\nAssistant: yes?\n\nUser: why\n\nAssistant: so"
    assert text == model.transcript(TURNS[1:]) + "so"
    np.testing.assert_allclose(found, expected(judge, [policy_tokenizer.encode(text)]), rtol=1e-4)
    alone, _ = judge.score_texts(["why"], ["so"], [False], [TURNS[1:2]])
    plain, _ = judge.score_texts(["why"], ["so"], [False])
    assert alone == plain, "a single user turn is the prompt itself"


def test_an_end_token_follows_by_add_eos(reward_folder, judge, policy_tokenizer, make_rollout, talk):
    """Of text and of the rollout's own ids alike."""
    texts = [prompt + completion for prompt, completion in zip(talk.prompts, talk.completions, strict=True)]
    rows = {
        add_eos: [policy_tokenizer.encode(text) + [2] * n for text in texts]
        for add_eos, n in (("true", 1), ("false", 0))
    }
    for add_eos in ("true", "false"):
        asked = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=4, add_eos=add_eos)
        wanted = expected(judge, rows[add_eos])
        np.testing.assert_allclose(asked.score_texts(*talk)[0], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(asked.score_rollout(make_rollout(policy_tokenizer))[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_chat_format_ends_its_turns_itself(reward_folder, tmp_path):
    folder = shutil.copytree(reward_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    with pytest.raises(ConfigError, match="add_eos is false, but reward model .* has a chat format"):
        RewardModel(str(folder), micro_batch_size=1, add_eos="false")


def test_ids_without_a_row_are_refused_and_the_text_is_scored_instead(judge, policy_tokenizer, make_rollout, talk):
    made, rows = make_rollout(policy_tokenizer), judge.model_config.vocab_size
    last = np.flatnonzero(made.mask[1])[-1]
    tokens = np.array(made.tokens)
    tokens[1, last] = rows
    beyond = dataclasses.replace(made, tokens=tokens)
    assert judge.has_rows(beyond).tolist() == [True, False, True]
    with pytest.raises(DataError, match=rf"has rows for {rows} tokens, and none for token {rows}"):
        judge.score_rollout(beyond)
    with pytest.raises(DataError, match="per_token: false"):
        judge.score_tokens(beyond)
    component = RewardComponent(Component(model=judge.path), judge, policy_tokenizer)
    found = component.score(ScoreRequest(talk.prompts, talk.completions, {}), beyond, None)
    np.testing.assert_allclose(found.values, judge.score_texts(*talk)[0], rtol=1e-4, atol=1e-5)


def test_a_model_with_one_more_token_for_padding_shares_the_tokenizer(judge, policy_tokenizer, monkeypatch):
    hf = copy.deepcopy(policy_tokenizer._hf)
    hf.add_special_tokens({"pad_token": "<|pad|>"})
    larger = Tokenizer(hf, TokenizerSource(), hf.pad_token_id, (), 1, None)
    monkeypatch.setattr(judge, "tokenizer", larger)
    assert larger.size == policy_tokenizer.size + 1 and judge.shares_tokenizer(policy_tokenizer)
    monkeypatch.setattr(judge, "tokenizer", policy_tokenizer)
    assert not judge.shares_tokenizer(larger)


def test_scores_from_python(reward_folder, judge, policy_tokenizer, talk):
    found = jaxrlhf.score(reward_folder, talk.prompts, talk.completions, finished=talk.finished)
    np.testing.assert_allclose(found, judge.score_texts(*talk)[0], rtol=1e-4, atol=1e-5)
    conversations = [[{"role": "user", "content": prompt}] for prompt in talk.prompts]
    again = jaxrlhf.score(str(reward_folder), conversations, talk.completions, finished=talk.finished)
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ConfigError, match="3 prompts, 2 completions"):
        jaxrlhf.score(reward_folder, talk.prompts, talk.completions[:2])
    for flag, name in ((True, "true"), (False, "false")):
        by_name = jaxrlhf.score(reward_folder, talk.prompts, talk.completions, add_eos=name)
        np.testing.assert_array_equal(
            jaxrlhf.score(reward_folder, talk.prompts, talk.completions, add_eos=flag), by_name
        )
    parts = [[{"from": "human", "content": [{"type": "text", "text": prompt}]}] for prompt in talk.prompts]
    found = jaxrlhf.score(reward_folder, parts, talk.completions, finished=talk.finished)
    np.testing.assert_array_equal(found, again)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than the 64 tokens"):
        jaxrlhf.score(reward_folder, ["a"], ["b" * 100])


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "said"),
    [
        ("Hi", "Yo", {}, "prompts and completions are lists"),
        (["a"], [None], {}, "completion 0 is null; expected text"),
        (["a", None], ["b", "c"], {}, "prompt 1 is null; expected text or a list of messages"),
        ([[]], ["b"], {}, "prompt 0 is list"),
        ([[{"role": "user", "content": 3}]], ["b"], {}, "prompt 0, message 1: content is int 3; expected text"),
        (["a"], ["b"], {"add_eos": "yes"}, "add_eos"),
        (["a"], ["b"], {"micro_batch_size": 0}, "micro_batch_size"),
    ],
)
def test_arguments_of_score_that_cannot_be_scored_are_refused(reward_folder, prompts, completions, options, said):
    with pytest.raises(ValueError, match=said):
        jaxrlhf.score(reward_folder, prompts, completions, **options)
