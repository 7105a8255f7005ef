"""The trainers as a user meets them: runs, files, resuming, exports, and the step of a notebook."""

import dataclasses
import datetime
import errno
import json

import jax
import numpy as np
import pytest
from support.recorded_runs import page_data
from support.runs import equal, length_reward, records

import jaxrlhf
from jaxrlhf import config, report, sharding
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, NumericsError, Preempted, RewardError, StorageError
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training import setup
from jaxrlhf.training.export import export
from jaxrlhf.training.on_policy.sampler import occurrences
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer


def test_slots_do_not_change_the_responses_of_ppo(ppo):
    """And a smaller copy of the policy changes what is sampled, but not the log-probs that training takes."""
    texts, logs = {}, {}
    for rollout in (config.Generation(), config.Generation(slots=3), config.Generation(dtype="int8")):
        trainer = PPOTrainer(config.PPOConfig(rollout=rollout, **ppo), reward=lambda prompts, completions: [0.0] * 8)
        step = trainer.ppo_step([row.text for row in trainer.data.train[:8]])
        texts[rollout], logs[rollout] = step["generated_texts"], step
    whole, slots, int8 = texts
    assert texts[whole] == texts[slots]
    for key, value in logs[whole].items():
        if isinstance(value, float):
            assert logs[slots][key] == pytest.approx(value, abs=1e-4), key
    assert logs[int8]["val/first_log_ratio_max"] < 1e-5 < logs[int8]["val/sampler_logprob_gap"]


def test_sft_learns_its_rows_and_leaves_a_model(supervised, tmp_path):
    supervised |= {"train": config.Train(num_train_epochs=8, batch_size=6, eval_batch_size=4)}
    trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **supervised))
    assert "first example, tokens to learn in brackets" in trainer.describe()
    result = trainer.train()
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert len(losses) == 24 and losses[-1] < 0.7 * losses[0] and result["eval/loss"] < losses[0]
    model, params = jaxrlhf.load(tmp_path / "run")
    assert model == dataclasses.replace(trainer.model, remat="none"), "remat is the trainer's business"
    equal(params, jax.device_get(trainer.params))
    assert (tmp_path / "run" / "samples.jsonl").stat().st_size > 0
    page = page_data(tmp_path / "run" / "report.html")
    assert page["status"] == {"kind": "done", "text": "Finished."} and page["warnings"] == []
    assert page["verdict"][0].startswith("Loss fell") and "rows" in page["about"] and page["samples"]["fixed"]
    export = tmp_path / "run" / "export"
    assert page["reproduce"]["export"] == str(export) and page["reproduce"]["checkpoints"][-1] == "24"


def test_a_report_that_cannot_be_written_is_a_note(supervised, tmp_path, capsys, monkeypatch):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    options = supervised | {
        "train": config.Train(batch_size=6, max_steps=1),
        "logging": config.Logging(tensorboard=False),
    }
    assert SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **options)).train()["loss"] > 0
    assert "report.html could not be written" in capsys.readouterr().out
    quiet = options | {"logging": config.Logging(tensorboard=False, report=False)}
    SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "other"), **quiet)).train()
    assert "report.html" not in capsys.readouterr().out and not (tmp_path / "other" / "report.html").exists()


def test_sft_exports_the_best_state_and_not_the_last(supervised, tmp_path):
    supervised |= {"train": config.Train(batch_size=6, eval_every=1, eval_batch_size=6)}  # three steps
    trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **supervised))
    states, losses = [], iter([3.0, 1.0, 2.0, 0.5])  # the fourth look is at the state that is kept

    def look():
        states.append(jax.tree.map(np.array, trainer.params))  # copies: the next step takes the buffers
        return {"eval/loss": next(losses), "eval/entropy": 0.0}

    trainer._evaluate = look
    assert trainer.train()["eval/loss"] == 0.5
    equal(states[3], states[1])
    equal(jaxrlhf.load(tmp_path / "run")[1], states[1])
    assert np.abs(states[2]["embed"]["embedding"] - states[1]["embed"]["embedding"]).max() > 0


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_reward_model_ranks_held_out_pairs(supervised, tmp_path, head):
    trainer = RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "run"), head=head, **supervised))
    result = trainer.train()
    assert result["eval/accuracy"] == 1.0 and result["min_reward"] <= result["mean_reward"] <= result["max_reward"]
    model, params = jaxrlhf.load(tmp_path / "run")
    assert model.head == head
    equal(params, jax.device_get(trainer.params))


