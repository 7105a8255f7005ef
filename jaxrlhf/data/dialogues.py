"""Split whole dialogues, as text or as messages, into the prompt they have in common and the completion of each."""

import re
from collections.abc import Sequence

from jaxrlhf.data.messages import Message
from jaxrlhf.errors import DataError

_ASSISTANT = re.compile(
    r"(?:^|\n)\s*(?:#+ *)?(?:Assistant|AI|Bot|Chatbot|Agent|Model|Response|Answer|Output|TL;DR) *:"
    r"|<\|im_start\|>assistant\n|<\|assistant\|>\n?|\[/INST\]|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
)


def common_beginning(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    first, last = min(texts, default=""), max(texts, default="")  # their common prefix is that of all texts
    differences = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differences, len(first))]


def has_answer_mark(text: str) -> bool:
    """`text` has a line that begins with "Assistant:", or a chat template's beginning of an answer."""
    return _ASSISTANT.search(text) is not None


def split_texts(texts: Sequence[str]) -> list[str]:
    """Split whole dialogues: [prompt, completion of each]. The prompt ends after the last "Assistant:" (or similar) of
    their common beginning; without one, at its last whitespace."""
    common = common_beginning(texts)
    turns = [match.end() for match in _ASSISTANT.finditer(common)]
    end = turns[-1] if turns else max((match.start() for match in re.finditer(r"\s+", common)), default=0)
    return [common[:end], *(text[end:] for text in texts)]


def split_conversations(
    conversations: Sequence[list[Message]], where: str
) -> tuple[list[Message], tuple[list[Message], ...]]:
    """Split conversations into their common prompt, which ends before an assistant turn, and their completions.

    Raises DataError if there is none.
    """
    first = min(conversations, key=len)
    common = next((i for i, turn in enumerate(first) if any(c[i] != turn for c in conversations)), len(first))
    while common and (common == len(first) or first[common]["role"] != "assistant"):
        common -= 1
    if not common:
        raise DataError(f"{where}: the conversations have no common prompt that is followed by an assistant turn")
    return first[:common], tuple(conversation[common:] for conversation in conversations)
