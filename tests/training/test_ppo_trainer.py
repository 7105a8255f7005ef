"""PPO runs with what goes on around the update: shaped scores, validation, alarms, replay, the critic's export."""

import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from support.runs import equal, length_reward, records

import jaxrlhf
from jaxrlhf import config, weights
from jaxrlhf.errors import ConfigError, DataError, NumericsError, Preempted, RewardError
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.rollout.text import response_ids
from jaxrlhf.training.export import export
from jaxrlhf.training.on_policy.alarms import Watch
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer


def held_out(ppo, **options):
    return ppo | {"data": config.replace(ppo["data"], validation_fraction=0.25)} | options


EVERYTHING = {
    "reference": config.Reference(sync_every=2, sync_alpha=0.5),
    "scores": config.Scores(normalise="running", clip=2.0, missing_eos_penalty=0.5, overlong_buffer=4),
    "critic": config.Critic(trunk="shared", warmup_updates=1, max_grad_norm=0.5),
}


def test_a_stopped_run_with_all_kinds_of_state_resumes_bit_for_bit(ppo, tmp_path, request):
    """Adaptive KL, running statistics, a moving reference, kept rollouts, warm-up: all in the checkpoint."""
    remembered = {"kl_coef": 0.2, "kl_target": 0.01, "kl_horizon": 50.0, "replay": 2, "target_kl": 0.5}
    options = held_out(ppo, **EVERYTHING, validation=config.Validation(eval_steps=2, max_prompts=5, keep_best=True))
    options |= {"ppo": config.replace(ppo["ppo"], **remembered)}

    def make(name):
        return PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / name), **options), reward=length_reward)

    whole = make("whole")
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(jax.device_get(resumed.state.value), jax.device_get(whole.state.value))
    log = records(tmp_path / "whole")
    assert log[0]["policy/grad_norm"] and log[0]["objective/kl"] == 0 == log[1]["objective/kl"], "policy warmed up"
    assert log[1]["objective/kl_coef"] != log[0]["objective/kl_coef"]
    assert [("eval/scores" in record) for record in log] == [False, True, False, True]


def test_the_statistics_of_reference_scores_are_measured_once(ppo, tmp_path):
    options = ppo | {"scores": config.Scores(normalise="reference", reference_samples=16)}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    trainer.train()
    stats = trainer.state.value.score_stats
    assert stats.seen == 16
    record = records(tmp_path / "run")[0]
    scale = np.sqrt(float(stats.squares) / 15 + 1e-8)
    expected = (record["objective/raw_scores"] - float(stats.mean)) / scale
    assert record["objective/scores"] == pytest.approx(expected, rel=1e-4)
    nothing = config.PPOConfig(**options | {"data": config.Data()})
    with pytest.raises(ConfigError, match="answers prompts of data.path"):
        PPOTrainer(nothing, reward=length_reward).ppo_step(["say red ", "say blue "])


def test_reference_scores_that_are_all_equal_are_refused(ppo, tmp_path):
    options = ppo | {"scores": config.Scores(normalise="reference", reference_samples=8)}
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **options)
    with pytest.raises(RewardError, match="all 8 responses of the reference score 0.5: there is no deviation"):
        PPOTrainer(settings, reward=lambda prompts, completions: [0.5] * len(prompts)).train()


def test_a_reward_that_fails_in_a_validation_loses_nothing(ppo, tmp_path):
    calls = []

    def reward(prompts, completions):
        calls.append(len(prompts))
        if len(calls) == 5:  # two before training, two updates, and then
            raise OSError("the judge has gone")
        return [0.5] * len(prompts)

    options = held_out(ppo, validation=config.Validation(eval_steps=2, max_prompts=3))
    options |= {"checkpoint": config.Checkpoint(save_every=50)}
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **options)
    with pytest.raises(RewardError, match=r"(?s)the judge has gone.*2 updates are saved"):
        PPOTrainer(settings, reward=reward).train()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert PPOTrainer(settings, reward=length_reward).train()["episode"] == 32


