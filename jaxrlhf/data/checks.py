"""Warnings about texts that training would learn from or answer without a word: a missing space, unknown words."""

from collections.abc import Sequence

from jaxrlhf.data.examples import Content, Example
from jaxrlhf.data.omissions import first_few
from jaxrlhf.data.tokenizer import Tokenizer

LOSSLESS_ROWS = 1000  # whose texts are encoded and decoded
Located = Sequence[tuple[str, Example]]
"""(where, example) of rows."""


def glued(examples: Located) -> list[str]:
    """Locations of plain-text examples whose prompt and completion meet without a space."""
    return [where for where, example in examples if _runs_together(example)]


def missing_space(glued: list[str]) -> list[str]:
    """A warning if there are `glued` rows."""
    if not glued:
        return []
    return [
        f"in {len(glued)} rows prompt and completion meet without a space ({first_few(glued)}); "
        "data.completion_prefix inserts one"
    ]


def unknown_words(examples: Located, tokenizer: Tokenizer) -> list[str]:
    """A warning if the tokenizer does not restore the first texts."""
    first = examples[:LOSSLESS_ROWS]
    lossy = [where for where, example in first if not _is_lossless(example, tokenizer)]
    if not lossy:
        return []
    return [
        f"the tokenizer does not restore the text of {len(lossy)} of the first {len(first)} rows ({first_few(lossy)}): "
        "it has no tokens for some characters or words, or changes them"
    ]


def text_of(content: Content) -> str:
    """The text of a completion or conversation, without its chat format."""
    return "\n".join(_texts(content))


def _is_lossless(example: Example, tokenizer: Tokenizer) -> bool:
    texts = [turn for content in (example.prompt, *example.completions) if content for turn in _texts(content)]
    return all(tokenizer.decode(tokenizer.encode(text)).split() == text.split() for text in texts)


def _runs_together(example: Example) -> bool:
    """A plain-text prompt ends, and its completion begins, with a character of a script that puts spaces."""
    prompt, completion = example.prompt, text_of(example.completions[0]) if example.completions else ""
    if not isinstance(prompt, str) or not prompt or not completion:
        return False
    return prompt[-1].isascii() and not prompt[-1].isspace() and completion[0].isascii() and completion[0].isalnum()


def _texts(content: Content) -> list[str]:
    return [content] if isinstance(content, str) else [turn["content"] for turn in content]
