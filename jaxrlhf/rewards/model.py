"""Scores from a reward model: of a rollout's tokens where it shares the policy's tokenizer, of its text where not."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.config import DType, TokenizerSource
from jaxrlhf.data.batching import bucket
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from jaxrlhf.errors import DataError, RewardError
from jaxrlhf.logprobs import last_token_scores
from jaxrlhf.types import Rollout

_PROBE = "Hello, world!  naïve 1234\n\tdef f(x): return x\n"
_scores = functools.partial(jax.jit, static_argnames="model")(last_token_scores)


class RewardModel:
    """A frozen sequence classifier with one or two labels, in micro-batches of a fixed number of rows.

    With a `mesh`, `micro_batch_size` is rounded up to a multiple of the devices that share rows. Raises DataError if
    `path` holds a model without a scalar head, or a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        micro_batch_size: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        resolved = runtime.resolve_dtype(dtype, jax.default_backend())
        self.path, self.mesh = path, mesh
        described = weights.load_config(path, revision=revision)
        if described.head == "lm":
            raise DataError(
                f"{path} is a language model, not a reward model: its config.json names no sequence classification "
                "architecture. Train a reward model from it with `jaxrlhf reward`"
            )
        self.tokenizer = load_tokenizer(weights.resolve(path, revision, weights=False), TokenizerSource())
        check_vocab(self.tokenizer, described.vocab_size)
        self.model, self.params = weights.load(
            path, revision=revision, dtype=resolved, compute_dtype=resolved, mesh=mesh
        )
        shares = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
        self.rows = -(-micro_batch_size // shares) * shares

    def shares_tokenizer(self, tokenizer: Tokenizer) -> bool:
        """Whether token ids of `tokenizer` mean the same to this model."""
        mine, size = self.tokenizer, tokenizer.size
        return (
            mine.size == size
            and mine.encode(_PROBE) == tokenizer.encode(_PROBE)
            and mine.pieces(range(size)) == tokenizer.pieces(range(size))
        )

    def score_rollout(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of a rollout by its token ids, read at the last real token."""
        return self._score(
            [t[m].tolist() for t, m in zip(*map(np.asarray, (rollout.tokens, rollout.mask)), strict=True)]
        )

    def score_texts(
        self, prompts: Sequence[str], completions: Sequence[str], finished: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of texts in this model's own tokens.

        A model with a chat format reads a user's and an assistant's turn. Another reads prompt and completion as one
        plain text, with its end token where the completion is `finished`.
        """
        rows = []
        for prompt, completion, ended in zip(prompts, completions, finished, strict=True):
            if self.tokenizer.has_chat:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                rows.append(self.tokenizer.render_chat(turns, generation=False))
            else:
                text = prompt + completion
                rows.append((self.tokenizer.prompt_ids(text) if text else []) + [self.tokenizer.eos_id] * bool(ended))
        return self._score(rows)

    def _score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of like length are read together. One longer than the context loses its beginning: the response is at
        its end."""
        limit = self.model.max_positions
        truncated = np.array([len(row) > limit for row in rows])
        rows = [row[-limit:] or [self.tokenizer.eos_id] for row in rows]
        order = np.argsort([len(row) for row in rows], kind="stable")
        scores = np.empty(len(rows), np.float32)
        pending = []
        for start in range(0, len(rows), self.rows):
            chosen = order[start : start + self.rows]
            width = bucket(len(rows[chosen[-1]]), limit)
            tokens = np.full((self.rows, width), self.tokenizer.pad_id, np.int32)
            mask = np.zeros((self.rows, width), bool)
            mask[:, 0] = True  # rows that only fill up
            for i, row in enumerate(chosen):
                tokens[i, : len(rows[row])], mask[i, : len(rows[row])] = rows[row], True
            placed = sharding.put_rows((tokens, mask), self.mesh) if self.mesh else (tokens, mask)
            pending.append((chosen, _scores(self.params, self.model, *placed)))
        for chosen, found in pending:  # all slices are under way by now
            scores[chosen] = np.asarray(found, np.float32)[: len(chosen)]
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RewardError(f"reward model {self.path} gave {scores[bad]} for completion {bad}")
        return scores, truncated
