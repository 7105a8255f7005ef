"""The score of a run: the weighted sum of its parts, with what went into it."""

import os
import shutil
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.config import RewardSource, TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, RewardError
from jaxrlhf.logprobs import last_token_scores
from jaxrlhf.metrics.statistics import correlation
from jaxrlhf.models import forward
from jaxrlhf.rewards.component import ComponentScores, RewardComponent
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rewards.sources import model as reward_model
from jaxrlhf.rewards.sources.model import RewardModel

FUNCTIONS = """
import asyncio, ctypes, math, os, resource, signal, sys, time
def good(completions): return [float(len(c)) for c in completions]
def raises(completions): return [float(c) for c in completions]
def hangs(completions): time.sleep(60)
def leaves(completions): sys.exit(3)
def exits(completions): os._exit(7)
def crashes(completions): os.kill(os.getpid(), signal.SIGSEGV)
def nan(completions): return [math.nan if i == 1 else 4.0 for i in range(len(completions))]
def infinite(completions): return [math.inf if i == 1 else 4.0 for i in range(len(completions))]
def short(completions): return [4.0]
def starves(completions):
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    return bytes(2**40)
def text(completions): return "high"
def word(completions): return ["high" if i == 1 else 4.0 for i in range(len(completions))]
def letters(tokens, per=1.0): return [[per * len(t) for t in row] for row in tokens]
def ragged(tokens): return [[1.0] * (len(row) - (i == 1)) for i, row in enumerate(tokens)]
"""


def lengths(completions):
    return [None if len(c) == 1 else len(c) for c in completions]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    file = tmp_path_factory.mktemp("functions") / "mine.py"
    file.write_text(FUNCTIONS)
    return file


@pytest.fixture
def score(policy_tokenizer, make_rollout, talk):
    """Components, as keywords or together, on the conversation `talk`."""

    def run(*components, columns=None, step=None, **one):
        source = RewardSource(components=components or (one,))
        scorer = Scorer(source, policy_tokenizer)
        return scorer.score(talk.prompts, talk.completions, make_rollout(policy_tokenizer), columns or {}, step)

    return run


def test_sources_outside_are_asked_while_others_score(policy_tokenizer, make_rollout, talk, tmp_path):
    """Each waits for a sign of the others, which comes only if all are at work at the same time."""
    (tmp_path / "meet.py").write_text(
        "import pathlib, time\n"
        "def reward(prompts, completions, name='', others=(), folder=''):\n"
        "    pathlib.Path(folder, name).touch()\n"
        "    deadline = time.monotonic() + 20\n"
        "    while not all(pathlib.Path(folder, other).exists() for other in others):\n"
        "        if time.monotonic() > deadline: return [0.0] * len(completions)\n"
        "        time.sleep(0.01)\n"
        "    return [1.0] * len(completions)\n"
    )
    sys.path.insert(0, str(tmp_path))
    from meet import reward

    sys.path.remove(str(tmp_path))
    names = {"a", "b", "c"}
    parts = tuple(
        {
            "function": "passed" if name == "b" else f"{tmp_path}/meet.py:reward",
            "name": name,
            "options": {"name": name, "others": sorted(names - {name}), "folder": str(tmp_path)},
        }
        for name in sorted(names)
    )
    scorer = Scorer(RewardSource(components=parts), policy_tokenizer, reward)
    scored = scorer.score(talk.prompts, talk.completions, make_rollout(policy_tokenizer), {})
    assert scored.scores.tolist() == [3.0] * 3
    assert [name for name in scored.components if name in names] == ["a", "b", "c"]


def test_a_worker_that_was_started_again_beside_others_stays(functions, policy_tokenizer, make_rollout, talk):
    parts = tuple({"function": f"{functions}:good", "name": name, "on_error": "skip"} for name in ("a", "b"))
    scorer, rollout = Scorer(RewardSource(components=parts), policy_tokenizer), make_rollout(policy_tokenizer)
    worker = scorer.components["a"].source

    def scores():
        return scorer.score(talk.prompts, talk.completions, rollout, {}).scores.tolist()

    expected = [2.0 * len(completion) for completion in talk.completions]
    assert scores() == expected
    os.kill(worker.pid, signal.SIGKILL)
    while not worker.ended:
        time.sleep(0.01)
    assert scores() == expected
    pid = worker.pid
    time.sleep(0.3)  # a signal of the kernel would come at the end of the thread
    assert scores() == expected and scores() == expected and worker.pid == pid


