"""Metrics of a run: one record per step, written to metrics.jsonl, TensorBoard, W&B and the console.

`keys` defines every metric, `console` prints, `plots` draws.
"""

import gzip
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import Logging
from jaxrlhf.errors import ConfigError, DataError, first_line, quoted
from jaxrlhf.files import write_whole
from jaxrlhf.metrics.console import Console
from jaxrlhf.metrics.keys import METRICS, REWARDS

TOKENS = "tokens"
"""The folder of token records in a run directory: one file `step-000012.jsonl.gz` for each step that has some."""


class Logger:
    """Write the records of one run. Files are flushed after every line, so a killed run loses no finished step.

    Args:
        directory: the run directory.
        config: what to show and where to send it.
        method: the command of the run (sft, ppo, ...).
        total_steps: steps of the whole run, for progress and remaining time.
        metric: the one that selects the best state, shown on the console by its key.
    """

    def __init__(self, directory: Path, config: Logging, method: str, total_steps: int, metric: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._config = directory, config
        self._purge_step: int | None = None
        self._writer: Any = None
        self._wandb = _open_wandb(config, directory) if config.wandb_project else None
        self._console = Console(method, total_steps, config, metric)
        self.note, self.paused = self._console.note, self._console.paused
        self._open()

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the record of `step` (1, 2, ...): numbers by their key in METRICS."""
        unknown = {key for key in record if not _is_metric(key)}
        assert not unknown, f"not in METRICS: {sorted(unknown)}"
        numbers = {key: _number(value) for key, value in record.items()}
        self._metrics.write(_line({"step": step, **numbers}))
        self._metrics.flush()
        if self._config.tensorboard:
            for key, value in numbers.items():
                self._tensorboard().add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)
        self._console.progress(step, numbers)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, show: bool = True) -> None:
        """Write rows ("prompt", "completion", and "score" or any other JSON value) and `show` the first few."""
        self._samples.writelines(_line({"step": step, **row}) for row in rows)
        self._samples.flush()
        for row in rows[: self._config.num_samples] if show else ():
            self._console.sample(step, row)

    def tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the token records of `step`, one row per sequence. Non-finite numbers are None in them."""
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_whole(
            self._directory / TOKENS / f"step-{step:06d}.jsonl.gz",
            gzip.compress(lines.encode("utf-8", "backslashreplace"), mtime=0),
        )

    def rewind(self, step: int) -> None:
        """Remove records after `step` and incomplete lines before the run resumes from `step`."""
        for path in (self._directory / TOKENS).glob("step-*.jsonl.gz"):
            if int(path.name.removeprefix("step-").removesuffix(".jsonl.gz")) > step:
                path.unlink()
        for file in (self._metrics, self._samples):
            file.close()
            _truncate(Path(file.name), step)
        self._purge_step = step + 1
        self._open()

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._samples.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
        self._console.close()

    def _open(self) -> None:
        # A lone surrogate, which UTF-8 cannot encode, is written as its JSON escape \udxxx.
        self._metrics, self._samples = (
            open(self._directory / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
            for name in ("metrics.jsonl", "samples.jsonl")
        )

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(
                str(self._directory / "tensorboard"), purge_step=self._purge_step, flush_secs=10
            )
        return self._writer


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl or the rows of a samples.jsonl, except an incomplete last line.

    "NaN", "Infinity" and "-Infinity" under a metric's key become floats. Raises DataError if the file is missing or a
    line is not a JSON object.
    """
    path, records = Path(path), []
    if not path.is_file():
        raise DataError(f"{path.parent} has no {path.name}: is it a run directory?")
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({first_line(error)})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object, found {quoted(record, 40)}")
        records.append({k: float(v) if isinstance(v, str) and _is_metric(k) else v for k, v in record.items()})
    return records


def _is_metric(key: str) -> bool:
    return key in METRICS or key.startswith(REWARDS)


def _number(value: Any) -> float | int:
    """Convert a Python, NumPy or JAX scalar to a Python number, exactly (float32 as float64)."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(dict(record)), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace non-finite floats, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _truncate(path: Path, step: int) -> None:
    """Keep the complete lines of `path` up to `step` (0: none), in one atomic replacement."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, b"".join(kept))


def _open_wandb(config: Logging, directory: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project is '{config.wandb_project}' but wandb is not installed; "
            "pip install 'jaxrlhf[wandb]', or leave it empty"
        ) from error
    wandb.init(project=config.wandb_project, name=directory.name, dir=str(directory))
    return wandb
