"""Responses of several turns in PPO and GRPO: what was sampled is learnt, what an environment said is not."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config, models
from jaxrlhf.errors import ConfigError, Preempted, RewardError
from jaxrlhf.rollout.text import turn_texts
from jaxrlhf.training.grpo import update as grpo_update
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.on_policy import update as shared_update
from jaxrlhf.training.on_policy.inspection import inspect
from jaxrlhf.training.ppo import update as ppo_update
from jaxrlhf.training.ppo.critic import critic_params
from jaxrlhf.training.ppo.trainer import PPOTrainer

LENGTH = 15  # odd, so that no rollout is trimmed: each shape is a compilation
STOPS = tuple("efghijklmnopqrstuvwxyz .\n")


class Echo:
    """Answers with the length of a turn, up to a number of turns that the seed gives, and rewards vowels."""

    def __init__(self, text="{}:", most=4):
        self.text, self.most, self.log = text, most, []

    def reset(self, prompt, seed, word):
        state = {"prompt": prompt, "word": word, "left": 1 + seed % self.most, "seed": seed, "turns": []}
        self.log.append(state)
        return state

    def step(self, state, completion):
        state["left"] -= 1
        state["turns"].append(completion)
        return (self.text.format(len(completion)) if state["left"] else None), len(completion) + 0.5


@pytest.fixture
def options(ppo):
    return ppo | {
        "sampling": config.Sampling(response_length=LENGTH, stop_strings=STOPS),
        "environment": config.Environment(function="passed", max_turns=3),
    }


def ppo_trainer(options, environment, reward=None, **settings):
    settings = {"batch_size": 8, "total_episodes": 24, "num_mini_batches": 2, "num_ppo_epochs": 1, **settings}
    return PPOTrainer(config.PPOConfig(**options | {"ppo": config.PPO(**settings)}), reward, environment)


def grpo_trainer(options, environment, reward=None, **settings):
    settings = {"num_generations": 4, "batch_size": 8, "total_episodes": 24, "kl_coef": 0.1, **settings}
    options = {key: value for key, value in options.items() if key != "ppo"}
    return GRPOTrainer(config.GRPOConfig(**options | {"grpo": config.GRPO(**settings)}), reward, environment)


def on_host(rollout):
    return jax.tree.map(np.asarray, rollout)


def played(trainer, step=0, **rest):
    rollout, completions = trainer.generate(trainer.prompts(step), step, **rest)
    return on_host(rollout), completions


def runs(mask):
    """The (first, last + 1) columns of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize(("slots", "kind"), [(0, "tiny"), (4, "tiny"), (4, "recurrent")])
def test_an_episode_is_what_was_sampled_with_the_answers_in_between(options, slots, kind, request):
    """Every token is accounted for from the log of the environment, and every log-prob by a forward pass over the whole
    sequence: positions, caches, states and masks of later turns are those of one sequence."""
    environment, sampling = Echo(), config.replace(options["sampling"], response_length=27)
    options |= {"rollout": config.Generation(slots=slots), "sampling": sampling}
    model = config.replace(options["model"], path=str(request.getfixturevalue(f"{kind}_model")))
    trainer = ppo_trainer(options | {"model": model}, environment)
    rollout, completions = played(trainer, 1)
    tokenizer, columns = trainer.tokenizer, rollout.response_mask.shape[1]
    texts = turn_texts(rollout, tokenizer)
    turns = []
    for i, state in enumerate(environment.log):
        row = trainer.prompts(1)[i]
        assert state["prompt"] == row.text and state["word"] == row.columns["word"]
        real, sampled = rollout.mask[i, -columns:], rollout.response_mask[i]
        ids = rollout.tokens[i, -columns:]
        assert real.sum() == len(np.trim_zeros(real, "b")) and not (sampled & ~real).any(), "no gap in what is real"
        spans, answers = runs(sampled), runs(real & ~sampled)
        turns.append(len(spans))
        assert len(spans) == len(state["turns"]) == len(answers) + 1 <= 3
        assert (rollout.turn_rewards[i] != 0).sum() == len(spans)
        for number, (begin, end) in enumerate(spans):
            said, stop = tokenizer.decode(ids[begin:end].tolist()), number + 1 < len(spans) or rollout.finished[i]
            last = said[-1:] if said[-1:] in STOPS else ""
            assert not stop or last or ids[end - 1] in tokenizer.stop_ids
            assert state["turns"][number] == said.removesuffix(last)
            assert not set(state["turns"][number]) & set(STOPS), "a turn ends at its first stop string"
            assert rollout.turn_rewards[i, end - 1] == len(state["turns"][number]) + 0.5
        for (begin, end), said in zip(answers, state["turns"], strict=False):
            assert ids[begin:end].tolist() == tokenizer.encode(f"{len(said)}:")
        assert rollout.finished[i] == (state["left"] == 0 and (ids[real][-1] in tokenizer.stop_ids or said[-1:] != ""
            or tokenizer.decode(ids[real].tolist())[-1:] in STOPS))  # fmt: skip
        assert "".join(texts[i]) == completions[i] or rollout.finished[i]
        assert texts[i][1::2] == [tokenizer.decode(ids[a:b].tolist()) for a, b in answers]
    assert {1, 2, 3} == {*turns}, "episodes of several lengths"
    np.testing.assert_allclose(trainer.logprobs(rollout), rollout.logprobs, atol=2e-5)
    assert (rollout.logprobs != 0).sum() == rollout.response_mask.sum()


