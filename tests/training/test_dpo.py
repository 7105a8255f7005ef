"""The preference trainer as a user meets it: the first step, the reference and its file, runs, adapters, KTO."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.runs import equal, records

import jaxrlhf
from jaxrlhf import config
from jaxrlhf.data import kto
from jaxrlhf.data.datasets import SFTRow
from jaxrlhf.errors import ConfigError, DataError, NumericsError, Preempted
from jaxrlhf.plan.programs import abstract_trainer
from jaxrlhf.training.best import best_of
from jaxrlhf.training.dpo import reference
from jaxrlhf.training.dpo.trainer import DPOTrainer, read_rows
from jaxrlhf.training.dpo.update import beta_schedule, evaluation_keys
from jaxrlhf.training.export import export


def made(options, **changes):
    return DPOTrainer(config.DPOConfig(**options | changes))


def test_a_run_begins_at_its_reference_learns_and_goes_on_bit_for_bit(supervised, tmp_path, request, capsys):
    kept = {"dpo": config.DPO(reference_folder=str(tmp_path / "kept"), beta_schedule="linear", beta_final=0.2)}
    kept["logging"] = config.replace(supervised["logging"], quiet=False, log_every=100)
    whole = made(supervised | kept, run_dir=str(tmp_path / "whole"))
    assert "chosen: say red red" in whole.describe()
    before = jax.device_get(whole.params)
    result = whole.train()
    assert "log-probs of the reference: 18 and 6 rows, once" in capsys.readouterr().out
    log = records(tmp_path / "whole")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(log[0]["rewards/margins"]) < 1e-6 and log[2]["rewards/margins"] > 0.01
    assert result["eval/rewards/accuracies"] == 1 and log[-1]["loss"] < 0.5
    assert [round(record["beta"], 4) for record in log[::4]] == [0.1, 0.15, 0.2]
    assert (tmp_path / "whole" / "samples.jsonl").stat().st_size > 0
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        made(supervised | kept, run_dir=str(tmp_path / "parts")).train()
    resumed = made(supervised | kept, run_dir=str(tmp_path / "parts"))
    equal(resumed.state.params["policy"], before)
    resumed.train()
    assert "log-probs of the reference: 24 rows read from" in capsys.readouterr().out
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert records(tmp_path / "parts") == log
    equal(resumed.state.value, whole.state.value)


def test_a_running_mean_of_rewards_goes_on_bit_for_bit(supervised, tmp_path, request):
    """Several losses, with weights of pairs and of late tokens; the mean follows the rewards of the steps before."""
    settings = config.DPO(
        loss=("bco_pair", "sigmoid", "sft"), loss_weights=(1.0, 0.5, 0.1), use_weighting=True, ld_alpha=0.5
    )
    options = supervised | {"dpo": settings, "train": config.replace(supervised["train"], max_steps=4)}
    whole = made(options, run_dir=str(tmp_path / "whole"))
    result = whole.train()
    log = records(tmp_path / "whole")
    rewards = np.cumsum([0.5 * (record["rewards/chosen"] + record["rewards/rejected"]) for record in log])
    expected = [0.0, *rewards[:-1] / np.arange(1, 4)]
    np.testing.assert_allclose([record["rewards/baseline"] for record in log], expected, rtol=1e-4, atol=1e-7)
    assert abs(expected[-1]) > 1e-4 and "eval/pair_weights" in result
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        made(options, run_dir=str(tmp_path / "parts")).train()
    resumed = made(options, run_dir=str(tmp_path / "parts"))
    resumed.train()
    assert records(tmp_path / "parts") == log
    equal(resumed.state.value, whole.state.value)


def test_adapters_have_the_model_under_them_as_reference(supervised, on_disk, tmp_path):
    options = (
        supervised
        | on_disk
        | {"run_dir": str(tmp_path / "run"), "lora": config.LoRA(enabled=True, rank=2, dropout=0.2)}
    )
    options |= {"train": config.Train(batch_size=2, eval_batch_size=4, packing=True, max_steps=3)}
    trainer = made(options)
    base = jax.device_get(trainer.frozen)
    trainer.score_reference(lambda _: None)
    known = trainer.reference[len(trainer.rows.train) :]
    np.testing.assert_allclose(trainer._logprobs(trainer.params, trainer.rows.validation).logprobs, known, rtol=1e-6)
    assert known.ndim == 3 and trainer._evaluate()["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    equal(trainer.frozen, base)
    assert trainer._evaluate()["eval/rewards/margins"] > 0, "measured without dropout"
    now = jaxrlhf.load(trainer.save_pretrained(tmp_path / "now", merge_lora=True))[1]
    again = jaxrlhf.load(export(tmp_path / "run", tmp_path / "again", merge_lora=True))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), again, now)  # another mesh


def test_the_reference_is_kept_by_what_it_is_made_of(tmp_path):
    values, said, calls = np.arange(6, dtype=np.float32).reshape(3, 2), [], []

    def kept(key="a", result=values):
        said.clear(), calls.clear()
        return reference.cached_logprobs(tmp_path, key, (3, 2), lambda: calls.append(1) or result, said.append)

    equal(kept(), values)
    assert calls and not said
    equal(kept(result=None), values)
    assert not calls and "3 rows read from" in said[0]
    assert kept("b", values + 1)[0, 0] == 1 and calls
    file = tmp_path / "a.npz"
    content = bytearray(file.read_bytes())
    at = content.rindex(values[1:].tobytes())
    content[at] ^= 1
    others = [bytes(content), content[:100], b"", b"not a zip"]
    np.savez(tmp_path / "other.npz", logprobs=values[:2])
    for damaged in (*others, (tmp_path / "other.npz").read_bytes()):
        file.write_bytes(damaged)
        equal(kept(), values)
        assert calls and "cannot be used" in said[0] and "computed anew" in said[0]
    with pytest.raises(NumericsError, match="not finite in 1 of 3 rows"):
        kept("c", np.where(values == 3, np.nan, values))
    assert not (tmp_path / "c.npz").exists()


def test_another_model_other_rows_or_another_dtype_are_another_reference(supervised, tmp_path):
    """And the order of an epoch, batches and the loss are nothing to it."""
    options = supervised | {"dpo": config.DPO(reference_folder=str(tmp_path))}

    def files(**changes):
        made(options, **changes).score_reference(lambda _: None)
        return len(list(tmp_path.iterdir()))

    with pytest.raises(Preempted, match="before the first step"):
        made(options).score_reference(lambda _: None, stopping=lambda: True)
    assert files() == 1
    same = {
        "data": config.replace(supervised["data"], shuffle=False),
        "train": config.Train(batch_size=3, eval_batch_size=4),
    }
    assert files(mesh=config.Mesh(fsdp=2)) == 1, "equal up to rounding"
    assert files(**same, dpo=config.replace(options["dpo"], loss="ipo")) == 1
    assert files(seed=1) == 2, "random weights"
    assert files(data=config.replace(supervised["data"], max_rows=20)) == 3
    assert files(model=config.replace(supervised["model"], compute_dtype="bfloat16")) == 4


def test_kto_learns_from_labels_and_needs_both(supervised, tmp_path):
    rows = [
        {"prompt": f"say {word} ", "completion": word if good else "nooo", "label": good}
        for i, word in enumerate(("red", "green", "blue", "black", "white", "grey"))
        for good in (True, i % 2 == 0)
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = supervised | {"dpo": config.DPO(loss="kto"), "data": config.replace(supervised["data"], path=str(file))}
    options |= {"train": config.Train(batch_size=4, micro_batch_size=2, eval_batch_size=4, num_train_epochs=3)}
    trainer = made(options, run_dir=str(tmp_path / "run"))
    assert "good: say red red" in trainer.describe()
    trainer.train()
    log = records(tmp_path / "run")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert log[-1]["loss"] < 0.5 and log[-1]["share/chosen"] + log[-1]["share/rejected"] == 1
    assert {"eval/loss", "eval/kl", "eval/rewards/margins"} <= log[-1].keys()
    file.write_text("".join(json.dumps(row | {"label": True}) + "\n" for row in rows))
    with pytest.raises(DataError, match="9 good and 0 bad"):
        made(options)


def test_kto_takes_pairs_apart(supervised):
    """As TRL does: all chosen ones before all rejected ones, so that the KL is over both."""
    tokenizer = jaxrlhf.load_tokenizer(supervised["model"].path, config.TokenizerSource())
    losses = (config.DPO(), config.DPO(loss="kto"))
    pairs, apart = (read_rows(config.DPOConfig(**supervised, dpo=loss), tokenizer) for loss in losses)
    for whole, parts in ((pairs.train, apart.train), (pairs.validation, apart.validation)):
        assert [row.label for row in parts] == [True] * len(whole) + [False] * len(whole)
        assert [row.tokens for row in parts] == [getattr(p, s).tokens for s in ("chosen", "rejected") for p in whole]
        assert [row.loss_mask for row in parts[len(whole) :]] == [pair.rejected.loss_mask for pair in whole]
    assert "36 responses to train on" in str(apart.report)


def test_what_stands_beside_a_row_has_another_prompt():
    def row(prompt, answer):
        return SFTRow([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))

    rows = [row([1, 5], [7]), row([1, 5], [8, 2]), row([1, 6, 6], [9, 9, 9]), row([1, 5], [3])]
    made = kto.mismatched_pairs(rows, 5)
    assert [pair.chosen for pair in made] == rows
    assert [pair.rejected.tokens for pair in made] == [[1, 5, 9, 9, 9], [1, 5, 9, 9, 9], [1, 6, 6, 3], [1, 5, 9, 9, 9]]
    assert [sum(pair.rejected.loss_mask) for pair in made] == [3, 3, 1, 3]
    assert kto.mismatched_pairs(rows, 4)[0].rejected == SFTRow([1, 5, 9, 9], [False, False, True, True])
    alike = kto.mismatched_pairs([rows[0], rows[1], rows[3]], 9)
    assert [pair.rejected.tokens for pair in alike] == [[1, 5, 8, 2], [1, 5, 3], [1, 5, 7]]


def test_rows_that_have_nothing_to_learn_from_are_counted_and_named(supervised, tmp_path):
    rows = [{"prompt": "say red ", "chosen": "red", "rejected": "no"}] * 3
    rows += [{"prompt": "say ", "chosen": "a", "rejected": "a"}, {"prompt": "say ", "chosen": "", "rejected": "a"}]
    rows += [{"prompt": "say " * 30, "chosen": "a", "rejected": "b"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.Data(path=str(file), max_length=32)
    told = abstract_trainer(config.DPOConfig(**supervised | {"data": data})).describe()
    for line in (
        "chosen and rejected are the same (line 4)",
        "chosen is empty (line 5)",
        "the prompt is longer than data.max_length (32 tokens) (line 6)",
    ):
        assert f"dropped 1: {line}" in told
    assert "6 rows" in told and "; 3 kept" in told
    wrong = config.replace(supervised["train"], metric="eval/rewards/margin")
    with pytest.raises(ConfigError, match="did you mean 'eval/rewards/margins'"):
        abstract_trainer(config.DPOConfig(**supervised | {"train": wrong}))


@pytest.mark.parametrize(("loss", "less"), [("orpo", {"loss", "nll_loss"}), ("kto", {"loss", "kl"})])
def test_the_best_state_has_the_least_loss_and_the_greatest_margin(loss, less):
    def best(metric):
        return best_of(config.DPOConfig(dpo=config.DPO(loss=loss), train=config.Train(metric=metric)))

    found = {key: best(f"eval/{key}") for key in evaluation_keys(config.DPO(loss=loss))}
    assert {key for key, mode in found.items() if mode == "min"} == less
    assert found["rewards/margins"] == best("") == "max"


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_beta_goes_from_the_first_step_to_the_last(kind):
    schedule = beta_schedule(config.DPO(beta=0.1, beta_schedule=kind, beta_final=0.5), 5)
    share = np.arange(5) / 4 if kind == "linear" else (1 - np.cos(np.pi * np.arange(5) / 4)) / 2
    np.testing.assert_allclose([schedule(step) for step in range(5)], 0.1 + 0.4 * share, rtol=1e-6)
    assert beta_schedule(dataclasses.replace(config.DPO(), beta=0.3), 5)(3) == 0.3