def test_frozen_trunk_trains_the_head_alone(supervised, tmp_path):
    trainer = RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "run"), frozen_trunk=True, **supervised))
    before = jax.device_get(trainer.params)
    trainer.train()
    after = jax.device_get(trainer.params)
    equal(after["layers"], before["layers"])
    assert np.abs(after["score"]["kernel"] - before["score"]["kernel"]).max() > 1e-3
    assert set(trainer.state.value.params["reward"]) == {"score"}


@pytest.mark.parametrize(("micro", "packing"), [(1, False), (3, False), (2, True)])
def test_micro_batches_do_not_change_supervised_training(supervised, tmp_path, micro, packing):
    # MLP head: its dropout must not depend on the cut either.
    whole = config.replace(supervised["train"], batch_size=4 if packing else 6, packing=packing)  # 5 packed rows
    parts = config.replace(whole, micro_batch_size=micro)
    optim = config.Optim(learning_rate=1e-3, eps=1e-3)
    runs = []
    for i, train in enumerate((whole, parts)):
        options = supervised | {"train": config.replace(train, max_steps=3), "optim": optim}
        trainer = RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / str(i)), head="mlp", **options))
        trainer.train()
        runs.append(jax.device_get(trainer.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *runs)


def test_ppo_raises_the_reward_it_is_given(ppo, tmp_path):
    options = ppo | {"ppo": config.replace(ppo["ppo"], total_episodes=160, kl_coef=0.0)}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    trainer.train()
    scores = [record["objective/scores"] for record in records(tmp_path / "run")]
    assert np.mean(scores[-3:]) > np.mean(scores[:3])
    first = records(tmp_path / "run")[0]
    assert first["objective/kl"] == 0 and first["val/first_log_ratio_max"] <= 1e-5
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) >= {"step", "prompt", "completion", "score"}
    page = page_data(tmp_path / "run" / "report.html")
    assert page["status"]["kind"] == "done" and "over 20 updates, at a KL" in page["verdict"][0]


def test_ppo_step_returns_completions_scores_and_metrics(ppo):
    trainer = PPOTrainer(config.PPOConfig(**ppo), reward=length_reward)
    prompts = ["say red ", "say blue "]
    result = trainer.ppo_step(prompts)
    assert len(result["generated_texts"]) == len(result["rewards"]) == 2
    np.testing.assert_allclose(result["rewards"], length_reward(prompts, result["generated_texts"]), rtol=1e-6)
    assert {"policy_loss", "value_loss", "objective/kl"} <= set(result) and trainer.state.value.step == 1
    assert trainer.ppo_step(prompts)["generated_texts"] != result["generated_texts"]  # another update, other keys
    with pytest.raises(ConfigError, match="multiple of 2"):
        trainer.ppo_step(["one"])
    with pytest.raises(ConfigError, match="one text"):
        trainer.ppo_step("say red ")
    trainer.ppo_step(prompts), trainer.ppo_step(prompts)
    with pytest.raises(ConfigError, match="ended after 4 updates"):
        trainer.ppo_step(prompts)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_bfloat16_reference_and_moments(ppo, storage):
    """Products in bfloat16, as on a GPU: the reference still is the policy, and Adam still counts in float32."""
    model = config.replace(ppo["model"], compute_dtype="bfloat16", param_dtype=storage)
    trainer = PPOTrainer(config.PPOConfig(**ppo | {"model": model}), reward=length_reward)
    assert trainer.frozen["reference"]["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"
    # Norms and biases that bfloat16 cannot hold, as a trained model has them.
    odd = jax.tree.map(lambda x: x * 1.001, trainer.params["norm"])
    trainer.state.value.params["policy"]["norm"] = odd
    trainer.frozen["reference"]["norm"] = jax.tree.map(lambda x: x.copy(), odd)
    result = trainer.ppo_step(["say red ", "say blue "])
    assert result["objective/kl"] == 0 and result["val/first_log_ratio_max"] <= 1e-5
    moments = [x for x in jax.tree.leaves(trainer.state.value.opt_state) if x.ndim]
    assert moments and all(x.dtype == "float32" for x in moments)
    assert trainer.params["layers"]["mlp"]["up"]["kernel"].dtype == storage


def test_copy_keeps_what_is_not_a_product(ppo):
    params = {"norm": {"scale": jax.numpy.full(4, 1.001)}, "up": {"kernel": jax.numpy.full((4, 4), 1.001)}}
    mesh = sharding.make_mesh(config.Mesh())
    copied = setup.cast_copy(params, "bfloat16", mesh)
    equal(copied["norm"], params["norm"])
    assert copied["up"]["kernel"].dtype == "bfloat16"
    same = setup.cast_copy(params, "float32", mesh)
    assert same["norm"]["scale"].unsafe_buffer_pointer() != params["norm"]["scale"].unsafe_buffer_pointer()


def test_a_run_is_not_resumed_with_other_data(ppo, tmp_path):
    rows = [{"prompt": f"say {word} "} for word in ("red", "green", "blue", "pink")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ppo | {"data": config.Data(path=str(file))}
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **options)
    PPOTrainer(settings, reward=length_reward).train()
    rows[2]["prompt"] = "say grey "
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StorageError, match="other prompts"):
        PPOTrainer(settings, reward=length_reward).train()