def test_stop_strings_cut_the_response_and_finish_it(ppo):
    free = PPOTrainer(config.PPOConfig(**ppo), reward=length_reward)
    rows = free.data.train[:8]
    _, texts = free.generate(rows, 0)
    stop = next(text for text in texts if len(text) > 3)[2]
    sampling = config.replace(ppo["sampling"], stop_strings=(stop,))
    cutting = PPOTrainer(config.PPOConfig(**ppo | {"sampling": sampling}), reward=length_reward)
    rollout, cut = cutting.generate(rows, 0)
    assert cut == [text.split(stop)[0] for text in texts] and cut != texts
    whole, _ = free.generate(rows, 0)
    for i, text in enumerate(texts):
        ids = np.asarray(rollout.tokens[i, -rollout.response_mask.shape[1] :])[np.asarray(rollout.response_mask[i])]
        assert bool(rollout.finished[i]) == (stop in text or bool(whole.finished[i]))
        if stop in text:
            said = cutting.tokenizer.decode(ids.tolist(), after=rows[i].tokens)
            assert stop in said and stop not in cutting.tokenizer.decode(ids[:-1].tolist(), after=rows[i].tokens)
    # a control token is a stop token, although it is in no text
    sampling = config.replace(ppo["sampling"], stop_strings=("<s>",))
    fined = config.PPOConfig(**ppo | {"sampling": sampling, "scores": config.Scores(missing_eos_penalty=3.0)})
    trainer = PPOTrainer(fined, reward=lambda prompts, completions: [1.0] * len(prompts))
    rollout, _ = trainer.generate(rows, 0)
    said = [trainer.tokenizer.bos_id in ids for ids in response_ids(whole)]
    assert any(said) and rollout.finished.tolist() == [a or bool(b) for a, b in zip(said, whole.finished, strict=True)]
    experience, _ = trainer.learn(rollout, np.ones(8), 0)
    np.testing.assert_allclose(experience.scores, np.where(rollout.finished, 1.0, -2.0))


def test_num_train_epochs_sets_the_number_of_updates(ppo):
    options = ppo | {"ppo": config.replace(ppo["ppo"], num_train_epochs=2.5)}
    trainer = PPOTrainer(config.PPOConfig(**options), reward=length_reward)
    assert trainer.total_steps == -(-round(2.5 * len(trainer.data.train)) // 8)
    with pytest.raises(ConfigError, match="counts passes over data.path"):
        PPOTrainer(config.PPOConfig(**options | {"data": config.Data()}), reward=length_reward)


def test_the_best_state_is_exported_and_patience_ends_the_run(ppo, tmp_path):
    """A reward that only falls: the first validation stays the best, and two worse ones are enough."""
    calls = []

    def falling(prompts, completions):
        calls.append(1)
        return [-float(len(calls))] * len(prompts)

    validation = config.Validation(eval_steps=1, max_prompts=3, keep_best=True, patience=2)
    longer = config.replace(ppo["ppo"], total_episodes=80)
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **held_out(ppo | {"ppo": longer}, validation=validation))
    trainer = PPOTrainer(settings, reward=falling)
    trainer.train()
    log = records(tmp_path / "run")
    assert len(log) == 2, "the measurement before training counts as the first"
    assert trainer.state.value.step == 0, "nothing was better than the policy of step 0"
    assert log[-1]["eval/win_rate"] == 0 and log[-1]["eval/gain"] < 0
    exported = jaxrlhf.load(tmp_path / "run")[1]
    equal(jax.device_get(exported["layers"]), jax.device_get(trainer.params["layers"]))
    PPOTrainer(settings, reward=falling).train()
    assert len(records(tmp_path / "run")) == 2, "a run that has stopped stays stopped"
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any(row.get("held_out") and "greedy" in row for row in shown)


def test_unscored_completions_are_left_out_of_a_run(ppo, tmp_path):
    """Of the updates, of normalisation, of validation and of what is logged, where they have no score."""
    given = []

    def reward(prompts, completions):
        given.append([None if i % 4 == 1 else float(10 * i) for i in range(len(prompts))])
        return given[-1]

    settings = held_out(ppo, validation=config.Validation(eval_steps=2), scores=config.Scores(normalise="running"))
    logging = config.replace(ppo["logging"], num_samples=8)
    PPOTrainer(
        config.PPOConfig(run_dir=str(tmp_path / "run"), **settings | {"logging": logging}), reward=reward
    ).train()
    first, *_, last = records(tmp_path / "run")
    assert first["objective/unscored"] == 0.25 and first["objective/raw_scores"] == pytest.approx(220 / 6)
    assert first["objective/scores"] == pytest.approx(0, abs=1e-6), "normalised by the scored responses"
    assert last["eval/scores"] == np.mean([0, 20, 30, 40]) and last["eval/win_rate"] == 0.5 and last["eval/gain"] == 0
    baseline = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert baseline["scores"] == [0, None, 20, 30, 40, None]
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["score"] for row in shown if row["step"] == 1} == {0, None, 20, 30, 40, 60, 70}
    trainer = PPOTrainer(config.PPOConfig(**settings), reward=lambda completions: [None] * len(completions))
    with pytest.raises(RewardError, match="none of the 8 responses of this update has a score"):
        trainer.ppo_step(["a "] * 8)
    assert int(trainer.state.value.step) == 0


