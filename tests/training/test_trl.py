"""A whole update against TRL's PPOTrainer (tests/support/recorded.py): the same models, tokens and settings, float32.

Where TRL is right, everything agrees: what it annotates, what it logs, the gradients and the parameters afterwards.
Where it is wrong, the test names the thread and asserts both numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import recorded

import jaxrlhf
from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import no_stats, shaped
from jaxrlhf.config import PPO, Mesh, Optim, Reference, Scores
from jaxrlhf.logprobs import last_token_scores
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo import update as ppo_update
from jaxrlhf.training.state import State
from jaxrlhf.types import Rollout

LOGGED = {
    "objective": ("kl", "non_score_reward", "rlhf_reward", "scores"),
    "policy": ("approxkl_avg", "clipfrac_avg", "entropy_avg"),
    "loss": ("policy_avg", "value_avg"),
    "val": ("clipfrac_avg", "ratio", "num_eos_tokens"),
}
EVERYTHING = [f"{group}/{name}" for group, names in LOGGED.items() for name in names]


def close(ours, theirs, name=""):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)


def model(name):
    return jaxrlhf.load(recorded.FIXTURES / "models" / name, dtype="float32", compute_dtype="float32")


def rollout_of(case):
    columns = np.arange(case["tokens"].shape[1] - case.width)
    prompt = columns >= len(columns) - case["prompt_lengths"][:, None]
    rows = len(prompt)
    return Rollout(
        tokens=jnp.asarray(case["tokens"]),
        mask=jnp.asarray(np.concatenate([prompt, case.mask], axis=1)),
        response_mask=jnp.asarray(case.mask),
        logprobs=jnp.zeros(case.mask.shape),
        finished=jnp.asarray(case["finished"]),
        index=jnp.arange(rows, dtype=jnp.int32),
        sample=jnp.zeros(rows, jnp.int32),
    )


@dataclasses.dataclass
class Ours:
    """What this library makes of a case."""

    experience: object
    metrics: dict
    steps: int  # of the optimizer
    changes: dict  # by role and name of the tensor: what the update added to it


def run(case, folder=None, **changes):
    """Annotates and updates; with a folder, the parameters go through an export there, for their names."""
    given = case.settings | changes
    shape = Scores(missing_eos_penalty=given.pop("missing_eos_penalty", 0.0))
    settings = PPO(batch_size=len(case.mask), **given)
    steps = settings.num_ppo_epochs * settings.num_mini_batches
    optim = case.about["optim"]
    optimizer = make_optimizer(
        Optim(schedule="constant", eps=optim["adam_epsilon"], max_grad_norm=1e9), optim["learning_rate"], steps
    )
    policy, params = model("llama")
    critic, critic_params = model("llama-score")
    mesh = sharding.make_mesh(Mesh())
    roles = ppo_update.PPOSpec(
        policy=policy,
        critic=critic,
        optimizers=(("policy", optimizer), ("critic", optimizer)),
        ppo=settings,
        temperature=case.temperature,
        trunk="own",
        mesh=mesh,
        reference=Reference(),
    )
    frozen = {"policy": {}, "reference": jax.tree.map(lambda x: case.about["reference"] * x, params), "critic": {}}
    begin = {"policy": params, "critic": critic_params}
    copies = jax.tree.map(jnp.copy, begin)
    state = State(copies, dict(roles.optimizers), mesh, settings.kl_coef).value
    rollout = rollout_of(case)
    scores, _ = shaped(
        jnp.asarray(case["raw_scores"]), rollout.response_mask, rollout.finished, no_stats(), config=shape, longest=99
    )
    experience, before = ppo_update.annotate(state, frozen, rollout, scores, spec=roles)
    state, after = ppo_update.update(state, frozen, experience, jax.random.key(0), spec=roles)
    added = {}
    for role, config in (("policy", policy), ("critic", critic)) if folder else ():
        difference = jax.tree.map(jnp.subtract, state.params[role], begin[role])
        exported = jaxrlhf.export(folder / role, config, difference)
        added |= {f"{role}/{name}": x for name, x in load_file(exported / "model.safetensors").items()}
    (steps,) = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32}
    return Ours(experience, before | after, steps, added)


def digest(x):
    """The norm, and the products with four fixed directions; as in the script."""
    flat = x.astype(np.float64).ravel()
    return np.array([np.linalg.norm(flat), *(flat @ np.cos((i + 1) * np.arange(flat.size)) for i in range(4))])


def same_changes(ours, case, role):
    theirs = case.group(f"change/{role}/")
    names = {name.removeprefix(f"{role}/") for name in ours.changes if name.startswith(role)}
    assert names == set(theirs)
    for name, expected in theirs.items():
        found = digest(ours.changes[f"{role}/{name}"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * expected[0], err_msg=name)


def test_scores_of_the_reward_model():
    for case in map(recorded.load, ("full", "ragged")):
        rollout = rollout_of(case)
        config, params = model("qwen2-score")
        close(last_token_scores(params, config, rollout.tokens, rollout.mask), case["raw_scores"])


@pytest.mark.parametrize("name", ["full", "full-whitened"])
def test_an_update_of_full_responses_is_that_of_trl(name, tmp_path):
    """Nothing is padded, so that its mistakes do not matter: three epochs, with clipped ratios and clipped values."""
    case = recorded.load(name)
    ours = run(case, tmp_path)
    close(ours.experience.old_logprobs, case["logprobs"])
    for field in ("scores", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        close(getattr(ours.experience, field), case[field], field)
    for metric in EVERYTHING:
        close(ours.metrics[metric], case[f"metric/{metric}"], metric)
    assert ours.metrics["policy/clipfrac_avg"] > 0.2 and ours.metrics["val/clipfrac_avg"] > 0.2
    for role in ("policy", "critic"):
        close(ours.metrics[f"{role}/grad_norm"], case[f"norm/{role}"].mean(), role)
        same_changes(ours, case, role)


def test_an_update_of_ragged_responses_changes_the_policy_as_trl_does_without_discounts(tmp_path):
    """With gamma = lam = 1 the extra step at which TRL pays the score (trl#3750) falls out of the advantages."""
    case = recorded.load("ragged-undiscounted")
    ours = run(case, tmp_path)
    mask = case.mask
    close(np.asarray(ours.experience.old_logprobs)[mask], case["logprobs"][mask])
    for field in ("ref_logprobs", "values", "advantages", "returns"):
        close(np.asarray(getattr(ours.experience, field))[mask], case[field][mask], field)
    close(ours.experience.scores, case["scores"])
    for metric in ("policy/clipfrac_avg", "loss/policy_avg", "val/num_eos_tokens"):
        close(ours.metrics[metric], case[f"metric/{metric}"], metric)
    for metric in LOGGED["objective"]:
        close(ours.metrics[f"objective/{metric}"], case[f"metric/objective/{metric}"], metric)
    close(ours.metrics["policy/grad_norm"], case["norm/policy"].mean())
    same_changes(ours, case, "policy")
    # trl#6809: the same policy, but three of its diagnostics are means over the padding too
    share = mask.mean()
    assert share < 0.7
    close(ours.metrics["policy/approxkl_avg"] * share, case["metric/policy/approxkl_avg"])
    close(ours.metrics["val/ratio"] * share + (1 - share), case["metric/val/ratio"])
    masks = mask[case["rows"][:, 0]]
    of_tokens = [entropies[real].mean() for entropies, real in zip(case["entropies"], masks, strict=True)]
    close(ours.metrics["policy/entropy_avg"], np.mean(of_tokens))
    assert abs(ours.metrics["policy/entropy_avg"] - case["metric/policy/entropy_avg"]) > 0.02


@pytest.mark.parametrize("name", ["full", "ragged"])
def test_the_entropy_of_a_rollout_is_exact(name):
    """trl#2022: TRL estimates it by -log p of the tokens and, where they are ragged, adds up padding too."""
    case = recorded.load(name)
    at_first = np.empty_like(case["entropies"][0])
    at_first[case["rows"][0, 0]] = case["entropies"][0]
    ours = run(case).metrics["objective/entropy"]
    close(ours, np.where(case.mask, at_first, 0).sum(1).mean())
    assert abs(ours - case["metric/objective/entropy"]) > 3


def test_with_discounts_where_the_score_is_paid_changes_advantages():
    """trl#3750: TRL pays on the first padding, so a discount too late; a response that fills its columns is exempt."""
    case = recorded.load("ragged")
    ours = run(case)
    lengths, scores = case["response_lengths"], case["scores"]
    rows = np.flatnonzero(lengths < case.width)
    last = lengths[rows] - 1
    kl = case["logprobs"] - case["ref_logprobs"]
    penalty = -case.settings["kl_coef"] * kl[rows, last]
    close(case["rewards"][rows, last], penalty)
    close(case["rewards"][rows, last + 1], scores[rows])
    close(np.asarray(ours.experience.rewards)[rows, last], penalty + scores[rows])
    gamma, lam = case.settings["gamma"], case.settings["lam"]
    values = case["values"]
    # returns - values: the advantage before whitening, here of the last token
    theirs = (case["returns"] - values)[rows, last]
    after = values[rows, last + 1]
    close(theirs, penalty + gamma * after - values[rows, last] + gamma * lam * (scores[rows] - after))
    right = penalty + scores[rows] - values[rows, last]
    close((ours.experience.returns - ours.experience.values)[rows, last], right)
    assert np.abs(theirs - right).min() > 0.02 and np.abs(theirs - right).max() > 0.5


def test_every_mini_batch_is_an_optimizer_step(tmp_path):
    """trl#5645: in TRL the mini-batches of an epoch share one step, and it trains as if there were one mini-batch."""
    case, full = recorded.load("mini-batches"), recorded.load("full")
    assert (case.settings["num_mini_batches"], full.settings["num_mini_batches"]) == (2, 1)
    assert len(case["norm/policy"]) == 3
    for name, expected in full.group("change/").items():
        np.testing.assert_allclose(case[f"change/{name}"], expected, rtol=0, atol=2e-4 * expected[0], err_msg=name)
    ours = run(case, tmp_path)
    assert ours.steps == 6
    for name, theirs in case.group("change/").items():
        assert np.abs(digest(ours.changes[name]) - theirs).max() > 0.05 * theirs[0], name
    # trl#7012: and half of the places for its statistics stay 0, so that it logs half of what it measured
    close(case["metric/loss/value_avg"], case["loss/value"].mean() / 2)
    close(case["loss/value"].mean(), full["metric/loss/value_avg"])


def test_the_penalty_for_a_missing_end_knows_every_stop_token():
    """trl#3750: TRL looks for EOS alone, so that with another stop token it fines every response."""
    case = recorded.load("stop-token")
    fine = case.settings["missing_eos_penalty"]
    assert fine and case["finished"].sum() == 7 and not case["finished"][1]
    ours = run(case, num_ppo_epochs=3)
    close(case["raw_scores"] - case["scores"], np.full(8, fine))
    close(case["raw_scores"] - ours.experience.scores, np.where(case["finished"], 0, fine))
    assert case["metric/val/num_eos_tokens"] == 0 and ours.metrics["val/num_eos_tokens"] == 7


def test_micro_batches_are_weighed_by_their_tokens():
    """TRL averages the means of micro-batches (trl#7012), so their size and make-up change its gradient."""
    case = recorded.load("micro-batches")
    whole, parts = run(case), run(case, micro_batch_size=4)
    assert not np.isclose(case["norm/policy"][0], recorded.load("ragged")["norm/policy"][0], rtol=0.01)
    close(parts.metrics["policy/grad_norm"], whole.metrics["policy/grad_norm"])
    # ratios are 1 and advantages have mean 0, and so has their sum over tokens, but not TRL's mean of means
    close(case["metric/loss/policy_avg"], case["loss/policy"].mean())
    assert abs(case["metric/loss/policy_avg"]) > 0.03
    for ours in (whole, parts):
        assert abs(ours.metrics["loss/policy_avg"]) < 1e-6
