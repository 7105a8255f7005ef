"""Distillation runs: the loss of chunks, learning, resuming, prompts alone, meshes, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, records
from support.traced import largest_array

import jaxrlhf
from jaxrlhf import config, plan, runtime, weights
from jaxrlhf.algorithms.distillation import token_divergences
from jaxrlhf.errors import ConfigError, DataError, Preempted
from jaxrlhf.models import forward, init, lm_logits
from jaxrlhf.training.distill.trainer import DistillTrainer
from jaxrlhf.training.distill.update import Objective, loss, update
from jaxrlhf.training.divergence import Predictor, divergence_sums
from jaxrlhf.training.step import gradients
from jaxrlhf.types import Batch


@pytest.fixture
def distill(supervised, teacher):
    return supervised | {
        "teacher": config.Teacher(path=str(teacher)),
        "train": config.Train(
            max_steps=12, num_train_epochs=20, batch_size=6, micro_batch_size=3, eval_batch_size=4, eval_every=3
        ),
        "optim": config.Optim(learning_rate=2e-2),
        "sampling": config.Sampling(response_length=8),
    }


def test_the_loss_of_chunks_is_that_of_whole_logits_whatever_the_padding_and_micro_batches(
    tiny_model, teacher, monkeypatch
):
    model, params = jaxrlhf.load(tiny_model, init="random", key=jax.random.key(1))
    large, frozen = jaxrlhf.load(teacher)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(4, 40, (4, 11)), jnp.int32)
    mask = jnp.arange(11) < jnp.array([[11], [9], [10], [7]])
    loss_mask = mask & (jnp.arange(11) >= jnp.array([[4], [3], [1], [5]]))
    objective = Objective(config.Distill(beta=0.3, temperature=0.8), large)
    count = jnp.sum(loss_mask)

    def whole(params):
        ours, theirs = (
            lm_logits(p, m, forward(p, m, tokens, mask))[:, :-1] for p, m in ((params, model), (frozen, large))
        )
        found = token_divergences(ours, theirs, 0.3, 0.8)
        return jnp.sum(jnp.where(loss_mask[:, 1:], found["loss"], 0)) / count

    expected, gradient = jax.value_and_grad(whole)(params)
    monkeypatch.setattr(runtime, "logits_alive", lambda _: 4 * model.vocab_size * 3)  # 3 of 10 columns at a time

    def summed(params, rows):
        return loss(params, frozen, rows, None, model=model, objective=objective, count=count)

    def padded(left, right):
        def pad(x):
            return jnp.pad(jnp.asarray(x), [(0, 0), (left, right)])

        return Batch(pad(tokens), pad(mask), pad(loss_mask))

    for batch, parts in ((padded(0, 0), 1), (padded(5, 0), 1), (padded(2, 3), 2)):
        grads, metrics = jax.jit(lambda p, b, parts=parts: gradients(summed, p, b, parts))(params, batch)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), grads, gradient)


def test_logits_of_the_whole_batch_never_exist(tiny_model):
    rows, columns, size = 8, 512, 50_304
    model = dataclasses.replace(weights.load_config(tiny_model), vocab_size=size)
    params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    hidden = jax.ShapeDtypeStruct((rows, columns, model.hidden_size), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, columns), jnp.bool_)

    def total(params, teacher, hidden, mask):
        return divergence_sums(Predictor(params, model, hidden), Predictor(teacher, model, hidden), mask, 0.5, 1.0)[
            "loss"
        ]

    made = largest_array(jax.make_jaxpr(jax.grad(total))(params, params, hidden, mask).jaxpr)
    assert made <= 4 * size * model.hidden_size, "the gradient of the embedding is the largest array"
    assert made < 4 * rows * columns * size / 100


def test_a_student_comes_near_its_teacher_and_a_stopped_run_goes_on_bit_for_bit(distill, tmp_path, request):
    """On completions of the data and of its own in turns."""

    def make(name):
        return DistillTrainer(config.DistillConfig(run_dir=str(tmp_path / name), **distill))

    whole = make("whole")
    about = whole.describe()
    assert "teacher " in about and "first prompt:" in about and "its completion:" in about
    start = whole._evaluate()
    end = whole.train()
    log = records(tmp_path / "whole")
    assert {record["distill/on_policy"] for record in log} == {0.0, 1.0}
    assert end["eval/loss"] < 0.8 * start["eval/loss"]
    assert end["eval/distill/reverse_kl"] < start["eval/distill/reverse_kl"]
    request.getfixturevalue("stop_at_two")
    stopped = make("parts")
    with pytest.raises(Preempted, match="after step 2"):
        stopped.train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == log
    equal(resumed.state.value, whole.state.value)
    exported = jaxrlhf.load(tmp_path / "whole")[1]
    equal(exported, jax.device_get(whole.params))
    assert "distillation from a teacher" in (tmp_path / "whole" / "export" / "README.md").read_text()


def test_adapters_learn_from_a_quantised_teacher_on_prompts_alone(distill, on_disk, rows, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines))
    options = distill | on_disk | {
        "data": config.Data(path=str(prompts), validation_fraction=0.25),
        "distill": config.Distill(lmbda=1.0, beta=1.0),
        "teacher": config.replace(distill["teacher"], quantize="int8"),
        "train": config.replace(distill["train"], max_steps=2),
    }  # fmt: skip
    trainer = DistillTrainer(config.DistillConfig(run_dir=str(tmp_path / "run"), **options))
    base = jax.device_get(trainer.frozen)
    assert "codes" in trainer.teacher["layers"]["mlp"]["up"]
    trainer.train()
    log = records(tmp_path / "run")
    assert [record["distill/on_policy"] for record in log] == [1, 1]
    assert log[0]["loss"] == log[0]["distill/reverse_kl"] and log[-1]["eval/loss"] > 0
    assert 1 <= log[0]["tokens/mean_length"] <= 8
    equal(trainer.frozen, base)
    assert (tmp_path / "run" / "export" / "adapter_config.json").is_file()


def test_a_run_on_eight_devices_is_that_on_one(distill, teacher):
    options = distill | {
        "optim": config.Optim(learning_rate=1e-2, eps=1e-3),
        "distill": config.Distill(lmbda=1.0),
        "train": config.Train(max_steps=1, batch_size=8, eval_batch_size=8),
        "data": config.replace(distill["data"], validation_fraction=0.0),
    }
    results = []
    for mesh in (config.Mesh(), config.Mesh(data=2, fsdp=2, tensor=2)):
        trainer = DistillTrainer(config.DistillConfig(mesh=mesh, **options))
        batch, _ = trainer.batch(0)
        state, metrics = update(
            trainer.state.value, trainer.frozen, trainer.teacher, batch, trainer.key, spec=trainer.spec
        )
        results.append(jax.device_get((batch, metrics["loss"], state.params)))
    (batch, value, params), (there, other, after) = results
    equal(batch, there)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), after, params)


def test_a_plan_knows_the_teacher(distill):
    made = plan.plan(config.DistillConfig(**distill))
    update = next(phase for phase in made.phases if phase.name == "update")
    with_teacher = update.bytes["frozen models"]
    assert with_teacher > 4 * 48 * 48 * 3 and {phase.name for phase in made.phases} >= {"rollout", "evaluation"}


def test_what_cannot_be_distilled_is_refused(distill, tiny_model, teacher, tmp_path):
    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            DistillTrainer(config.DistillConfig(**distill | changes))

    other = shutil.copytree(teacher, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    named = config.Teacher(path=str(other))
    refused(
        ConfigError, "another vocabulary .*2 of 47 tokens differ, the first is 4: 'b' there, 'a' here", teacher=named
    )
    refused(ConfigError, "teacher.path is empty", teacher=config.Teacher())
    long = config.Sampling(response_length=60)
    refused(ConfigError, "context", sampling=long)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a story"}\n' * 8)
    refused(
        DataError, "8 rows are whole texts without a prompt, and distill.lmbda is 0.5", data=config.Data(path=str(text))
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a question"}\n' * 8)
    refused(DataError, "for prompts alone set distill.lmbda to 1", data=config.Data(path=str(prompts)))
    with pytest.raises(ConfigError, match="does not pack rows"):
        config.DistillConfig(train=config.Train(packing=True))
    with pytest.raises(ConfigError, match="rollout.devices is 1, which is for PPO and GRPO"):
        config.DistillConfig(rollout=config.Generation(devices=1))