def test_validation_repeats_its_keys_and_scores_with_a_second_reward_model(ppo, supervised, tmp_path):
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised)).train()
    validation = config.Validation(eval_steps=2, max_prompts=5, reward_model=str(tmp_path / "rm"))
    frozen = config.replace(ppo["optim"], learning_rate=1e-30)
    options = held_out(ppo, validation=validation, optim=frozen)
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    trainer.train()
    baseline = json.loads((tmp_path / "run" / "validation.json").read_text())
    log = [record for record in records(tmp_path / "run") if "eval/scores" in record]
    assert len(log) == 2 and len(baseline["scores"]) == 5
    for record in log:  # the policy has not moved: neither has anything that it says
        assert record["eval/scores"] == baseline["metrics"]["eval/scores"] and record["eval/win_rate"] == 0.5
        assert record["eval/heldout_gain"] == 0 and record["eval/kl"] == 0
    judge = RewardModel(str(tmp_path / "rm"), micro_batch_size=4)
    assert judge.shares_tokenizer(trainer.tokenizer)


def test_the_critic_is_exported_as_a_model_that_scores(ppo, tmp_path):
    for trunk in ("own", "shared", "frozen"):
        options = ppo | {"critic": config.Critic(trunk=trunk)}
        trainer = PPOTrainer(config.PPOConfig(**options), reward=length_reward)
        head = trainer.state.value.params["critic"]["score"]
        head["kernel"] = head["kernel"] + 0.5  # as training would move it
        trainer.save_pretrained(tmp_path / trunk, role="critic")
        model, params = jaxrlhf.load(tmp_path / trunk)
        assert model.head == "linear" and np.all(np.asarray(params["score"]["kernel"]) == 0.5)
        owner = {"own": "critic", "shared": "policy"}.get(trunk)
        source = trainer.state.value.params[owner] if owner else trainer.frozen["reference"]
        equal(jax.device_get(params["layers"]), jax.device_get(source["layers"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ppo": {"local_rollout_forward_batch_size": 3}}, r"forward_batch_size \(3\) must divide .* 2 would"),
        ({"ppo": {"dual_clip": 1.1}}, r"dual_clip is 1.1; it must be above .*\(1.2\)"),
        ({"ppo": {"kl_coef": 0.0, "kl_target": 6.0}}, "kl_target multiplies it"),
        ({"ppo": {"cliprange": 1.5}}, "cliprange"),
        ({"ppo": {"kl_estimator": "k3"}}, "k3 does not go with ppo.kl_in reward"),
        ({"ppo": {"num_mini_batches": 3}}, r"num_mini_batches \(3\) must divide"),
        ({"scores": {"overlong_buffer": 99}}, r"overlong_buffer \(99\) is more than sampling.response_length \(8\)"),
        ({"reference": {"sync_alpha": 0.5, "dtype": "bfloat16"}}, "small moves would be rounded away"),
        ({"validation": {"eval_steps": 2}}, "validation.eval_steps is set but there are no held-out prompts"),
        ({"critic": {"trunk": "shared", "init": "reward"}}, "critic.trunk is 'shared'"),
        ({"ppo": {"kl_target": 6.0, "kl_horizon": 1.0}}, "one update could turn kl_coef negative"),
        ({"sampling": {"min_length": 9}}, "min_length is 9 and sampling.response_length 8: no response could end"),
        ({"sampling": {"stop_strings": ("",)}}, "has an empty text, which ends every response at once"),
    ],
)  # fmt: skip
def test_contradicting_options_are_refused_with_a_remedy(ppo, changes, said):
    sections = {"scores": config.Scores, "reference": config.Reference, "validation": config.Validation,
                "critic": config.Critic}  # fmt: skip
    options = dict(ppo)
    with pytest.raises(ValueError, match=said):
        for section, values in changes.items():
            options[section] = config.replace(options.get(section) or sections[section](), **values)
        config.PPOConfig(**options)


@pytest.mark.parametrize(("replay", "warmup"), [(0, 2), (1, 1)])
def test_the_learning_rate_falls_to_its_end_at_the_last_step(ppo, tmp_path, replay, warmup):
    """Neither updates that the critic has to itself nor rollouts that are not there yet are steps of the policy."""
    options = ppo | {"critic": config.Critic(warmup_updates=warmup), "ppo": config.replace(ppo["ppo"], replay=replay)}
    options |= {"optim": config.Optim(learning_rate=1e-3, schedule="linear")}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    trainer.train()
    for role, optimizer in trainer.spec.optimizers:
        assert optimizer.rate_of(trainer.state.value.opt_state[role]) == pytest.approx(0, abs=1e-9), role
        assert optimizer.rate(trainer.state.value.opt_state[role][-1].count - 1) > 0


def test_a_warmup_as_long_as_the_run_is_refused(ppo):
    options = ppo | {"critic": config.Critic(warmup_updates=4)}
    with pytest.raises(
        ConfigError, match="warmup_updates is 4 and the run has 4 updates: the policy would never train"
    ):
        PPOTrainer(config.PPOConfig(**options), reward=length_reward)


def test_a_run_that_failed_on_skipped_updates_fails_again_when_resumed(ppo, tmp_path):
    options = ppo | {"optim": config.Optim(learning_rate=1e38, max_grad_norm=1e38, schedule="constant")}
    options |= {"ppo": config.replace(ppo["ppo"], total_episodes=80), "checkpoint": config.Checkpoint(save_every=2)}
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **options)
    for _ in range(2):
        with pytest.raises(NumericsError, match="start over with --fresh"):
            PPOTrainer(settings, reward=length_reward).train()
    assert len(records(tmp_path / "run")) < 8