@pytest.mark.parametrize("human", [False, True])
def test_judges_take_turns_and_nothing_runs_while_a_person_is_asked(
    human, functions, policy_tokenizer, make_rollout, talk, monkeypatch
):
    def score(self, request, *_):
        threads[self.name] = threading.get_ident()
        return ComponentScores(np.zeros(len(request.completions), np.float32), np.zeros(len(request.completions), bool))

    threads = {}
    judges = [{"judge": {"url": "http://127.0.0.1:9/v1", "model": "m"}, "name": name} for name in "ab"]
    parts = [*judges, {"function": f"{functions}:good", "name": "c"}, {"function": "passed", "name": "d"}]
    scorer = Scorer(RewardSource(components=tuple(parts)), policy_tokenizer, lengths)
    monkeypatch.setattr(RewardComponent, "score", score)
    monkeypatch.setattr(Scorer, "has_human", human)
    scorer.score(talk.prompts, talk.completions, make_rollout(policy_tokenizer), {})
    assert set(threads) == {"a", "b", "c", "d"} and threads["d"] == threading.get_ident()
    assert threads["a"] == threads["b"] and len(set(threads.values())) == (1 if human else 3)


TWO = "jaxrlhf.rewards.text:matches"


def test_the_sum_is_weighted_and_its_parts_are_not(reward_folder, policy_tokenizer, make_rollout, talk):
    source = RewardSource(model=str(reward_folder), model_weight=2.0, function_weight=-0.5, model_dtype="float32")
    made = make_rollout(policy_tokenizer)
    scored = Scorer(source, policy_tokenizer, lengths).score(talk.prompts, talk.completions, made, {})
    judge = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=16)
    parts = scored.components
    assert set(parts) == {"model", "model_truncated", "lengths", "lengths_unanswered"}
    np.testing.assert_allclose(parts["model"], judge.score_rollout(made)[0], rtol=1e-5)
    np.testing.assert_array_equal(parts["lengths"], [6, 27, np.nan])
    assert parts["lengths_unanswered"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(scored.scores, 2 * parts["model"] - [3, 13.5, 0], rtol=1e-6)
    assert scored.scores.dtype == np.float32
    assert scored.token_scores is None
    assert scored.totals is scored.scores
    alone = Scorer(RewardSource(), policy_tokenizer, lengths).score(talk.prompts, talk.completions, made, {})
    assert not scored.unscored.any() and alone.unscored.tolist() == [False, False, True]
    assert alone.as_list() == [6.0, 27.0, None]


def test_what_a_component_leaves_unscored_is_no_part_of_its_metrics(policy_tokenizer, make_rollout, talk):
    """A component without a weight measures only: it gives no score."""
    components = (
        {"function": "passed", "name": "some", "weight": 2.0},
        {"function": TWO, "name": "two", "weight": 0.0, "options": {"pattern": ".*"}},
    )
    scorer = Scorer(RewardSource(components=components), policy_tokenizer, lengths)  # type: ignore[arg-type]
    rollout = make_rollout(policy_tokenizer)
    scored = scorer.score(talk.prompts, talk.completions, rollout, {})
    assert scored.as_list() == [12.0, 54.0, None]
    metrics = scored.metrics
    assert metrics["rewards/some/mean"] == np.mean([6, 27]) and metrics["rewards/some/std"] == np.std([6, 27])
    assert metrics["rewards/some/length_correlation"] == pytest.approx(1)
    assert metrics["rewards/some_unanswered/mean"] == pytest.approx(1 / 3) and metrics["rewards/two/mean"] == 1
    none = Scorer(RewardSource(), policy_tokenizer, lambda completions: [None] * len(completions))
    scored = none.score(talk.prompts, talk.completions, rollout, {})
    assert scored.unscored.all() and {*none.metric_keys()} - scored.metrics.keys() == {
        f"rewards/{next(iter(none.components))}/{name}" for name in ("mean", "std", "length_correlation")
    }


def test_any_number_of_components_add_up_to_a_number_worked_out_by_hand(score, functions):
    parts = [
        {"function": f"{functions}:good", "weight": 0.5},
        {"function": f"{functions}:good", "name": "again", "weight": -2.0, "template": "{prompt}|{response}"},
        {"function": "jaxrlhf.rewards.text:matches", "options": {"pattern": "a.*", "whole": True}, "weight": 10.0},
        {"function": f"{functions}:good", "name": "off", "enabled": False},
    ]
    scored = score(*parts)
    # prompts of 12, 5 and 3 characters, completions of 6, 27 and 1; only "a cat." begins with a
    assert scored.components["good"].tolist() == [6, 27, 1]
    assert scored.components["again"].tolist() == [19, 33, 5]
    assert scored.scores.tolist() == [3 - 38 + 10, 13.5 - 66, 0.5 - 10]
    assert set(scored.components) == {f"{n}{s}" for n in ("good", "again", "matches") for s in ("", "_unanswered")}


def test_metrics_of_each_component(score, functions, make_rollout, policy_tokenizer):
    metrics = score(function=f"{functions}:good").metrics
    assert metrics["rewards/good/mean"] == pytest.approx(34 / 3)
    assert metrics["rewards/good/std"] == pytest.approx(np.std([6, 27, 1]))
    assert metrics["rewards/good/errors"] == 0
    assert metrics["rewards/good_unanswered/mean"] == 0
    tokens = make_rollout(policy_tokenizer).response_mask.sum(1)  # a letter each, and an end token for two of the three
    assert tokens.tolist() == [7, 27, 2]
    assert metrics["rewards/good/length_correlation"] == pytest.approx(np.corrcoef([6, 27, 1], tokens)[0, 1])
    assert correlation(np.ones(3, np.float32), tokens) == 0
    assert correlation(-tokens.astype(np.float32), tokens) == pytest.approx(-1)


FAILURES = {
    # what a function does -> (what is said, completions without a usable answer)
    "raises": (r"raised ValueError: could not convert .* at .*mine.py:4; first completion: 'a cat.'", 3),
    "hangs": (
        r"did not answer 3 completions within 1 s and was killed; raise timeout .*; first completion: 'a cat.'",
        3,
    ),
    "leaves": (r"raised SystemExit: 3 at .*mine.py:6; first completion: 'a cat.'", 3),
    "exits": (r"ended its process with exit code 7; first completion: 'a cat.'", 3),
    "crashes": (r"was killed by SIGSEGV.*mine.py\", line 8 in crashes.*first completion: 'a cat.'", 3),
    "nan": (r"returned nan, not a finite float32, for completion 1: 'because it is so, they say.'", 1),
    "infinite": (r"returned inf, not a finite float32, for completion 1: 'because it is so, they say.'", 1),
    "starves": (r"raised MemoryError at .*mine.py:14; first completion: 'a cat.'", 3),
    "short": (r"returned 1 value for 3 completions; first completion: 'a cat.'", 3),
    "text": (r"returned a str for 3 completions; first completion: 'a cat.'", 3),
    "word": (r"returned 'high' \(str\), not a number, for completion 1: 'because it is so, they say.'", 1),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_every_failure_gives_a_note_and_is_handled_by_on_error(kind, functions, policy_tokenizer, make_rollout, talk):
    message, count = FAILURES[kind]
    where = rf"reward .*mine.py:{kind} \(step 5\) "
    asked = talk.prompts, talk.completions, make_rollout(policy_tokenizer), {}, 5
    spec = {"function": f"{functions}:{kind}", "name": "bad", "weight": 2.0, "timeout": 1.0}
    good = {"function": f"{functions}:good"}
    policies = [{"on_error": "fail"}, {"on_error": "skip"}, {"on_error": "value", "error_value": -3.0}]
    fail, skip, value = (
        Scorer(RewardSource(components=(spec | policy, good)), policy_tokenizer) for policy in policies
    )  # type: ignore[operator]
    with pytest.raises(RewardError, match=where + message) as caught:
        fail.score(*asked)
    assert caught.value.exit_code == 5
    hit = [count == 3, True, count == 3]
    for scorer, instead, unanswered in ((skip, 0.0, True), (value, -3.0, False)):
        for _ in range(1 if kind == "hangs" else 2):  # the second time in a new process, where the first is gone
            scored = scorer.score(*asked)
            expected = [instead if bad else 4.0 for bad in hit]
            known = [np.nan if bad and unanswered else value for bad, value in zip(hit, expected, strict=True)]
            np.testing.assert_array_equal(scored.components["bad"], known)
            np.testing.assert_allclose(scored.scores, 2 * np.array(expected) + [6, 27, 1])
            assert scored.components["bad_unanswered"].tolist() == [float(bad and unanswered) for bad in hit]
            assert scored.metrics["rewards/bad/errors"] == count
            assert scored.metrics["rewards/good/errors"] == 0
            (note,) = scored.notes
            assert f"{count} completions " in note
            assert f"on_error: {'skip' if unanswered else 'value'}" in note
            with pytest.raises(RewardError, match=where + message):
                raise RewardError(note)


def test_on_error_holds_for_a_passed_function(policy_tokenizer, make_rollout, talk):
    def late(completions):
        time.sleep(3)

    source = RewardSource(
        components=({"function": "passed", "timeout": 0.2, "on_error": "value", "error_value": 1.5, "weight": 2.0},)  # type: ignore[arg-type]
    )
    scored = Scorer(source, policy_tokenizer, late).score(
        talk.prompts, talk.completions, make_rollout(policy_tokenizer), {}
    )
    assert scored.scores.tolist() == [3, 3, 3]
    assert "reward late has not answered within 0.2 s. It runs in this process" in scored.notes[0]
    with pytest.raises(ConfigError, match=r"function: passed, and no Python function was given"):
        Scorer(source, policy_tokenizer)


def test_with_another_tokenizer_the_text_is_scored(reward_folder, other_tokenizer, make_rollout, talk):
    source = RewardSource(model=str(reward_folder), model_dtype="float32")
    theirs = make_rollout(other_tokenizer)
    scores = Scorer(source, other_tokenizer).score(talk.prompts, talk.completions, theirs, {}).scores
    judge = RewardModel(str(reward_folder), dtype="float32", micro_batch_size=16)
    np.testing.assert_allclose(scores, judge.score_texts(*talk)[0], rtol=1e-5)
    assert np.abs(scores - judge.score_rollout(theirs)[0]).max() > 0.1, "its ids would have scored something else"


def by_hand(folder, text: str, tokenizer) -> float:
    """The score of a text as it stands, one row without padding."""
    loaded, params = weights.load(folder, dtype="float32", compute_dtype="float32")
    ids = jax.numpy.array([tokenizer.encode(text, special=True)])
    return float(last_token_scores(params, loaded, ids, ids >= 0)[0])


def test_several_models_and_a_template_with_columns(reward_folder, policy_tokenizer, make_rollout, talk):
    text = "q: {prompt}{hint}\nr: {response}</s>"
    two = {"model": str(reward_folder), "name": "written", "template": text, "weight": 0.5, "dtype": "float32"}
    source = RewardSource(components=({"model": str(reward_folder), "dtype": "float32"}, two))  # type: ignore[arg-type]
    hints = ["short", "</s>", ""]
    scorer = Scorer(source, policy_tokenizer)
    scored = scorer.score(talk.prompts, talk.completions, make_rollout(policy_tokenizer), {"hint": hints})
    shown = [
        f"q: {p}{h}\nr: {c}</s>".replace("</s>\n", "</\ufdd0s>\n")
        for p, h, c in zip(talk.prompts, hints, talk.completions, strict=True)
    ]
    assert shown[1] != f"q: {talk.prompts[1]}</s>\nr: {talk.completions[1]}</s>"
    for i, text in enumerate(shown):
        if i != 1:
            assert scored.components["written"][i] == pytest.approx(
                by_hand(reward_folder, text, policy_tokenizer), rel=1e-4, abs=1e-5
            )
    spelt = [*policy_tokenizer.encode(f"q: {talk.prompts[1]}</s>\nr: {talk.completions[1]}"), policy_tokenizer.eos_id]
    judge = scorer.models["written"]
    assert scored.components["written"][1] == pytest.approx(judge.score_ids([spelt])[0][0], rel=1e-4), (
        "a column is text"
    )
    np.testing.assert_allclose(
        scored.scores, scored.components["model"] + 0.5 * scored.components["written"], rtol=1e-5, atol=1e-6
    )


def test_templates_are_checked_before_anything_is_loaded(reward_folder, policy_tokenizer):
    def scorer(template):
        component = {"model": str(reward_folder), "template": template}
        return Scorer(RewardSource(components=(component,)), policy_tokenizer)  # type: ignore[arg-type]

    with pytest.raises(
        ConfigError, match=r"there is no 'promt'; the fields are prompt, response, answer; did you mean"
    ):
        scorer("{promt} {response}").check(["a"], {"answer": ["b"]})
    scorer("{prompt} {answer}").check(["a"], {"answer": ["b"]})
    for bad, reason in {
        "{prompt.__class__} {response}": "a field is a plain name in braces",
        "{prompt[0]}": "a field is a plain name",
        "{prompt!r}": "a field is a plain name",
        "{prompt:>10}": "a field is a plain name",
        "{} {response}": "a field is a plain name",
        "prompt": "has no field",
        "{prompt": "write a literal brace twice",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            scorer(bad)


def test_tokens_are_rewarded_beside_sequences(score, functions, talk, make_rollout, policy_tokenizer):
    per_token = {"function": f"{functions}:letters", "per_token": True, "weight": 0.5, "options": {"per": 3.0}}
    scored = score(per_token, {"function": f"{functions}:good"})
    mask = make_rollout(policy_tokenizer).response_mask
    ended = np.array(talk.finished)
    expected = 0.5 * 3.0 * mask
    for i in range(3):
        if ended[i]:
            expected[i, mask[i].sum() - 1] = 0  # the end token has no letters
    np.testing.assert_array_equal(scored.token_scores, expected)
    assert scored.token_scores.dtype == np.float32
    assert scored.scores.tolist() == [6, 27, 1]
    assert scored.components["letters"].tolist() == [18, 81, 3]
    np.testing.assert_allclose(scored.totals, [6 + 9, 27 + 40.5, 1 + 1.5])


def test_token_rewards_of_the_wrong_length(score, functions):
    spec = {"function": f"{functions}:ragged", "per_token": True}
    with pytest.raises(RewardError, match=r"returned 26 numbers for 27 tokens, for completion 1: 'because"):
        score(spec)
    scored = score(spec | {"on_error": "value", "error_value": 2.0})
    assert scored.components["ragged"].tolist() == [7, 54, 2]
    flat = {"function": f"{functions}:good", "per_token": True}
    with pytest.raises(RewardError, match=r"returned 6.0 \(float\), not a list of 7 numbers, one per token"):
        score(flat)


def test_a_model_scores_every_token(reward_folder, policy_tokenizer, other_tokenizer, make_rollout, talk):
    spec = {"model": str(reward_folder), "per_token": True, "dtype": "float32", "micro_batch_size": 2}
    source = RewardSource(components=(spec,))  # type: ignore[arg-type]
    made = make_rollout(policy_tokenizer)
    scored = Scorer(source, policy_tokenizer).score(talk.prompts, talk.completions, made, {})
    assert scored.scores.tolist() == [0, 0, 0]
    loaded, params = weights.load(reward_folder, dtype="float32", compute_dtype="float32")
    for i in range(3):
        ids = jax.numpy.array(made.tokens[i][made.mask[i]])[None]
        row = (forward(params, loaded, ids, ids >= 0)[0] @ params["score"]["kernel"])[:, 0]  # a prefix in each place
        said = int(made.response_mask[i].sum())
        np.testing.assert_allclose(scored.token_scores[i, :said], row[-said:], rtol=1e-4, atol=1e-5)
        assert (scored.token_scores[i, said:] == 0).all()
    with pytest.raises(ConfigError, match="is per_token, but .* reads other tokens than the policy"):
        Scorer(source, other_tokenizer)


def test_non_finite_scores_of_a_model(reward_folder, policy_tokenizer, make_rollout, talk, monkeypatch):
    monkeypatch.setattr(
        reward_model, "sequence_scores_jit", lambda params, model, tokens, mask: np.array([1, np.nan, 2])
    )
    asked = talk.prompts, talk.completions, make_rollout(policy_tokenizer), {}
    spec = {"model": str(reward_folder), "micro_batch_size": 3}
    with pytest.raises(RewardError, match="gave nan for completion"):
        Scorer(RewardSource(components=(spec,)), policy_tokenizer).score(*asked)  # type: ignore[arg-type]
    spec |= {"on_error": "value", "error_value": -1.0}
    scored = Scorer(RewardSource(components=(spec,)), policy_tokenizer).score(*asked)  # type: ignore[arg-type]
    assert sorted(scored.scores.tolist()) == [-1, 1, 2]
    assert scored.metrics["rewards/model/errors"] == 1


def test_a_model_that_cannot_read_the_prompts_is_refused_without_its_weights(reward_folder, tiny_model, tmp_path, talk):
    folder = shutil.copytree(reward_folder, tmp_path / "m")
    for file in folder.glob("*.safetensors"):
        file.unlink()  # nothing that compiles or computes is needed for the refusal
    text = (tiny_model / "tokenizer.json").read_text()
    policy_folder = shutil.copytree(tiny_model, tmp_path / "p")
    (policy_folder / "tokenizer.json").write_text(text.replace('"z"', '"ж"'))
    policy = load_tokenizer(policy_folder, TokenizerSource())
    scorer = Scorer(RewardSource(model=str(folder)), policy)
    with pytest.raises(
        DataError, match=r"has no tokens for 8 of 12 characters in the first 2 \(67%; 'ж'.*Use a reward"
    ):
        scorer.check(["жжжж ab", "жжжж cd"], {})
    scorer.check(["zebra " * 20 + "ж", "a CAT"], {})


def test_columns_and_the_step_reach_the_function(policy_tokenizer, make_rollout, talk):
    def reward(prompts, completions, answer):
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    scorer = Scorer(RewardSource(), policy_tokenizer, reward)
    made = make_rollout(policy_tokenizer)
    scored = scorer.score(talk.prompts, talk.completions, made, {"answer": ["cat", "no", "x"]})
    assert scored.scores.tolist() == [1, 0, 1]
    with pytest.raises(RewardError, match=r"reward reward \(step 7\) needs 'answer'"):
        scorer.score(talk.prompts, talk.completions, made, {}, step=7)
    with pytest.raises(RewardError, match=r"reward reward needs 'answer'"):
        scorer.check(talk.prompts, {"other": [1, 2, 3]})


def test_columns_that_are_not_json_are_refused_before_generation(policy_tokenizer, functions, talk):
    column = {"image": [b"png"] * 3}
    Scorer(RewardSource(function=f"{functions}:good"), policy_tokenizer).check(talk.prompts, column)
    server = Scorer(RewardSource(components=({"url": "http://127.0.0.1:9/"},)), policy_tokenizer)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"reward http://127.0.0.1:9/ is to get column 'image', whose value 0 cannot"):
        server.check(talk.prompts, column)


def test_what_cannot_be_a_reward_is_refused(policy_tokenizer, functions):
    with pytest.raises(ConfigError, match="no reward"):
        Scorer(RewardSource(), policy_tokenizer)
    with pytest.raises(ConfigError, match="no reward"):
        Scorer(RewardSource(components=({"function": f"{functions}:good", "enabled": False},)), policy_tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two reward functions"):
        Scorer(RewardSource(function="math:fsum"), policy_tokenizer, lengths)
    with pytest.raises(RewardError, match="there is no file"):
        Scorer(RewardSource(function="none.py:f"), policy_tokenizer)
    with pytest.raises(ConfigError, match="two components of the reward are called 'lengths'"):
        Scorer(RewardSource(components=({"function": "math:fsum", "name": "lengths"},)), policy_tokenizer, lengths)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"human: score asks a person, and standard input is no terminal"):
        Scorer(RewardSource(components=({"human": "score"},)), policy_tokenizer)  # type: ignore[arg-type]