DATED = (
    "{{ strftime_now('%Y.%m.%d') }}\n{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 1, 2)


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_run_keeps_the_date_of_its_start_and_names_a_changed_template(ppo, supervised, tmp_path, monkeypatch, method):
    template, file = tmp_path / "dated.jinja", tmp_path / "rows.jsonl"
    template.write_text(DATED)
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    file.write_text((json.dumps({"messages": turns[:1] if method == "ppo" else turns}) + "\n") * 8)
    common = {
        "data": config.Data(path=str(file)),
        "tokenizer": config.TokenizerSource(chat_template=str(template)),
        "run_dir": str(tmp_path / "run"),
    }

    def make(**options):
        if method == "ppo":
            section = config.replace(ppo["ppo"], total_episodes=8)
            settings = config.PPOConfig(**ppo | common | {"ppo": section} | options)
            return PPOTrainer(settings, reward=length_reward)
        train = config.Train(batch_size=4, max_steps=1)
        return SFTTrainer(config.SFTConfig(**supervised | common | {"train": train} | options))

    def text(trainer):
        return trainer.tokenizer.decode(trainer.data.train[0].tokens)

    first = make()
    first.train()
    today = first.config.tokenizer.template_date
    assert text(first).startswith(f"{today.replace('-', '.')}\nsay red")
    monkeypatch.setattr(datetime, "date", Tomorrow)
    again = make()
    assert text(again) == text(first)
    again.train()  # resumes
    assert text(make(run_dir=str(tmp_path / "other"))).startswith("2031.01.02\n")
    named = make(tokenizer=config.replace(common["tokenizer"], template_date="2031-01-02"))
    with pytest.raises(StorageError, match=f"tokenizer.template_date: {today} -> 2031-01-02"):
        named.train()
    template.write_text("{# the same rows #}" + DATED)
    make().train()
    template.write_text("Today: " + DATED)
    with pytest.raises(StorageError, match="with other chat template and (data|prompts)"):
        make().train()


def test_reward_columns_reach_the_function(ppo):
    seen = {}

    def reward(prompts, completions, word):
        seen["word"] = word
        return [0.0] * len(prompts)

    PPOTrainer(config.PPOConfig(**ppo), reward=reward).ppo_step(["say red ", "say blue "], word=["red", "blue"])
    assert seen["word"] == ["red", "blue"]


@pytest.mark.parametrize("init", ["policy", "reward"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_critic_starts_from_the_policy_or_the_reward_model(ppo, supervised, tmp_path, init, frozen):
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised)).train()
    options = ppo | {
        "reward": config.RewardSource(model=str(tmp_path / "rm")),
        "critic": config.Critic(init=init, trunk="frozen" if frozen else "own", head="mlp", learning_rate=1e-3),
    }
    trainer = PPOTrainer(config.PPOConfig(**options))
    trunk = jax.device_get({**trainer.frozen["critic"], **trainer.state.value.params["critic"]})
    source = trainer.frozen["reference"] if init == "policy" else trainer.scorer.model.params
    equal(trunk["layers"], jax.device_get(source["layers"]))
    assert not np.any(trunk["score"]["dense_2"]["kernel"])
    assert trainer.ppo_step(["say red ", "say blue "])["val/explained_variance"] == pytest.approx(0, abs=1e-5)
    after = jax.device_get(trainer.state.value.params["critic"])
    assert np.any(after["score"]["dense_2"]["kernel"]) and ("layers" in after) != frozen


def test_a_prompt_that_comes_twice_in_a_batch_gets_two_responses(ppo):
    trainer = PPOTrainer(config.PPOConfig(**ppo), reward=length_reward)
    row = trainer.data.train[0]
    assert occurrences([row, row, trainer.data.train[1]]) == [0, 1, 0]
    _, texts = trainer.generate([row] * 8, 0)
    assert len(set(texts)) > 4


SHORT = {"optim": config.Optim(learning_rate=1e-2, state_dtype="bfloat16")}
AWAY = {"optim": config.replace(SHORT["optim"], offload=True), "reference": config.Reference(offload=True)}
PACKED = {"train": config.Train(num_train_epochs=2, batch_size=2, eval_batch_size=4, packing=True)}


@pytest.mark.parametrize(
    ("method", "options"), [("sft", SHORT | PACKED), ("reward", {}), ("reward", PACKED), ("ppo", {}), ("ppo", AWAY)]
)
def test_a_stopped_run_goes_on_bit_for_bit(supervised, ppo, tmp_path, request, method, options):
    def make(name: str):
        if method == "ppo":
            return PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / name), **ppo | options), reward=length_reward)
        kind, trainer = {"sft": (config.SFTConfig, SFTTrainer), "reward": (config.RewardConfig, RewardTrainer)}[method]
        return trainer(kind(run_dir=str(tmp_path / name), **supervised | options))

    whole = make("whole")
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(resumed.state.value, whole.state.value)


