"""Examples to token ids: plain text or chat template, BOS and end tokens, loss masks, truncation.

Prompt and completion are encoded separately, as in generation: the tokens of a prompt never depend on its completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxrlhf.config import Data
from jaxrlhf.data import chat
from jaxrlhf.data.examples import Content, Example, Message
from jaxrlhf.data.formats import Task
from jaxrlhf.data.tokenizer import ESCAPE, Tokenizer
from jaxrlhf.errors import DataError

_COMPLETIONS = {
    "prompts": 0,
    "pairs": 2,
    "rankings": None,
}  # that a task reads (None: all); others read one


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """An example as escaped text.

    prompt: "" if a text or conversation is trained on as a `whole`.
    plain: without the chat template, so BOS and EOS are added.
    """

    prompt: str
    completions: list[list[chat.Chunk]]
    plain: bool
    whole: bool

    @property
    def has_escapes(self) -> bool:
        """The data spells a control token, which is read as ordinary text."""
        return ESCAPE in self.prompt or any(ESCAPE in text for chunks in self.completions for text, _ in chunks)


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
        trained = any(turn.get("train", True) for turn in turns)
        return "" if trained else "no assistant turn is trained on" if turns else "no assistant turn"
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
    return not (content if isinstance(content, str) else "".join(turn["content"] for turn in content)).strip()


def _ends_with_assistant(turns: list[Message]) -> bool:
    return bool(turns) and turns[-1]["role"] == "assistant"


def _has_duplicates(items: Sequence) -> bool:
    return any(item in items[:i] for i, item in enumerate(items))


def render(example: Example, task: Task, tokenizer: Tokenizer) -> RenderedExample:
    """Render an example without a `drop_reason`. Raises DataError for a conversation that cannot be rendered."""
    prompt, completions = example.prompt, example.completions[: _COMPLETIONS.get(task, 1)]
    if isinstance(prompt, str):
        chunks = [[(str(completion), True)] for completion in completions]
        return RenderedExample(prompt, chunks, plain=True, whole=False)
    if prompt is None and isinstance(example.completions[0], str):
        return RenderedExample("", [[(example.completions[0], True)]], plain=True, whole=True)
    if not tokenizer.has_chat:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template; set tokenizer.chat_template to chatml "
            "or to a .jinja file"
        )
    conversations = [completion for completion in completions if isinstance(completion, list)]
    if prompt is None:
        chunks = [chat.render_conversation(tokenizer, conversations[0], example.tools)]
        return RenderedExample("", chunks, plain=False, whole=True)
    rendered_prompt = tokenizer.render(prompt, generation=True, tools=example.tools)
    chunks = [
        chat.render_completion(tokenizer, prompt, rendered_prompt, turns, example.tools) for turns in conversations
    ]
    return RenderedExample(rendered_prompt, chunks, plain=False, whole=False)


def tokenise(examples: Sequence[RenderedExample], tokenizer: Tokenizer) -> list[TokenisedExample]:
    """Encode all examples in one call of the tokenizer."""
    texts: list[str] = []
    continues: list[bool] = []
    for example in examples:
        texts.append(example.prompt)
        continues.append(False)
        for chunks in example.completions:
            texts += [text for text, _ in chunks]
            continues += [bool(example.prompt) or i > 0 for i in range(len(chunks))]
    ids = iter(tokenizer.encode_batch(texts, continues))
    return [
        _add_special_tokens(e, next(ids), [[next(ids) for _ in chunks] for chunks in e.completions], tokenizer)
        for e in examples
    ]


def _add_special_tokens(
    example: RenderedExample, prompt: list[int], chunk_ids: list[list[list[int]]], tokenizer: Tokenizer
) -> TokenisedExample:
    """Join the ids of the chunks of each completion and add BOS and EOS where they are due."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    start = prompt or (chunk_ids[0][0] if chunk_ids else [])
    needs_bos = tokenizer.adds_bos or not (prompt or example.whole)
    if example.plain and bos is not None and start[:1] != [bos] and needs_bos:
        prompt = [bos, *prompt]
    needs_eos = example.plain or not tokenizer.turn_end
    completions = []
    for chunks, ids_of_chunks in zip(example.completions, chunk_ids, strict=True):
        ids = [i for chunk in ids_of_chunks for i in chunk]
        loss_mask = [loss for (_, loss), chunk in zip(chunks, ids_of_chunks, strict=True) for _ in chunk]
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
