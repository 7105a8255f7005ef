"""What a run measures and where it goes: one record per step -> metrics.jsonl, TensorBoard, W&B and the console."""

import contextlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import Logging
from jaxrlhf.console import Console
from jaxrlhf.errors import ConfigError, DataError, first_line, quoted
from jaxrlhf.files import write_whole

PREFERENCES: dict[str, str] = {
    "rewards/chosen": "mean over pairs of the chosen response's reward; kto: over rows with a true label",
    "rewards/rejected": "the same of rejected responses; kto: of rows with a false label",
    "rewards/accuracies": "share of pairs whose chosen response has the higher reward",
    "rewards/margins": "rewards/chosen - rewards/rejected",
    "logps/chosen": "mean over pairs (kto: rows with a true label) of log p(chosen), summed over its tokens, nats",
    "logps/rejected": "the same of rejected responses",
    "nll_loss": "the SFT term before its weight: mean over tokens of chosen responses of -log p",
    "log_odds_chosen": "ORPO: mean over pairs of the log odds ratio, chosen against rejected",
    "log_odds_ratio": "ORPO: mean over pairs of log sigmoid of it",
    "share/chosen": "KTO: share of rows with a true label",
    "share/rejected": "KTO: share of rows with a false label",
    "kl": "KTO: the baseline, mean log(policy / reference) of answers to other prompts, at least 0",
    "beta": "beta of this step",
}
METRICS: dict[str, str] = {
    # every trainer
    "epoch": "passes over the training rows so far",
    "learning_rate": "learning rate of this step; in PPO the policy's",
    "grad_norm": "global norm of the gradient before clipping",
    "grad_norm_clipped": "global norm of the gradient after clipping",
    "num_tokens": "tokens learnt in this step",
    "skipped_updates": "optimizer steps of this record that were left out because loss or gradient was not finite",
    # SFT
    "loss": "SFT: mean over loss tokens of -log p; reward model: the loss that it learns by, mean over rows; "
    "DPO: what dpo.loss says, mean over rows, and the SFT term",
    "entropy": "mean over loss tokens of the entropy of the next-token distribution, nats",
    "eval/loss": "`loss` over all held-out rows",
    "eval/entropy": "`entropy` over all held-out rows",
    # reward model
    "accuracy": "share of pairs whose chosen response scores higher (ties are none of them, but count); of a ranking "
    "the share of its pairs in order, mean over rankings; share of labelled responses with the label's sign",
    "margin": "mean over pairs of chosen score - rejected score (0 for a tie)",
    "ties": "share of pairs that are ties",
    "absolute_error": "mean over scored responses of |score - target|",
    "min_reward": "least score of the batch, of all responses together",
    "mean_reward": "mean score of the batch, of all responses together (of rankings, mean of their means)",
    "max_reward": "greatest score of the batch, of all responses together",
    "eval/accuracy": "`accuracy` over all held-out rows but ties",
    "eval/margin": "`margin` over all held-out rows but ties",
    "eval/ties": "`ties` over all held-out rows",
    "eval/absolute_error": "`absolute_error` over all held-out rows",
    "eval/mean_reward": "`mean_reward` over all held-out rows",
    "eval/ece": "held-out rows: expected calibration error of sigmoid(chosen - rejected); of labels, sigmoid(score)",
    "eval/auc": "held-out labels: share of all (good, bad) where the good response scores higher, a tie half",
    "eval/correlation": "held-out scores: Pearson correlation of score and target",
    "eval/length_accuracy": "held-out rows: accuracy of length alone, longer or shorter as better, whichever is more",
    # DPO and its relatives; a pair's reward is beta log(policy / reference), without a reference beta log p per token
    **PREFERENCES,
    **{f"eval/{key}": f"`{key}` over all held-out rows" for key in PREFERENCES if key != "beta"},
    # PPO; per sequence: the sum over response tokens, then the mean over the batch
    "objective/kl": "per sequence: sum of k1 = log pi_old - log ref at the sampled tokens, nats",
    "objective/kl_per_token": "mean over response tokens of k1, nats",
    "objective/kl_k3": "per sequence: sum of k3 = exp(-k1) - 1 + k1, nats: never negative, the same mean",
    "objective/entropy_per_token": "mean over response tokens of the entropy of pi_old, nats",
    "objective/raw_scores": "mean over sequences of the score as rewards gave it",
    "objective/score_length_correlation": "Pearson correlation over sequences of score and length in tokens",
    "objective/kl_coef": "coefficient of the KL in this step's rewards or loss",
    "objective/entropy": "per sequence: sum of the entropy of pi_old at each response token, nats",
    "objective/non_score_reward": "per sequence: sum of rewards but for the score, -kl_coef * k1; 0 with kl_in: loss",
    "objective/rlhf_reward": "mean over sequences of score - kl_coef * sum of k1, whether kl_in is reward or loss",
    "objective/scores": "mean over sequences of the score as `scores` shapes it, rewards of single tokens added",
    "objective/scores_std": "standard deviation over sequences of the score",
    "policy/approxkl_avg": "mean over response tokens and optimizer steps of 0.5 (log pi - log pi_old)^2",
    "policy/clipfrac_avg": "share of response tokens where the clipped policy loss is the larger",
    "policy/clipfrac_high_avg": "of those, at a ratio above 1 + cliprange_high",
    "policy/clipfrac_low_avg": "of those, at a ratio below 1 - cliprange",
    "policy/dual_clipfrac_avg": "share of response tokens that dual_clip holds",
    "policy/kl_avg": "mean over response tokens and optimizer steps of pi / pi_old - 1 - log(pi / pi_old), nats",
    "policy/steps": "mini-batches looked at in this update; where target_kl ended it, the last was not learnt from",
    "policy/entropy_avg": "mean over response tokens and optimizer steps of the policy's entropy, nats",
    "loss/policy_avg": "policy loss of PPO or of grpo.method, mean over response tokens and optimizer steps",
    "loss/value_avg": "clipped value loss (halved squares), mean over response tokens and optimizer steps",
    "loss/kl_avg": "with kl_in: loss, mean over response tokens and optimizer steps of k2 or pi / pi_old * k3",
    "val/clipfrac_avg": "share of response tokens where the clipped value loss is the larger",
    "val/ratio": "pi / pi_old, mean over response tokens and optimizer steps",
    "val/ratio_var": "variance of pi / pi_old over response tokens, mean over optimizer steps",
    "val/first_log_ratio_max": "largest |log pi - log pi_old| at the first optimizer step: 0 up to rounding",
    "val/log_ratio_max": "largest |log pi - log pi_old| over response tokens and optimizer steps",
    "val/sampler_logprob_gap": "mean over response tokens of |log-prob of the sampler - log-prob of the trainer|",
    "val/sampler_logprob_gap_max": "largest |log-prob of the sampler - log-prob of the trainer|",
    "val/sampler_ratio_q01": "1 % quantile over response tokens of pi_old / pi_sampler",
    "val/sampler_ratio_q50": "its median",
    "val/sampler_ratio_q99": "its 99 % quantile",
    "val/sampler_corrected": "share of response tokens that sampler_correction cut or left out",
    "val/advantage_mean": "mean over response tokens of the advantage before whitening",
    "val/value_mean": "mean over response tokens of the value",
    "val/num_eos_tokens": "responses of the batch that ended with a stop token or string",
    "val/explained_variance": "1 - Var(returns - values) / Var(returns) over response tokens; 0 if returns do not vary",
    "policy/grad_norm": "global norm of the policy's gradient before clipping, mean over optimizer steps",
    "policy/grad_norm_clipped": "the same after clipping",
    "critic/learning_rate": "learning rate of the critic, mean over optimizer steps",
    "critic/grad_norm": "global norm of the critic's gradient before clipping, mean over optimizer steps",
    "critic/grad_norm_clipped": "the same after clipping",
    "tokens/mean_length": "mean response length, stop token included",
    "tokens/min_length": "least response length",
    "tokens/max_length": "greatest response length",
    "tokens/finished": "share of responses that ended with a stop token or string; the others were truncated",
    "tokens/identical": "1 - different responses / responses of the batch",
    "eval/scores": "held-out prompts: mean score of a sampled response, as rewards give it (before `scores`)",
    "eval/scores_greedy": "held-out prompts: mean score of the greedy response",
    "eval/kl": "held-out prompts: KL of sampled responses to the reference, nats per response",
    "eval/win_rate": "held-out prompts: share whose sampled response scores higher than that of step 0, ties half",
    "eval/gain": "eval/scores less that of step 0",
    "eval/mean_length": "held-out prompts: mean length of a sampled response",
    "eval/finished": "held-out prompts: share of sampled responses that ended with a stop token or string",
    "eval/heldout_scores": "held-out prompts: mean score by validation.reward_model",
    "eval/heldout_gain": "eval/heldout_scores less that of step 0",
    "alarm/kl": "1 where KL to the reference is over alarms.kl",
    "alarm/entropy": "1 where entropy has collapsed (alarms.entropy)",
    "alarm/length": "1 where the score follows length (alarms.length_correlation)",
    "alarm/finished": "1 where far fewer responses finish than at first (alarms.finished)",
    "alarm/held_out": "1 where score and held-out reward model moved apart since step 0",
    "episode": "responses since the start; of refills those that took another's place",
    # GRPO and its relatives
    "groups/count": "groups: prompts of the batch",
    "groups/flat": "groups whose scores, as `scores` shapes them, are all equal: their advantages are 0",
    "groups/single": "groups of one response; each that no reward had an opinion on is one",
    "groups/refills": "further rollouts of this update (grpo.max_refills)",
    "groups/replaced": "flat groups that gave way to one of a refill",
    "groups/tied": "online DPO: groups whose best and worst score alike: no pair is made of them",
    "objective/greedy_scores": "ReMax: mean score of the greedy response, as rewards gave it",
    "rewards/chosen": "online DPO: mean over pairs of beta log(pi / ref) of the chosen response",
    "rewards/rejected": "the same of the rejected response",
    "rewards/accuracies": "share of pairs where that of the chosen response is larger",
    "rewards/margins": "mean over pairs of the difference",
    "perf/response_tokens_per_second": "response tokens per wall-clock second of generation",
    "perf/rollout_seconds": "wall-clock seconds of generation",
    "perf/reward_seconds": "wall-clock seconds of scoring",
}
"""Every key of a record and what it means. `perf/...` are timings: they alone differ between equal runs."""

