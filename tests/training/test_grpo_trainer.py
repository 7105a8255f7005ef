"""GRPO runs: resuming with refills, the greedy baseline of ReMax, exports, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, length_reward, records

import jaxrlhf
from jaxrlhf import config, models, plan
from jaxrlhf.cli import models as commands_models
from jaxrlhf.errors import ConfigError, Preempted
from jaxrlhf.training.export import export
from jaxrlhf.training.grpo import rollouts
from jaxrlhf.training.grpo.trainer import GRPOTrainer


@pytest.fixture
def grpo(parts):
    return parts | {
        "grpo": config.GRPO(method="dapo", batch_size=8, num_generations=2, total_episodes=32, num_mini_batches=2),
        "sampling": config.Sampling(response_length=8),
        "data": config.replace(parts["data"], validation_fraction=0.0),
    }


def coarse(prompts, completions, **columns):
    """Few values, so that many groups are flat."""
    return [float(len(text) > 6) for text in completions]


def test_a_stopped_run_with_refills_goes_on_bit_for_bit_and_is_exported(grpo, tmp_path, request):
    options = grpo | {"data": config.replace(grpo["data"], validation_fraction=0.25)}
    options |= {"validation": config.Validation(eval_steps=2, max_prompts=4)}

    def make(name):
        return GRPOTrainer(config.GRPOConfig(run_dir=str(tmp_path / name), **options), reward=coarse)

    whole = make("whole")
    whole.train()
    request.getfixturevalue("stop_at_two")
    stopped = make("parts")
    with pytest.raises(Preempted, match="after step 2"):
        stopped.train()
    assert list(stopped.frozen) == ["policy"], "there is no KL, so no reference"
    assert export(tmp_path / "parts", tmp_path / "exported") == tmp_path / "exported"
    assert commands_models.overrides_from_run(str(tmp_path / "parts"), "sampling"), (
        "generate and evaluate sample as it did"
    )
    resumed = make("parts")
    resumed.train()
    log = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == log
    equal(jax.device_get(resumed.state.value), jax.device_get(whole.state.value))
    assert sum(record["groups/replaced"] for record in log) > 0, "there were flat groups, and others"
    assert all(0 <= record["groups/refills"] <= 3 for record in log) and "eval/kl" not in log[-1]
    size = whole.config.grpo.batch_size
    for record in log:
        rollouts, least = 1 + record["groups/refills"], size * record["tokens/min_length"]
        assert record["tokens/generated"] >= rollouts * least and record["tokens/generated"] % 1 == 0
        if rollouts == 1:
            assert record["tokens/generated"] == pytest.approx(size * record["tokens/mean_length"])
    assert jaxrlhf.load(tmp_path / "exported")[0].vocab_size == whole.model.vocab_size


def test_a_stopped_run_with_decoupled_rewards_and_entropy_control_goes_on_bit_for_bit(grpo, tmp_path, request):
    (tmp_path / "reward.py").write_text(
        "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n\n"
        "def short(prompts, completions):\n    return [float(len(text) < 6) for text in completions]\n"
    )
    names = {"length": 1.0, "short": 0.5, "unused": 0.0}
    components = tuple(
        config.Component(
            name=name, function=f"{tmp_path / 'reward.py'}:{name.replace('unused', 'short')}", weight=weight
        )
        for name, weight in names.items()
    )
    method = config.replace(
        grpo["grpo"],
        method="gdpo",
        kl_coef=0.0,
        entropy_target=10.0,
        entropy_coef=0.01,
        mask_truncated_completions=True,
    )
    options = grpo | {"reward": config.RewardSource(components=components), "grpo": method}
    made = plan.plan(config.GRPOConfig(**options))
    assert [phase.name for phase in made.phases] == ["copy for decoding", "rollout", "annotation", "update"]

    def make(name):
        return GRPOTrainer(config.GRPOConfig(run_dir=str(tmp_path / name), **options))

    whole = make("whole")
    assert whole.spec.reward_weights == (1.0, 0.5)
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    log = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == log
    equal(jax.device_get(resumed.state.value), jax.device_get(whole.state.value))
    coefs = [record["policy/entropy_coef"] for record in log]
    np.testing.assert_allclose(coefs, [0, 0.015, 0.02, 0.025], rtol=1e-5)
    assert all("tokens/masked" in record for record in log)


def test_a_refill_replaces_whole_zero_variance_groups_and_no_others(grpo):
    trainer = GRPOTrainer(config.GRPOConfig(**grpo), reward=coarse)
    rows = trainer.prompts(0)
    plain = trainer.generate_and_score(rows, 0)
    filled = rollouts.rollout_with_refills(trainer, rows, 0, None, 3)
    before, after = (set(rollouts.zero_variance_groups(answers, 2).tolist()) for answers in (plain, filled))
    assert before and after < before
    assert filled.metrics["groups/replaced"] == len(before) - len(after)
    masks = [np.asarray(answers.rollout.response_mask).sum(1) for answers in (plain, filled)]
    for group in range(4):
        rows = slice(2 * group, 2 * group + 2)
        assert (filled.completions[rows] == plain.completions[rows]) == (group not in before - after)
        assert len({row.index for row in filled.rows[rows]}) == 1, "one prompt"
        index, sample = (np.asarray(x)[rows].tolist() for x in (filled.rollout.index, filled.rollout.sample))
        assert index == [row.index for row in filled.rows[rows]] and sample == [0, 1]
        assert filled.scored.totals[rows].tolist() == coarse([], filled.completions[rows])
        assert group in before - after or (masks[0][rows] == masks[1][rows]).all()
    said = [filled.completions[i] for i in range(8)]
    real = np.asarray(filled.rollout.tokens[:, -filled.rollout.response_mask.shape[1] :])
    decoded = [
        trainer.tokenizer.decode(tokens[mask].tolist(), after=row.tokens)
        for tokens, mask, row in zip(real, np.asarray(filled.rollout.response_mask), filled.rows, strict=True)
    ]
    assert decoded == said, "text and tokens are of the same response"
    silent = np.isin(np.arange(8), [0, 1, 3])
    some = plain._replace(scored=plain.scored._replace(scores=np.where(silent, np.nan, np.arange(8.0))))
    assert rollouts.zero_variance_groups(some, 2).tolist() == [0, 1], "of a group of two, one is nothing to compare"


def test_the_baseline_of_remax_is_the_greedy_response(grpo):
    """Every token of it is the likeliest by the model's own forward pass, and it is scored and shaped like the rest."""
    remax = config.GRPO(method="remax", batch_size=8, num_generations=2)
    scores = config.Scores(missing_eos_penalty=1.0)
    trainer = GRPOTrainer(config.GRPOConfig(**grpo | {"grpo": remax, "scores": scores}), reward=length_reward)
    answers = rollouts.rollout_with_greedy(trainer, trainer.prompts(0), 0, None)
    greedy, worth = answers.greedy
    length = greedy.response_mask.shape[1]
    hidden = models.forward(trainer.params, trainer.model, greedy.tokens, greedy.mask)[:, -length - 1 : -1]
    likeliest = jnp.argmax(models.lm_logits(trainer.params, trainer.model, hidden), axis=-1)
    assert np.all((likeliest == greedy.tokens[:, -length:]) | ~greedy.response_mask)
    np.testing.assert_array_equal(greedy.index, [row.index for row in answers.rows])
    compared, metrics = trainer.learn(answers.rollout, answers.scored.totals, 0, answers.greedy)
    shaped = [np.asarray(s) - np.where(r.finished, 0.0, 1.0) for r, s in
              ((answers.rollout, answers.scored.totals), (greedy, worth))]  # fmt: skip
    expected = np.where(answers.rollout.response_mask, (shaped[0] - shaped[1])[:, None], 0)
    np.testing.assert_allclose(compared.advantages, expected, atol=1e-6)
    assert np.isfinite(metrics["loss/policy_avg"])
    worth = np.where(np.arange(8) < 2, np.nan, worth)  # no baseline, so no advantage
    compared, metrics = trainer.learn(answers.rollout, answers.scored.totals, 1, (greedy, worth))
    expected[:2] = 0
    np.testing.assert_allclose(compared.advantages, expected, atol=1e-6)
    assert metrics["objective/unscored"] == 0.25


