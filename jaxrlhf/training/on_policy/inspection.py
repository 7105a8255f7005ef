"""A table of the tokens of one update: what PPO and GRPO computed for each."""

import dataclasses
import html
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import visible
from jaxrlhf.rollout.text import token_pieces
from jaxrlhf.types import Experience, GroupExperience, Rollout

SHOWN = 200
"""Rows of a table that are printed."""
_TAIL = 160  # characters of a prompt that are printed


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Response tokens of an update, one row each, grouped by prompt. Printing shows the first 200."""

    rows: list[dict[str, Any]]
    """A dict for each token, all with the same keys: those of `inspect`."""
    sequences: list[dict[str, Any]]
    """A dict for each sequence: `index`, `sample`, `prompt` and `completion` (text), `finished`, `tokens` (their
    number: 0 for a response that was left out: it had no score, or was truncated) and, of PPO, `score`."""
    labels: list[str] = dataclasses.field(repr=False)
    """The token of each row as printed: its text, or the vocabulary's entry if that is empty."""

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The table by column: `pandas.DataFrame(table.columns)`."""
        names = self.rows[0] if self.rows else ()
        return {name: [row[name] for row in self.rows] for name in names}

    def __str__(self) -> str:
        lines = []
        for title, header, rows in self._printed():
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            lines.append(title)
            for row in (header, *rows) if rows else ():
                cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
                cells[1] = row[1].ljust(widths[1])
                lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*lines, *self._rest()])

    def _repr_html_(self) -> str:
        parts = []
        for title, header, rows in self._printed():
            cells = ["".join(f"<td><pre>{html.escape(cell)}</pre></td>" for cell in row) for row in rows]
            head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
            body = "".join(f"<tr>{row}</tr>" for row in cells)
            parts.append(f"<p>{html.escape(title)}</p><table><tr>{head}</tr>{body}</table>")
        return "".join([*parts, *(f"<p>{html.escape(line)}</p>" for line in self._rest())])

    def _printed(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, names of columns, cells) of each sequence that is printed."""
        start = 0
        for sequence in self.sequences:
            if start >= SHOWN:
                return
            prompt = _one_line(sequence["prompt"])
            score = f", score {sequence['score']:.4g}" if "score" in sequence else ""
            title = f"prompt {sequence['index']}, sample {sequence['sample']}{score}: "
            title += prompt if len(prompt) <= _TAIL else f"... {prompt[-_TAIL:]}"
            if not sequence["tokens"]:
                yield f"{title}  (left out of the update)", [], []
                continue
            rows = self.rows[start : min(start + sequence["tokens"], SHOWN)]
            names = [name for name in rows[0] if name not in ("index", "sample", "position", "state", "token", "id")]
            cells = [
                [str(row["position"]), label, str(row["id"]), *(f"{row[name]:.4g}" for name in names)]
                for row, label in zip(rows, self.labels[start:], strict=False)
            ]
            yield title, ["position", "token", "id", *names], cells
            start += sequence["tokens"]

    def _rest(self) -> list[str]:
        more = len(self.rows) - SHOWN
        return [f"... and {more} more tokens: they are in `rows` and `columns`"] if more > 0 else []


def inspect(
    experience: Experience | GroupExperience,
    tokenizer: Tokenizer,
    *,
    new_logprobs: Array | np.ndarray | None = None,
) -> TokenTable:
    """Tabulate the response tokens of an update, with what training computed for each. Those of an environment are not
    in the table, but in `state`.

    Args:
        experience: that of `ppo_step` or `grpo_step`.
        tokenizer: the policy's, `trainer.tokenizer`.
        new_logprobs: log-probs of the tokens under the policy after the update, f32 of the shape of
            `experience.old_logprobs` (`trainer.logprobs(experience.rollout)`), for the column `ratio`.

    Columns, where the method has them (log-probs and KL in nats):
        index, sample: number of the prompt, and of the response among those to it.
        position: number of the token in its response, from 0.
        state: the text before the token: prompt and response so far, with the control tokens of the prompt.
        token, id: its text (see `jaxrlhf.rollout.text.token_pieces`) and its id.
        logprob, ref_logprob: log-probability under the policy that sampled (pi_old) and under the reference.
        kl: logprob - ref_logprob, the k1 estimate.
        reward: the score at the last token, scores of single tokens, and minus kl_coef * kl if the KL is in the reward.
        value: the critic's value V_t of the state.
        td_error: delta_t = reward_t + gamma V_t+1 - V_t; after the last token V is 0, or the critic's value if the
            response was truncated (`ppo.bootstrap_truncated`).
        raw_advantage: A_t = delta_t + gamma lam A_t+1 (generalised advantage estimation).
        advantage: as in the loss: whitened over the batch with `ppo.whiten_advantages`.
        return: the target of the critic.
        ratio: exp(new_logprobs - logprob).

    Raises TypeError for anything but an experience.
    """
    if not isinstance(experience, Experience | GroupExperience):
        raise TypeError(
            f"inspect takes an experience, not {type(experience).__name__}: "
            'inspect(result["experience"], trainer.tokenizer), where result is what ppo_step or grpo_step returned'
        )
    experience = on_host(experience)
    series = token_series(experience)
    if new_logprobs is not None and "logprob" in series:
        new = np.asarray(sharding.fetch(new_logprobs)).reshape(series["logprob"].shape)
        series["ratio"] = np.exp(new - series["logprob"])
    rollout, rows, sequences, labels = experience.rollout, [], [], []
    first = {index: i for i, index in reversed([*enumerate(rollout.index.tolist())])}
    for i in sorted(range(len(rollout.index)), key=lambda i: first[int(rollout.index[i])]):
        about, tokens, names = _tokens(rollout, i, tokenizer)
        score = {"score": float(experience.scores[i])} if isinstance(experience, Experience) else {}
        sequences.append(about | score)
        columns = {name: values[i][rollout.response_mask[i]].tolist() for name, values in series.items()}
        rows += [token | {name: values[t] for name, values in columns.items()} for t, token in enumerate(tokens)]
        labels += names
    return TokenTable(rows, sequences, labels)


