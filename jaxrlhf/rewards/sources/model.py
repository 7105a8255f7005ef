"""Scores from a reward model: of the rollout's tokens if it shares the policy's tokenizer, of the texts otherwise."""

import collections
import dataclasses
import functools
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.config import Component, DType, TokenizerSource
from jaxrlhf.config.base import AutoBool
from jaxrlhf.data.batching import bucket
from jaxrlhf.data.labels import describe
from jaxrlhf.data.messages import read_content
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, quoted
from jaxrlhf.files import read_json
from jaxrlhf.logprobs import last_token_scores
from jaxrlhf.models import ModelConfig, forward, scalar_head
from jaxrlhf.types import Params, Rollout
from jaxrlhf.weights import peft
from jaxrlhf.weights.families import ADD_EOS
from jaxrlhf.weights.hub import CONFIG

Messages = list[dict[str, Any]]
READABLE = 0.9
"""Minimum share of the prompts' characters that must survive encoding and decoding by the model's tokenizer."""
sequence_scores_jit = functools.partial(jax.jit, static_argnames="model")(last_token_scores)


@functools.partial(jax.jit, static_argnames="model")
def token_scores_jit(params: Params, model: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The score f32 [B, T] after each token."""
    return scalar_head(params, model, forward(params, model, tokens, mask))


class RewardModel:
    """A frozen sequence classifier with one or two labels, run in micro-batches of a fixed number of rows.

    With a `mesh`, `micro_batch_size` is rounded up to a multiple of its row shards. Weights are loaded on first use.
    Scores may be non-finite. Raises DataError if `path` holds a model without a scalar head, or a tokenizer that does
    not fit the model.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        micro_batch_size: int,
        max_length: int | None = None,
        add_eos: AutoBool = "auto",
        mesh: jax.sharding.Mesh | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        self.path, self.revision, self.mesh = path, revision, mesh
        self.dtype: DType = runtime.resolve_dtype(dtype, sharding.platform(mesh))
        self.model_config = weights.load_config(path, revision=revision)
        if self.model_config.head == "lm":
            raise DataError(
                f"{path} is a language model, not a reward model: its config.json names no sequence classification "
                "architecture. Train a reward model from it with `jaxrlhf reward`"
            )
        if mesh is not None:
            sharding.check_heads(self.model_config, mesh, f"the reward model {path}")
        self.tokenizer = load_tokenizer(weights.tokenizer_folder(path, revision), tokenizer or TokenizerSource())
        check_vocab(self.tokenizer, self.model_config.vocab_size)
        self.max_length = min(self.model_config.max_positions, max_length or self.model_config.max_positions)
        self._add_eos = self._end_option(add_eos)
        shards = sharding.row_shards(mesh) if mesh else 1
        self.micro_batch_size = -(-micro_batch_size // shards) * shards

    def _end_option(self, add_eos: AutoBool) -> bool | None:
        """True: an end token follows every completion; None: only those that ended by themselves."""
        if add_eos == "auto":
            folder, _ = weights.base_and_adapters(weights.resolve(self.path, self.revision, weights=False))
            return read_json(folder / CONFIG).get(ADD_EOS)
        if self.tokenizer.has_chat:
            raise ConfigError(
                f"add_eos is {add_eos}, but reward model {self.path} has a chat format, which ends the turns itself; "
                "leave add_eos out, or give the whole text as `template`"
            )
        return add_eos == "true"

    @functools.cached_property
    def _loaded(self) -> tuple[ModelConfig, Params]:
        dtype = self.dtype
        return weights.load(self.path, revision=self.revision, dtype=dtype, compute_dtype=dtype, mesh=self.mesh)

    @property
    def model(self) -> ModelConfig:
        """The configuration of the loaded model, with its dtype and adapters."""
        return self._loaded[0]

    @property
    def params(self) -> Params:
        return self._loaded[1]

    def share_base_params(self, folder: Path, base: Params) -> None:
        """Use `base`, the frozen parameters of the model in `folder`, instead of loading them a second time.

        Does nothing unless this reward model is adapters for that model in the same dtype.
        """
        base_folder, adapter_folder = weights.base_and_adapters(
            weights.resolve(self.path, self.revision, weights=False)
        )
        table = base["embed"]["embedding"]
        if (
            adapter_folder
            and base_folder.samefile(folder)
            and (table.dtype, table.shape[0]) == (self.dtype, self.model_config.vocab_size)
        ):
            adapters, adapter_params = peft.read(adapter_folder, self.model_config)
            model = dataclasses.replace(self.model_config, dtype=self.dtype, adapters=adapters)
            adapter_params = sharding.put_whole(adapter_params, self.mesh) if self.mesh else adapter_params
            trunk = {name: part for name, part in base.items() if name != "lm_head"}
            self.__dict__["_loaded"] = model, {**trunk, **adapter_params}

    def check_readable(self, texts: Sequence[str]) -> None:
        """Raise DataError if the tokenizer loses so many characters of `texts` that scores would be meaningless."""
        lost: collections.Counter[str] = collections.Counter()
        total = 0
        for text in texts:
            letters = _letters(text)
            total += letters.total()
            lost += letters - _letters(self.tokenizer.decode(self.tokenizer.encode(text)))
        if lost.total() > (1 - READABLE) * total:
            examples = " ".join(repr(letter) for letter, _ in lost.most_common(5))
            raise DataError(
                f"reward model {self.path} cannot read the prompts: its tokenizer has no tokens for {lost.total()} of "
                f"{total} characters in the first {len(texts)} ({lost.total() / total:.0%}; {examples}; the first: "
                f"{quoted(texts[0])}). Use a reward model for this language and script"
            )

    def shares_tokenizer(self, tokenizer: Tokenizer) -> bool:
        """True if the token ids of `tokenizer` mean the same to this model, which may have more (for padding)."""
        return self.tokenizer.has_ids_of(tokenizer)

    def score_rollout(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of a rollout's token ids, at the last real token."""
        return self.score_ids(
            [
                self.ended(row[real].tolist())
                for row, real in zip(*map(np.asarray, (rollout.tokens, rollout.mask)), strict=True)
            ]
        )

    def has_rows(self, rollout: Rollout) -> np.ndarray:
        """bool [B]: the embedding has a row for every token id. A policy with more rows can sample ids beyond it."""
        return np.where(rollout.mask, rollout.tokens, 0).max(axis=1) < self.model_config.vocab_size

    def ended(self, ids: list[int]) -> list[int]:
        """Token ids of a prompt and a completion with or without a final end token, by `add_eos`."""
        at_end = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        if self._add_eos is None or self._add_eos == at_end:
            return ids
        return [*ids, self.tokenizer.eos_id] if self._add_eos else ids[:-1]

    def score_tokens(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B, R], truncated bool [B]) of a rollout's token ids: the score after each response token.

        0 outside the response mask, and for tokens that do not fit the context.
        """
        tokens, mask, response_mask = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.response_mask))
        rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
        row_scores, truncated = self._run(rows, token_scores_jit)
        scores = np.zeros(response_mask.shape, np.float32)
        for i, values in enumerate(row_scores):
            columns = np.flatnonzero(mask[i])[len(rows[i]) - len(values) :] - (mask.shape[1] - response_mask.shape[1])
            scores[i, columns[columns >= 0]] = values[columns >= 0]
        return np.where(response_mask, scores, 0), truncated

    def score_texts(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool],
        messages: Sequence[Messages | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of texts, encoded by this model's tokenizer.

        A model with a chat format reads the prompt's `messages` (or the prompt as one user message), then the
        completion as an assistant message. Another model reads prompt and completion as one plain text, several
        messages as a transcript, followed by its end token if the completion is `finished` (or by `add_eos`).
        """
        rows = []
        conversations = messages or [None] * len(prompts)
        for prompt, completion, ended, turns in zip(prompts, completions, finished, conversations, strict=True):
            if self.tokenizer.has_chat:
                turns = turns or [{"role": "user", "content": prompt}]
                answer = {"role": "assistant", "content": completion}
                rows.append(self.tokenizer.render_chat([*turns, answer], generation=False))
            else:
                text = (transcript(turns) if turns and len(turns) > 1 else prompt) + completion
                ended = ended if self._add_eos is None else self._add_eos
                rows.append(
                    (self.tokenizer.encode_prompt(text) if text else []) + [self.tokenizer.eos_id] * bool(ended)
                )
        return self.score_ids(rows)

    def score_formatted(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of complete texts, whose control tokens are encoded as such unless
        escaped by `Tokenizer.escape`. Only a BOS token is added, if the tokenizer adds one."""
        assert self.tokenizer.bos_id is not None or not self.tokenizer.adds_bos
        first = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        return self.score_ids([[*first, *ids] for ids in self.tokenizer.encode_batch(texts)])  # type: ignore[list-item]

    def score_ids(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(scores f32 [B], truncated bool [B]) of token ids of this model. Raises DataError for ids without a row."""
        scores, truncated = self._run(rows, sequence_scores_jit)
        return np.array(scores, np.float32), truncated

    def padded_rows(self, width: int) -> tuple[Any, Any]:
        """(tokens int32, mask bool), shaped and placed like a micro-batch whose longest row has `width` tokens."""
        return self._micro_batch([[self.tokenizer.pad_id] * min(width, self.max_length)])

    def _run(self, rows: list[list[int]], program: Callable[..., Any]) -> tuple[list[Any], np.ndarray]:
        """(scores of each row, f32 scalar or [tokens]; truncated bool [B]).

        Rows are sorted by length into micro-batches. A row longer than the context loses its beginning, because the
        response is at its end.
        """
        size = self.model_config.vocab_size
        largest = max((max(row) for row in rows if row), default=0)
        if largest >= size:
            raise DataError(
                f"reward model {self.path} has rows for {size} tokens, and none for token {largest}; use a reward "
                "model with as many rows as the policy, and per_token: false for one with fewer"
            )
        truncated = np.array([len(row) > self.max_length for row in rows])
        rows = [row[-self.max_length :] or [self.tokenizer.eos_id] for row in rows]
        order = np.argsort([len(row) for row in rows], kind="stable")
        pending = []
        for start in range(0, len(rows), self.micro_batch_size):
            indices = order[start : start + self.micro_batch_size]
            batch = self._micro_batch([rows[i] for i in indices])
            pending.append((indices, program(self.params, self.model, *batch)))
        scores: list[Any] = [None] * len(rows)
        for indices, values in pending:  # fetched after all micro-batches have been dispatched
            for i, value in zip(indices, sharding.fetch(values).astype(np.float32), strict=False):
                scores[i] = value[: len(rows[i])] if value.ndim else value
        return scores, truncated

    def _micro_batch(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Pad `rows`, sorted by length, on the right to a bucketed width, and with filler rows to the batch size."""
        shape = self.micro_batch_size, bucket(len(rows[-1]), self.max_length)
        tokens, mask = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
        mask[:, 0] = True  # filler rows have one real token
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return sharding.put_rows((tokens, mask), self.mesh) if self.mesh else (tokens, mask)


def score(
    model: str | Path,
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    *,
    finished: Sequence[bool] | None = None,
    add_eos: AutoBool | bool = "auto",
    dtype: DType = "auto",
    micro_batch_size: int = 16,
) -> np.ndarray:
    """Score completions with a reward model: f32 [N], one number per completion.

    model: folder, run directory or hub id of a sequence classification model. With one label the score is its output,
        with two it is the probability of label 1.
    prompts: texts, or conversations as lists of messages.
    finished: bool per completion, True if it ended by itself and was not cut off; None: all are finished.
    add_eos: as `reward.add_eos`; True and False as "true" and "false".
    dtype: of the parameters and matrix products; "auto": float32 on a CPU, else bfloat16.
    micro_batch_size: rows per forward pass.
    A text longer than the model's context loses its beginning, with a warning. Raises ConfigError if the arguments
    differ in length and for invalid options, DataError for a model that cannot be used, for prompts and completions of
    other types and for a score that is not finite.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise ConfigError(
            "score: prompts and completions are lists; for one completion: score(model, [prompt], [text])"
        )
    finished = [True] * len(completions) if finished is None else finished
    if not len(prompts) == len(completions) == len(finished):
        raise ConfigError(
            f"score: {len(prompts)} prompts, {len(completions)} completions and {len(finished)} values of `finished`; "
            "give one of each per completion"
        )
    for i, text in enumerate(completions):
        if not isinstance(text, str):
            raise DataError(f"score: completion {i} is {describe(text)}; expected text")
    asked = {"dtype": dtype, "micro_batch_size": micro_batch_size, "add_eos": add_eos}
    options = Component(model=str(model), **asked)  # type: ignore[arg-type]
    judge = RewardModel(
        options.model, dtype=options.dtype, micro_batch_size=options.micro_batch_size, add_eos=options.add_eos
    )
    read = [_prompt(prompt, f"score: prompt {i}") for i, prompt in enumerate(prompts)]
    texts, messages = [text for text, _ in read], [turns for _, turns in read]
    scores, truncated = judge.score_texts(texts, completions, finished, messages)
    if truncated.any():
        warnings.warn(
            f"{truncated.sum()} of {len(scores)} texts are longer than the {judge.max_length} tokens of the reward "
            "model's context and lost their beginning",
            stacklevel=2,
        )
    if len(unusable := np.flatnonzero(~np.isfinite(scores))):
        i = unusable[0]
        raise DataError(f"reward model {model} gives {scores[i]} for completion {i}: {quoted(completions[i])}")
    return scores


def _prompt(prompt: Any, where: str) -> tuple[str, Messages | None]:
    """(text of a prompt, or of its last message; its normalised messages, None for text). Raises DataError."""
    if isinstance(prompt, str):
        return prompt, None
    turns = read_content(prompt, where)
    if not turns or isinstance(turns, str):
        raise DataError(f"{where} is {describe(prompt)}; expected text or a list of messages")
    return turns[-1]["content"], turns


def transcript(messages: Messages) -> str:
    """A conversation as plain text that ends with "Assistant: "."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant: "])


def _letters(text: str) -> "collections.Counter[str]":
    """Count characters, ignoring white space, case, accents and widths, which some tokenizers normalise away."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return collections.Counter(c for c in plain if not c.isspace() and not unicodedata.combining(c))
