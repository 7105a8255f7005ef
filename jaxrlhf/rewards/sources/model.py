"""Scores from a reward model: of a rollout's tokens where it shares the policy's tokenizer, of its text where not."""

import collections
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.compilation import Ahead
from jaxrlhf.config import DType, TokenizerSource
from jaxrlhf.data.batching import bucket
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from jaxrlhf.errors import DataError, quoted
from jaxrlhf.logprobs import last_token_scores
from jaxrlhf.models import ModelConfig, forward, init, scalar_head
from jaxrlhf.types import Params, Rollout
from jaxrlhf.weights import peft

Turns = list[dict[str, Any]]
READABLE = 0.9
"""Least share of the characters of the prompts that must survive a model's tokenizer."""
_PROBE = "Hello, world!  naïve 1234\n\tdef f(x): return x\n"
_scores = functools.partial(jax.jit, static_argnames="model")(last_token_scores)


@functools.partial(jax.jit, static_argnames="model")
def _token_scores(params: Params, model: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The score [B, T] after each token."""
    return scalar_head(params, model, forward(params, model, tokens, mask))


class RewardModel:
    """A frozen sequence classifier with one or two labels, in micro-batches of a fixed number of rows.

    With a `mesh`, `micro_batch_size` is rounded up to a multiple of the devices that share rows. The weights are loaded
    when they are first needed. Scores may be non-finite, if that is what the model says. Raises DataError if `path`
    holds a model without a scalar head, or a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        micro_batch_size: int,
        max_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.path, self.mesh = path, mesh
        self.revision = revision
        self._dtype: DType = runtime.resolve_dtype(dtype, jax.default_backend())
        described = weights.load_config(path, revision=revision)
        if described.head == "lm":
            raise DataError(
                f"{path} is a language model, not a reward model: its config.json names no sequence classification "
                "architecture. Train a reward model from it with `jaxrlhf reward`"
            )
        self.described = described
        """The model, before its weights are loaded."""
        self.tokenizer = load_tokenizer(weights.tokenizer_folder(path, revision), TokenizerSource())
        check_vocab(self.tokenizer, described.vocab_size)
        self.limit = min(described.max_positions, max_length or described.max_positions)
        shares = sharding.row_shards(mesh) if mesh else 1
        self.rows = -(-micro_batch_size // shares) * shares

    @functools.cached_property
    def _loaded(self) -> tuple[ModelConfig, Params]:
        dtype = self._dtype
        return weights.load(self.path, revision=self.revision, dtype=dtype, compute_dtype=dtype, mesh=self.mesh)

    def share(self, folder: Path, base: Params) -> None:
        """Lay this model over `base`, the frozen parameters of the model in `folder`, if it is adapters for that model
        in the same precision: then nothing is in memory twice."""
        whole, adapters = weights.described_by(weights.resolve(self.path, self.revision, weights=False))
        table = base["embed"]["embedding"]
        if (
            adapters
            and whole.samefile(folder)
            and (table.dtype, table.shape[0]) == (self._dtype, self.described.vocab_size)
        ):
            found, added = peft.read(adapters, self.described)
            model = dataclasses.replace(self.described, dtype=self._dtype, adapters=found)
            added = sharding.put_whole(added, self.mesh) if self.mesh else added
            trunk = {name: part for name, part in base.items() if name != "lm_head"}
            self.__dict__["_loaded"] = model, {**trunk, **added}

    def outline(self) -> None:
        """Let shapes stand for the parameters, unless they are there: for a plan, which loads nothing."""
        if "_loaded" not in self.__dict__:
            model = dataclasses.replace(self.described, dtype=self._dtype)
            shapes = jax.eval_shape(lambda: init(model, jax.random.key(0), dtype=self._dtype))
            places = sharding.shardings(shapes, self.mesh) if self.mesh else None
            self.__dict__["_loaded"] = model, sharding.with_shardings(shapes, places) if places else shapes

    def compile(self, ahead: Ahead, width: int, *, per_token: bool) -> None:
        """Begin to compile the scoring of rows of up to `width` tokens; the parameters may be shapes."""
        width = bucket(min(width, self.limit), self.limit)
        rows = np.zeros((self.rows, width), np.int32), np.ones((self.rows, width), bool)
        placed = sharding.put_rows(rows, self.mesh) if self.mesh else rows
        ahead.compile(_token_scores if per_token else _scores, self.params, self.model, *placed)

    @property
    def model(self) -> ModelConfig:
        return self._loaded[0]

    @property
    def params(self) -> Params:
        return self._loaded[1]

    def check_readable(self, texts: Sequence[str]) -> None:
        """DataError if too many characters of `texts` have no tokens here, so that their scores would mean nothing."""
        lost: collections.Counter[str] = collections.Counter()
        total = 0
        for text in texts:
            written = _letters(text)
            total += written.total()
            lost += written - _letters(self.tokenizer.decode(self.tokenizer.encode(text)))
        if lost.total() > (1 - READABLE) * total:
            examples = " ".join(repr(letter) for letter, _ in lost.most_common(5))
            raise DataError(
                f"reward model {self.path} cannot read the prompts: its tokenizer has no tokens for {lost.total()} of "
                f"{total} characters in the first {len(texts)} ({lost.total() / total:.0%}; {examples}; the first: "
                f"{quoted(texts[0])}). Use a reward model made for this language and script"
            )

    def shares_tokenizer(self, tokenizer: Tokenizer) -> bool:
        """Whether token ids of `tokenizer` mean the same to this model."""
        mine, size = self.tokenizer, tokenizer.size
        return (
            mine.size == size
            and mine.encode(_PROBE) == tokenizer.encode(_PROBE)
            and mine.convert_ids_to_tokens(range(size)) == tokenizer.convert_ids_to_tokens(range(size))
        )

    def score_rollout(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of a rollout by its token ids, read at the last real token."""
        return self.score_ids(
            [t[m].tolist() for t, m in zip(*map(np.asarray, (rollout.tokens, rollout.mask)), strict=True)]
        )

    def score_tokens(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B, R], truncated bool [B]): the score after each response token, by the rollout's token ids; 0
        outside the response mask. Tokens that do not fit the context score 0."""
        tokens, mask, response = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.response_mask))
        rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
        found, truncated = self._run(rows, _token_scores)
        answered = np.zeros(response.shape, np.float32)
        for i, values in enumerate(found):
            columns = np.flatnonzero(mask[i])[len(rows[i]) - len(values) :] - (mask.shape[1] - response.shape[1])
            answered[i, columns[columns >= 0]] = values[columns >= 0]
        return np.where(response, answered, 0), truncated

    def score_texts(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool],
        messages: Sequence[Turns | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of texts in this model's own tokens.

        A model with a chat format reads the prompt's turns (`messages`; failing that, one of a user) and an
        assistant's. Another reads prompt and completion as one plain text, a conversation as a transcript, with its end
        token where the completion is `finished`.
        """
        rows = []
        turns = messages or [None] * len(prompts)
        for prompt, completion, ended, before in zip(prompts, completions, finished, turns, strict=True):
            if self.tokenizer.has_chat:
                before = before or [{"role": "user", "content": prompt}]
                answer = {"role": "assistant", "content": completion}
                rows.append(self.tokenizer.render_chat([*before, answer], generation=False))
            else:
                text = (transcript(before) if before and len(before) > 1 else prompt) + completion
                rows.append(
                    (self.tokenizer.encode_prompt(text) if text else []) + [self.tokenizer.eos_id] * bool(ended)
                )
        return self.score_ids(rows)

    def score_written(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of texts as they stand, control tokens included where `escape` has not
        marked them as letters. Nothing is added but the token that begins every text, if this tokenizer has one."""
        assert self.tokenizer.bos_id is not None or not self.tokenizer.adds_bos
        first = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        return self.score_ids([[*first, *ids] for ids in self.tokenizer.encode_batch(texts)])  # type: ignore[list-item]

    def score_ids(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of token ids of this model."""
        found, truncated = self._run(rows, _scores)
        return np.array(found, np.float32), truncated

    def _run(self, rows: list[list[int]], program: Callable[..., Any]) -> tuple[list[Any], np.ndarray]:
        """(what `program` gives for each row, for rows of many numbers those of its tokens; truncated bool [B]).

        Rows of like length are read together. One longer than the context loses its beginning: the response is at its
        end.
        """
        truncated = np.array([len(row) > self.limit for row in rows])
        rows = [row[-self.limit :] or [self.tokenizer.eos_id] for row in rows]
        order = np.argsort([len(row) for row in rows], kind="stable")
        found: list[Any] = [None] * len(rows)
        pending = []
        for start in range(0, len(rows), self.rows):
            chosen = order[start : start + self.rows]
            width = bucket(len(rows[chosen[-1]]), self.limit)
            tokens = np.full((self.rows, width), self.tokenizer.pad_id, np.int32)
            mask = np.zeros((self.rows, width), bool)
            mask[:, 0] = True  # rows that only fill up
            for i, row in enumerate(chosen):
                tokens[i, : len(rows[row])], mask[i, : len(rows[row])] = rows[row], True
            placed = sharding.put_rows((tokens, mask), self.mesh) if self.mesh else (tokens, mask)
            pending.append((chosen, program(self.params, self.model, *placed)))
        for chosen, answer in pending:  # all slices are under way by now
            for row, value in zip(chosen, np.asarray(answer, np.float32), strict=False):
                found[row] = value[: len(rows[row])] if value.ndim else value
        return found, truncated


def transcript(turns: Turns) -> str:
    """A conversation as plain text, up to where the assistant takes over."""
    said = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n\n".join([*said, "Assistant: "])


def _letters(text: str) -> "collections.Counter[str]":
    """What a tokenizer should keep of a text: some normalise white space, capitals, accents and widths away."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return collections.Counter(c for c in plain if not c.isspace() and not unicodedata.combining(c))
