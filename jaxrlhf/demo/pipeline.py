"""The demo: SFT from scratch, a reward model, PPO, and an evaluation by the task's own truth; two minutes on a CPU."""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf import config as c
from jaxrlhf import metrics
from jaxrlhf.demo import task
from jaxrlhf.demo.tokenizer import write_base
from jaxrlhf.errors import StorageError
from jaxrlhf.evaluation.completions import evaluate
from jaxrlhf.evaluation.summary import wilson
from jaxrlhf.files import write_whole
from jaxrlhf.metrics import plots
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

MEASURES = {"right_level": "right strictness", "fact_right": "fact right", "well_formed": "well formed"}
HELD_OUT = 192  # questions of the final evaluation: all there are
ANSWERING = 0.6  # temperature of the evaluation, before and after alike; training explores at a higher one
_INTRODUCTION = """\
StrictBot in miniature: a tiny model learns to answer questions in any tone (SFT), a reward model learns from pairs
which answers people prefer, and PPO teaches the first model to answer like that. The rule it has to find out: be strict
with factual errors, firm with poor logic, gentle with misconceptions and good questions."""
_Training = tuple[
    str,
    c.SFTConfig | c.RewardConfig | c.PPOConfig,
    Callable[[], SFTTrainer | RewardTrainer | PPOTrainer],
    Callable[[list[dict[str, Any]]], tuple[str, dict[str, Any]]],
]
_MARK, _RESULTS = "demo.json", "results.json"