def test_options_that_the_data_or_the_reward_contradicts_are_refused(ppo):
    replaying = {"ppo": config.replace(ppo["ppo"], replay=1)}
    with pytest.raises(ConfigError, match="as wide as the prompts of data.path"):
        PPOTrainer(config.PPOConfig(**ppo | replaying | {"data": config.Data()}), reward=length_reward)
    with pytest.raises(ConfigError, match=r"with ppo.replay it needs 8"):
        PPOTrainer(config.PPOConfig(**ppo | replaying), reward=length_reward).ppo_step(["say red ", "say blue "])
    for wrong, near in {"eval/score": "eval/scores", "rewards/lengths/mean": "rewards/length_reward/mean"}.items():
        options = held_out(ppo, validation=config.Validation(metric=wrong))
        with pytest.raises(ConfigError, match=f"no record has '{wrong}'; did you mean '{near}'"):
            PPOTrainer(config.PPOConfig(**options), reward=length_reward)


def test_options_that_the_models_contradict_are_refused_before_weights_are_read(ppo, supervised, tmp_path, monkeypatch):
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised)).train()
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("weights were read"))
    judge = {"reward": config.RewardSource(model=str(tmp_path / "rm"))}
    second = held_out(ppo, validation=config.Validation(reward_model=str(tmp_path / "none")))
    rows = ppo | {"mesh": config.Mesh(data=4), "ppo": config.PPO(batch_size=8, num_mini_batches=4)}
    narrow = tmp_path / "narrow"
    shutil.copytree(tmp_path / "rm" / "export", narrow)
    described = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 16}))
    for options, said in {
        "no such folder": (second, "none"),
        "rows": (rows | judge, r"a mini-batch, \(2\) must be a multiple of mesh.replica x mesh.data x mesh.fsdp \(4\)"),
        "context": (ppo | {"reward": config.RewardSource(model=str(narrow))}, "for the reward model .* context is 16"),
    }.values():
        with pytest.raises((ConfigError, DataError), match=said):
            PPOTrainer(config.PPOConfig(**options), None if "reward" in options else length_reward)


