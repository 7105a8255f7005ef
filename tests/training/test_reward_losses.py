"""Every loss of a reward model through the trainer's own update: neither padding nor micro-batches change it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import records
from support.tiny import tiny

from jaxrlhf import models, sharding, weights
from jaxrlhf.config import Mesh, Optim, RewardConfig, Train
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PairRow, SFTRow
from jaxrlhf.data.labelled import RankedRow
from jaxrlhf.errors import ConfigError, NumericsError
from jaxrlhf.plan.programs import abstract_trainer
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.reward import trainer as reward
from jaxrlhf.training.reward.loss import objective_of
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Spec

MODEL = tiny(head="linear", num_layers=1, sliding_layers=(False,))
MESH = sharding.make_mesh(Mesh())
OPTIMIZER = make_optimizer(Optim(learning_rate=1e-2, eps=1e-2), 1e-2, 10)
B = 4


def text(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 12))
    return SFTRow(rng.integers(0, 29, size).tolist(), [False, *[True] * (size - 1)])


def rows(loss):
    texts = [text(seed) for seed in range(4 * B)]
    if loss == "ranking":
        return [RankedRow(tuple(texts[4 * i : 4 * i + 2 + i % 3])) for i in range(B)], [0.0] * B
    if loss in ("classification", "regression"):
        target = [1.0, 0.0, 0.0, 1.0] if loss == "classification" else [0.3, -1.0, 2.0, 0.1]
        return texts[:B], target
    target = [0.0, 1.0, 1.0, 0.0] if loss == "ties" else [0.5, 0.0, 1.5, 0.2]
    return [PairRow(texts[2 * i], texts[2 * i + 1]) for i in range(B)], target


OPTIONS = {
    "pairwise": {"label_smoothing": 0.1, "margins": True, "center_rewards_coefficient": 0.2},
    "ties": {"nu": 0.3, "center_rewards_coefficient": 0.1},
    "ranking": {},
    "classification": {},
    "regression": {},
}


@pytest.mark.parametrize("loss", OPTIONS)
def test_padding_and_micro_batches_do_not_change_an_update(loss):
    made, target = rows(loss)
    group = max(len(batching.texts(row)) for row in made)
    params = jax.tree.map(lambda x: 5 * x, models.init(MODEL, jax.random.key(0)))
    objective, found = objective_of(RewardConfig(loss=loss, **OPTIONS[loss])), []
    for width, number, num_micro in ((12, group, 1), (16, group + 1, 2)):
        number = number if loss == "ranking" else group  # only there may responses be missing
        batch = jax.tree.map(jnp.asarray, batching.responses(made, target, 3, width, number))
        state = State({"reward": jax.tree.map(jnp.copy, params)}, {"reward": OPTIMIZER}, MESH).value
        spec = Spec(MODEL, OPTIMIZER, num_micro, MESH, objective)
        found.append(reward.update(state, {}, batch, jax.random.key(0), spec=spec))
    (state, metrics), *others = found
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 1e-3
    assert any(np.abs(new - old).max() > 1e-4 for new, old in zip(
        jax.tree.leaves(state.params["reward"]), jax.tree.leaves(params), strict=True))  # fmt: skip
    for other, logged in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other.params, state.params)
        assert {k: float(v) for k, v in logged.items()} == pytest.approx(
            {k: float(v) for k, v in metrics.items()}, rel=2e-5, abs=1e-6
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"nu": 0.0}, "greater than 0"),
        ({"loss": "ties", "label_smoothing": 0.1}, "label_smoothing .* has no meaning with loss: ties"),
        ({"loss": "ranking", "center_rewards_coefficient": 0.1}, "only with pairwise or ties"),
        ({"loss": "pairwise", "nu": 0.2}, "nu .* only with ties"),
        ({"loss": "ties", "train": Train(packing=True)}, "loss is ties: a packed row keeps"),
        ({"margins": True, "train": Train(packing=True)}, "margins is true: a packed row"),
    ],
)
def test_what_does_not_go_together_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RewardConfig(**options)


def written(path, loss):
    """Rows that any reader of an `!` can tell apart."""
    good = [f"say {i} so!" for i in range(8)]
    bad = [f"say {i} no {'o' * (i % 3)}" for i in range(8)]
    if loss == "ranking":
        made = [{"prompt": "q", "responses": [a, b, b + " x"][: 2 + i % 2]}
                for i, (a, b) in enumerate(zip(good, bad, strict=True))]  # fmt: skip
    else:
        made = [{"prompt": "q", "completion": text, "label": mark} for texts, mark in
                ((good, True), (bad, False)) for text in texts]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.mark.parametrize("loss", ["ranking", "classification"])
def test_each_kind_of_row_trains_and_is_evaluated(supervised, tmp_path, loss):
    file = written(tmp_path / "rows.jsonl", loss)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(pathlib.Path(file).read_text().replace('"prompt": "q"', '"prompt": "r"'))
    data = {"data": {"path": file, "validation_path": str(held_out), "max_length": 48}}
    metric = "eval/auc" if loss == "classification" else "eval/ece"
    train = {"train": Train(num_train_epochs=6, batch_size=8, eval_batch_size=8, metric=metric)}
    config = RewardConfig(run_dir=str(tmp_path / "run"), loss=loss, **supervised | data | train)
    trainer = RewardTrainer(config)
    result = trainer.train()
    made = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    logged = [record[metric] for record in records(tmp_path / "run") if metric in record]
    best = max(logged) if loss == "classification" else min(logged)
    assert result[metric] == pytest.approx(best) == made[metric.removeprefix("eval/")]
    assert made["auc" if loss == "classification" else "accuracy"] >= 0.75
    model, params = weights.load(tmp_path / "run")
    labels = 2 if loss == "classification" else 1
    trained = trainer.params["score"]["kernel"]
    assert (model.num_labels, params["score"]["kernel"].shape[1]) == (labels, labels)
    np.testing.assert_array_equal(params["score"]["kernel"][:, -1:], trained)


def test_held_out_scores_that_are_not_finite_stop_the_run(supervised, tmp_path, monkeypatch):
    trainer = abstract_trainer(RewardConfig(run_dir=str(tmp_path / "run"), **supervised))
    monkeypatch.setattr(RewardTrainer, "params", {})
    monkeypatch.setattr(reward, "evaluate", lambda params, batch, *, model: np.where(batch.real, np.inf, 0))
    with pytest.raises(NumericsError, match="scores of held-out rows are not finite; start over with --fresh"):
        trainer._evaluate()


def test_a_metric_that_no_evaluation_gives_is_refused(supervised, tmp_path):
    def trainer(metric, **data):
        train = Train(batch_size=6, metric=metric)
        parts = supervised | {"train": train, "data": data if data else supervised["data"]}
        return abstract_trainer(RewardConfig(run_dir=str(tmp_path / "run"), **parts))

    with pytest.raises(ConfigError, match=r"gives 'eval/acuracy'; did you mean 'eval/accuracy'"):
        trainer("eval/acuracy")
    with pytest.raises(ConfigError, match="'eval/ece' but there are no held-out rows"):
        trainer("eval/ece", path=supervised["data"].path)