def run(directory: str | Path, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Run the four stages in `directory`, say what they did (unless `quiet`), and return what results.json holds.

    A demo that was interrupted goes on where it was; one that had finished, or had another seed, starts over. Raises
    StorageError if `directory` holds something else.
    """
    directory = Path(directory)
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    started = time.monotonic()
    _claim(directory, seed)
    sft, reward, ppo = configs(directory, seed)
    console.print(_INTRODUCTION)
    write_data(directory, seed)
    trainings: tuple[_Training, ...] = (
        ("SFT", sft, lambda: SFTTrainer(sft), _about_sft),
        ("reward model", reward, lambda: RewardTrainer(reward), _about_reward),
        ("PPO", ppo, lambda: PPOTrainer(ppo), _about_ppo),
    )
    stages = {}
    for number, (name, config, trainer, summary) in enumerate(trainings, 1):
        before = time.monotonic()
        with console.status(f"[{number}/4] {name} ..."):
            trainer().train()
        text, figures = summary(metrics.read(Path(config.run_dir) / "metrics.jsonl"))
        seconds = time.monotonic() - before
        stages[name] = figures | {"seconds": seconds}
        _line(console, number, name, text, seconds)
    before = time.monotonic()
    with console.status("[4/4] evaluation ..."):
        answers = _answers(ppo, {"before": sft.run_dir, "after": ppo.run_dir})
    about = f"{len(answers)} held-out questions, temperature {ANSWERING}"
    _line(console, 4, "evaluation", about, time.monotonic() - before)
    results = {"seed": seed, "seconds": time.monotonic() - started, "stages": stages, **_shares(answers)}
    write_whole(directory / "answers.jsonl", "".join(json.dumps(answer) + "\n" for answer in answers))
    write_whole(directory / _RESULTS, json.dumps(results, indent=2) + "\n")
    _report(console, directory, results, answers)
    return results


def configs(directory: Path, seed: int) -> tuple[c.SFTConfig, c.RewardConfig, c.PPOConfig]:
    """The configs of the three trainings, in `directory`."""
    data = directory / "data"
    logging = c.Logging(quiet=True, tensorboard=False, sample_every=0)
    checkpoint = c.Checkpoint(save_every=0)
    shape = {"completion_prefix": " ", "max_length": 64}
    sft = c.SFTConfig(
        run_dir=str(directory / "sft"),
        seed=seed,
        model=c.ModelSource(path=str(directory / "base"), init="random"),
        data=c.Data(path=str(data / "sft.jsonl"), **shape),
        train=c.Train(batch_size=64, max_steps=150, num_train_epochs=100),
        optim=c.Optim(learning_rate=5e-3, schedule="cosine", warmup_steps=10, final_lr_fraction=0.05),
        logging=logging,
        checkpoint=checkpoint,
    )
    reward = c.RewardConfig(
        run_dir=str(directory / "reward"),
        seed=seed,
        model=c.ModelSource(path=str(directory / "sft")),
        data=c.Data(path=str(data / "preferences.jsonl"), validation_fraction=0.1, **shape),
        train=c.Train(batch_size=32, max_steps=340, num_train_epochs=100, eval_every=340, eval_batch_size=64),
        optim=c.Optim(learning_rate=1e-3, schedule="cosine", warmup_steps=5, final_lr_fraction=0.05),
        logging=logging,
        checkpoint=checkpoint,
    )
    ppo = c.PPOConfig(
        run_dir=str(directory / "ppo"),
        seed=seed,
        model=c.ModelSource(path=str(directory / "sft")),
        data=c.Data(path=str(data / "prompts.jsonl"), **shape),
        reward=c.RewardSource(model=str(directory / "reward"), micro_batch_size=64),
        critic=c.Critic(init="reward", learning_rate=2e-3),
        ppo=c.PPO(
            total_episodes=100 * 128,
            batch_size=128,
            num_ppo_epochs=1,
            num_mini_batches=2,
            kl_coef=1.0,  # a tone is worth 0.7 nats; whatever goes beyond that spoils facts and grammar
            lam=0.9,
            cliprange_value=10.0,
        ),
        scores=c.Scores(missing_eos_penalty=5.0),
        sampling=c.Sampling(response_length=20),
        optim=c.Optim(learning_rate=5e-4, schedule="cosine", final_lr_fraction=0.05, eps=1e-5),
        logging=c.Logging(quiet=True, tensorboard=False, sample_every=10),
        checkpoint=checkpoint,
    )
    return sft, reward, ppo


def write_data(directory: Path, seed: int) -> None:
    """Write data/*.jsonl and the untrained model's folder, base/."""
    write_base(directory / "base")
    for name, rows in {
        "sft": task.make_sft_rows(4096, seed),
        "preferences": task.make_preferences(6000, seed),
        "prompts": task.make_prompts(576, seed),
        "held_out": task.make_prompts(HELD_OUT, seed, held_out=True),
    }.items():
        write_whole(directory / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _claim(directory: Path, seed: int) -> None:
    """Make `directory` the demo's and clear it of earlier runs, unless they are of this seed and not yet finished."""
    mark = directory / _MARK
    if directory.exists() and not mark.is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise StorageError(f"{directory} exists and is not a demo's; give another directory (--output)")
    about = json.dumps({"seed": seed}) + "\n"
    unfinished = mark.is_file() and mark.read_text(encoding="utf-8") == about and not (directory / _RESULTS).exists()
    if not unfinished:
        for run in ("sft", "reward", "ppo"):
            shutil.rmtree(directory / run, ignore_errors=True)
        (directory / _RESULTS).unlink(missing_ok=True)
        write_whole(mark, about)


def _answers(config: c.PPOConfig, models: dict[str, str]) -> list[dict[str, Any]]:
    """Every held-out question with the answer of each of `models` {name: run directory} and the verdict on it."""
    rows: dict[str, dict[str, Any]] = {}
    data = str(Path(config.data.path).with_name("held_out.jsonl"))
    nobody = {"critic.init": "policy", "reward": c.RewardSource()}
    for name, path in models.items():
        place = {"model.path": path, "data.path": data, "sampling.temperature": ANSWERING}
        asked = c.replace(config, **place, **nobody)
        result = evaluate(asked, num_prompts=HELD_OUT, num_completions=1, function=task.truth)
        for item in result["prompts"]:
            text = item["completions"][0]["text"]
            row = rows.setdefault(item["prompt"], {"prompt": item["prompt"], "category": task.category(item["prompt"])})
            row[name] = {"text": text.strip(), **vars(task.judge(item["prompt"], text))}
    return list(rows.values())


def _shares(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{measure: {name: {share, interval_95}}} over all answers, and the share at the right strictness by category."""

    def share(measure: str, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        hits = sum(row[name][measure] for row in rows)
        return {"share": hits / len(rows), "interval_95": list(wilson(hits, len(rows)))}

    def both(measure: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: share(measure, name, rows) for name in ("before", "after")}

    by_category = {name: [row for row in answers if row["category"] == name] for name in task.CATEGORIES}
    return {
        "questions": len(answers),
        **{measure: both(measure, answers) for measure in MEASURES},
        "by_category": {name: both("right_level", rows) for name, rows in by_category.items()},
    }


def _about_sft(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    losses = plots.series(records, "loss")[1]
    text = f"{len(losses)} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token"
    return text, {"steps": len(losses), "loss": [losses[0], losses[-1]]}


def _about_reward(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    steps, losses = len(plots.series(records, "loss")[1]), plots.series(records, "eval/loss")[1]
    accuracy = plots.series(records, "eval/accuracy")[1][losses.index(min(losses))]  # of the state that was kept
    return f"{steps} steps, accuracy {accuracy:.2f} on held-out pairs", {"steps": steps, "accuracy": accuracy}


def _about_ppo(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    scores, kl = (plots.series(records, f"objective/{key}")[1] for key in ("scores", "kl"))
    text = f"{len(scores)} updates, score {scores[0]:+.1f} -> {scores[-1]:+.1f}, KL {kl[-1]:.1f} nats per answer"
    return text, {"updates": len(scores), "score": [scores[0], scores[-1]], "kl": kl[-1]}


def _line(console: Console, number: int, name: str, text: str, seconds: float) -> None:
    console.print(rf"\[{number}/4] {name:<13} {text:<60} {seconds:4.0f} s")


def _interval(about: dict[str, Any]) -> str:
    low, high = about["interval_95"]
    return f"{about['share']:.2f} [{low:.2f}, {high:.2f}]"


def _report(console: Console, directory: Path, results: dict[str, Any], answers: Sequence[dict[str, Any]]) -> None:
    look = {"box": box.SIMPLE_HEAD if console.is_terminal else box.ASCII, "title_justify": "left"}
    table = Table("share of answers with", "before PPO", "after PPO", **look)  # type: ignore[arg-type]
    lines: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
        (label, lambda name, measure=measure: results[measure][name]) for measure, label in MEASURES.items()
    ]
    for category, about in results["by_category"].items():
        lines.append((f"  {category}: {task.LEVELS[task.RIGHT_LEVEL[category]]}", about.__getitem__))
    for label, look_up in lines:
        table.add_row(label, *(_interval(look_up(name)) for name in ("before", "after")))
    console.print(table)
    rng = random.Random(results["seed"])
    for category in task.CATEGORIES:
        rows = [row for row in answers if row["category"] == category]
        row = rng.choice([row for row in rows if not row["before"]["right_level"]] or rows)
        console.print(f"{category} (should be {task.LEVELS[task.RIGHT_LEVEL[category]]}): {row['prompt']}")
        for name in ("before", "after"):
            console.print(f"  {name:<6}  {row[name]['text']}", markup=False)
    console.print(
        f"\n{results['seconds']:.0f} s. All answers: {directory}/answers.jsonl   figures: {directory}/{_RESULTS}   "
        f"data: {directory}/data   runs: {directory}/sft, reward, ppo"
    )
    console.print(
        f'next: jaxrlhf generate {directory}/ppo --prompt "Is it true that bats are blind?" --max-new-tokens 20'
    )
    console.print(f"      jaxrlhf plot {directory}/ppo")
    console.print(f"      jaxrlhf ppo {directory}/ppo/config.yaml --run_dir {directory}/mine --ppo.kl_coef 0.2")