REWARDS = "rewards/"
"""Keys that begin so are a part of the score by its own name: `mean` and `std` over the batch, before its weight
(NAME_unanswered and NAME_truncated: shares of the completions without an opinion, and of those a model could not read
whole; NAME_spread: standard deviation between the models of an ensemble); `errors`, completions without a usable
answer; `length_correlation`, Pearson's, with the number of response tokens (0 where one of the two does not vary)."""


class Logger:
    """Writes the records of one run. Files are flushed line by line, so a killed run loses no finished step.

    Args:
        directory: the run directory.
        config: what to show and where to send it.
        method: the command that runs.
        total_steps: steps of the whole run, for progress and time left.
    """

    def __init__(self, directory: Path, config: Logging, method: str, total_steps: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._config = directory, config
        self._purge: int | None = None
        self._writer: Any = None
        self._wandb = _wandb(config, directory) if config.wandb_project else None
        self._console = None if config.quiet else Console(method, total_steps, config.log_every)
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
        if self._console:
            self._console.progress(step, numbers)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows ("prompt", "completion", and "score" or anything else that is JSON), and show the first few."""
        self._samples.writelines(_line({"step": step, **row}) for row in rows)
        self._samples.flush()
        if self._console:
            for row in rows[: self._config.num_samples]:
                self._console.sample(step, row)

    def note(self, text: str) -> None:
        """Say something on the console, between the progress lines."""
        if self._console:
            self._console.note(text)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, the console draws nothing."""
        return self._console.paused() if self._console else contextlib.nullcontext()

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`, and lines that a kill cut short: what follows is written anew."""
        self._metrics.close()
        self._samples.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut(self._directory / name, step)
        self._purge = step + 1
        self._open()

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._samples.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
        if self._console:
            self._console.close()

    def _open(self) -> None:
        # half of a surrogate pair, which UTF-8 refuses, becomes \udxxx: that is how JSON spells it
        mode: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
        self._metrics = open(self._directory / "metrics.jsonl", "a", **mode)  # noqa: SIM115
        self._samples = open(self._directory / "samples.jsonl", "a", **mode)  # noqa: SIM115

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=self._purge, flush_secs=10)
        return self._writer


def read(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, or the rows of a samples.jsonl. A line that is being written is left out.

    "NaN", "Infinity" and "-Infinity" under the key of a metric become floats again. Raises DataError if the file is
    missing or a line is not a record.
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
    """A Python number of a Python, numpy or jax scalar. Floats keep every bit (float32 as float64)."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(dict(record)), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite: a string takes its place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _cut(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`, in one atomic replacement; none where nothing has been done (0)."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, b"".join(kept))


def _wandb(config: Logging, directory: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project is '{config.wandb_project}' but wandb is not installed; "
            "pip install 'jaxrlhf[wandb]', or leave it empty"
        ) from error
    wandb.init(project=config.wandb_project, name=directory.name, dir=str(directory))
    return wandb
