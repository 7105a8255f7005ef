"""The description of an on-policy run that is printed before it: notes on its options, and questions to others."""

import collections

from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.environments.episodes import Episodes
from jaxrlhf.environments.worker import WorkerEpisodes
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rewards.sources.judge import Judge
from jaxrlhf.training.on_policy.validation import Validator
from jaxrlhf.training.optim import warmup_warnings


def notes(
    config: PPOConfig | GRPOConfig,
    total_steps: int,
    scorer: Scorer,
    environment: Episodes | WorkerEpisodes | None,
    teacher: ModelConfig | None,
) -> list[str]:
    """Lines about options whose effect may surprise."""
    lines = warmup_warnings(config.optim, total_steps * config.settings.optimizer_steps)
    if config.lora.enabled and config.lora.dropout:
        lines.append(f"lora.dropout has no effect in {config.method}, whose rollout and update are without dropout")
    if teacher:
        lines.append(f"KL to the teacher {config.reference.path}: {teacher.family}, {teacher.dtype}")
    if environment:
        limit = config.environment.max_turns
        lines.append(f"environment {environment.name}: up to {limit} turns of the policy in a response")
    elif not scorer.components:
        lines.append("no reward: every response is preferred to grpo.rejected_text, and all scores are 0")
    if penalty := config.scores.missing_eos_penalty:
        lines.append(f"{penalty:g} is subtracted from scores of truncated responses (scores.missing_eos_penalty)")
    if isinstance(config, GRPOConfig) and config.grpo.recipe.advantage == "decoupled" and len(scorer.summed) == 1:
        lines.append(
            "the reward has one component, and grpo.method gdpo treats several apart: its advantages are those of "
            "grpo, normalised over the batch"
        )
    return lines


def questions(config: PPOConfig | GRPOConfig, total_steps: int, scorer: Scorer, validator: Validator) -> list[str]:
    """A line for each judge, and one for a person, that says how many completions each is asked about."""
    judges = collections.Counter(c.source.name for c in scorer.components.values() if isinstance(c.source, Judge))
    asked = [f"{name}{f' ({n} criteria)' if n > 1 else ''}" for name, n in judges.items()]
    asked += ["a person"] if scorer.has_human else []
    if not asked:
        return []
    size = config.settings.batch_size
    parts = [f"{size} in each of {total_steps} updates"]
    if validator.rows:
        validations = 1 + sum(validator.due(step, total_steps) for step in range(1, total_steps + 1))
        parts.append(f"{2 * len(validator.rows)} in each of {validations} validations")
    if config.scores.normalise == "reference":
        parts.append(f"{-(-config.scores.reference_samples // size) * size} before training, for scores.normalise")
    return [f"{who} is asked about completions: {', '.join(parts)}; once each" for who in asked]