def test_a_finished_run_can_be_started_and_exported_again(ppo, tmp_path, capsys):
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **ppo)
    done = PPOTrainer(settings, reward=length_reward)
    before = done.train()
    # A key that is younger than the run has its default and is no change.
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("  renormalise_logprobs: false\n", ""))
    loud = dataclasses.replace(settings, logging=dataclasses.replace(settings.logging, quiet=False))
    assert before == PPOTrainer(loud, reward=length_reward).train()
    assert len(records(tmp_path / "run")) == 4
    printed = capsys.readouterr().out
    assert "already finished: step 4 of 4 is done" in printed and "resuming" not in printed


def test_bad_input_is_refused_at_the_door(ppo, supervised, tmp_path):
    def long(section, **changes):
        return config.replace(section, **changes)

    with pytest.raises(ConfigError, match="no reward"):
        PPOTrainer(config.PPOConfig(**ppo))
    with pytest.raises(ConfigError, match="greedy"):
        PPOTrainer(config.PPOConfig(**ppo | {"sampling": config.Sampling(greedy=True)}), reward=length_reward)
    with pytest.raises(ConfigError, match=r"context is 64"):
        PPOTrainer(config.PPOConfig(**ppo | {"sampling": config.Sampling(response_length=60)}), reward=length_reward)
    with pytest.raises(ConfigError, match="model.path is empty"):
        SFTTrainer(config.SFTConfig(**supervised | {"model": config.ModelSource()}))
    with pytest.raises(DataError, match="data"):
        SFTTrainer(config.SFTConfig(**supervised | {"data": config.Data(path=str(tmp_path / "absent.jsonl"))}))
    with pytest.raises(ConfigError, match="multiple of mesh"):
        SFTTrainer(config.SFTConfig(**supervised | {"mesh": config.Mesh(data=4)}))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda n: [1.0] * (n - 1), "7 values for 8"),
        (lambda n: [float("nan")] * n, "nan"),
        (lambda n: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_bad_reward_stops_the_run_and_loses_nothing(ppo, tmp_path, answer, said):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        return answer(len(prompts)) if len(calls) == 4 else [0.5] * len(prompts)

    options = ppo | {"checkpoint": config.Checkpoint(save_every=50)}
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), **options)
    with pytest.raises(
        RewardError, match=rf"(?s){said}.*3 updates are saved. Fix the reward and run the same command again"
    ):
        PPOTrainer(settings, reward=reward).train()
    before = records(tmp_path / "run")
    assert [record["step"] for record in before] == [1, 2, 3]
    status = page_data(tmp_path / "run" / "report.html")["status"]
    assert status["kind"] == "failed" and status["text"].startswith("Ended by RewardError after 3 of 4 updates: ")
    assert PPOTrainer(settings, reward=length_reward).train()["episode"] == 32
    page = page_data(tmp_path / "run" / "report.html")
    assert page["status"]["kind"] == "done" and page["restarts"] == [3]
    assert records(tmp_path / "run")[:3] == before and len(records(tmp_path / "run")) == 4


