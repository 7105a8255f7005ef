"""The doctor's checks of PPO: all pass for a valid model, and each reports the fault it is for."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import Data, RewardSource, file, replace
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.demo.tokenizer import write_base
from jaxrlhf.doctor import ppo
from jaxrlhf.doctor.masks import check_masks
from jaxrlhf.training.ppo import update

REWARD = """
def length(completions, word):
    return [0.5 + len(text) for text in completions]

def broken(completions):
    raise KeyError("no such word")
"""


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with prompts, a reward and a config."""
    place = tmp_path_factory.mktemp("doctor")
    rows = [
        {"prompt": f"please say the word {word}", "word": word} for word in ("red", "green", "grey, light", "white")
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "reward.py").write_text(REWARD)
    (place / "ppo.yaml").write_text(
        f"run_dir: {place}/run\ndata: {{path: {place}/rows.jsonl}}\nreward: {{function: '{place}/reward.py:length'}}\n"
        "sampling: {response_length: 20, stop_strings: [xyz]}\nppo: {num_mini_batches: 2, replay: 1}\n"
    )
    return place


def config(folder, made):
    return file.load_config("ppo", made / "ppo.yaml", [("model.path", str(folder))], partial=True)


@pytest.fixture(scope="module")
def examined(folder, made):
    """(trial, what each check has found) on a healthy model."""
    trial = ppo.Trial(config(folder, made))
    return trial, {name: check() for name, check in trial.checks()}


@pytest.fixture
def trial(examined, monkeypatch):
    """The trial, to be broken: what a test puts into it, or into its trainer, is taken out again."""
    trial = examined[0]
    for thing in (trial, trial.trainer):
        for name, value in list(vars(thing).items()):
            monkeypatch.setattr(thing, name, value)
    monkeypatch.setattr(ppo, "PPOTrainer", lambda *_, **__: trial.trainer)
    return trial


def test_all_checks_pass_for_a_valid_model_and_config(examined, made):
    _, found = examined
    assert list(found) == [
        "first rows of the data",
        "tokenizer round trip of the prompts",
        "trained sequences end with a stop token",
        "rollout masks",
        "rollouts depend on the key alone",
        "the reward runs",
        "micro-batches change nothing",
        "KL to the reference is zero",
        "first ratio is one",
        "sampler and training log-probs agree",
    ]
    assert all(passed for passed, _ in found.values()), found
    assert "'please say the word red'" in found["first rows of the data"][1]
    assert found["the reward runs"][1].count("for '") == 2
    assert not (made / "run").exists()


def test_the_drawing_shows_the_end_inside_the_mask_and_padding_outside(examined):
    lines = examined[1]["rollout masks"][1].splitlines()[1:5]
    tokens, letters, seen, learnt = (line.split()[1:] for line in lines)
    assert "".join(letters).replace("...", "").strip("-_").strip("PR") == "E"
    for letter, one, other in zip(letters, seen, learnt, strict=True):
        assert ((one == "1") == (letter in "PRE") and (other == "1") == (letter in "RE")) or letter == "..."
    assert tokens[letters.index("P")] == "p"


def tampered(trial, **changes):
    """Lets the trainer's rollouts have other fields."""
    generate = trial.trainer.generate

    def wrong(rows, step):
        rollout, texts = generate(rows, step)
        return dataclasses.replace(rollout, **{k: f(rollout) for k, f in changes.items()}), texts

    trial.trainer.generate = wrong


def test_a_mask_without_the_end_token_or_with_padding_is_found(trial):
    def last(rollout):
        mask = np.array(rollout.response_mask)
        return mask & ~(np.cumsum(mask[:, ::-1], 1)[:, ::-1] == 1)

    tampered(trial, response_mask=lambda r: np.where(np.asarray(r.finished)[:, None], last(r), r.response_mask))
    passed, found = trial.masks()
    assert passed is False and "(end) is not in the response mask" in found
    tampered(trial, mask=lambda r: np.ones(r.mask.shape, bool), response_mask=lambda r: r.response_mask)
    passed, found = trial.masks()
    assert passed is False and "'<pad>' in column 0 (padding before the prompt) is in the mask" in found


def test_a_response_that_ended_counts_as_finished(trial):
    rollout = jax.device_get(trial.rollout)
    rollout = dataclasses.replace(rollout, finished=~rollout.finished)
    assert "and it is not" in check_masks(rollout, trial.rows, trial.stops, trial.tokenizer)[0]


def test_rollouts_that_ignore_or_change_their_key_are_found(trial):
    first, other = trial.rollout, trial.trainer.generate(trial.rows, 7)[0]
    trial.trainer.generate = lambda rows, step: (first, [])
    passed, found = trial.randomness()
    assert passed is False and "the same tokens in every row" in found
    trial.trainer.generate = lambda rows, step: (other, [])
    passed, found = trial.randomness()
    assert passed is False and "the same key has drawn other tokens" in found