def on_host(experience: Experience | GroupExperience) -> Any:
    """The experience in NumPy arrays [B, ...], a pair of responses in two rows, without what only an update reads."""
    rollout = dataclasses.replace(experience.rollout, support=None)
    experience = dataclasses.replace(experience, ref_hidden=None)
    if isinstance(experience, Experience):
        return sharding.fetch(dataclasses.replace(experience, rollout=rollout, features=None, weights=None))
    paired = rollout.tokens.ndim == 3
    if paired:
        rollout = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), rollout)
    return sharding.fetch(dataclasses.replace(experience, rollout=rollout))


def token_series(experience: Any) -> dict[str, np.ndarray]:
    """The numbers of every response token by name (see `inspect`), each f32 [B, R], as far as the experience, from
    `on_host`, has them."""
    shape = experience.rollout.response_mask.shape
    old, ref = (None if x is None else x.reshape(shape) for x in (experience.old_logprobs, experience.ref_logprobs))
    found: dict[str, Any] = {"logprob": old, "ref_logprob": ref}
    found["kl"] = None if old is None or ref is None else old - ref
    if isinstance(experience, Experience):
        td_errors, raw_advantages = _gae(experience)
        found |= {
            "reward": experience.rewards,
            "value": experience.values,
            "td_error": td_errors,
            "raw_advantage": raw_advantages,
            "advantage": experience.advantages,
            "return": experience.returns,
        }
    elif experience.advantages.shape == shape:  # a pair has none
        found["advantage"] = experience.advantages
    return {name: np.asarray(values) for name, values in found.items() if values is not None}


def _gae(experience: Experience) -> tuple[np.ndarray, np.ndarray]:
    """(TD errors, advantages before whitening), each f32 [B, R]: those of `algorithms.advantages`, in NumPy, so that
    nothing is compiled to look at an update."""
    rewards, values, mask = (
        np.asarray(x) for x in (experience.rewards, experience.values, experience.rollout.response_mask)
    )
    lam: Any = experience.lam
    if experience.lam_alpha is not None:
        lam = np.maximum(1 - 1 / (experience.lam_alpha * np.maximum(mask.sum(1), 1)), 0)
    errors, advantages = np.zeros_like(rewards), np.zeros_like(rewards)
    next_value, next_advantage = np.asarray(experience.bootstrap), np.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        errors[:, t] = np.where(mask[:, t], rewards[:, t] + experience.gamma * next_value - values[:, t], 0)
        advantages[:, t] = errors[:, t] + experience.gamma * lam * next_advantage * mask[:, t]
        next_value = np.where(mask[:, t], values[:, t], next_value)
        next_advantage = np.where(mask[:, t], advantages[:, t], next_advantage)
    return errors, advantages


def _tokens(rollout: Rollout, i: int, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(facts of sequence i, for each of its tokens those of its row, and its label)."""
    width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
    prompt = rollout.tokens[i, :width][rollout.mask[i, :width]].tolist()
    ids = rollout.tokens[i, width:][rollout.mask[i, width:]].tolist()
    pieces = token_pieces(ids, prompt, tokenizer)
    sampled = rollout.response_mask[i, : len(ids)].tolist()
    text, where = tokenizer.decode(prompt, control=True), {"index": int(rollout.index[i])}
    where["sample"] = int(rollout.sample[i])
    rows, state = [], text
    for position, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        if sampled[position]:
            rows.append(where | {"position": position, "state": state, "token": piece, "id": token})
        state += piece
    about = {"prompt": text, "completion": "".join(pieces), "finished": bool(rollout.finished[i]), "tokens": len(rows)}
    labels = token_labels(ids, pieces, tokenizer)
    return where | about, rows, [label for label, own in zip(labels, sampled, strict=True) if own]


def token_labels(ids: Sequence[int], pieces: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The pieces on one line each, and the vocabulary's entry for a token without text."""
    entries = tokenizer.convert_ids_to_tokens(ids)
    return [_one_line(piece or entry) for piece, entry in zip(pieces, entries, strict=True)]


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