def test_an_episode_of_one_turn_is_a_response_without_an_environment(options):
    """The same tokens, log-probs and masks, with every turn ended at once."""
    plain = options | {"environment": config.Environment()}
    alone = ppo_trainer(plain, None, length_reward)
    with_one = ppo_trainer(options, Echo(most=1))
    (expected, texts), (rollout, same) = played(alone), played(with_one)
    assert texts == same
    equal(dataclasses.replace(rollout, turn_rewards=None), expected)


def test_greedy_turns_go_on_as_a_prompt_that_has_all_before_them(options):
    environment = Echo()
    trainer = ppo_trainer(options, environment)
    rollout, _ = played(trainer, greedy=True)
    checked = 0
    for i, row in enumerate(trainer.prompts(0)):
        for begin, end in runs(rollout.response_mask[i])[1:]:
            width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
            before = rollout.tokens[i, :width][rollout.mask[i, :width]].tolist()
            before += rollout.tokens[i, width : width + begin].tolist()
            environment.most = 1
            whole, _ = trainer.sampler.decode(
                trainer.sampler.inference_copy(trainer.params),
                [dataclasses.replace(row, tokens=before[-20:])] * 8, trainer.key(0, 0), slots=0, greedy=True,
            )  # fmt: skip
            checked += len(before) <= 20
            if len(before) <= 20:
                new = on_host(whole).tokens[0, -LENGTH:][: end - begin]
                assert new.tolist() == rollout.tokens[i, width + begin : width + end].tolist()
    assert checked


def test_a_group_plays_the_same_episode_and_seeds_are_those_of_the_update(options):
    environment = Echo(most=2**31)
    trainer = grpo_trainer(options, environment)
    seeds = []
    for step in (0, 1, 0):
        environment.log.clear()
        played(trainer, step)
        seeds.append([state["seed"] for state in environment.log])
        assert [len({*seeds[-1][g : g + 4]}) for g in (0, 4)] == [1, 1] and len({*seeds[-1]}) == 2
    assert seeds[0] == seeds[2] and not {*seeds[0]} & {*seeds[1]}
    environment.log.clear()
    trainer.generate(trainer.prompts(0)[::4] * 4, 0, use=1, greedy=True)
    assert [state["seed"] for state in environment.log][:2] == seeds[0][::4], "the baseline of ReMax"


def test_a_loop_without_end_is_bounded_by_turns_and_by_tokens(options):
    class Endless(Echo):
        def step(self, state, completion):
            return "again", 0.0

    few = ppo_trainer(options, Endless(), length_reward)
    batch = few.generate_and_score(few.prompts(0), 0)
    rollout = on_host(batch.rollout)
    turns = [len(runs(mask)) for mask in rollout.response_mask]
    assert max(turns) == 3 and not rollout.finished.any()
    assert batch.metrics["turns/mean"] == np.mean(turns) and batch.metrics["turns/max"] == 3
    assert batch.metrics["turns/truncated"] == np.mean(np.array(turns) == 3)
    assert batch.metrics["turns/overlong"] == np.mean(np.array(turns) < 3)
    between = rollout.mask[:, -rollout.response_mask.shape[1] :].sum() - rollout.response_mask.sum()
    assert batch.metrics["turns/environment_tokens"] == between / 8 > 0
    many = options | {"environment": config.Environment(function="passed", max_turns=1000)}
    rollout, _ = played(ppo_trainer(many, Endless()))
    used = rollout.mask[:, -rollout.response_mask.shape[1] :].sum(axis=1)
    assert (used > LENGTH - len("again") - 1).all() and (used <= LENGTH).all() and not rollout.finished.any()
    wordy, _ = played(ppo_trainer(options, Echo(text="x" * LENGTH)))
    assert (wordy.mask[:, -wordy.response_mask.shape[1] :] == wordy.response_mask).all(), "no room: left out, not cut"
    assert (wordy.turn_rewards != 0).sum(axis=1).tolist() == [1] * 8, "the turn keeps its reward"


