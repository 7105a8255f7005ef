"""A model out of a checkpoint, without the data, the rewards and the optimizer of the run that wrote it."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import jax

from jaxrlhf import config, metrics, runs, sharding, weights
from jaxrlhf.checkpoint import Checkpoints
from jaxrlhf.config import ModelSource, PPOConfig, file
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training import pretrained, session, setup
from jaxrlhf.training.on_policy.policy import reference_dtype
from jaxrlhf.training.ppo.roles import critic_model
from jaxrlhf.types import Params

Identity = dict[str, str]  # hashes of what checkpoints do not hold, by name


def export(run: Path, target: Path, role: Literal["policy", "critic"] = "policy", *, merge_lora: bool = False) -> Path:
    """Write the model of the newest checkpoint of a run (the best, if that is kept, with a warning), or the critic of a
    PPO run, to `target` in Hugging Face layout, with the run's tokenizer and a card.

    Raises ConfigError for the critic of a run that has none, StorageError where there is no checkpoint, or where a
    frozen part of the model, which is not in checkpoints, is no longer what it was in the run.
    """
    method, _ = runs.what_ran(run)
    if role == "critic" and method != "ppo":
        raise ConfigError(f"{run} is a run of jaxrlhf {method}: only ppo has a critic")
    settings = file.load_config(method, run / "config.yaml", [("run_dir", str(run))], partial=True)
    settings = dataclasses.replace(settings, model=_found(settings.model, run))
    mesh = sharding.make_mesh(config.Mesh(fsdp=jax.device_count()))  # the run's may be another machine's
    step, trained, identity = _newest(run, settings, mesh)
    tokenizer = weights.open_tokenizer(settings.tokenizer, settings.model)
    source = settings.model
    if role == "critic":
        model, params, source = _critic(settings, tokenizer, mesh, trained, identity)
    elif method == "reward":
        model, params = setup.model_config(source, tokenizer, settings.head, settings.lora), trained["reward"]
        if settings.frozen_trunk or settings.lora.enabled:
            _, trunk = setup.split_trainable(_begun(settings, tokenizer, mesh, settings.head), frozen_trunk=True)
            params |= _unchanged(trunk, identity, "frozen parameters")
    else:
        model, params = setup.model_config(source, tokenizer, "lm", settings.lora), trained["policy"]
        if settings.lora.enabled:
            base = _begun(settings, tokenizer, mesh, "lm")
            params |= _unchanged(base, identity, "reference" if method in ("ppo", "grpo") else "frozen parameters")
    records = {record.pop("step"): record for record in metrics.read(run / "metrics.jsonl")}
    settings = dataclasses.replace(settings, model=source)
    return pretrained.save(
        target,
        model,
        params,
        settings,
        tokenizer,
        method=method,
        step=step,
        results=records.get(step, {}),
        merge_lora=merge_lora,
    )


def _found(source: ModelSource, run: Path) -> ModelSource:
    """The model that the run began with, if need be from the folder in which the run was started."""
    started = runs.started_in(run)
    there = Path(started, source.path)
    if Path(source.path).expanduser().exists() or not started or not there.exists():
        return source
    return dataclasses.replace(source, path=str(there))


def merge(folder: Path, target: Path) -> Path:
    """Write the model that a folder of adapters makes of the one they are for. DataError if it holds none."""
    base, adapters = weights.described_by(weights.resolve(folder))
    if adapters is None:
        raise DataError(f"{folder} holds a whole model, and no adapters to merge")
    model, params = weights.load(folder)
    tokenizer = load_tokenizer(weights.tokenizer_folder(folder), config.TokenizerSource())
    facts = {"method": "merge", "base_model": str(base), "adapters": str(adapters)}
    return weights.export(target, model, params, source=base, tokenizer=tokenizer, facts=facts)


def _newest(run: Path, settings: Any, mesh: jax.sharding.Mesh) -> tuple[int, dict[str, Params], Identity]:
    """(step, what trained by role, hashes of what did not) of the checkpoint to export."""
    checkpoints = Checkpoints(
        run / "checkpoints", settings.checkpoint.keep, synchronous=True, best=session.best_of(settings)
    )
    if not checkpoints.steps:
        raise StorageError(f"{run} has no checkpoint yet: nothing to export")
    best, newest = checkpoints.best_step, checkpoints.steps[-1]
    if best not in (None, newest):
        warnings.warn(f"this is the best checkpoint, of step {best}; the newest is of step {newest}", stacklevel=3)
    return checkpoints.restore_params(newest if best is None else best, mesh)


def _critic(
    settings: PPOConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, trained: dict[str, Params], identity: Identity
) -> tuple[ModelConfig, Params, ModelSource]:
    """(model, parameters, where its description comes from) of the critic of a PPO run."""
    source, policy, judge = settings.model, setup.model_config(settings.model, tokenizer, "lm", settings.lora), None
    trunk: Params = {}
    kept = settings.critic.trunk == "frozen" or settings.lora.enabled
    if settings.critic.init == "reward":
        part = next(part for part in settings.reward.parts() if part.model)
        source = dataclasses.replace(source, path=part.model, revision=part.revision, merged_path="")
        judge = RewardModel(part.model, revision=part.revision, dtype=part.dtype, micro_batch_size=1, mesh=mesh)
        if kept:
            models = [member for each in settings.reward.parts() if each.model for member in each.members()]
            alone = len(models) == 1  # else the hash is of all of them
            trunk = _unchanged(judge.params, identity, "reward model") if alone else judge.params
    elif kept:
        trunk = _begun(settings, tokenizer, mesh, "lm")
        if not settings.lora.enabled:
            trunk = setup.cast_copy(trunk, reference_dtype(settings.reference, policy), mesh)
        trunk = _unchanged(trunk, identity, "reference")
    if settings.critic.trunk == "shared":
        trunk |= trained["policy"]
    model = critic_model(settings, policy, judge and judge.described)
    return model, {**{k: v for k, v in trunk.items() if k not in ("lm_head", "score")}, **trained["critic"]}, source


def _begun(settings: Any, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, head: str) -> Params:
    """The parameters that a run began with; of a head that it made itself, others."""
    key, storage = setup.keys(settings.seed)[0], setup.param_dtype(settings)
    source = dataclasses.replace(settings.model, merged_path="")  # the run has written it
    made = setup.load_model(source, tokenizer=tokenizer, mesh=mesh, key=key, head=head, storage=storage)
    return setup.quantize(made, settings.lora)


def _unchanged(params: Params, identity: Identity, what: str) -> Params:
    if identity.get(what) != setup.params_fingerprint(params):
        raise StorageError(
            f"the {what} of this run were other parameters than its config leads to now: a model that it names has "
            "changed since; put the old one back"
        )
    return params
