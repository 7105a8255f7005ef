"""Examples to token ids: plain text or chat template, BOS and end tokens, loss masks, truncation.

The tokens of a prompt never depend on its completion. Otherwise a conversation has the tokens of its rendering encoded
as a whole. They differ only where a token would reach over the place at which generation continues the prompt: the text
is then encoded in two pieces.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jaxrlhf.config import Data
from jaxrlhf.data import chat
from jaxrlhf.data.examples import Content, Example
from jaxrlhf.data.formats import Task
from jaxrlhf.data.messages import Message
from jaxrlhf.data.tokenizer import ESCAPE, Encoding, Tokenizer
from jaxrlhf.errors import DataError

_COMPLETIONS = {
    "prompts": 0,
    "pairs": 2,
    "rankings": None,
}  # that a task reads (None: all); others read one
_BATCH = 1024  # examples whose encodings, which are larger than their ids, are in memory at once


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """An example as escaped text.

    prompt: "" if a text or conversation is trained on as a `whole`.
    plain: without the chat template, so BOS and EOS are added.
    """

    prompt: str
    completions: list[chat.Turns]
    plain: bool
    whole: bool

    @property
    def has_escapes(self) -> bool:
        """The data spells a control token, which is read as ordinary text."""
        return ESCAPE in self.prompt or any(ESCAPE in turns.text for turns in self.completions)

    @property
    def has_equal_completions(self) -> bool:
        """Two completions differ only in what the chat template leaves out."""
        return _has_duplicates([turns.text for turns in self.completions])


@dataclass(frozen=True, slots=True)
class TokenisedExample:
    """Ids of the prompt; ids and loss mask of each completion."""

    prompt: list[int]
    completions: list[tuple[list[int], list[bool]]]
    whole: bool

    def __len__(self) -> int:
        return len(self.prompt) + max((len(ids) for ids, _ in self.completions), default=0)

    def sequence(self, number: int, all_tokens: bool = False) -> tuple[list[int], list[bool]]:
        """(tokens, loss mask) of the prompt and completion `number`; the first token is never predicted.

        The loss mask covers the completion, or with `all_tokens` the prompt too.
        """
        ids, loss_mask = self.completions[number]
        tokens = self.prompt + ids
        mask = [True] * len(tokens) if all_tokens else [False] * len(self.prompt) + loss_mask
        return tokens, [False, *mask[1:]]


def drop_reason(example: Example, task: Task, has_bos: bool) -> str:
    """Return why `task` cannot use an example, or "". With `has_bos` an empty text prompt is allowed."""
    prompt, completions = example.prompt, example.completions
    if prompt is None:
        content = completions[0]
        if not content or (isinstance(content, str) and not content.strip()):
            return "it is empty"
        if isinstance(content, str):
            return ""
        turns = [turn for turn in content if turn["role"] == "assistant"]
        return "" if _is_trained(turns) else "no assistant turn is trained on" if turns else "no assistant turn"
    if isinstance(prompt, list):
        empty = all(turn["role"] == "system" or not turn["content"] for turn in prompt)
    else:
        empty = not (prompt or has_bos)
    if empty:
        return "the prompt is empty"
    if task == "prompts":
        ends_with_assistant = isinstance(prompt, list) and _ends_with_assistant(prompt)
        return "the prompt ends with an assistant turn" if ends_with_assistant else ""
    if any(isinstance(content, list) and not _ends_with_assistant(content) for content in completions):
        return "a completion does not end with an assistant turn"
    if any(isinstance(content, list) and not _is_trained(content) for content in completions):
        return "no assistant turn is trained on"
    if task == "pairs":
        chosen, rejected = completions
        if chosen == rejected:
            return "chosen and rejected are the same"
        return "chosen is empty" if _is_empty(chosen) else "rejected is empty" if _is_empty(rejected) else ""
    if task == "rankings":
        if len(completions) < 2:
            return "fewer than two responses"
        if _has_duplicates(completions):
            return "two responses are the same"
        return "a response is empty" if any(map(_is_empty, completions)) else ""
    return "the completion is empty" if not completions or _is_empty(completions[0]) else ""


def _is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(
        turn["content"].strip() or turn.get("reasoning_content") or turn.get("tool_calls") for turn in content
    )


def _is_trained(turns: list[Message]) -> bool:
    return any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns)


def _ends_with_assistant(turns: list[Message]) -> bool:
    return bool(turns) and turns[-1]["role"] == "assistant"


def _has_duplicates(items: Sequence) -> bool:
    return any(item in items[:i] for i, item in enumerate(items))


def render(example: Example, task: Task, tokenizer: Tokenizer) -> RenderedExample:
    """Render an example without a `drop_reason`. Raises DataError for a conversation that cannot be rendered."""
    prompt, completions = example.prompt, example.completions[: _COMPLETIONS.get(task, 1)]
    if isinstance(prompt, str):
        return RenderedExample(prompt, [_text(str(text)) for text in completions], plain=True, whole=False)
    if prompt is None and isinstance(example.completions[0], str):
        return RenderedExample("", [_text(example.completions[0])], plain=True, whole=True)
    if not tokenizer.has_chat:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template; set tokenizer.chat_template to chatml "
            "or to a .jinja file"
        )
    conversations = [completion for completion in completions if isinstance(completion, list)]
    if prompt is None:
        turns = chat.render_conversation(tokenizer, conversations[0], example.tools)
        return RenderedExample("", [turns], plain=False, whole=True)
    rendered_prompt = tokenizer.render(prompt, generation=True, tools=example.tools)
    continued = [
        chat.render_completion(tokenizer, prompt, rendered_prompt, turns, example.tools) for turns in conversations
    ]
    return RenderedExample(rendered_prompt, continued, plain=False, whole=False)


def _text(text: str) -> chat.Turns:
    return chat.Turns(text, [(0, len(text))], [])


def tokenise(examples: Sequence[RenderedExample], tokenizer: Tokenizer) -> list[TokenisedExample]:
    """Encode examples, many in one call of the tokenizer."""
    tokenised = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        prompts = tokenizer.encode_batch([example.prompt for example in batch])
        pieces = iter(_encode([_Piece.of(e, turns, tokenizer) for e in batch for turns in e.completions], tokenizer))
        for example, prompt in zip(batch, prompts, strict=True):
            tokenised.append(
                _add_special_tokens(example, prompt, [next(pieces) for _ in example.completions], tokenizer)
            )
    return tokenised


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text to encode after a prompt.

    context: the end of the prompt that decides how, its last control token and what follows; "" for plain text.
    cuts: the characters of context and text before which the ids must be those of the text before alone.
    """

    context: str
    turns: chat.Turns
    cuts: list[int]
    continues: bool

    @classmethod
    def of(cls, example: RenderedExample, turns: chat.Turns, tokenizer: Tokenizer) -> "_Piece":
        context = "" if example.plain else tokenizer.last_segment(example.prompt)
        cuts = [len(context)] * bool(context) + [len(context) + cut for cut in turns.cuts]
        return cls(context, turns, cuts, continues=example.plain and bool(example.prompt))


