"""scripts/sweep_rates.py: which runs are made, how the best rate is chosen, and what a result is."""

import json
import math

import pytest
import sweep_rates

from jaxrlhf.metrics import read_records

BEST = {"full": 3e-4, "rank 8": 3e-3}  # learning rates


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Run the script with stand-ins for training; return its runs as (variant's changes, rate, seed), and its table."""

    def run(method, *arguments, rates=("3e-4", "1e-3", "3e-3"), seeds=("0", "1"), diverges=()):
        made = []

        def train(method, path, options):
            chosen = dict(options)
            rate, seed = float(chosen["optim.learning_rate"]), int(chosen["seed"])
            variant = "rank 8" if "lora.rank" in chosen else "full"
            made.append((variant, rate, seed, chosen))
            regret = abs(math.log(rate / BEST[variant])) + seed / 10
            result = math.nan if rate in diverges else -regret if method in ("ppo", "grpo") else regret
            return {"result": result, "trained": 1234, "seconds": 1.0}

        monkeypatch.setattr(sweep_rates, "train", train)
        monkeypatch.setattr("sys.argv", [
            "sweep_rates.py", method, method, "--folder", str(tmp_path / "runs"), "--rates", *rates, "--seeds", *seeds,
            "--variant", "full", "--variant", "rank 8", "lora.enabled=true", "lora.rank=8", *arguments,
        ])  # fmt: skip
        sweep_rates.main()
        return made, [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    return run


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_all_rates_are_run_and_further_seeds_at_the_best_one(sweep, method):
    made, table = sweep(method, "--model.path", "MODEL")
    runs = [(variant, rate, seed) for variant, rate, seed, _ in made]
    assert runs == [
        *(("full", rate, 0) for rate in (3e-4, 1e-3, 3e-3)),
        ("full", 3e-4, 1),
        *(("rank 8", rate, 0) for rate in (3e-4, 1e-3, 3e-3)),
        ("rank 8", 3e-3, 1),
    ]
    assert all(chosen["model.path"] == "MODEL" for *_, chosen in made)
    assert len({chosen["run_dir"] for *_, chosen in made}) == len(made)
    sign = "-" if method == "grpo" else ""
    assert table[2].startswith("| full | 1,234 | ") and table[2].endswith(f" | {sign}0.000, {sign}0.100 at 0.0003 |")
    assert table[3].endswith(f" | {sign}0.000, {sign}0.100 at 0.003 |")


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_rate_that_diverges_is_not_the_best(sweep, method):
    made, _ = sweep(method, diverges=(3e-4,))
    assert [rate for _, rate, seed, _ in made if seed == 1] == [1e-3, 3e-3]


def test_runs_that_are_there_are_not_repeated(sweep):
    _, first = sweep("sft")
    made, again = sweep("sft")
    assert not made and again == first
    made, more = sweep("sft", rates=("1e-3", "1e-2"))
    assert [(variant, rate, seed) for variant, rate, seed, _ in made] == [("full", 1e-2, 0), ("rank 8", 1e-2, 0)]
    assert more[2].count("|") == first[2].count("|") + 1  # the runs of all rates are in the table


def test_runs_of_other_options_are_not_taken_for_these(sweep, capsys):
    sweep("sft")
    with pytest.raises(SystemExit):
        sweep("sft", "--model.path", "OTHER")
    assert "'full' with other options (sft sft)" in capsys.readouterr().err


def test_options_without_a_value_are_refused(sweep, capsys):
    with pytest.raises(SystemExit):
        sweep("sft", "--model.path")
    assert "--section.key VALUE" in capsys.readouterr().err


@pytest.mark.slow
def test_a_result_is_the_lowest_held_out_loss_of_the_run(tmp_path, tiny_model):
    for name, completion in (("train", "bc"), ("held_out", "xy")):  # the better the one is learnt, the worse the other
        row = json.dumps({"prompt": "a", "completion": completion})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 4)
    options = {
        "run_dir": str(tmp_path / "run"), "model.path": str(tiny_model), "model.init": "random",
        "data.path": str(tmp_path / "train.jsonl"), "data.validation_path": str(tmp_path / "held_out.jsonl"),
        "train.batch_size": "4", "train.num_train_epochs": "3", "train.eval_every": "1", "train.eval_batch_size": "4",
        "optim.learning_rate": "0.01", "lora.enabled": "true", "lora.rank": "1",
        "logging.quiet": "true", "logging.report": "false", "logging.sample_every": "0",
    }  # fmt: skip
    row = sweep_rates.train("sft", None, list(options.items()))
    losses = [record["eval/loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and row["result"] == min(losses) < losses[-1]
    attention, mlp = (32 + 32) + 2 * (32 + 16) + (32 + 32), 3 * (32 + 64)  # rows of A and columns of B
    assert row["trained"] == 2 * (attention + mlp)
