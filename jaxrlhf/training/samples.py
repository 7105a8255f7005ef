"""Completions that supervised training shows while it goes on."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import memory, sharding
from jaxrlhf.compilation import Ahead
from jaxrlhf.config import Sampling
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, SFTRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout.decode import generate
from jaxrlhf.rollout.inference_copy import convert, inference_model
from jaxrlhf.rollout.text import response_texts
from jaxrlhf.training import setup
from jaxrlhf.types import Params


class Samples:
    """Draws a completion for each of `rows`, with room for it in the context."""

    def __init__(
        self,
        rows: Sequence[SFTRow],
        model: ModelConfig,
        tokenizer: Tokenizer,
        sampling: Sampling,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._model, self._inference = model, inference_model(model, model.dtype)
        self._tokenizer, begun = tokenizer, [_prompt(row, index) for index, row in enumerate(rows)]
        length = batching.bucket(max(len(row.tokens) for row in begun), model.max_positions)
        self._sampling = setup.fit_response(sampling, length, model)
        self._prompts = sharding.put_whole(batching.prompts(begun, tokenizer.pad_id, length), mesh)
        self._stops = tokenizer.stop_ids, tokenizer.pad_id

    def compile(self, programs: Ahead, params: Params, key: jax.Array) -> None:
        """Begin to compile what draws; `params` may be shapes."""
        copied = programs.compile(convert, params, self._model, self._inference).result()
        programs.compile(generate, copied, self._inference, self._prompts, key, self._sampling, *self._stops)

    def draw(self, params: Params, key: jax.Array) -> list[dict[str, Any]]:
        """Prompts and completions."""
        copied = convert(params, self._model, self._inference)
        rollout = generate(copied, self._inference, self._prompts, key, self._sampling, *self._stops)
        texts = response_texts(rollout, self._tokenizer)
        del copied  # all is drawn by now
        memory.release_free_memory()
        begun = zip(np.asarray(self._prompts.tokens), np.asarray(self._prompts.mask), strict=True)
        asked = [self._tokenizer.decode(tokens[mask].tolist()) for tokens, mask in begun]
        return [{"prompt": prompt, "completion": text} for prompt, text in zip(asked, texts, strict=True)]


def _prompt(row: SFTRow, index: int) -> PromptRow:
    """What comes before the first token to learn; of a text that is learnt whole, its first 8 tokens."""
    start = int(np.argmax(row.loss_mask))
    return PromptRow(tokens=row.tokens[: start if start > 1 else 8], text="", columns={}, index=index)