def test_grpo_step_returns_completions_scores_and_metrics(grpo):
    """With a reference, which here is what lies under the adapters: there is no second copy."""
    options = {"grpo": config.GRPO(batch_size=4, num_generations=2), "lora": config.LoRA(enabled=True, rank=2)}
    trainer = GRPOTrainer(config.GRPOConfig(**grpo | options | {"data": config.Data()}), reward=length_reward)
    assert trainer.frozen["reference"] is trainer.frozen["policy"]
    result = trainer.grpo_step(["say red ", "say blue "])
    assert len(result["generated_texts"]) == len(result["rewards"]) == 4
    assert result["objective/kl"] == 0 and result["groups/count"] == 2 and trainer.state.value.step == 1
    assert len(set(result["generated_texts"])) > 2, "samples of a prompt differ"
    with pytest.raises(ConfigError, match="grpo_step got one text"):
        trainer.grpo_step("say red ")


def test_online_dpo_pushes_a_text_away_with_one_response_to_a_prompt_and_no_reward(grpo):
    method = config.GRPO(method="online_dpo", batch_size=4, num_generations=1, rejected_text="no, no")
    sampling = config.Sampling(response_length=8, stop_strings=("a", "e", "i", "o", "u", "b", "c"))  # shorter than it
    optim = config.Optim(learning_rate=1e-2, schedule="constant")
    options = grpo | {"grpo": method, "sampling": sampling, "optim": optim, "data": config.Data()}
    trainer = GRPOTrainer(config.GRPOConfig(**options))
    assert len(trainer.spec.rejected) == 7 and "no reward: every response is preferred" in trainer.describe()
    first, second = (trainer.grpo_step(["say red ", "say blue ", "go ", "stop "]) for _ in range(2))
    assert first["groups/tied"] == 0 and abs(first["rewards/margins"]) < 1e-5
    assert second["rewards/rejected"] < 0 < second["rewards/margins"]
    assert second["rewards"] == [0.0] * 4 and second["objective/unscored"] == 0
    with pytest.raises(ConfigError, match="no reward: give reward.model"):
        GRPOTrainer(config.GRPOConfig(**options | {"grpo": config.replace(method, num_generations=2)}))
    with pytest.raises(ConfigError, match="a response may have from 1 to 4; change the text"):
        short = config.replace(sampling, response_length=4)
        GRPOTrainer(config.GRPOConfig(**options | {"sampling": short}), reward=length_reward)


