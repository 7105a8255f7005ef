"""Render conversations with the chat template and find the characters the model learns to generate.

Nothing is found by searching for the text of a message, which may occur anywhere. An assistant turn begins after the
generation prompt of the messages before it, where the finished conversation starts with that. Where it does not (the
generation prompt opens a thought that finished turns leave out), the message is replaced by two markers: where these
two renderings part is where the turn begins. Blocks that the template marks with {% generation %} are used as marked.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from jaxrlhf.data.messages import Message
from jaxrlhf.data.tokenizer import Span, Tokenizer
from jaxrlhf.errors import DataError

Tools = list[dict[str, Any]] | None
MARKERS = ("qzkmarkvx", "xwjmarkzq")  # no common beginning or end
_EMPTY_THOUGHT = re.compile(r"\s*(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")


class Turns(NamedTuple):
    """Rendered text with the characters to train on, and the places where generation continues it."""

    text: str
    learnt: list[Span]
    cuts: list[int]


def render_conversation(tokenizer: Tokenizer, messages: list[Message], tools: Tools = None) -> Turns:
    """Render a conversation up to its last assistant turn; assistant turns with their end token are trained on.

    Raises DataError if a turn cannot be located.
    """
    return _Conversation(tokenizer, messages, tools).turns(0, 0)


def render_completion(
    tokenizer: Tokenizer, prompt: list[Message], rendered_prompt: str, completion: list[Message], tools: Tools = None
) -> Turns:
    """Render `completion` as it continues the rendered prompt, up to the end of its last assistant turn.

    Where the finished conversation does not start with the rendered prompt, the content of the first turn follows the
    prompt as it is, without a thought's opening that the prompt ends with already.
    rendered_prompt: `tokenizer.render(prompt, generation=True)`. Raises DataError.
    """
    first = len(prompt)
    chat = _Conversation(tokenizer, [*prompt, *completion], tools, {first: rendered_prompt})
    if chat.text.startswith(rendered_prompt):
        return chat.turns(first, len(rendered_prompt))
    if completion[0]["role"] != "assistant":
        raise DataError("the chat template renders the prompt differently when this completion follows")
    begin, _ = chat.begin(first)
    end = chat.end(first, begin)
    rest = chat.turns(first + 1, end) if len(completion) > 1 else Turns("", [], [])
    opening, message = chat.text[begin:end], completion[0]
    if not (message.get("tool_calls") or message.get("reasoning_content")):
        content, repeated = message["content"], rendered_prompt[begin:].strip()
        if repeated and rendered_prompt.startswith(chat.text[:begin]) and content.lstrip().startswith(repeated):
            content = content.lstrip()[len(repeated) :].lstrip()
        opening = tokenizer.escape(content) + tokenizer.turn_end
    size = len(opening)
    learnt = [(0, size)] if message.get("train", True) else []
    return Turns(
        opening + rest.text,
        learnt + [(begin + size, end + size) for begin, end in rest.learnt],
        [cut + size for cut in rest.cuts],
    )


@dataclass
class _Conversation:
    tokenizer: Tokenizer
    messages: list[Message]
    tools: Tools
    _before: dict[int, str | None] = field(default_factory=dict)
    """The messages before number i with the generation prompt, as far as rendered."""

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    def render(self, messages: list[Message], generation: bool = False) -> str:
        return self.tokenizer.render(messages, generation, self.tools)

    def turns(self, first: int, offset: int) -> Turns:
        """The text from character `offset` to the end of the last assistant turn; turns from number `first` on are
        learnt and are counted from `offset`."""
        numbers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and i >= first]
        marked = self._marked(numbers)
        learnt, cuts, end = [], [], offset
        for i in numbers:
            begin, generated = self.begin(i, marked.get(i))
            end = self.end(i, begin) if i not in marked else self._marked_end(*marked[i])
            if generated and begin > offset:
                cuts.append(begin - offset)
            if self.messages[i].get("train", True):
                if i in marked:
                    begin = max(begin, marked[i][0])
                begin = self._after_empty_thought(i, begin, end)
                learnt.append((begin - offset, end - offset))
        return Turns(self.text[offset:end], learnt, cuts)

    def begin(self, i: int, marked: Span | None = None) -> tuple[int, bool]:
        """Find where generation of message `i` starts, and whether its generation prompt is the text before."""
        if i not in self._before:
            self._before[i] = self.render(self.messages[:i], generation=True) if i else None
        before = self._before[i]
        if before is not None and self.text.startswith(before):
            return len(before), True
        if marked:
            return marked[0], False
        for find in (self._after_generation_prompt, lambda i: self._span(i)[0], self._header_end):
            if (start := find(i)) is not None:
                return start, False
        raise DataError(
            f"the chat template changes the text around message {i + 1}, so the assistant's turn cannot be located; "
            "mark it in the template with {% generation %}, or set tokenizer.chat_template to another template"
        )

    def end(self, i: int, begin: int) -> int:
        """Find where the turn of message `i` ends: after its end token, or before what follows if it has none."""
        rendered = self.text if i + 1 == len(self.messages) else self.render(self.messages[: i + 1])
        whole = self.text.startswith(rendered) and len(rendered) >= begin
        limit = len(rendered)
        if not whole:  # later messages change this one: it ends before the next one begins
            following = self._span(i + 1)[0]
            limit = len(self.text) if following is None else following
        if self.tokenizer.turn_end:
            end = self.tokenizer.find_turn_end(self.text, begin)
            if end is not None and end <= limit:
                return end
        if whole:  # a control token at the end, which may be another than usual (after a tool call)
            last = self.tokenizer.control_spans(self.text[:limit], begin)[-1:]
            return next((end for _, end in last if not self.text[end:limit].strip()), limit)
        if (after := self._span(i)[1]) is not None:
            following = self.tokenizer.control_spans(self.text, after)[:1] if self.tokenizer.turn_end else []
            return next((end for start, end in following if not self.text[after:start].strip()), after)
        raise DataError(
            f"cannot tell where message {i + 1} ends in the rendered conversation; mark it in the chat template with "
            "{% generation %}, or set tokenizer.chat_template to another template"
        )

    def _span(self, i: int) -> tuple[int | None, int | None]:
        """First and last character that depend on the text of message `i`; None where they cannot be told."""
        first, second = (self.render(_with_text(self.messages, i, marker)) for marker in MARKERS)
        start, after = _common(first, second), _common(first[::-1], second[::-1])
        if first == second:
            return None, None
        begins_alike = self.text.startswith(first[:start])
        ends_alike = self.text.endswith(first[len(first) - after :])
        return start if begins_alike else None, len(self.text) - after if ends_alike else None

    def _after_generation_prompt(self, i: int) -> int | None:
        """Find the start of message `i` if the generation prompt follows the message before it, whose own rendering may
        depend on the messages after it. A first message is compared with the same after a question."""
        before = self._before[i]
        if before is None:
            question = {"role": "user", "content": MARKERS[0]}
            longer = _Conversation(self.tokenizer, [question, *self.messages], self.tools)
            begin, generated = longer.begin(1)
            turns = longer.text[begin:]
            return len(self.text) - len(turns) if generated and self.text.endswith(turns) else None
        shorter = _Conversation(self.tokenizer, self.messages[:i], self.tools)
        end, end_in_shorter = self._span(i - 1)[1], shorter._span(i - 1)[1]
        if end is None or end_in_shorter is None or not before.startswith(shorter.text):
            return None
        following = before[end_in_shorter:]
        return end + len(following) if self.text.startswith(following, end) else None

    def _header_end(self, i: int) -> int | None:
        """Find the first character that depends on the content of message `i`; None if it is in an earlier message."""
        before = self.messages[:i]
        shown = [self.render([*before, {"role": "assistant", "content": marker}]) for marker in MARKERS]
        start = min(_common(self.text, text) for text in shown)
        start = min([start, *(a for a, b in self.tokenizer.control_spans(self.text) if a < start < b)])
        base = self.render(before) if before else ""
        return start if self.text.startswith(base) and start > len(base) else None

    def _marked(self, numbers: list[int]) -> dict[int, Span]:
        """The {% generation %} blocks of the turns `numbers`; a turn without one is left out."""
        if not self.tokenizer.marks_generation:
            return {}
        blocks = self.tokenizer.render_with_spans(self.messages, self.tools)[1]
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(blocks) == len(turns):
            return {i: block for i, block in zip(turns, blocks, strict=True) if i in numbers}
        marked = {}
        for i in numbers if blocks else []:
            begin = self.begin(i)[0]
            end = self.end(i, begin)
            if inside := [block for block in blocks if block[0] < end and block[1] > begin]:
                marked[i] = inside[0][0], inside[-1][1]
        return marked

    def _marked_end(self, begin: int, end: int) -> int:
        """Move the end of a {% generation %} block to just after the end token, which may be before or after it."""
        turn_end = self.tokenizer.find_turn_end(self.text, begin) if self.tokenizer.turn_end else None
        between = self.text[end:turn_end].removesuffix(self.tokenizer.turn_end).strip()
        return end if turn_end is None or (turn_end > end and between) else turn_end

    def _after_empty_thought(self, i: int, begin: int, end: int) -> int:
        """Skip a thought without text that the template has put before the content, unless that is to be learnt."""
        content, match = self.messages[i]["content"], _EMPTY_THOUGHT.match(self.text, begin, end)
        if match is None or self.tokenizer.train_empty_thinking or self.messages[i].get("reasoning_content"):
            return begin
        if (f"</{match[1]}>" if match[1] else f"[/{match[2]}]") in content:
            return begin
        start = self._span(i)[0] if content[:1].isspace() else None
        return match.end() if start is None else min(match.end(), max(start, begin))


def _common(first: str, second: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    different = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _with_text(messages: list[Message], i: int, marker: str) -> list[Message]:
    """The messages with content and reasoning of number `i` replaced."""
    changed = {**messages[i], "content": marker}
    if changed.get("reasoning_content"):
        changed["reasoning_content"] = marker
    return [*messages[:i], changed, *messages[i + 1 :]]
