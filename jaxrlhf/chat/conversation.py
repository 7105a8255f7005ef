"""A conversation: its turns, the prompt that they make, replies as they are generated, and their reward."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, prompt_text
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.evaluation import generation
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.stream import Stream
from jaxrlhf.rollout.text import first_stop
from jaxrlhf.types import Rollout

UNKNOWN = "\ufffd"  # what the bytes of an incomplete character decode to


@dataclasses.dataclass
class Turn:
    """A message and the reply to it. finished: the reply ended by itself. reward: by component, None: not scored."""

    message: str
    reply: str = ""
    tokens: int = 0
    finished: bool = False
    reward: float | None = None
    components: dict[str, float | None] = dataclasses.field(default_factory=dict)


class Conversation:
    """A conversation with the model of `config`, which gives sampling and, if it has one, the reward.

    With a chat template the prompt of a reply is the rendered conversation. Without one it is the text so far: each
    reply continues the message before it, and a newline stands before a message that follows a reply. Without `history`
    each message is answered alone.

    Raises what `generation.open_model` and `Scorer` raise.
    """

    def __init__(self, config: PPOConfig, system: str = "", *, history: bool = True) -> None:
        self.config, self.history = config, history
        self.tokenizer: Tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.system = ""
        self.turns: list[Turn] = []
        self.set_system(system)
        self._forgotten = 0  # turns that are no longer in the prompt
        self._count = 0  # replies drawn, also those undone
        self._interrupted = False
        self.scorer: Scorer | None = None
        self._model, params = generation.open_model(config, self.tokenizer, 1)
        stops = self.tokenizer.stops(config.sampling.stop_strings)
        self._stream = Stream(params, Decoding(self._model, config.sampling, stops, self.tokenizer.pad_id))
        self._key = jax.random.key(config.seed)

    def open_reward(self) -> None:
        """Score replies from now on. Raises what Scorer raises, and ConfigError for a reward that a person gives."""
        scorer = Scorer(self.config.reward, self.tokenizer)
        if scorer.has_human:
            raise ConfigError("reward: a chat cannot ask a person for scores; leave the component out")
        rows = [self._row([Turn("Hello")], self._prompt([Turn("Hello")]))]
        scorer.check_rows(rows)
        scorer.probe_rows(rows)
        self.scorer = scorer

    def warm_up(self) -> None:
        """Compile the programs of a short prompt."""
        for _ in self._stream.generate([self.tokenizer.eos_id], self._key, limit=2):
            pass

    @property
    def context(self) -> int:
        """Tokens of the model's context."""
        return self._model.max_positions

    def set_system(self, text: str) -> None:
        """Replace the system prompt; "" removes it. Raises ConfigError for a model without a chat template."""
        if text and not self.tokenizer.has_chat:
            raise ConfigError(
                "a system prompt needs a chat template, and this tokenizer has none: put it into the first message, or "
                "set --tokenizer.chat_template"
            )
        self.system = text

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._forgotten = [], 0

    def undo(self) -> Turn | None:
        """Remove the last turn and return it; None if there is none."""
        self._forgotten = min(self._forgotten, max(len(self.turns) - 2, 0))
        return self.turns.pop() if self.turns else None

    def interrupt(self) -> None:
        """End the reply that is being generated after the next few tokens."""
        self._interrupted = True

    def reply(self, message: str) -> Iterator[str]:
        """Add a turn: yield the reply's text piece by piece, as it is generated.

        Stop strings and incomplete characters are held back. The turn is complete, and scored, when the iterator ends.
        Raises DataError for a message that leaves no room for a reply, and then adds no turn.
        """
        turn = Turn(message)
        turns, prompt = self._fitted(turn)
        limit = self.context - len(prompt)
        self.turns.append(turn)
        self._interrupted = False
        stops = self.tokenizer.stops(self.config.sampling.stop_strings)
        drawn: list[int] = []
        text = ""
        count, self._count = self._count, self._count + 1
        for new in self._stream.generate(prompt, self._key, index=count, limit=limit):
            drawn += new
            ended = drawn[-1] in (*stops, *self.config.sampling.stop_token_ids)
            ids = drawn[: len(drawn) - ended]
            length, text = first_stop(ids, prompt, self.tokenizer, self.config.sampling.stop_strings)
            turn.finished = ended or length <= len(ids)
            if length <= len(ids):
                drawn = drawn[:length]
            else:
                text = self.tokenizer.decode(ids, after=prompt)
            turn.tokens = len(drawn)
            shown = text if turn.finished else self._certain(text)
            if len(shown) > len(turn.reply):
                turn.reply, piece = shown, shown[len(turn.reply) :]
                yield piece
            if turn.finished or self._interrupted:
                break
        else:
            if len(text) > len(turn.reply):  # the length limit
                turn.reply, piece = text, text[len(turn.reply) :]
                yield piece
        if self.scorer is not None:
            self._score(turn, turns, prompt, drawn)

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as rows of a data set for `jaxrlhf sft`: one with messages or, without a chat template or
        history, one for each turn. A reply that was cut off is not trained on; as plain text it is left out."""
        if self.tokenizer.has_chat:
            conversations = [self.turns] if self.history else [[turn] for turn in self.turns]
            finished = (turns for turns in conversations if any(turn.finished for turn in turns))
            return [{"messages": self._messages(turns, whole=True)} for turns in finished]
        prompts = [_joined(self.turns[: i + 1]) if self.history else t.message for i, t in enumerate(self.turns)]
        pairs = zip(prompts, self.turns, strict=True)
        return [{"prompt": prompt, "completion": turn.reply} for prompt, turn in pairs if turn.finished]

    def notes(self) -> list[str]:
        """Notes to print before the first message."""
        lines = []
        if not self.tokenizer.has_chat and self.history:
            lines.append(
                "the tokenizer has no chat template: each reply continues the text so far. --no-history answers each "
                "message alone"
            )
        return lines

    @property
    def forgotten(self) -> int:
        """Turns that no longer fit in the context, from the first on."""
        return self._forgotten

    def _fitted(self, turn: Turn) -> tuple[list[Turn], list[int]]:
        """The turns of the prompt, the last one open, and its tokens; the oldest turns are dropped until there is room
        for a reply, of `response_length` tokens or half of the context if that is less."""
        room = min(self.config.sampling.response_length, self.context // 2)
        start = self._forgotten if self.history else len(self.turns)
        prompt = self._prompt(turns := [*self.turns[start:], turn])
        while len(prompt) + room > self.context and start < len(self.turns):
            start += 1
            prompt = self._prompt(turns := [*self.turns[start:], turn])
        if len(prompt) >= self.context:
            raise DataError(
                f"the message comes to {len(prompt)} tokens and the model's context is {self.context}: no room for a "
                "reply; send less"
            )
        self._forgotten = start if self.history else 0
        return turns, prompt

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        if self.tokenizer.has_chat:
            return self.tokenizer.render_chat(self._messages(turns), generation=True)
        text = _joined(turns)
        if self.config.data.control_tokens:
            return self.tokenizer.encode(text, special=True)
        return self.tokenizer.encode_prompt(text)

    def _messages(self, turns: Sequence[Turn], *, whole: bool = False) -> list[dict[str, Any]]:
        """The messages of turns, without the reply of the last one unless `whole`."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": turn.reply})
            if whole and not turn.finished:
                messages[-1]["train"] = False
        return messages if whole else messages[:-1]

    def _certain(self, text: str) -> str:
        """The part of an unfinished reply that further tokens cannot change: without the bytes of an incomplete
        character, and without what may be the beginning of a stop string."""
        text = text.rstrip(UNKNOWN)
        held = 0
        for stop in self.config.sampling.stop_strings:
            held = max([held, *(n for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))])
        return text[: len(text) - held]

    def _row(self, turns: Sequence[Turn], prompt: list[int]) -> PromptRow:
        messages = self._messages(turns) if self.tokenizer.has_chat else None
        return PromptRow(prompt, prompt_text(messages or _joined(turns)), {}, self._count, messages)

    def _score(self, turn: Turn, turns: Sequence[Turn], prompt: list[int], drawn: list[int]) -> None:
        assert self.scorer is not None
        length = self.config.sampling.response_length
        width = batching.bucket(len(prompt), self.context)
        row = self._row(turns, prompt)
        prompts = batching.prompts([row], self.tokenizer.pad_id, width)
        padding = [self.tokenizer.pad_id] * (length - len(drawn))
        mask = np.arange(length)[None] < len(drawn)
        rollout = Rollout(
            tokens=np.concatenate([prompts.tokens, [drawn + padding]], axis=1, dtype=np.int32),  # type: ignore[arg-type]
            mask=np.concatenate([prompts.mask, mask], axis=1),  # type: ignore[arg-type]
            response_mask=mask,  # type: ignore[arg-type]
            logprobs=np.zeros((1, length), np.float32),  # type: ignore[arg-type]
            finished=np.array([turn.finished]),  # type: ignore[arg-type]
            index=prompts.index,
            sample=prompts.sample,
            support=None,
        )
        scored = self.scorer.score_rows([row], [turn.reply], rollout)
        turn.reward = scored.as_list()[0]
        values = {name: scored.components[name][0] for name in self.scorer.components}
        turn.components = {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def _joined(turns: Sequence[Turn]) -> str:
    """The text so far, up to the last message."""
    return "".join(f"{turn.message}{turn.reply}\n" for turn in turns[:-1]) + turns[-1].message
