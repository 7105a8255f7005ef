"""Render conversations with the chat template and mark the text to train on.

A chunk is (text, loss): rendered, escaped text and whether its tokens are trained on.
"""

from jaxrlhf.data.examples import Message
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError

Chunk = tuple[str, bool]
Span = tuple[int, int]


def render_completion(
    tokenizer: Tokenizer,
    prompt: list[Message],
    rendered_prompt: str,
    completion: list[Message],
    tools: list[Message] | None = None,
) -> list[Chunk]:
    """Render `completion` as it continues the rendered prompt, up to the end of its last assistant turn.

    rendered_prompt: `tokenizer.render(prompt, generation=True)`. Raises DataError.
    """
    text, spans = _assistant_spans(tokenizer, [*prompt, *completion], len(prompt), rendered_prompt, tools)
    if text.startswith(rendered_prompt) and spans[0][0] == len(rendered_prompt):
        turns = [message for message in completion if message["role"] == "assistant"]
        return _chunks(text, spans, len(rendered_prompt), [turn.get("train", True) for turn in turns])
    if len(completion) > 1:
        raise DataError("the chat template renders the prompt differently when a completion of several turns follows")
    return [(tokenizer.escape(completion[0]["content"]) + tokenizer.turn_end, True)]


def render_conversation(
    tokenizer: Tokenizer, messages: list[Message], tools: list[Message] | None = None
) -> list[Chunk]:
    """Render a conversation up to its last assistant turn; assistant turns with their end token are trained on."""
    text, spans = _assistant_spans(tokenizer, messages, 0, tools=tools)
    turns = [message for message in messages if message["role"] == "assistant"]
    return _chunks(text, spans, 0, [turn.get("train", True) for turn in turns])


def _chunks(text: str, spans: list[Span], start: int, trained: list[bool]) -> list[Chunk]:
    chunks = []
    for (begin, end), train in zip(spans, trained, strict=True):
        chunks += [(text[start:begin], False), (text[begin:end], train)]
        start = end
    return [chunk for chunk in chunks if chunk[0]]


def _assistant_spans(
    tokenizer: Tokenizer,
    messages: list[Message],
    first: int,
    rendered_prompt: str = "",
    tools: list[Message] | None = None,
) -> tuple[str, list[Span]]:
    """Render `messages` and find the characters the model generates in each assistant turn from number `first` on."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if tokenizer.marks_generation:
        text, marked = tokenizer.render_with_spans(messages, tools)
        if len(marked) == len(turns):
            return text, [
                (begin, _marked_end(tokenizer, text, begin, end))
                for i, (begin, end) in zip(turns, marked, strict=True)
                if i >= first
            ]
    text = tokenizer.render(messages, tools=tools)
    spans = []
    for i in turns:
        if i >= first:
            after_prompt = rendered_prompt and i == first and text.startswith(rendered_prompt)
            begin = len(rendered_prompt) if after_prompt else _turn_begin(tokenizer, text, messages, i, tools)
            spans.append((begin, _turn_end(tokenizer, text, messages, i, begin, tools)))
    return text, spans


def _turn_begin(tokenizer: Tokenizer, text: str, messages: list[Message], i: int, tools: list[Message] | None) -> int:
    """Find where generation of message `i` starts: after the generation prompt of the messages before it.

    If the template renders those differently (it rewrites earlier turns, or its generation prompt is not part of the
    finished conversation), the turn starts at its content.
    """
    if i:
        before = tokenizer.render(messages[:i], generation=True, tools=tools)
        if text.startswith(before):
            return len(before)
    cursor = 0
    for message in messages[:i]:
        content = tokenizer.escape(message["content"]).strip()
        cursor = max(cursor, text.find(content, cursor) + len(content))
    begin = text.find(tokenizer.escape(messages[i]["content"]).strip(), cursor)
    if begin < 0:
        raise DataError(
            f"the chat template changes the content of message {i + 1}, so the assistant's text cannot be located; "
            "mark it in the template with {% generation %}, or set tokenizer.chat_template to another template"
        )
    return begin


def _turn_end(
    tokenizer: Tokenizer, text: str, messages: list[Message], i: int, begin: int, tools: list[Message] | None
) -> int:
    end = tokenizer.find_turn_end(text, begin) if tokenizer.turn_end else None
    if end is not None:
        return end
    rendered = tokenizer.render(messages[: i + 1], tools=tools)
    if text.startswith(rendered):
        return len(rendered)
    raise DataError(
        f"cannot tell where message {i + 1} ends in the rendered conversation; mark it in the chat template with "
        "{% generation %}, or set tokenizer.chat_template to another template"
    )


def _marked_end(tokenizer: Tokenizer, text: str, begin: int, end: int) -> int:
    """Move the end of a {% generation %} block to just after the end-of-turn token, which may be before or after it."""
    turn_end = tokenizer.find_turn_end(text, begin) if tokenizer.turn_end else None
    if turn_end is None or (turn_end > end and text[end:turn_end].removesuffix(tokenizer.turn_end).strip()):
        return end
    return turn_end
