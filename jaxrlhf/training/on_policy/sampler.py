"""Responses to prompts from the current policy, on the device and as text."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import jax
from jax import Array

from jaxrlhf import memory, sharding
from jaxrlhf.config import DistillConfig, Environment, GRPOConfig, PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout import engine, turns
from jaxrlhf.rollout.cache import check_slots
from jaxrlhf.rollout.decode import Decoding, rollout_shapes, trim
from jaxrlhf.rollout.inference_copy import RolloutDType, convert, inference_model, split_axes
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.training import setup
from jaxrlhf.types import Params, Prompts, Rollout

LOWER = "data.max_prompt_length or sampling.response_length"


class Sampler:
    """Generates the responses of an update, a group of them to each prompt. `longest` is the number of tokens of the
    longest known prompt (0: none is known), and `widths` are the columns that prompts are padded to, narrowest first,
    where they fit (the others: `batching.bucket`).

    Raises ConfigError for what the model cannot do: prompts and responses beyond its context, filters beyond its
    vocabulary.
    """

    def __init__(
        self,
        config: PPOConfig | GRPOConfig | DistillConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        longest: int,
        environment: tuple[turns.Partner, Environment] | None = None,
        widths: Sequence[int] = (),
    ) -> None:
        self.sampling, self.model, self.tokenizer, self.mesh = config.sampling, model, tokenizer, mesh
        self.batch, self._group, self.longest = config.settings.batch_size, config.settings.group, longest
        self._environment, self._widths = environment, widths
        dtype: RolloutDType = model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
        rows = min(config.rollout.slots or self.batch, self.batch)
        self.decoder = inference_model(model, dtype, -(-rows // sharding.row_shards(mesh)))
        """The model that decodes."""
        self.conversion = model, self.decoder, mesh, split_axes(self.decoder, mesh, config.rollout.layout)
        """Arguments of `convert` besides the parameters."""
        self.columns = 0
        """Prompt columns that fit every known prompt, so that few programs are compiled."""
        self.stops = tokenizer.stops(config.sampling.stop_strings), tokenizer.pad_id
        check_sampling(config.sampling, model.vocab_size)
        if longest:
            self._check_context(longest)
            self.columns = batching.bucket(longest, model.max_positions - config.sampling.response_length)
        self.slots = config.rollout.slots
        if 0 < self.slots < self.batch:
            sharding.check_rows(self.slots, mesh, "rollout.slots")

    def check_memory(self) -> None:
        """Raise ConfigError for more slots than the device has free memory for; call it when all else is loaded."""
        rows = min(self.slots or self.batch, self.batch)
        check_slots(self.decoder, rows, self.columns + self.sampling.response_length, self.mesh)

    def inference_copy(self, params: Params) -> Params:
        """The policy's parameters, prepared for decoding."""
        return convert(params, *self.conversion)

    def generate(
        self, params: Params, rows: Sequence[PromptRow], key: Array, *, greedy: bool = False
    ) -> tuple[Rollout, list[str]]:
        """A response to each row's prompt, all at once or in `rollout.slots`: the rollout and its completions."""
        decoder_params = self.inference_copy(params)
        rollout = self.draw(decoder_params, rows, key, greedy=greedy)
        size = sum(x.nbytes for x in jax.tree.leaves(decoder_params))
        del decoder_params  # but the device still uses it until the rollout is there
        finished = self.finished(rollout)
        memory.release_free_memory(size)
        return finished

    def draw(self, decoder_params: Params, rows: Sequence[PromptRow], key: Array, *, greedy: bool = False) -> Rollout:
        """`generate` with an inference copy, up to the rollout as it was drawn: on the host if there are slots."""
        group, slots = 1 if greedy else self.shared(len(rows)), self.slots if self.slots < len(rows) else 0
        return self._drawn(decoder_params, rows, key, slots=slots, group=group, greedy=greedy)

    def finished(self, rollout: Rollout) -> tuple[Rollout, list[str]]:
        """A rollout that was drawn, here or on another mesh, cut at stop strings and put on this mesh, and its
        completions."""
        rollout, completions = self._completions(rollout)
        return sharding.put_rows(trim(rollout), self.mesh), completions

    def shapes(self, rows: Sequence[PromptRow]) -> Rollout:
        """The shapes of a rollout of `rows` on the mesh, of responses of full length."""
        group = self.shared(len(rows))
        decoding = Decoding(self.decoder, self.sampling, *self.stops)
        rollout = rollout_shapes(decoding, self.prompts_on_host(rows, group), group)
        return jax.tree.map(lambda x: sharding.rows_shape(x, self.mesh), rollout)

    def decode(
        self,
        decoder_params: Params,
        rows: Sequence[PromptRow],
        key: Array,
        *,
        slots: int,
        group: int = 1,
        greedy: bool = False,
    ) -> tuple[Rollout, list[str]]:
        """`generate` with an inference copy, in `slots` (0: all at once). The arrays of the rollout are on the host if
        there are slots, stop strings or an environment."""
        return self._completions(self._drawn(decoder_params, rows, key, slots=slots, group=group, greedy=greedy))

    def _completions(self, rollout: Rollout) -> tuple[Rollout, list[str]]:
        """The rollout cut at stop strings, which with an environment end turns and are cut already, and its text."""
        strings = () if self._environment else self.sampling.stop_strings
        return decode_completions(rollout, self.tokenizer, strings)

    def _drawn(
        self, decoder_params: Params, rows: Sequence[PromptRow], key: Array, *, slots: int, group: int, greedy: bool
    ) -> Rollout:
        sampling = dataclasses.replace(self.sampling, greedy=greedy)
        decoding = Decoding(self.decoder, sampling, *self.stops)

        def draw(prompts: Prompts, group: int) -> Rollout:
            prompts = sharding.put_rows(prompts, self.mesh)
            if not slots:
                return engine.generate_in_chunks(decoder_params, decoding, prompts, key, group, self.mesh)
            queue = PromptQueue(prompts, slots, group, self.columns)
            return engine.generate_in_slots(decoder_params, decoding, queue, key, self.mesh)

        if self._environment is None:
            return draw(self.prompts_on_host(rows, group), group)
        prompts = self.prompts_on_host(rows)
        return turns.play(
            draw,
            *self._environment,
            rows,
            prompts,
            turns.episode_seeds(prompts, key, 1 if greedy else self._group),
            self.tokenizer,
            length=sampling.response_length,
            context=self.model.max_positions,
            stop_strings=sampling.stop_strings,
            group=group,
            shards=sharding.row_shards(self.mesh),
        )

    def shared(self, rows: int) -> int:
        """The number of rows that share one prefill of their prompt: a group, if the mesh can split groups evenly."""
        return self._group if rows % (self._group * sharding.row_shards(self.mesh)) == 0 else 1

    def prompts(self, rows: Sequence[PromptRow], group: int = 1) -> Prompts:
        """The prompts of every `group`-th row on the mesh, padded to one length. Raises ConfigError if they leave no
        room for the response."""
        return sharding.put_rows(self.prompts_on_host(rows, group), self.mesh)

    def prompts_on_host(self, rows: Sequence[PromptRow], group: int = 1) -> Prompts:
        """`prompts` as arrays of NumPy."""
        longest = max(len(row.tokens) for row in rows)
        self._check_context(longest)
        fitting = (width for width in self._widths if width >= longest)
        length = next(fitting, batching.bucket(longest, self.model.max_positions - self.sampling.response_length))
        return batching.prompts(rows[::group], self.tokenizer.pad_id, length, occurrences(rows)[::group])

    def _check_context(self, longest: int) -> None:
        length = longest + self.sampling.response_length
        setup.check_context(length, self.model, "the longest prompt with its response", LOWER)


def occurrences(rows: Sequence[PromptRow]) -> list[int]:
    """Count how often each row's prompt came before in the batch: a repeated prompt needs another random stream."""
    seen: Counter[int] = Counter()
    numbers = []
    for row in rows:
        numbers.append(seen[row.index])
        seen[row.index] += 1
    return numbers