def test_the_text_of_an_environment_cannot_stop_the_policy_or_spell_control_tokens(options):
    rollout, _ = played(ppo_trainer(options, Echo(text="</s>.")))
    assert max(len(runs(mask)) for mask in rollout.response_mask) > 1, "the policy goes on"
    columns = rollout.response_mask.shape[1]
    given = rollout.mask[:, -columns:] & ~rollout.response_mask
    assert given.any() and not (rollout.tokens[:, -columns:][given] == 2).any()


def test_rewards_of_turns_are_at_their_last_tokens_in_ppo_and_summed_in_grpo(options):
    """Beside another reward, which is of the whole response."""
    seen = []

    def reward(completions, turns):
        seen.append((completions, turns))
        return [10.0] * len(completions)

    environment = Echo()
    trainer = ppo_trainer(options, environment, reward, kl_coef=0.0, whiten_advantages=False)
    batch, experience, metrics = trainer._update(trainer.prompts(0), 0)
    rollout, rewards = on_host(experience.rollout), np.asarray(experience.rewards)
    expected = np.zeros_like(rewards)
    for i, state in enumerate(environment.log):
        spans = runs(rollout.response_mask[i])
        for (_, end), said in zip(spans, state["turns"], strict=True):
            expected[i, end - 1] = len(said) + 0.5
        expected[i, spans[-1][1] - 1] += 10
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    sums = expected.sum(axis=1) - 10
    assert metrics["rewards/environment/mean"] == pytest.approx(sums.mean(), rel=1e-6)
    assert metrics["objective/scores"] == pytest.approx(sums.mean() + 10, rel=1e-6)
    assert seen.pop() == (batch.completions, turn_texts(rollout, trainer.tokenizer))
    table = inspect(experience, trainer.tokenizer)
    assert len(table.rows) == rollout.response_mask.sum()
    assert any(re.search(r"\d+:", row["state"]) for row in table.rows)
    last = options | {"environment": config.replace(options["environment"], completion="last")}
    trainer = ppo_trainer(last, Echo(), reward)
    trainer.generate_and_score(trainer.prompts(0), 0)
    completions, turns = seen.pop()
    assert completions == [texts[-1] for texts in turns] != batch.completions
    environment = Echo()
    trainer = grpo_trainer(options, environment)
    batch, experience, metrics = trainer._update(trainer.prompts(0), 0)
    sums = np.array([sum(len(said) + 0.5 for said in state["turns"]) for state in environment.log])
    np.testing.assert_allclose(batch.scored.totals, sums)
    mean, std = (f(sums.reshape(2, 4), axis=1).repeat(4) for f in (np.mean, lambda x, axis: x.std(axis=axis, ddof=1)))
    mask = np.asarray(experience.rollout.response_mask)
    advantages = np.where(mask, ((sums - mean) / (std + 1e-4))[:, None], 0)
    np.testing.assert_allclose(experience.advantages, advantages, atol=1e-5)


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer])
def test_log_probs_of_an_environments_tokens_are_in_no_loss(make, options, monkeypatch):
    """They and their entropies are made nan, after the model: losses, gradients, metrics and the next state are as they
    were, bit for bit."""
    method = ppo_update if make is ppo_trainer else grpo_update
    trainer = make(options, Echo(), **({} if make is grpo_trainer else {"entropy_coef": 0.01}), num_mini_batches=2)
    rows = trainer.prompts(0)
    batch = trainer.generate_and_score(rows, 0)
    given = np.asarray(batch.rollout.mask)[:, -batch.rollout.response_mask.shape[1] :] & ~batch.rollout.response_mask
    assert given.any()
    scores = jnp.asarray(batch.scored.totals)
    state = trainer.state.value

    def updated():
        experience, metrics = method.annotate.__wrapped__(
            state, trainer.frozen, batch.rollout, scores, spec=trainer.spec
        )
        after = method.update.__wrapped__(state, trainer.frozen, experience, trainer.key(0, 1), spec=trainer.spec)
        return jax.device_get((experience.advantages, metrics, *after))

    expected = updated()
    plain, of_tokens, rollouts = method.sequence_logprobs, shared_update.token_logprobs, []

    def watched(params, model, rollout, *rest, **options):
        rollouts.append(rollout)
        return plain(params, model, rollout, *rest, **options)

    def spoilt(*arguments):
        return tuple(jnp.where(rollouts[-1].response_mask, x, jnp.nan) for x in of_tokens(*arguments))

    monkeypatch.setattr(method, "sequence_logprobs", watched)
    monkeypatch.setattr(shared_update, "token_logprobs", spoilt)
    equal(updated(), expected)


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer])
def test_a_run_learns_from_episodes_and_resumes_bit_for_bit(make, options, tmp_path, request):
    """With held-out prompts, an environment in a process of its own, and pi_old that is the policy to rounding."""
    (tmp_path / "game.py").write_text(
        "import random\n"
        "class Game:\n"
        "    def reset(self, seed): return {'random': random.Random(seed), 'left': 1 + seed % 3}\n"
        "    def step(self, state, completion):\n"
        "        state['left'] -= 1\n"
        "        text = f'{state[\"random\"].randint(0, 99)}:'\n"
        "        return (text if state['left'] else None), completion.count('b') - 0.1 * len(completion)\n"
    )
    options |= {
        "environment": config.Environment(function=f"{tmp_path / 'game.py'}:Game", max_turns=3),
        "data": config.replace(options["data"], validation_fraction=0.25),
        "validation": config.Validation(eval_steps=2, max_prompts=5),
        "logging": config.replace(options["logging"], token_samples=2),
    }

    def trainer(name):
        return make(options | {"run_dir": str(tmp_path / name)}, None)

    whole = trainer("whole")
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        trainer("parts").train()
    resumed = trainer("parts")
    resumed.train()
    log = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == log
    equal(jax.device_get(resumed.state.value), jax.device_get(whole.state.value))
    assert all(record["val/first_log_ratio_max"] < 1e-5 for record in log if "val/first_log_ratio_max" in record)
    assert all(record["val/sampler_logprob_gap_max"] < 1e-4 for record in log)
    assert all(1 <= record["turns/mean"] <= record["turns/max"] <= 3 for record in log)
    assert {"eval/scores", "rewards/environment/mean", "turns/environment_tokens"} <= {*log[-1]}