def test_a_run_has_a_plan(grpo, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(prompts, completions):\n    return [0.0] * len(prompts)\n")
    reward = config.RewardSource(function=f"{tmp_path / 'reward.py'}:reward")
    made = plan.plan(config.GRPOConfig(**grpo | {"reward": reward}))
    assert [phase.name for phase in made.phases] == ["copy for decoding", "rollout", "annotation", "update"]
    assert made.peak.bytes["frozen models"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 1}, "nothing to learn; give 2 or more, or use remax or reinforce_pp"),
        ({"method": "online_dpo", "num_generations": 1}, "give 2 or more, or give grpo.rejected_text"),
        ({"batch_size": 9}, r"must be a multiple of grpo.num_generations \(2\); 8 would do"),
        ({"method": "cispo", "cliprange": 1.5}, "must be at most 1"),
        ({"method": "rloo", "num_mini_batches": 2}, "rloo has no ratio"),
        ({"method": "gpg", "cliprange_high": 0.3, "num_mini_batches": 1}, "gpg clips no ratio"),
        ({"method": "sapo", "cliprange": 0.1}, "sapo clips no ratio"),
        ({"sapo_temperature_neg": 2.0}, "does not use it; it is for sapo"),
        ({"method": "kl_cov", "clip_cov_low": 0.0}, "it is for clip_cov"),
        ({"method": "clip_cov", "clip_cov_low": 6.0}, r"must be below grpo.clip_cov_high \(5\)"),
        ({"method": "pass_at_k", "pass_k": 2}, "every subset of that size would have the same maximum"),
        ({"method": "gmpo", "top_entropy_quantile": 0.2}, "it is for methods other than gmpo"),
        ({"method": "online_dpo", "entropy_coef": 0.1}, "it is for methods other than online_dpo"),
        ({"entropy_coef_delta": 0.1}, "without grpo.entropy_target"),
        ({"entropy_target": 0.3, "entropy_coef": 2.0}, r"must be between grpo.entropy_coef_min \(0\)"),
        ({"method": "kl_cov", "top_entropy_quantile": 0.0}, "top_entropy_quantile"),
        ({"sampler_correction": "truncate", "sampler_floor": 0.5}, "has no lower bound; it is for mask"),
        ({"kl_estimator": "k1"}, "its expected gradient is zero"),
        ({"method": "dr_grpo", "kl_estimator": "k2"}, "has no KL to estimate; give a grpo.kl_coef, or leave it out"),
        ({"method": "rloo", "kl_estimator": "k3", "num_mini_batches": 1}, "the part that flows through the estimate"),
        ({"method": "remax", "max_refills": 1, "num_mini_batches": 1}, "compares no groups; set it to 0"),
        ({"method": "online_dpo", "sampler_correction": "mask"}, "no importance weights"),
        ({"rejected_text": "no"}, "does not use it; it is for online_dpo"),
        ({"beta": 0.2}, "it is for online_dpo; the KL penalty coefficient is grpo.kl_coef"),
        ({"dpo_loss": "ipo"}, "grpo.dpo_loss is set"),
        ({"method": "online_dpo", "num_mini_batches": 3}, "must divide the pairs of a batch"),
        ({"method": "online_dpo", "kl_coef": 0.1}, "grpo.beta is its own"),
        ({"gamma": 0.9}, "all tokens of a response have one advantage; leave it out, or use reinforce_pp"),
        ({"micro_batch_size": 3}, r"grpo.micro_batch_size \(3\) must divide a mini-batch"),
    ],
)
def test_contradicting_options_are_refused_with_a_remedy(grpo, changes, said):
    with pytest.raises(ValueError, match=said):
        config.GRPOConfig(**grpo | {"grpo": config.replace(grpo["grpo"], **changes)})


