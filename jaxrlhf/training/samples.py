"""Sample completions, drawn during supervised training."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxrlhf import memory, sharding
from jaxrlhf.config import DistillConfig, DPOConfig, SFTConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, SFTRow, Split
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.inference_copy import convert, inference_model, split_axes
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.training import setup
from jaxrlhf.training.session import Session
from jaxrlhf.types import Params


class Samples:
    """Completes the first `logging.num_samples` held-out prompts, or training prompts, with the model in training.

    Raises ConfigError for `sampling` options that do not fit the model.
    """

    def __init__(
        self,
        rows: Split[Any],
        config: SFTConfig | DPOConfig | DistillConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
    ) -> None:
        check_sampling(config.sampling, model.vocab_size)
        examples = (rows.validation or rows.train)[: config.logging.num_samples]
        prompts = [_prompt(batching.texts(row)[0], index) for index, row in enumerate(examples)]
        self.columns = batching.bucket(max(len(row.tokens) for row in prompts), model.max_positions)
        self._count = len(prompts)
        prompts += prompts[-1:] * (-len(prompts) % sharding.row_shards(mesh))  # filled up; their samples are cut off
        self.batch, self.slots, self.mesh = len(prompts), 0, mesh
        self.prompts = sharding.put_rows(batching.prompts(prompts, tokenizer.pad_id, self.columns), mesh)
        self.sampling = setup.fit_response(config.sampling, self.columns, model)
        model = for_length(model, self.columns + self.sampling.response_length)
        at_a_time = self.batch // sharding.row_shards(mesh)
        self.model, self.decoder, self.tokenizer = model, inference_model(model, model.dtype, at_a_time), tokenizer
        self.conversion = model, self.decoder, mesh, split_axes(self.decoder, mesh, "auto")
        """Arguments of `convert` besides the parameters."""
        self.decoding = Decoding(
            self.decoder, self.sampling, tokenizer.stops(config.sampling.stop_strings), tokenizer.pad_id
        )

    def log(self, session: Session, step: int, params: Params, key: jax.Array) -> None:
        """Log completions of the state after `step`, drawn with the key of the run folded with `step`."""
        session.flush()
        session.log_samples(step, self.draw(params, jax.random.fold_in(key, step)))

    def draw(self, params: Params, key: jax.Array) -> list[dict[str, Any]]:
        """A record {"prompt", "completion"} for each row. Raises Interrupted after a request to stop, which is looked
        for between programs (`engine.generate_in_chunks`)."""
        decoder_params = convert(params, *self.conversion)
        rollout = engine.generate_in_chunks(decoder_params, self.decoding, self.prompts, key, mesh=self.mesh)
        _, completions = decode_completions(rollout, self.tokenizer, self.sampling.stop_strings)
        size = sum(x.nbytes for x in jax.tree.leaves(decoder_params))
        del decoder_params  # before its memory is given back
        memory.release_free_memory(size)
        rows = zip(*sharding.fetch((self.prompts.tokens, self.prompts.mask)), strict=True)
        prompts = [self.tokenizer.decode(tokens[mask].tolist()) for tokens, mask in rows]
        pairs = zip(prompts[: self._count], completions[: self._count], strict=True)
        return [{"prompt": prompt, "completion": text} for prompt, text in pairs]


def _prompt(row: SFTRow | PromptRow, index: int) -> PromptRow:
    """The tokens before the first one under the loss mask; the first 8 of a text that is trained on whole."""
    if isinstance(row, PromptRow):
        return dataclasses.replace(row, index=index)
    start = int(np.argmax(row.loss_mask))
    return PromptRow(tokens=row.tokens[: start if start > 1 else 8], text="", columns={}, index=index)
