"""Prompts in, responses of the policy as it is now out, on the device and as text."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

import jax
from jax import Array

from jaxrlhf import compilation, memory, sharding
from jaxrlhf.config import Generation, Sampling
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.decode import generate, trim
from jaxrlhf.rollout.inference_copy import RolloutDType, convert, inference_copy, inference_model
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.training import setup
from jaxrlhf.types import Params, Prompts, Rollout

LOWER = "data.max_prompt_length or sampling.response_length"


class Sampler:
    """Draws `batch` responses at a time, `group` in turn to one prompt. `longest` is the length of the longest prompt
    that is known of (0: of none).

    Raises ConfigError for what the model cannot do: prompts and responses beyond its context, filters beyond its
    vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        rollout: Generation,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        longest: int,
        batch: int,
        group: int = 1,
    ) -> None:
        self.sampling, self.model, self.tokenizer, self.mesh = sampling, model, tokenizer, mesh
        self.batch, self._group = batch, group
        self.programs = compilation.Ahead()
        self.dtype: RolloutDType = model.dtype if rollout.dtype == "auto" else rollout.dtype
        self.columns = 0  # that every prompt fits in, so that programs are few
        check_sampling(sampling, model.vocab_size)
        reserved = sampling.response_length
        if longest:
            setup.check_context([longest + reserved], model, "the longest prompt with its response", LOWER)
            self.columns = batching.bucket(longest, model.max_positions - reserved)
        self.slots = rollout.slots
        if 0 < self.slots < batch:
            sharding.check_rows(self.slots, mesh, "rollout.slots")

    def check_memory(self) -> None:
        """Refuse more slots than there is memory for, once everything else has its place."""
        rows = min(self.slots or self.batch, self.batch)
        columns = self.columns + self.sampling.response_length
        engine.check_slots(self.inference, rows, columns, self.mesh)

    @property
    def inference(self) -> ModelConfig:
        """The model that decodes."""
        return inference_model(self.model, self.dtype)

    def copy(self, params: Params) -> tuple[ModelConfig, Params]:
        """The policy made ready for decoding."""
        self.programs.wait(convert)
        return inference_copy(self.model, params, self.dtype)

    def generate(
        self, params: Params, rows: Sequence[PromptRow], key: Array, *, greedy: bool = False
    ) -> tuple[Rollout, list[str]]:
        """A response to each row's prompt, all at once or in `rollout.slots`; `greedy`: the likeliest."""
        group, slots = 1 if greedy else self.shared(len(rows)), self.slots or len(rows)
        prompts = self.prompts(rows, group)
        model, copy = self.copy(params)
        sampling = dataclasses.replace(self.sampling, greedy=greedy)
        rest = key, sampling, self.tokenizer.stop_ids, self.tokenizer.pad_id
        if slots < len(rows):
            self.programs.wait(engine.generate_in_slots)
            where = {"slots": slots, "columns": self.columns, "mesh": self.mesh}
            made = sharding.put_rows(
                engine.generate_in_slots(copy, model, prompts, *rest, group=group, **where), self.mesh
            )
        else:
            self.programs.wait(generate)
            made = generate(copy, model, prompts, *rest, group=group)
        made, texts = decode_completions(made, self.tokenizer, self.sampling.stop_strings)
        del copy  # all is drawn by now
        memory.release_free_memory()
        if self.sampling.stop_strings:
            made = sharding.put_rows(made, self.mesh)
        return trim(made), texts

    def shared(self, rows: int) -> int:
        """How many of `rows` responses share the reading of their prompt: a group, where the devices can split what is
        read evenly."""
        shares = sharding.row_shards(self.mesh)
        return self._group if rows % (self._group * shares) == 0 else 1

    def prompts(self, rows: Sequence[PromptRow], group: int = 1) -> Prompts:
        """Prompts of one length, in place, the first of each `group` rows. Raises ConfigError where there is no room
        for the response."""
        reserved = self.sampling.response_length
        longest = max(len(row.tokens) for row in rows)
        setup.check_context([longest + reserved], self.model, "the longest prompt with its response", LOWER)
        length = batching.bucket(longest, self.model.max_positions - reserved)
        made = batching.prompts(rows[::group], self.tokenizer.pad_id, length, occurrences(rows)[::group])
        return sharding.put_rows(made, self.mesh)

    def compile(self, policy: Params, rows: Sequence[PromptRow], key: Array) -> Future[Rollout]:
        """Begin to compile a rollout of `rows`; `policy` may be shapes. Returns the shapes of the rollout to come."""
        group, model = self.shared(len(rows)), self.inference
        prompts = self.prompts(rows, group)
        rest = key, self.sampling, self.tokenizer.stop_ids, self.tokenizer.pad_id
        copy = self.programs.compile(convert, policy, self.model, model)
        if not 0 < self.slots < len(rows):
            return self.programs.begin(
                lambda: compilation.compile_shapes(generate, copy.result(), model, prompts, *rest, group=group),
                generate,
            )
        where = {"slots": self.slots, "group": group, "columns": self.columns, "mesh": self.mesh}

        def prepare() -> None:
            for program, arguments in engine.slot_programs(copy.result(), model, prompts, *rest, **where):
                compilation.compile_shapes(program, *arguments)

        self.programs.begin(prepare, engine.generate_in_slots)

        def shapes() -> Rollout:
            made = jax.eval_shape(functools.partial(generate, group=group), copy.result(), model, prompts, *rest)
            return jax.tree.map(lambda x: sharding.rows_shape(x, self.mesh), made)

        return self.programs.begin(shapes, engine.generate_in_slots)


def occurrences(rows: Sequence[PromptRow]) -> list[int]:
    """How often each row's prompt came before in the batch: a repeated prompt needs another random stream."""
    seen: Counter[int] = Counter()
    numbers = []
    for row in rows:
        numbers.append(seen[row.index])
        seen[row.index] += 1
    return numbers