def test_decoupling_a_single_reward_is_said_to_be_grpo(grpo):
    options = grpo | {"grpo": config.replace(grpo["grpo"], method="gdpo", kl_coef=0.0)}
    about = GRPOTrainer(config.GRPOConfig(**options), reward=coarse).summary()
    assert "the reward has one component" in about and "those of grpo, normalised over the batch" in about


def test_decoupled_rewards_refuse_what_shapes_their_sum(grpo):
    with pytest.raises(ValueError, match="make a penalty a component of reward.components"):
        config.GRPOConfig(
            **grpo | {"grpo": config.replace(grpo["grpo"], method="gdpo"), "scores": config.Scores(clip=1.0)}
        )


@pytest.mark.parametrize(
    ("section", "values"),
    [("reference", {"offload": True}), ("reference", {"sync_every": 2}), ("alarms", {"kl": 10.0})],
)
def test_options_of_a_reference_are_refused_without_one(grpo, section, values):
    kinds = {"reference": config.Reference, "alarms": config.Alarms}
    with pytest.raises(ValueError, match=f"{section}.* is set, and with a grpo.kl_coef of 0"):
        config.GRPOConfig(**grpo | {section: kinds[section](**values)})


def test_a_given_option_replaces_the_default_of_the_method():
    assert config.GRPO(method="dapo").clip == (0.2, 0.28) and config.GRPO(method="gspo").clip == (3e-4, 4e-4)
    assert config.GRPO(cliprange=0.1).clip == (0.1, 0.1) and config.GRPO(cliprange_high=0.3).clip == (0.2, 0.3)
    assert config.GRPO().kl_weight == 0.04 and not config.GRPO(kl_coef=0.0).has_reference
    assert config.GRPO(method="dapo").refills == 3 and config.GRPO(method="dapo", max_refills=0).refills == 0
