"""The equations on what TRL computed with them (tests/support/recorded.py), ragged batches included.

Where TRL is wrong, the test names the thread and asserts both numbers.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from support import recorded
from support.tiny import tiny

from jaxrlhf.algorithms import masked, ppo
from jaxrlhf.algorithms.advantages import gae, whiten
from jaxrlhf.algorithms.kl import k1, k3
from jaxrlhf.logprobs import token_logprobs

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
WITH_EPOCHS = ["full", "ragged", "ragged-whitened", "ragged-undiscounted"]


def clip(cliprange):
    """TRL has the plain clip alone."""
    return ppo.Clip(cliprange, cliprange, None, 20.0)


def arrays(case, *names):
    return tuple(jnp.asarray(case[name]) for name in names)


def test_log_probs_and_entropies():
    case = recorded.load("functions")
    vocabulary = case["logits"].shape[-1]
    model = tiny(vocab_size=vocabulary, hidden_size=vocabulary, tie_embeddings=False)
    head = {"lm_head": {"kernel": jnp.eye(vocabulary)}}  # hidden states are the logits
    ours = token_logprobs(head, model, *arrays(case, "logits", "tokens"), 1.0)
    close(ours[0], case["logprobs"])
    close(ours[1], case["entropies"])


def test_sums_under_a_ragged_mask():
    case = recorded.load("functions")
    mask = jnp.asarray(case["tokens"] != 0)
    assert not mask.all() and mask[:, 0].all()
    values = jnp.asarray(case["values"])
    count = mask.sum()
    mean = masked.total(values, mask) / count
    close(mean, case["masked_mean"])
    close(masked.total(jnp.square(values - mean), mask) / (count - 1), case["masked_var"])
    np.testing.assert_array_equal(np.argmax(masked.last(mask), axis=1), case["first_pad"] - 1)
    for name, shift_mean in (("whitened", True), ("whitened-mean-kept", False)):
        close(np.asarray(whiten(values, mask, shift_mean))[mask], case[name][mask], err_msg=name)


def paid(case, at):
    """The scores, in column `at` of each row."""
    return np.where(np.arange(case.width) == at[:, None], case["scores"][:, None], 0)


def column_of_trl(case):
    """Where TRL pays the score: on the first padding (trl#3750), or the last token where there is none."""
    return np.minimum(case["response_lengths"], case.width - 1)


@pytest.mark.parametrize(("name", "estimator"), [("full", k1), ("ragged", k1), ("k3", k3)])
def test_kl_penalties(name, estimator):
    case = recorded.load(name)
    penalty = case["rewards"] - paid(case, column_of_trl(case))
    kl = np.asarray(estimator(*arrays(case, "logprobs", "ref_logprobs")))
    assert np.abs(kl[case.mask]).min() > 1e-6
    close(penalty, -case.settings["kl_coef"] * kl)
    close(np.where(case.mask, kl, 0).sum(1).mean(), case["metric/objective/kl"])


def test_the_score_is_paid_on_the_last_token():
    """trl#3750: TRL pays it on the first padding."""
    for name in ("full", "ragged"):
        case = recorded.load(name)
        scores, old, reference = arrays(case, "scores", "logprobs", "ref_logprobs")
        ours = ppo.token_rewards(scores, old, reference, jnp.asarray(case.mask), case.settings["kl_coef"])
        last = case["response_lengths"] - 1
        close(ours - paid(case, last), case["rewards"] - paid(case, column_of_trl(case)))
        late = column_of_trl(case) - last
        assert late.any() == (name == "ragged")


@pytest.mark.parametrize("name", WITH_EPOCHS)
def test_advantages_and_returns_on_the_episodes_of_trl(name):
    case = recorded.load(name)
    gamma, lam = case.settings["gamma"], case.settings["lam"]
    longer = jnp.asarray(case.longer_mask)
    ours, returns = gae(*arrays(case, "rewards", "values"), longer, jnp.zeros(len(longer)), gamma, lam)
    close(np.asarray(returns)[longer], case["returns"][longer])
    close(whiten(ours, jnp.asarray(case.mask), shift_mean=True), case["advantages"])


@pytest.mark.parametrize("name", ["full-whitened", "ragged-whitened"])
def test_whitened_rewards_on_the_episodes_of_trl(name):
    """TRL counts the padding on which it pays (trl#3750) among the tokens, which scales ragged rewards otherwise."""
    case = recorded.load(name)
    penalty = -case.settings["kl_coef"] * (case["logprobs"] - case["ref_logprobs"])
    theirs = jnp.asarray(penalty + paid(case, column_of_trl(case)))
    close(whiten(theirs, jnp.asarray(case.longer_mask), shift_mean=False), case["rewards"])
    right = jnp.asarray(penalty + paid(case, case["response_lengths"] - 1))
    ours = whiten(right, jnp.asarray(case.mask), shift_mean=False)
    before = case.mask & (np.arange(case.width) < case["response_lengths"][:, None] - 1)  # there both were the penalty
    difference = np.abs(ours - case["rewards"])[before]
    if name == "full-whitened":
        assert difference.max() < 1e-5
    else:
        assert difference.min() > 0.02


def losses(case, epoch, mask):
    """(policy loss, value loss, metrics of both) of what the models said at the start of an epoch."""
    rows, settings, where = case["rows"][epoch, 0], case.settings, jnp.asarray(mask)[case["rows"][epoch, 0]]
    old, old_values, advantages, returns = (
        x[rows] for x in arrays(case, "logprobs", "values", "advantages", "returns")
    )
    new, values = jnp.asarray(case["new_logprobs"][epoch]), jnp.asarray(case["new_values"][epoch])
    count = where.sum()
    policy, about = ppo.policy_loss(new, old, advantages, where, count, clip(settings["cliprange"]))
    value, more = ppo.value_loss(values, old_values, returns, where, count, settings["cliprange_value"])
    return policy, value, ppo.finalize_metrics(about) | more


@pytest.mark.parametrize("name", WITH_EPOCHS)
def test_losses_and_clip_fractions(name):
    """The value loss of TRL is over its episodes, with one column of padding (trl#3750)."""
    case = recorded.load(name)
    epochs = range(case.settings["num_ppo_epochs"])
    on_tokens, on_longer = ([losses(case, e, m) for e in epochs] for m in (case.mask, case.longer_mask))
    close([policy for policy, *_ in on_tokens], case["loss/policy"][:, 0])
    close([value for _, value, _ in on_longer], case["loss/value"][:, 0])
    clipped = np.mean([metrics["policy/clipfrac_avg"] for *_, metrics in on_tokens])
    assert 0.2 < clipped < 0.8
    close(clipped, case["metric/policy/clipfrac_avg"])
    clipped = np.mean([metrics["val/clipfrac_avg"] for *_, metrics in on_longer])
    assert 0.2 < clipped < 0.8
    close(clipped, case["metric/val/clipfrac_avg"])
    if name != "full":
        different = [value for _, value, _ in on_tokens]
        assert np.abs(np.divide(different, case["loss/value"][:, 0]) - 1).min() > 0.01


@pytest.mark.parametrize("name", WITH_EPOCHS)
def test_diagnostics_are_of_tokens_alone(name):
    """trl#6809: approxkl, ratio and entropy of TRL are means over the padding too."""
    case = recorded.load(name)
    epochs = range(case.settings["num_ppo_epochs"])
    ours = [metrics for *_, metrics in (losses(case, e, case.mask) for e in epochs)]
    share = case.mask.mean()  # the others are padding: log-ratio 0, ratio 1
    assert (share == 1) == (name == "full")
    approxkl = np.mean([metrics["policy/approxkl_avg"] for metrics in ours])
    close(case["metric/policy/approxkl_avg"], approxkl * share)
    ratio = np.mean([metrics["val/ratio"] for metrics in ours])
    close(case["metric/val/ratio"], ratio * share + (1 - share))
    close(case["metric/policy/entropy_avg"], case["entropies"].mean())
    # another quantity under the same name: TRL's variance is that of the means of forwards
    log_ratios = case["new_logprobs"] - np.stack([case["logprobs"][rows] for rows in case["rows"][:, 0]])
    close(case["metric/val/ratio_var"], np.exp(log_ratios).mean((1, 2)).var(ddof=1), rtol=1e-4)
    masks = np.stack([case.mask[rows] for rows in case["rows"][:, 0]])
    of_tokens = [np.exp(x[mask]).var() for x, mask in zip(log_ratios, masks, strict=True)]
    close([metrics["val/ratio_var"] for metrics in ours], of_tokens, rtol=1e-4)


def test_the_entropy_of_a_rollout_counts_no_padding():
    """trl#2022: TRL estimates it by -log p of the tokens, and takes 1 away for every padding."""
    for name in ("full", "ragged"):
        case = recorded.load(name)
        estimate = -np.where(case.mask, case["logprobs"], 0).sum(1).mean()
        padding = (~case.mask).sum(1).mean()
        close(case["metric/objective/entropy"], estimate - padding)
        assert padding == (0 if name == "full" else 2.625)


def test_micro_batches_are_weighed_by_their_tokens():
    """TRL takes the mean of each micro-batch and the mean of those (trl#7012)."""
    case = recorded.load("micro-batches")
    rows, cliprange = case["rows"][0], case.settings["cliprange"]
    masks = jnp.asarray(case.mask)[rows]
    ours, theirs = [], []
    for chosen, mask in zip(rows, masks, strict=True):
        new, advantages = jnp.asarray(case["logprobs"][chosen]), jnp.asarray(case["advantages"][chosen])
        for sums, count in ((theirs, mask.sum()), (ours, masks.sum())):
            sums.append(ppo.policy_loss(new, new, advantages, mask, count, clip(cliprange))[0])
    assert masks[0].sum() != masks[1].sum()
    close(theirs, case["loss/policy"][0])
    close(np.mean(theirs), case["metric/loss/policy_avg"])
    # ratios are 1 and advantages have mean 0, so that nothing else is right
    close(sum(ours), 0, atol=1e-6)
    assert abs(np.mean(theirs)) > 0.03