def test_other_temperatures_and_a_loss_that_depends_on_the_micro_batch_are_found(trial, monkeypatch):
    """All at once, since each costs a compilation: the sampler at another temperature, the reference at a third,
    old log-probs that are off by a little, and a mean over each micro-batch in place of the global one."""
    trial.trainer.spec = dataclasses.replace(trial.trainer.spec, temperature=0.9)
    trial.measured, trial.changes = trial.measured[:1], trial.changes[:1]
    score, finish, loss = update.sequence_logprobs, update.fill_experience, update.policy_loss
    monkeypatch.setattr(update, "sequence_logprobs", lambda *a, **k: score(*a[:3], 1.0, **k))
    monkeypatch.setattr(
        update,
        "fill_experience",
        lambda e, m, *a: finish(e, m._replace(logprobs=m.logprobs + 1e-3 * (m.logprobs < 0)), *a),
    )
    monkeypatch.setattr(update, "policy_loss", lambda *a: loss(*a[:4], a[3].sum(), *a[5:]))
    monkeypatch.setattr(trial, "learn", lambda micro: micro and ppo.Trial.learn(trial, micro))
    passed, found = trial.micro_batches()
    assert passed is False and "it is not rounding" in found
    checks = dict(trial.measurements())
    passed, found = checks["KL to the reference is zero"]()
    assert passed is False and "not scored alike" in found
    passed, found = checks["first ratio is one"]()
    assert passed is False and "annotation and update score the policy differently" in found
    passed, found = checks["sampler and training log-probs agree"]()
    assert passed is False and "other temperature" in found


@pytest.mark.parametrize(
    ("end", "passes", "says"), [("</s>", True, "ends with '</s>' (id 2)"), ("\n", False, "turn 1 of 2 ends with '\\n'")]
)
def test_a_template_without_an_end_token_is_found(folder, made, tmp_path, end, passes, says):
    place = shutil.copytree(folder, tmp_path / "chat")
    (place / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        f"{{{{ {end!r} if m.role == 'assistant' else '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    trial = ppo.Trial(config(place, made))
    assert trial.tokenizer.has_chat
    passed, found = trial.template()
    assert passed is passes and says in found


def test_a_reward_that_raises_and_data_that_lacks_a_column(trial, made, capsys):
    from jaxrlhf.doctor import _run

    trial.config = replace(trial.config, reward=RewardSource(function=f"{made}/reward.py:broken"))
    assert _run("the reward runs", trial.reward) is False
    assert "raised KeyError: 'no such word'" in capsys.readouterr().out
    trial.config = replace(trial.config, reward=RewardSource(function=f"{made}/reward.py:length"))
    trial.rows = [replace(row, columns={}) for row in trial.rows]
    assert _run("the reward runs", trial.reward) is False
    assert "needs 'word', which the data does not have" in capsys.readouterr().out
    trial.config = replace(trial.config, reward=RewardSource())
    assert trial.reward()[0] is None


def test_text_that_changes_in_a_tokenizer_round_trip_is_found(trial):
    trial.rows = [replace(trial.rows[0], text="Say Red")]
    passed, found = trial.round_trip()
    assert passed is False and "'Say Red' decodes to" in found


def test_checks_that_need_a_config_are_skipped_without_one(trial):
    trial.config = replace(trial.config, data=Data())
    passed, found = trial.data()
    assert passed is None and found.startswith("needs a config")


def test_too_little_memory_is_reported_and_a_bad_config_still_fails(folder, made, monkeypatch, capsys):
    monkeypatch.setattr(ppo.memory, "free_on_device", lambda: 1000)
    arguments = ["doctor", str(folder), str(made / "ppo.yaml"), "--sampling.response_length", "60"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "FAIL  first rows of the data: the longest prompt with its response comes to" in printed
    assert "skip  rollout and update: policy and critic of 0 M parameters" in printed and "0.0 are free" in printed
    assert not (made / "run").exists()


def test_doctor_refuses_overrides_without_a_model(made, capsys):
    assert main(["doctor", "--ppo.kl_coef", "0.1"]) == 3
    assert "give the MODEL to check first" in capsys.readouterr().err
    assert main(["doctor", "m", str(made / "ppo.yaml"), "--ppo.kl_ceof", "0.1"]) == 3
    assert "did you mean 'ppo.kl_coef'" in capsys.readouterr().err


def test_the_built_in_prompts_are_spelt_by_a_small_vocabulary_too(folder, tmp_path):
    """The demo's tokenizer knows no other words than its own."""
    assert ppo.built_in_prompts(load_tokenizer(folder)) == ppo.PROMPTS
    small = load_tokenizer(write_base(tmp_path / "base"))
    prompts = ppo.built_in_prompts(small)
    assert len(set(prompts)) == len(ppo.PROMPTS)
    assert all(small.decode(small.encode(text)) == text for text in prompts)
    assert not any(small.convert_ids_to_tokens(small.encode(text)).count("<unk>") for text in prompts)