def test_endless_skipping_stops_the_run(supervised, tmp_path):
    options = supervised | {"optim": config.Optim(learning_rate=1e30, schedule="constant")}
    with pytest.raises(NumericsError, match="in 5 steps in a row"):
        SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **options)).train()
    page = page_data(tmp_path / "run" / "report.html")
    assert "Ended by NumericsError" in page["status"]["text"] and "steps were skipped" in page["warnings"][0]


def test_a_chat_format_that_is_added_travels_into_the_export(supervised, tiny_model, tmp_path):
    """Two new tokens: two new rows at the mean, the template and the ids in the exported tokenizer, and it stops."""
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    options = supervised | {
        "data": config.Data(path=str(tmp_path / "chat.jsonl")),
        "tokenizer": config.TokenizerSource(chat_template="chatml"),
        "train": config.Train(batch_size=4, max_steps=1),
    }
    trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **options))
    old = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    rows = jax.device_get(trainer.params["embed"]["embedding"])
    assert rows.shape[0] == trainer.tokenizer.size == old + 2
    for row in rows[old:]:
        np.testing.assert_allclose(row, rows[:old].mean(0), rtol=1e-5, atol=1e-7)
    learnt = [p for p, m in zip(trainer.data.train[0].tokens, trainer.data.train[0].loss_mask, strict=True) if m]
    assert trainer.tokenizer.convert_ids_to_tokens(learnt)[-1] == "<|im_end|>"
    trainer.train()
    again = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "again"), **supervised | {
        "model": config.ModelSource(path=str(tmp_path / "run")), "data": options["data"]}))  # fmt: skip
    assert again.model.vocab_size == old + 2 and again.tokenizer.added == 0
    assert again.data.train == trainer.data.train and again.tokenizer.stop_ids == trainer.tokenizer.stop_ids


@pytest.mark.parametrize(("chat_template", "noted"), [("chatml", True), ("none", False)])
def test_a_reward_model_of_plain_text_scores_plain_text(supervised, tmp_path, chat_template, noted):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"input": "red", "chosen": " yes", "rejected": " no"}) + "\n")
    options = supervised | {
        "data": config.Data(path=str(tmp_path / "pairs.jsonl"), template="say {input}:"),
        "tokenizer": config.TokenizerSource(chat_template=chat_template),
        "train": config.Train(batch_size=1, max_steps=1),
    }
    trainer = RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "run"), **options))
    assert ("exported without the tokenizer's chat template" in trainer.about()) == noted
    text = trainer.data.train[0].chosen.tokens
    for folder in (trainer.save_pretrained(tmp_path / "saved"), trainer.train() and tmp_path / "run"):
        model = RewardModel(str(folder), micro_batch_size=1)
        assert not model.tokenizer.has_chat
        expected, _ = model.score_ids([text])
        np.testing.assert_array_equal(model.score_texts(["say red:"], [" yes"], [True])[0], expected)
    export(tmp_path / "run", tmp_path / "exported")
    assert not load_tokenizer(tmp_path / "exported").has_chat


FUNCTIONS = """
def picky(completions): return [float("nan") if len(c) % 3 == 0 else 0.25 for c in completions]
def letters(tokens): return [[float("e" in text) for text in row] for row in tokens]
def matches(completions, word): return [float(w[0] in c) for c, w in zip(completions, word)]
"""


