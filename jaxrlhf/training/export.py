"""Export of a run's model from its checkpoint, without loading the run's data, rewards and optimizer."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import jax

from jaxrlhf import config, metrics, runs, sharding, weights
from jaxrlhf.checkpoint import Checkpoints
from jaxrlhf.config import ModelSource, PPOConfig
from jaxrlhf.config import file as config_file
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training import facts, pretrained, setup
from jaxrlhf.training.adapters import quantize, split_trainable
from jaxrlhf.training.best import best_of
from jaxrlhf.training.on_policy.policy import reference_dtype
from jaxrlhf.training.ppo.critic import critic_model
from jaxrlhf.types import Params

Identity = dict[str, str]
"""Hashes of what checkpoints do not contain, by name."""


def export(run: Path, target: Path, role: Literal["policy", "critic"] = "policy", *, merge_lora: bool = False) -> Path:
    """Write the model of a run's newest checkpoint (or its best, if that is kept, with a warning), or the critic of a
    PPO run, to `target` in Hugging Face layout.

    Raises ConfigError for the critic of a run without one, StorageError if there is no checkpoint or if a frozen part
    of the model, which checkpoints do not contain, has changed since the run.
    """
    method, last_start = runs.method_and_last_start(run)
    if role == "critic" and method != "ppo":
        raise ConfigError(f"{run} is a run of jaxrlhf {method}: only ppo has a critic")
    settings = config_file.load_config(method, run / "config.yaml", [("run_dir", str(run))], partial=True)
    settings = dataclasses.replace(settings, model=_locate(settings.model, last_start.get("directory", "")))
    mesh = sharding.make_mesh(config.Mesh(fsdp=jax.device_count()))  # the run's may be another machine's
    step, trained, identity = _trained_params(run, settings, mesh)
    tokenizer = weights.open_tokenizer(settings.tokenizer, settings.model)
    source, head = settings.model, settings.head if method == "reward" else "lm"
    if role == "critic":
        model, params, source = _critic(settings, tokenizer, mesh, trained, identity)
    else:
        model = setup.model_config(source, tokenizer, head, settings.lora, mesh)
        params = trained["reward" if method == "reward" else "policy"]
        if settings.lora.enabled or (method == "reward" and settings.frozen_trunk):
            name = "reference" if method in ("ppo", "grpo") else "frozen parameters"
            frozen = _initial_params(settings, tokenizer, mesh, head)
            if method == "reward":
                frozen = split_trainable(frozen, frozen_trunk=True)[1]
            params |= _checked(frozen, identity, name)
    records = {record.pop("step"): record for record in metrics.read_records(run / "metrics.jsonl")}
    return pretrained.save(
        target,
        model,
        params,
        dataclasses.replace(settings, model=source),
        tokenizer,
        step=step,
        results=records.get(step, {}),
        origin=facts.Origin(run, identity.get("data") or identity.get("prompts", "")),
        merge_lora=merge_lora,
    )


def merge(folder: Path, target: Path) -> Path:
    """Write the model that results from merging a folder of adapters into their base model. Raises DataError if the
    folder has none."""
    base, adapters = weights.base_and_adapters(weights.resolve(folder))
    if adapters is None:
        raise DataError(f"{folder} holds a whole model, and no adapters to merge")
    model, params = weights.load(folder)
    tokenizer = load_tokenizer(weights.tokenizer_folder(folder), config.TokenizerSource())
    model, params, tokenizer = pretrained.with_pad_token(model, params, tokenizer, may_grow=True)
    facts = {"method": "merge", "base_model": str(base), "adapters": str(adapters)}
    return weights.export(target, model, params, source=base, tokenizer=tokenizer, facts=facts)


def _locate(source: ModelSource, started: str) -> ModelSource:
    """The initial model of a run, looked up in the folder where the run was started if it is not found here."""
    candidate = Path(started, source.path)
    if Path(source.path).expanduser().exists() or not started or not candidate.exists():
        return source
    return dataclasses.replace(source, path=str(candidate))


def _trained_params(run: Path, settings: Any, mesh: jax.sharding.Mesh) -> tuple[int, dict[str, Params], Identity]:
    """(step, trained parameters by role, hashes of the frozen ones) of the checkpoint to export."""
    checkpoints = Checkpoints(run / "checkpoints", settings.checkpoint.keep, synchronous=True, best=best_of(settings))
    if not checkpoints.steps:
        raise StorageError(f"{run} has no checkpoint yet: nothing to export")
    best, newest = checkpoints.best_step, checkpoints.steps[-1]
    if best not in (None, newest):
        warnings.warn(f"this is the best checkpoint, of step {best}; the newest is of step {newest}", stacklevel=3)
    return checkpoints.restore_params(newest if best is None else best, mesh)


def _critic(
    settings: PPOConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, trained: dict[str, Params], identity: Identity
) -> tuple[ModelConfig, Params, ModelSource]:
    """(model, parameters, source of its config.json) of the critic of a PPO run."""
    source, policy = settings.model, setup.model_config(settings.model, tokenizer, "lm", settings.lora, mesh)
    reward_model: RewardModel | None = None
    trunk: Params = {}
    frozen_trunk = settings.critic.trunk == "frozen" or settings.lora.enabled
    if settings.critic.init == "reward":
        part = next(part for part in settings.reward.parts() if part.model)
        source = dataclasses.replace(source, path=part.model, revision=part.revision, merged_path="")
        reward_model = RewardModel(part.model, revision=part.revision, dtype=part.dtype, micro_batch_size=1, mesh=mesh)
        if frozen_trunk:
            models = [member for each in settings.reward.parts() if each.model for member in each.members()]
            trunk = reward_model.params
            if len(models) == 1:  # the hash of several models is of all of them
                trunk = _checked(trunk, identity, "reward model")
    elif frozen_trunk:
        trunk = _initial_params(settings, tokenizer, mesh, "lm")
        if not settings.lora.enabled:
            trunk = setup.cast_copy(trunk, reference_dtype(settings.reference, policy), mesh)
        trunk = _checked(trunk, identity, "reference")
    if settings.critic.trunk == "shared":
        trunk |= trained["policy"]
    model = critic_model(settings, policy, reward_model and reward_model.model_config)
    return model, {**{k: v for k, v in trunk.items() if k not in ("lm_head", "score")}, **trained["critic"]}, source


def _initial_params(settings: Any, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, head: str) -> Params:
    """The initial parameters of a run; a randomly initialised head differs."""
    source = dataclasses.replace(settings.model, merged_path="")  # the run has written it
    settings = dataclasses.replace(settings, model=source)
    return quantize(setup.load_model(settings, tokenizer, mesh, head), settings.lora)


def _checked(params: Params, identity: Identity, name: str) -> Params:
    """The frozen parameters, if they are still those of the run."""
    if identity.get(name) != setup.params_fingerprint(params):
        raise StorageError(
            f"the {name} of this run were other parameters than its config leads to now: a model that it names has "
            "changed since; restore the old one"
        )
    return params
