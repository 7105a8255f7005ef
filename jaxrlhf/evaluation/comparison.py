"""Comparison of two or more language models on the same prompts. The first is the baseline, A."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import DataError
from jaxrlhf.evaluation import completions, generation, kl, prompts, training_runs
from jaxrlhf.evaluation.prompts import Questions
from jaxrlhf.evaluation.resampling import RESAMPLES, SEED
from jaxrlhf.evaluation.win_rates import against, value_of
from jaxrlhf.metrics.statistics import mean_and_error
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.types import Rollout

Result = dict[str, Any]


def compare(
    configs: Sequence[PPOConfig],
    *,
    num_prompts: int,
    num_completions: int,
    function: Callable[..., Any] | None = None,
    files: Sequence[str] = (),
    references: str = "",
    by: str = "",
    threshold: float | None = None,
) -> Result:
    """Evaluate the models of `configs`, which differ in nothing else, on the same prompts, and compare them with the
    first. The arguments are those of `completions.evaluate`.

    Prompts too long for one of the models are left out. The first model is loaded last, when it also reads the
    completions of the others for their KL to it. Returns the JSON object of `compare_results`.
    """
    first = configs[0]
    completions.check(first, num_completions, threshold, function)
    asked = _common_questions(
        [
            prompts.read(config, files, references, by, has_reward=completions.has_reward(config, function))
            for config in configs
        ],
        first,
        num_prompts,
    )
    first_model = weights.load_config(first.model.path, revision=first.model.revision)
    temperature, greedy = first.sampling.temperature, first.sampling.greedy
    scorers: list[tuple[Questions, Scorer | None]] = []
    results: dict[int, Result] = {}
    sampled: dict[int, tuple[Rollout, np.ndarray]] = {}  # rollouts and their log-probs by the model that sampled them
    divergences: dict[int, Result] = {}
    for number in [*range(1, len(configs)), 0]:
        config, questions = configs[number], asked[number]
        scorer = _scorer(scorers, config, questions, function)
        model, params = generation.load_model(config, questions.tokenizer)
        decoder = generation.decoder(config, model, params, len(questions.rows) * num_completions)
        results[number], rollout = completions.complete(config, questions, num_completions, decoder, scorer, threshold)
        del decoder
        if number == 0:
            for other, (rollout, own) in sampled.items():
                ratio = own - kl.response_logprobs(params, model, rollout, temperature)
                divergences[other] = _mean_over_prompts(ratio.reshape(-1, num_completions))
        elif reason := kl.obstacle(asked[0], questions, first_model, rollout, greedy=greedy):
            divergences[number] = {"reason": reason}
        else:
            sampled[number] = rollout, kl.response_logprobs(params, model, rollout, temperature)
        del model, params
    ordered = [results[number] for number in range(len(configs))]
    return compare_results(ordered, [divergences.get(number) for number in range(len(configs))])


def compare_results(results: Sequence[Result], divergences: Sequence[Result | None]) -> Result:
    """Compare the results of `completions.evaluate` on the same prompts with the first of them.

    `divergences` are the KL of each model to the first ({mean, standard_error}, or {reason} why there is none). Returns
    a JSON object: what was asked, `models` with their statistics, `against` the first (`win_rates.against`), KL, the
    same by group, and of run directories costs of training; `prompts` with the answers of all models; `notes`.
    """
    first = results[0]
    by = "score" if "mean" in first["statistics"] else "ROUGE-L"
    runs = [training_runs.read(result["model"]) for result in results]
    equal, notes = training_runs.at_equal_tokens(runs)
    models = []
    for number, (result, run) in enumerate(zip(results, runs, strict=True)):
        entry = {
            "label": label(number),
            "model": result["model"],
            "statistics": result["statistics"],
            "against": against(first["prompts"], result["prompts"], by) if number else None,
            "kl": divergences[number],
            "groups": {column: _groups(first, result, column, by, number) for column in result["groups"]},
            "training": run.costs() if run else None,
            "at_equal_tokens": equal[number],
        }
        models.append(entry)
    shared = ("prompts_from", "references_from", "category_from", "reward")
    shared += ("environment", "weights", "sampling", "seed", "threshold")
    return {
        **{name: first[name] for name in shared},
        "by": by,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
        "models": models,
        "prompts": [_prompt([r["prompts"][i] for r in results], by) for i in range(len(first["prompts"]))],
        "notes": [*notes, *_notes(models)],
    }


def label(number: int) -> str:
    """A, B, ..., Z, then A2, B2, ..."""
    round_, letter = divmod(number, 26)
    return chr(ord("A") + letter) + (str(round_ + 1) if round_ else "")


def _common_questions(asked: list[Questions], first: PPOConfig, count: int) -> list[Questions]:
    """`count` random prompts that all models can read."""
    common = set.intersection(*({question.row.index for question in questions.questions} for questions in asked))
    if not common:
        raise DataError("no prompt leaves room for a response in the context of every model; lower response_length")
    chosen = asked[0].only(common).sample(count, first.seed)
    indices = {question.row.index for question in chosen.questions}
    return [questions.only(indices) for questions in asked]


def _scorer(
    opened: list[tuple[Questions, Scorer | None]],
    config: PPOConfig,
    questions: Questions,
    function: Callable[..., Any] | None,
) -> Scorer | None:
    """The reward: one that is open, if it is for the same tokenizer, so that reward models are loaded once."""
    for other, scorer in opened:
        same_template = other.tokenizer.template_digest == questions.tokenizer.template_digest
        if same_template and kl.equal_ids(other.tokenizer, questions.tokenizer):
            return scorer
    opened.append((questions, completions.open_scorer(config, questions, function)))
    return opened[-1][1]


def _mean_over_prompts(values: np.ndarray) -> Result:
    """Mean of values [prompts, completions] and its standard error over prompts."""
    mean, error = mean_and_error(values.mean(1))
    return {"mean": mean, "standard_error": error if len(values) > 1 else None}


def _groups(first: Result, result: Result, column: str, by: str, number: int) -> dict[str, Any]:
    """The measures of each group and the comparison with the first model in it."""
    key = "file" if column == "file" else "category"
    groups = {}
    for name, measures in result["groups"][column].items():
        ours, theirs = ([p for p in r["prompts"] if p[key] == name] for r in (first, result))
        groups[name] = measures | {"against": against(ours, theirs, by) if number else None}
    return groups


def _prompt(answers: list[dict[str, Any]], by: str) -> dict[str, Any]:
    """A prompt with the completions of every model, and by how much their mean is above that of the first."""
    shared = ("prompt", "index", "file", "category", "reference")
    base = value_of(answers[0], by)
    result = {name: answers[0][name] for name in shared}
    result["answers"] = []
    for number, answer in enumerate(answers):
        own = {name: value for name, value in answer.items() if name not in shared}
        value = value_of(answer, by)
        improvement = value - base if number and value is not None and base is not None else None
        result["answers"].append({"label": label(number), "improvement": improvement, **own})
    return result


def _notes(models: Sequence[Result]) -> list[str]:
    """Notes on the tables: differences between the models, and results that are missing."""
    notes = []
    for model in models[1:]:
        name, found, divergence = model["label"], model["against"], model["kl"]
        if divergence and "reason" in divergence:
            notes.append(f"no KL of {name} to A: {divergence['reason']}")
        if not found["prompts"]:
            notes.append(f"no prompt has a {found['by']} of both A and {name}: there is nothing to compare")
        elif found["left_out"]:
            notes.append(f"{found['left_out']} prompts without a {found['by']} of both A and {name} are left out")
        if found["prompts"] and found["ties"] == found["prompts"]:
            notes.append(f"A and {name} are tied on every prompt")
        elif found["prompts"] > 1 and found["prompts"] in (found["wins"], found["losses"]):
            low, high = found["decided_win_rate_interval_95"]
            notes.append(
                f"{name} {'wins' if found['wins'] else 'loses'} every prompt, so bootstrap intervals of its win rate "
                f"have no width; Wilson's is [{low:.2f}, {high:.2f}]"
            )
    if models[0]["statistics"]["prompts"] == 1:
        notes.append("one prompt: there are no standard errors and intervals over prompts")
    for model in models:
        training = model["training"]
        if training and training["open_starts"]:
            notes.append(
                f"{model['label']}: {training['open_starts']} of {training['starts']} starts have no end (running or "
                "killed): their time and memory are not counted"
            )
    return notes
