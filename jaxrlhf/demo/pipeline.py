"""Demo of the whole pipeline: SFT from scratch, reward model, PPO, evaluation by ground truth; two minutes on a CPU."""

import json
import random
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf import config
from jaxrlhf.demo import task
from jaxrlhf.demo.tokenizer import write_base
from jaxrlhf.errors import StorageError
from jaxrlhf.evaluation.completions import evaluate
from jaxrlhf.files import write_whole
from jaxrlhf.metrics import read_records
from jaxrlhf.metrics.drawing import series
from jaxrlhf.metrics.statistics import wilson
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

MEASURES = {"right_level": "right strictness", "fact_right": "fact right", "well_formed": "well formed"}
HELD_OUT = 192  # questions of the final evaluation: all held-out questions
EVAL_TEMPERATURE = 0.6  # of the evaluation before and after PPO; training samples at a higher one
_INTRODUCTION = """\
StrictBot in miniature: SFT trains a tiny model to answer questions in any tone, a reward model is trained on pairs of
preferred and rejected answers, and PPO trains the first model on that reward. The rule to be learned: be strict with
factual errors, firm with poor logic, gentle with misconceptions and good questions."""
_MARKER, _RESULTS = "demo.json", "results.json"
Records = list[dict[str, Any]]


def run(directory: str | Path, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Run the four stages in `directory`, print a report (unless `quiet`), and return the content of results.json.

    An interrupted demo resumes; a finished one, or one with another seed, starts over. Raises StorageError if
    `directory` holds something else.
    """
    directory = Path(directory)
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    started = time.monotonic()
    _prepare(directory, seed)
    sft, reward, ppo = configs(directory, seed)
    console.print(_INTRODUCTION)
    write_data(directory, seed)
    trainings = (
        ("SFT", sft, lambda: SFTTrainer(sft), _sft_results),
        ("reward model", reward, lambda: RewardTrainer(reward), _reward_results),
        ("PPO", ppo, lambda: PPOTrainer(ppo), _ppo_results),
    )
    stages = {}
    for number, (name, settings, trainer, summarise) in enumerate(trainings, 1):
        stage_started = time.monotonic()
        with console.status(f"[{number}/4] {name} ..."):
            trainer().train()
        text, stage_results = summarise(read_records(Path(settings.run_dir) / "metrics.jsonl"))
        seconds = time.monotonic() - stage_started
        stages[name] = stage_results | {"seconds": seconds}
        _print_stage(console, number, name, text, seconds)
    evaluation_started = time.monotonic()
    with console.status("[4/4] evaluation ..."):
        answers = _answer_held_out(ppo, {"before": sft.run_dir, "after": ppo.run_dir})
    text = f"{len(answers)} held-out questions, temperature {EVAL_TEMPERATURE}"
    _print_stage(console, 4, "evaluation", text, time.monotonic() - evaluation_started)
    results = {"seed": seed, "seconds": time.monotonic() - started, "stages": stages, **_shares(answers)}
    write_whole(directory / "answers.jsonl", "".join(json.dumps(answer) + "\n" for answer in answers))
    write_whole(directory / _RESULTS, json.dumps(results, indent=2) + "\n")
    _report(console, directory, results, answers)
    return results


def configs(directory: Path, seed: int) -> tuple[config.SFTConfig, config.RewardConfig, config.PPOConfig]:
    """Configs of the three trainings, with run directories in `directory`."""
    data = directory / "data"
    logging = config.Logging(quiet=True, tensorboard=False, sample_every=0)
    checkpoint = config.Checkpoint(save_every=0)
    sft = config.SFTConfig(
        run_dir=str(directory / "sft"),
        seed=seed,
        model=config.ModelSource(path=str(directory / "base"), init="random"),
        data=config.Data(path=str(data / "sft.jsonl"), max_length=64),
        train=config.Train(batch_size=64, max_steps=150, num_train_epochs=100),
        optim=config.Optim(learning_rate=5e-3, schedule="cosine", warmup_steps=10, final_lr_fraction=0.05),
        logging=logging,
        checkpoint=checkpoint,
    )
    reward = config.RewardConfig(
        run_dir=str(directory / "reward"),
        seed=seed,
        model=config.ModelSource(path=str(directory / "sft")),
        data=config.Data(path=str(data / "preferences.jsonl"), validation_fraction=0.1, max_length=64),
        train=config.Train(batch_size=32, max_steps=340, num_train_epochs=100, eval_every=340, eval_batch_size=64),
        optim=config.Optim(learning_rate=1e-3, schedule="cosine", warmup_steps=5, final_lr_fraction=0.05),
        logging=logging,
        checkpoint=checkpoint,
    )
    ppo = config.PPOConfig(
        run_dir=str(directory / "ppo"),
        seed=seed,
        model=config.ModelSource(path=str(directory / "sft")),
        data=config.Data(path=str(data / "prompts.jsonl"), max_length=64),
        reward=config.RewardSource(model=str(directory / "reward"), micro_batch_size=64),
        critic=config.Critic(init="reward", learning_rate=2e-3),
        ppo=config.PPO(
            total_episodes=100 * 128,
            batch_size=128,
            num_ppo_epochs=1,
            num_mini_batches=2,
            kl_coef=1.0,  # choosing the right tone costs 0.7 nats of KL; more would damage facts and grammar
            lam=0.9,
            cliprange_value=10.0,
        ),
        scores=config.Scores(missing_eos_penalty=5.0),
        sampling=config.Sampling(response_length=20),
        optim=config.Optim(learning_rate=5e-4, schedule="cosine", final_lr_fraction=0.05, eps=1e-5),
        logging=config.Logging(quiet=True, tensorboard=False, sample_every=10),
        checkpoint=checkpoint,
    )
    return sft, reward, ppo


def write_data(directory: Path, seed: int) -> None:
    """Write data/*.jsonl and the folder of the untrained model, base/. Answers begin with the space that follows their
    prompt."""
    write_base(directory / "base")
    for name, rows in {
        "sft": task.make_sft_rows(4096, seed),
        "preferences": task.make_preferences(6000, seed),
        "prompts": task.make_prompts(576, seed),
        "held_out": task.make_prompts(HELD_OUT, seed, held_out=True),
    }.items():
        rows = [
            {key: text if key in ("prompt", "category") else f" {text}" for key, text in row.items()} for row in rows
        ]
        write_whole(directory / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _prepare(directory: Path, seed: int) -> None:
    """Mark `directory` as the demo's and remove earlier runs, unless they have this seed and are not finished."""
    marker, content = directory / _MARKER, json.dumps({"seed": seed}) + "\n"
    if directory.exists() and not marker.is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise StorageError(f"{directory} exists and is not a demo's; give another directory (--output)")
    same_seed = marker.is_file() and marker.read_text(encoding="utf-8") == content
    if not same_seed or (directory / _RESULTS).exists():
        for run in ("sft", "reward", "ppo"):
            shutil.rmtree(directory / run, ignore_errors=True)
        (directory / _RESULTS).unlink(missing_ok=True)
        write_whole(marker, content)


def _answer_held_out(ppo: config.PPOConfig, models: dict[str, str]) -> list[dict[str, Any]]:
    """Answer every held-out question with each of `models` {name: run directory} and judge the answers."""
    rows: dict[str, dict[str, Any]] = {}
    data = str(Path(ppo.data.path).with_name("held_out.jsonl"))
    no_reward = {"critic.init": "policy", "reward": config.RewardSource()}
    all_at_once = {"rollout.slots": HELD_OUT}  # a single program to compile
    for name, path in models.items():
        changes = {"model.path": path, "data.path": data, "sampling.temperature": EVAL_TEMPERATURE}
        evaluated = config.replace(ppo, **changes, **no_reward, **all_at_once)
        result = evaluate(evaluated, num_prompts=HELD_OUT, num_completions=1, function=task.truth)
        for item in result["prompts"]:
            prompt, text = item["prompt"], item["completions"][0]["text"]
            row = rows.setdefault(prompt, {"prompt": prompt, "category": task.category(prompt)})
            row[name] = {"text": text.strip(), **vars(task.judge(prompt, text))}
    return list(rows.values())


def _shares(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{measure: {model: {share, interval_95}}} over all answers, and of right strictness by category."""

    def shares(measure: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        hits = {name: sum(row[name][measure] for row in rows) for name in ("before", "after")}
        return {name: {"share": n / len(rows), "interval_95": list(wilson(n, len(rows)))} for name, n in hits.items()}

    by_category = {name: [row for row in answers if row["category"] == name] for name in task.CATEGORIES}
    return {
        "questions": len(answers),
        **{measure: shares(measure, answers) for measure in MEASURES},
        "by_category": {name: shares("right_level", rows) for name, rows in by_category.items()},
    }


def _sft_results(records: Records) -> tuple[str, dict[str, Any]]:
    losses = series(records, "loss")[1]
    text = f"{len(losses)} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token"
    return text, {"steps": len(losses), "loss": [losses[0], losses[-1]]}


def _reward_results(records: Records) -> tuple[str, dict[str, Any]]:
    steps, losses = len(series(records, "loss")[1]), series(records, "eval/loss")[1]
    accuracy = series(records, "eval/accuracy")[1][losses.index(min(losses))]  # of the checkpoint that was kept
    return f"{steps} steps, accuracy {accuracy:.2f} on held-out pairs", {"steps": steps, "accuracy": accuracy}


def _ppo_results(records: Records) -> tuple[str, dict[str, Any]]:
    scores, kl = (series(records, f"objective/{key}")[1] for key in ("scores", "kl"))
    text = f"{len(scores)} updates, score {scores[0]:+.1f} -> {scores[-1]:+.1f}, KL {kl[-1]:.1f} nats per answer"
    return text, {"updates": len(scores), "score": [scores[0], scores[-1]], "kl": kl[-1]}


def _print_stage(console: Console, number: int, name: str, text: str, seconds: float) -> None:
    console.print(rf"\[{number}/4] {name:<13} {text:<60} {seconds:4.0f} s")


def _interval(result: dict[str, Any]) -> str:
    low, high = result["interval_95"]
    return f"{result['share']:.2f} [{low:.2f}, {high:.2f}]"


def _report(console: Console, directory: Path, results: dict[str, Any], answers: Sequence[dict[str, Any]]) -> None:
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII
    table = Table("share of answers with", "before PPO", "after PPO", box=style, title_justify="left")
    rows = {label: results[measure] for measure, label in MEASURES.items()}
    for category, shares in results["by_category"].items():
        rows[f"  {category}: {task.LEVELS[task.RIGHT_LEVEL[category]]}"] = shares
    for label, shares in rows.items():
        table.add_row(label, _interval(shares["before"]), _interval(shares["after"]))
    console.print(table)
    rng = random.Random(results["seed"])
    for category in task.CATEGORIES:
        examples = [row for row in answers if row["category"] == category]
        row = rng.choice([row for row in examples if not row["before"]["right_level"]] or examples)
        console.print(f"{category} (should be {task.LEVELS[task.RIGHT_LEVEL[category]]}): {row['prompt']}")
        for name in ("before", "after"):
            console.print(f"  {name:<6}  {row[name]['text']}", markup=False)
    console.print(
        f"\n{results['seconds']:.0f} s. All answers: {directory}/answers.jsonl   figures: {directory}/{_RESULTS}   "
        f"data: {directory}/data   runs: {directory}/sft, reward, ppo"
    )
    path = shlex.quote(str(directory))
    for number, command in enumerate(
        (
            f"chat {path}/ppo --no-history",
            f"report {path}/ppo",
            f"compare {path}/sft {path}/ppo --prompts {path}/data/held_out.jsonl",
            f"ppo {path}/ppo/config.yaml --run_dir {path}/mine --ppo.kl_coef 0.2",
        )
    ):
        console.print(f"{' ' * 5 if number else 'next:'} jaxrlhf {command}", markup=False)
