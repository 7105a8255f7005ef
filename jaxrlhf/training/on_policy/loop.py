"""The loop of every on-policy run: answer, score, learn, validate, log, save; and one update on its own."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import GRPO
from jaxrlhf.data.datasets import PromptRow, prompts_from_texts
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.training import session as loop
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy import checks
from jaxrlhf.training.on_policy.alarms import Watch
from jaxrlhf.training.on_policy.run import Answers, Online, repeated
from jaxrlhf.training.session import Metrics

Stop = Callable[[], None]


def train(
    online: Online,
    answer: Callable[[int, Stop], Answers],
    learn: Callable[[Answers, int], Metrics],
    export: Callable[[Path], Path],
) -> dict[str, float]:
    """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics.

    `answer(step, stop)` makes and scores the responses of update number `step`, and calls `stop` wherever the run may
    end; `learn(answers, step)` moves the learner's state on.
    """
    config, state, validator = online.config, online.learner.state, online.validator
    if not online.data:
        raise ConfigError(
            f"data.path is empty: give a file of prompts, or call {online.method}_step with prompts of your own"
        )
    size, sample_every = online.settings.batch_size, config.logging.sample_every
    online.check_reward()
    about = config, online.method, online.total_steps, state, online.identities()
    with loop.session(*about, fresh=online.fresh) as session:
        session.logger.note(setup.describe(config, online.model, online.tokenizer, online.data.report, online.mesh))
        for line in online.questions():
            session.logger.note(line)
        online.compile()
        online.scorer.pause_while_asking(session.logger.paused)
        done = session.resume(state)
        session.watch = Watch(config.alarms, size, session.records(), brake=_brake(online))
        online.calibrate()
        if validator:
            validator.begin(session, online.learner, online.run_key)
        for step in range(done, online.total_steps):
            if validator and validator.patience_is_over(session):
                break
            jax.block_until_ready(state.value.step)  # the update before is not the rollout's time
            with _nothing_lost(online, session, step):
                answers = answer(step, lambda step=step: session.stop_if_asked(step, state.value))
            for note in answers.scored.notes:
                session.logger.note(note)
            metrics = learn(answers, step) | answers.scored.metrics | answers.metrics
            metrics |= {
                "episode": (step + 1) * size,
                "tokens/identical": 1 - len(set(answers.texts)) / len(answers.texts),
            }
            worth = None
            validated = validator is not None and validator.due(step + 1, online.total_steps)
            if validator and validated:
                with _nothing_lost(online, session, step + 1, metrics):
                    metrics |= validator.run(session, step + 1, online.learner, online.run_key)
                worth = validator.worth(session, metrics)
            session.log(step + 1, metrics)
            if sample_every and (step % sample_every == 0 or step + 1 == online.total_steps):
                session.flush()
                session.logger.samples(step + 1, _show(answers)[: config.logging.num_samples])
            saved = session.due(step + 1) or (validated and session.best is not None)
            if saved:
                session.save(step + 1, state.value, worth)
            session.stop_if_asked(step + 1, state.value, saved=saved)
        session.flush()
        if not session.due(int(state.value.step)):
            session.save(int(state.value.step), state.value, block=True)
        last = session.last()
        session.take_best(state)
        exported = int(state.value.step)
        records = {record.pop("step"): record for record in session.records()}
        online.results = records.get(exported, validator.before if validator and not exported else {})
        session.logger.note(f"exported to {export(session.run.directory / 'export')}")
    return last


def one_update(
    online: Online,
    prompts: Sequence[str],
    extra: dict[str, Sequence[Any]],
    answer: Callable[[Sequence[PromptRow], int], Answers],
    learn: Callable[[Answers, int], Metrics],
) -> dict[str, Any]:
    """One update on prompts of somebody's own; `extra` columns go to the reward function, a value a prompt."""
    step = int(online.learner.state.value.step)
    about = online.method, online.config, online.settings, online.mesh, online.group
    checks.check_step(*about, prompts, step, online.total_steps)
    rows = repeated(prompts_from_texts(prompts, extra, online.config.data, online.tokenizer), online.group)
    online.calibrate()
    answers = answer(rows, step)
    for note in answers.scored.notes:
        warnings.warn(note, stacklevel=3)
    metrics = learn(answers, step) | answers.scored.metrics
    numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
    return {
        "generated_texts": answers.texts,
        "rewards": [float(score) for score in answers.scored.totals],
        "policy_loss": numbers["loss/policy_avg"],
        **numbers,
    }


@contextlib.contextmanager
def _nothing_lost(online: Online, session: loop.Session, step: int, metrics: Metrics | None = None) -> Iterator[None]:
    """A reward that fails in here finds `step` updates saved, and those measured last, if not yet logged, in the
    log."""
    try:
        yield
    except RewardError as error:
        if not step:
            raise RewardError(f"{error}\nNothing has been trained yet") from error
        if metrics:
            session.log(step, metrics)
        session.save(step, online.learner.state.value, block=True)
        raise RewardError(
            f"{error}\n{step} updates are saved; once that is mended, the same command goes on"
        ) from error


def _brake(online: Online) -> str:
    """The option that holds the policy near its reference."""
    paired = isinstance(online.settings, GRPO) and online.settings.recipe.loss == "dpo"
    return "grpo.beta" if paired else f"{online.method}.kl_coef"


def _show(answers: Answers) -> list[dict[str, Any]]:
    """Records for the samples log."""
    return [
        {"prompt": row.text, "completion": text, "score": float(score)}
        for row, text, score in zip(answers.rows, answers.texts, answers.scored.totals, strict=True)
    ]
