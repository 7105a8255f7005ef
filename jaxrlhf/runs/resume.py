"""Comparison of a config with that of the run it resumes."""

import contextlib
import platform
import re
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf import distributed, runtime
from jaxrlhf.config import text, yaml12
from jaxrlhf.config.file import load_config
from jaxrlhf.config.reader import read_config
from jaxrlhf.errors import ConfigError, StorageError, first_line
from jaxrlhf.runs.record import read_record
from jaxrlhf.secrets import redact_value, same

PACKAGES = ("jaxrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers")
FREE = (
    "run_dir",
    "logging.",
    "checkpoint.",
    "alarms.",
    "validation.eval_steps",
    "validation.patience",
    "optim.offload",
    "optim.idle_steps",
    "reference.offload",
    "dpo.reference_folder",
    "data.max_line_mb",
    "data.max_gz_ratio",
)
"""Keys that do not affect the result."""
REWARD_FAILURES = (
    ".timeout",
    ".on_error",
    ".error_value",
    ".judge.url",
    ".judge.api_key_env",
    ".judge.concurrency",
    ".judge.request_timeout",
    ".judge.retries",
    ".judge.input_price",
    ".judge.output_price",
)
"""Keys of a reward component that may change after it has failed, as those of its headers may; failed completions were
not trained on."""
TEMPLATE_DATE = "tokenizer.template_date"
"""Kept from the start of a run; free in a run that was started before there was such a key."""
ROUNDING = (
    "mesh.",
    "micro_batch_size",
    "eval_batch_size",
    "local_rollout_forward_batch_size",
    "remat",
    "model.attention",
    "rollout.slots",
)
"""Keys that change the order of sums: the result is equal up to rounding, not bit for bit."""
LENGTH = (
    "train.num_train_epochs",
    "train.max_steps",
    "ppo.total_episodes",
    "ppo.num_train_epochs",
    "grpo.total_episodes",
    "grpo.num_train_epochs",
)
"""Keys that only set the last step; free as long as no schedule depends on it."""


def check_resume(directory: Path, config: Any, method: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the record (run.json) of the run in `directory`, and notes on changes that cost bitwise equality.

    Raises:
        StorageError: the run has another method, its record cannot be read, or `config` would change the result.
    """
    try:
        record = read_record(directory)
        before = flatten(yaml12.load(read_config(directory / "config.yaml")))
        with contextlib.suppress(ConfigError):  # adds the options of list elements that are newer than the run
            complete = load_config(method, directory / "config.yaml", partial=True)
            before = flatten(yaml.safe_load(text.dump(complete))) | before
        old_method, old_versions = record["method"], record.get("versions", {})
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise StorageError(
            f"{directory} has checkpoints, but its run.json or config.yaml cannot be read ({first_line(error)}), so "
            "the run cannot be resumed; restore these files, or start over with --fresh"
        ) from error
    if old_method != method:
        raise StorageError(
            f"{directory} holds a run of '{old_method}' and not of '{method}'; choose another run_dir, or use --fresh"
        )
    now = flatten(yaml.safe_load(text.dump(config)))
    before = flatten(yaml.safe_load(text.dump(type(config)()))) | before  # defaults for options newer than the run
    schedules = [(keys.get("optim.schedule"), keys.get("dpo.beta_schedule", "constant")) for keys in (before, now)]
    constant = schedules == [("constant", "constant")] * 2
    rounding, refused = [], []
    for key in now | before:
        old, new = before.get(key, "(not set)"), now.get(key, "(not set)")
        free = key.startswith(FREE) or (constant and key in LENGTH) or (key == TEMPLATE_DATE and not old)
        failed = key.endswith(REWARD_FAILURES) or re.search(r"\.headers(\.|$)", key)
        if same(key, old, new) or free or (key.startswith("reward.components.") and failed):
            continue
        target = rounding if key.startswith(ROUNDING) or key.endswith(ROUNDING) else refused
        target.append(f"{key}: {redact_value(old, key.rpartition('.')[2])} -> {new}")
    if refused:
        raise StorageError(
            f"{directory} holds a run with another config:\n"
            + "\n".join(f"  {change}" for change in refused)
            + f"\nSet these back to resume (the old config is {directory / 'config.yaml'}), start over with --fresh "
            "(the old run is kept beside it), or choose another run_dir."
        )
    processes = record["starts"][-1].get("processes", 1), distributed.count()
    rounding += ["processes: {} -> {}".format(*processes)] if processes[0] != processes[1] else []
    notes = [f"{change}: equal up to rounding, not bit for bit" for change in rounding]
    notes += [
        f"{package} was {old_versions.get(package)} when this run started and is {version} now: not bit for bit"
        for package, version in versions().items()
        if package != "jaxrlhf" and old_versions.get(package) != version
    ]
    return record, tuple(notes)


def versions() -> dict[str, str]:
    """Versions of python and of the installed PACKAGES."""
    found = {package: version for package in PACKAGES if (version := runtime.version(package))}
    return {"python": platform.python_version(), **found}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"eps": 1}, "parts": [{"a": 2}]} -> {"optim.eps": 1, "parts": "a list of 1", "parts.0.a": 2}"""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat[f"{prefix}{key}"] = f"a list of {len(value)}"
            value = {str(i): item for i, item in enumerate(value)}
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