@pytest.mark.parametrize("trunk", ["own", "frozen"])
def test_a_stopped_run_is_exported_without_its_data_and_its_reward(ppo, tmp_path, stop_at_two, trunk):
    """Policy and critic are those of the checkpoint, whatever else the run had."""
    own = ppo | {"data": config.replace(ppo["data"], path=str(shutil.copy(ppo["data"].path, tmp_path / "mine.jsonl")))}
    options = own | {"critic": config.Critic(trunk=trunk), "ppo": config.replace(ppo["ppo"], replay=1)}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    with pytest.raises(Preempted):
        trainer.train()
    (tmp_path / "mine.jsonl").unlink()
    for role in ("policy", "critic"):
        assert export(tmp_path / "run", tmp_path / role, role) == tmp_path / role
        trainer.save_pretrained(tmp_path / f"{role}-now", role)
        equal(jaxrlhf.load(tmp_path / role)[1], jaxrlhf.load(tmp_path / f"{role}-now")[1])
    assert "objective/kl" in (tmp_path / "policy" / "README.md").read_text(), "the card says what was measured"


def test_the_penalty_of_truncated_responses_and_what_a_person_will_score_are_printed(ppo, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    options = held_out(ppo, validation=config.Validation(eval_steps=2, max_prompts=3))
    options |= {"reward": config.RewardSource(components=({"human": "score"},))}
    options |= {"scores": config.Scores(normalise="reference", reference_samples=10, missing_eos_penalty=1.5)}
    said = PPOTrainer(config.PPOConfig(**options)).describe()
    assert "8 in each of 4 updates, 6 in each of 3 validations, 16 before training" in said
    assert "\n1.5 is subtracted from scores of truncated responses (scores.missing_eos_penalty)\n" in said


def record(**changes):
    plain = {
        "objective/kl": 1.0, "objective/entropy_per_token": 2.0, "objective/score_length_correlation": 0.1,
        "tokens/finished": 0.9,
    }  # fmt: skip
    return plain | {key.replace("__", "/"): value for key, value in changes.items()}


watcher = functools.partial(Watch, kl_option="ppo.kl_coef")


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("kl", {"objective__kl": 30.0}, "30 nats per response, over the budget of 10; raise ppo.kl_coef"),
        ("entropy", {"objective__entropy_per_token": 0.1}, "the same; raise ppo.kl_coef"),
        ("length", {"objective__score_length_correlation": -0.97}, "correlate at -0.97"),
        ("finished", {"tokens__finished": 0.2}, "fell from 0.90 to 0.20"),
    ],
)
def test_an_alarm_is_recorded_while_it_lasts_and_printed_once(name, bad, words):
    watch = watcher(config.Alarms(kl=10.0, window=2), 8, [])
    assert watch(record()) == ({f"alarm/{k}": 0.0 for k in ("kl", "entropy", "length", "finished")}, [])
    watch(record(**bad))
    marks, _ = watch(record(**bad))
    assert marks[f"alarm/{name}"] == 1 and sum(marks.values()) == 1
    said = [
        line
        for watched in [watcher(config.Alarms(kl=10.0, window=1), 8, [record()])]
        for line in watched(record(**bad))[1]
    ]
    assert len(said) == 1 and words in said[0]
    again, silent = watch(record(**bad))
    assert again[f"alarm/{name}"] == 1 and silent == []
    watch(record())
    assert watch(record())[0][f"alarm/{name}"] == 0


def test_a_held_out_reward_model_that_disagrees_raises_the_alarm():
    watch = watcher(config.Alarms(), 8, [record()])
    marks, lines = watch(record(eval__gain=0.5, eval__heldout_gain=-0.2))
    assert marks["alarm/held_out"] == 1 and "they disagree" in lines[0]
    marks, _ = watcher(config.Alarms(), 8, [])(record(eval__gain=0.5, eval__heldout_gain=0.1))
    assert marks["alarm/held_out"] == 0


def test_alarms_of_a_resumed_run_remember_the_first_update():
    before = [record(), record()]
    marks, _ = watcher(config.Alarms(window=1), 8, before)(record(objective__entropy_per_token=0.1))
    assert marks["alarm/entropy"] == 1
    marks, _ = watcher(config.Alarms(window=1), 8, [])(record(objective__entropy_per_token=0.1))
    assert marks["alarm/entropy"] == 0


def test_few_completions_raise_no_alarm():
    by_length = record(objective__score_length_correlation=1.0)
    seen = [{rows: watcher(config.Alarms(window=3), rows, [])} for rows in (2, 4)]
    said = {rows: [watch(by_length)[1] for _ in range(4)] for watches in seen for rows, watch in watches.items()}
    assert said[2] == [[]] * 4, "two points lie on a line"
    assert [len(lines) for lines in said[4]] == [0, 0, 1, 0], "a window must be full"
