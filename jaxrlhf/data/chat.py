"""Conversations to text in which every stretch is marked as learnt or not.

A chunk is (text, learnt). Text is what `Tokenizer.render` returns: contents are guarded, so that control tokens in it
are those of the template.
"""

from jaxrlhf.data.formats import Message
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError

Chunk = tuple[str, bool]


def answer(tokenizer: Tokenizer, prompt: list[Message], head: str, turns: list[Message]) -> list[Chunk]:
    """What follows `head`, the prompt as generation sees it (`render(prompt, generation=True)`), when the assistant
    says `turns`: chunks that end with the turn terminator."""
    text, spans = _spans(tokenizer, [*prompt, *turns], len(prompt), head)
    if text.startswith(head) and spans[0][0] == len(head):
        return _chunks(text, spans, len(head))
    if len(turns) > 1:
        raise DataError("the chat template writes the prompt differently once an answer follows")
    return [(tokenizer.guard(turns[0]["content"]) + tokenizer.turn_end, True)]


def conversation(tokenizer: Tokenizer, messages: list[Message]) -> list[Chunk]:
    """A whole conversation up to its last assistant turn; assistant turns with their terminator are learnt."""
    return _chunks(*_spans(tokenizer, messages, 0), 0)


def _chunks(text: str, spans: list[tuple[int, int]], start: int) -> list[Chunk]:
    chunks = []
    for begin, end in spans:
        chunks += [(text[start:begin], False), (text[begin:end], True)]
        start = end
    return [chunk for chunk in chunks if chunk[0]]


def _spans(
    tokenizer: Tokenizer, messages: list[Message], first: int, head: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and, for each assistant turn from message `first` on, the characters the model has to say."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if tokenizer.marks_generation:
        text, blocks = tokenizer.render_blocks(messages)
        if len(blocks) == len(turns):
            return text, [
                (a, _end_of_block(tokenizer, text, a, b)) for i, (a, b) in zip(turns, blocks, strict=True) if i >= first
            ]
    text = tokenizer.render(messages)
    spans = []
    for i in turns:
        if i >= first:
            begin = len(head) if head and i == first and text.startswith(head) else _begin(tokenizer, text, messages, i)
            spans.append((begin, _end(tokenizer, text, messages, i, begin)))
    return text, spans


def _begin(tokenizer: Tokenizer, text: str, messages: list[Message], i: int) -> int:
    """Where the model takes over: after the prompt of the messages before. Some templates rewrite earlier turns or add
    to the prompt what the finished conversation lacks; then the turn begins where its content is found."""
    if i:
        head = tokenizer.render(messages[:i], generation=True)
        if text.startswith(head):
            return len(head)
    cursor = 0
    for message in messages[:i]:
        content = tokenizer.guard(message["content"]).strip()
        cursor = max(cursor, text.find(content, cursor) + len(content))
    begin = text.find(tokenizer.guard(messages[i]["content"]).strip(), cursor)
    if begin < 0:
        raise DataError(
            f"the chat template rewrites message {i + 1}, so the answer in it cannot be told from the rest; "
            "mark it in the template with {% generation %}, or set tokenizer.chat_template"
        )
    return begin


def _end(tokenizer: Tokenizer, text: str, messages: list[Message], i: int, begin: int) -> int:
    if tokenizer.turn_end:
        found = tokenizer.find_turn_end(text, begin)
        if found is not None:
            return found
    shown = tokenizer.render(messages[: i + 1])
    if text.startswith(shown):
        return len(shown)
    raise DataError(f"the chat template does not say where message {i + 1} ends")


def _end_of_block(tokenizer: Tokenizer, text: str, begin: int, end: int) -> int:
    """The end of a marked block, moved to just behind the turn terminator whether the block stops short of it or
    goes on after it."""
    found = tokenizer.find_turn_end(text, begin) if tokenizer.turn_end else None
    if found is not None and (found <= end or not text[end:found].removesuffix(tokenizer.turn_end).strip()):
        return found
    return end