def test_a_run_whose_environment_fails_has_lost_nothing(options, tmp_path):
    class Breaks(Echo):
        def step(self, state, completion):
            if len(self.log) > 16:
                raise OSError("the server is gone")
            return super().step(state, completion)

    settings = options | {"run_dir": str(tmp_path / "run")}
    settings["logging"] = config.replace(options["logging"], sample_every=0)
    with pytest.raises(RewardError, match="environment Breaks: step raised OSError: the server is gone"):
        ppo_trainer(settings, Breaks()).train()
    assert len(records(tmp_path / "run")) == 2
    whole = ppo_trainer(settings, Echo())
    whole.train()
    assert len(records(tmp_path / "run")) == 3


def test_contradictions_are_refused_before_a_response_is_generated(options):
    class Chess(Echo):
        def reset(self, board):
            return board

    with pytest.raises(RewardError, match="reset needs 'board', which the data does not have"):
        ppo_trainer(options, Chess())
    with pytest.raises(ConfigError, match="rollout.devices is 2 and environment.function is set"):
        ppo_trainer(options | {"rollout": config.Generation(devices=2)}, Echo(), sampler_correction="mask")
    with pytest.raises(ConfigError, match="no reward beside the environment"):
        ppo_trainer(options | {"scores": config.Scores(normalise="running")}, Echo())
    with pytest.raises(ConfigError, match="ppo.baseline is leave_one_out, which is for scores of responses"):
        ppo_trainer(options, Echo(), num_generations=4, baseline="leave_one_out")
    named = options | {
        "reward": config.RewardSource(components=(config.Component(name="environment", url="http://x"),))
    }
    with pytest.raises(ConfigError, match="two components of the reward are called 'environment'"):
        ppo_trainer(named, Echo())


def test_the_value_after_a_truncated_episode_is_that_of_its_last_token(options):
    """`max_turns` truncates responses of all lengths: each is read again alone, without padding."""

    class Endless(Echo):
        def step(self, state, completion):
            return "9", 1.0

    trainer = ppo_trainer(options, Endless(), bootstrap_truncated=True)
    batch = trainer.generate_and_score(trainer.prompts(0), 0)
    critic = critic_params(trainer.state.value.params, trainer.frozen, trainer.spec.trunk)
    critic = jax.tree.map(jnp.copy, critic)  # an update donates its state
    experience, _ = trainer.learn(batch.rollout, batch.scored.scores, 0, batch.scored.token_scores)
    rollout = on_host(batch.rollout)
    assert not rollout.finished.any() and len({*rollout.mask.sum(axis=1).tolist()}) > 1
    for i in (0, 5):
        ids = jnp.asarray(rollout.tokens[i][rollout.mask[i]])[None]
        hidden = models.forward(critic, trainer.spec.critic, ids, jnp.ones(ids.shape, bool))
        expected = models.scalar_head(critic, trainer.spec.critic, hidden)[0, -1]
        np.testing.assert_allclose(experience.bootstrap[i], expected, atol=1e-5)