def _encode(pieces: list[_Piece], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Ids and loss mask of each piece, without its context."""
    texts = [piece.context + piece.turns.text for piece in pieces]
    encodings = tokenizer.encode_with_offsets(texts, [piece.continues for piece in pieces])
    contexts = [
        [tokenizer.last_segment(text[:cut]) for cut in piece.cuts] for text, piece in zip(texts, pieces, strict=True)
    ]
    distinct = list(dict.fromkeys(context for of_piece in contexts for context in of_piece))
    ids_of = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    result = []
    for piece, text, before, encoding in zip(pieces, texts, contexts, encodings, strict=True):
        tokens = {
            0: 0,
            **{cut: _aligned(encoding, cut, c, ids_of[c]) for cut, c in zip(piece.cuts, before, strict=True)},
        }
        if broken := [cut for cut, token in tokens.items() if token is None]:
            encoding, tokens = _encode_cut(text, broken, piece, tokenizer)
        size, mask = len(piece.context), [False] * len(encoding.ids)
        for begin, end in piece.turns.learnt:
            first, last = tokens.get(begin + size), bisect_left(encoding.starts, end + size)
            if first is None:
                first = bisect_left(encoding.ends, begin + size + 1)
            mask[first:last] = [True] * (last - first)
        skip = tokens[size]
        result.append((encoding.ids[skip:], mask[skip:]))
    return result


def _aligned(encoding: Encoding, cut: int, context: str, ids: list[int]) -> int | None:
    """The number of tokens before character `cut`, if they end with the `ids` that its `context` has alone."""
    position = cut - len(context)
    start = bisect_left(encoding.ends, position + 1) if position else 0
    stop = start + len(ids)
    reaches_over = any(begin < cut for begin in encoding.starts[stop : stop + 1])
    return None if reaches_over or encoding.ids[start:stop] != ids else stop


def _encode_cut(
    text: str, cuts: list[int], piece: _Piece, tokenizer: Tokenizer
) -> tuple[Encoding, dict[int, int | None]]:
    """Encode the text in pieces that end at `cuts`; also return the number of tokens before each cut of the piece."""
    parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    encoded = tokenizer.encode_with_offsets(parts, [False] + [True] * len(cuts))
    ids, starts, ends = [], [], []
    for offset, part in zip([0, *cuts], encoded, strict=True):
        ids += part.ids
        starts += [offset + start for start in part.starts]
        ends += [offset + end for end in part.ends]
    return Encoding(ids, starts, ends), {cut: bisect_left(starts, cut) for cut in (0, *piece.cuts)}


def _add_special_tokens(
    example: RenderedExample, prompt: list[int], encoded: list[tuple[list[int], list[bool]]], tokenizer: Tokenizer
) -> TokenisedExample:
    """Add BOS and EOS where they are due."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    start = prompt or (encoded[0][0] if encoded else [])
    needs_bos = tokenizer.adds_bos or not (prompt or example.whole)
    if example.plain and bos is not None and start[:1] != [bos] and needs_bos:
        prompt = [bos, *prompt]
    needs_eos = example.plain or not tokenizer.turn_end
    completions = []
    for ids, loss_mask in encoded:
        if needs_eos and ids[-1:] != [eos]:  # with data.control_tokens the text may contain its EOS
            ids, loss_mask = [*ids, eos], [*loss_mask, True]
        completions.append((ids, loss_mask))
    return TokenisedExample(prompt, completions, example.whole)


def truncate(tokens: TokenisedExample, config: Data, tokenizer: Tokenizer) -> tuple[TokenisedExample | None, str]:
    """Apply `max_length`, `max_prompt_length` and `truncation`: (tokens, what was cut) or (None, why it is dropped).

    left cuts the beginning of the prompt (except BOS) and never a completion; right cuts the end of completions with
    their end token and never a prompt. A text trained on as a whole is cut at the left or right end.
    """
    limit, prompt_limit = config.max_length, config.max_prompt_length or config.max_length
    too_long = f"longer than data.max_length ({limit} tokens)"
    if tokens.whole:
        return (tokens, "") if len(tokens) <= limit else _truncate_whole(tokens, config, too_long)
    if not tokens.prompt:
        return None, "the tokenizer has no tokens for the prompt"
    if len(tokens.prompt) <= prompt_limit and len(tokens) <= limit:
        return tokens, ""
    if config.truncation == "left":
        keep = min(prompt_limit, limit - (len(tokens) - len(tokens.prompt)))
        bos = tokens.prompt[:1] if tokenizer.adds_bos and tokens.prompt[:1] == [tokenizer.bos_id] else []
        if keep <= len(bos):
            return None, f"the completion alone fills data.max_length ({limit} tokens)"
        prompt = bos + tokens.prompt[len(bos) - keep :]
        return replace(tokens, prompt=prompt), "beginning of the prompt cut (data.truncation is left)"
    if len(tokens.prompt) > prompt_limit:
        name = "max_prompt_length" if config.max_prompt_length else "max_length"
        return None, f"the prompt is longer than data.{name} ({prompt_limit} tokens)"
    keep = limit - len(tokens.prompt)
    if config.truncation != "right" or keep < 1:
        return None, too_long
    completions = [(ids[:keep], loss_mask[:keep]) for ids, loss_mask in tokens.completions]
    if _has_duplicates(completions):
        return None, f"the completions are the same within data.max_length ({limit} tokens)"
    return replace(tokens, completions=completions), "end of the completion cut (data.truncation is right)"


def _truncate_whole(tokens: TokenisedExample, config: Data, too_long: str) -> tuple[TokenisedExample | None, str]:
    side, keep = config.truncation, config.max_length - len(tokens.prompt)
    if side not in ("left", "right"):
        return None, too_long
    kept = slice(-keep, None) if side == "left" else slice(keep)
    ids, loss_mask = (values[kept] for values in tokens.completions[0])
    shorter = replace(tokens, completions=[(ids, loss_mask)])
    if not any(shorter.sequence(0)[1]):
        return None, f"no tokens to train on are left when cut to data.max_length ({config.max_length} tokens)"
    return shorter, f"cut on the {side} to {config.max_length} tokens"