def test_a_run_with_components_of_every_trade(ppo, supervised, tmp_path):
    """Workers, one that fails on some answers, rewards of single tokens, a model: the parts add up in the objective."""
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised)).train()
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    mine = str(tmp_path / "mine.py")
    parts = [
        {"function": f"{mine}:picky", "weight": 2.0, "on_error": "value", "error_value": -1.0},
        {"function": f"{mine}:letters", "weight": 0.5, "per_token": True},
        {"function": f"{mine}:matches", "weight": 3.0},
        {"model": str(tmp_path / "rm"), "weight": 0.1, "template": "{prompt}{response}</s>", "name": "judge"},
        {"model": str(tmp_path / "rm"), "weight": -0.3, "per_token": True, "name": "steps"},
    ]
    settings = config.PPOConfig(run_dir=str(tmp_path / "run"), reward={"components": parts}, **ppo)  # type: ignore[arg-type]
    PPOTrainer(settings).train()
    lines = records(tmp_path / "run")
    assert len(lines) == 4
    weights = {"picky": 2.0, "letters": 0.5, "matches": 3.0, "judge": 0.1, "steps": -0.3}
    for line in lines:
        total = sum(weight * line[f"rewards/{name}/mean"] for name, weight in weights.items())
        assert line["objective/scores"] == pytest.approx(total, rel=1e-4, abs=1e-5)
        assert {f"rewards/{name}/{key}" for name in weights for key in ("std", "errors", "length_correlation")} <= set(
            line
        )
    assert sum(line["rewards/picky/errors"] for line in lines) > 0
    assert sum(line["rewards/letters/mean"] for line in lines) > 0
    again = config.replace(settings, run_dir=str(tmp_path / "again"))
    PPOTrainer(again).train()
    timeless = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    assert timeless == [
        {k: v for k, v in line.items() if not k.startswith("perf/")} for line in records(tmp_path / "again")
    ]


def test_what_cannot_be_scored_is_refused_before_training(ppo, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS + "def needs(completions, answer): pass")
    for part, error, message in [
        ({"function": f"{tmp_path}/mine.py:needs"}, RewardError, "needs 'answer', which the data does not have"),
        (
            {"function": f"{tmp_path}/mine.py:picky", "template": "{answer}"},
            ConfigError,
            "there is no 'answer'; the fields",
        ),
    ]:
        settings = config.PPOConfig(run_dir=str(tmp_path / "run"), reward={"components": [part]}, **ppo)  # type: ignore[arg-type]
        for refused in (
            lambda c: PPOTrainer(c),
            lambda c: PPOTrainer(c).train(),
            lambda c: PPOTrainer(c).describe(),
        ):
            with pytest.raises(error, match=message):
                refused(settings)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_cannot_learn_as_asked_says_so_before_it_starts(supervised, ppo, tmp_path):
    rows = [{"prompt": f"red {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = supervised | {
        "data": config.Data(path=str(tmp_path / "pairs.jsonl"), validation_fraction=0.2),
        "train": config.Train(batch_size=4, eval_batch_size=4, max_steps=99),
        "optim": config.Optim(learning_rate=1e-3, warmup_steps=9),
    }
    about = RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "run"), **options)).about()
    assert "warning: in 6 rows prompt and completion meet without a space" in about
    assert "2 steps, fewer than train.max_steps (99): train.num_train_epochs (1) ends before it" in about
    assert (
        "warning: optim.warmup_steps (9) does not end within the 2 optimizer steps of this run: the learning" in about
    )
    assert "reaches 2.0e-04 of 1.0e-03" in about
    assert "warning: which state is kept is decided by eval/accuracy on 1 held-out row;" in about
    good = supervised | {"train": config.Train(batch_size=4, eval_batch_size=4)}
    assert "warning" not in SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "good"), **good)).about()
    trainer = PPOTrainer(
        config.PPOConfig(**ppo | {"optim": config.Optim(learning_rate=1e-3, warmup_steps=99)}), length_reward
    )
    assert "warning: optim.warmup_steps (99) does not end within" in trainer.describe()
