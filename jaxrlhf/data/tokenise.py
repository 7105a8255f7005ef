"""Normalised examples to token lists: chat or plain text, BOS and end tokens, what is learnt, and cutting to length.

A prompt and its answer are tokenised apart, as generation does it: the tokens of the prompt never depend on the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxrlhf.config import Data
from jaxrlhf.data import chat
from jaxrlhf.data.formats import Content, Example, Task
from jaxrlhf.data.tokenizer import GUARD, Tokenizer
from jaxrlhf.errors import DataError


@dataclass(frozen=True, slots=True)
class Draft:
    """An example as guarded text. prompt is "" where text or a conversation is learnt as a whole."""

    prompt: str
    answers: list[list[chat.Chunk]]
    plain: bool  # not in the chat format: BOS before, EOS behind
    whole: bool

    @property
    def guarded(self) -> bool:
        """Whether people's text in it spells a control token."""
        return GUARD in self.prompt or any(GUARD in text for chunks in self.answers for text, _ in chunks)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A draft in ids: the prompt, and for each answer its ids and which of them are learnt."""

    prompt: list[int]
    answers: list[tuple[list[int], list[bool]]]
    whole: bool

    def __len__(self) -> int:
        return len(self.prompt) + max((len(ids) for ids, _ in self.answers), default=0)

    def sequence(self, which: int, learn_all: bool = False) -> tuple[list[int], list[bool]]:
        """(tokens, loss mask) of the prompt and one answer; the first token is never predicted."""
        ids, learnt = self.answers[which]
        tokens = self.prompt + ids
        mask = [True] * len(tokens) if learn_all else [False] * len(self.prompt) + learnt
        return tokens, [False, *mask[1:]]


def refusal(example: Example, task: Task, bos: bool) -> str:
    """Why a row has nothing to offer for `task`, or "". `bos`: an empty prompt can start from BOS."""
    prompt, answer = example.prompt, example.answer
    if prompt is None:
        if not answer or (isinstance(answer, str) and not answer.strip()):
            return "it is empty"
        talks = isinstance(answer, str) or any(turn["role"] == "assistant" for turn in answer)
        return "" if talks else "no assistant turn"
    if isinstance(prompt, list):
        blank = all(turn["role"] == "system" or not turn["content"] for turn in prompt)
    else:
        blank = not (prompt or bos)
    if blank:
        return "the prompt is empty"
    if task == "prompts":
        return "the prompt ends with an assistant turn" if isinstance(prompt, list) and _speaker(prompt) else ""
    answers = example.answers
    if any(isinstance(said, list) and not (said and _speaker(said)) for said in answers):
        return "an answer does not end with an assistant turn"
    if task == "pairs":
        names = ("chosen", "rejected")
        empty = next((f"{name} is empty" for name, said in zip(names, answers, strict=True) if _blank(said)), "")
        return "chosen and rejected are the same" if answer == example.rejected else empty
    if task == "rankings":
        if len(answers) < 2:
            return "fewer than two responses"
        if any(said in answers[:i] for i, said in enumerate(answers)):
            return "two responses are the same"
        return "a response is empty" if any(map(_blank, answers)) else ""
    return "the completion is empty" if answer is None or _blank(answer) else ""


def _blank(answer: Content) -> bool:
    return not (answer if isinstance(answer, str) else "".join(turn["content"] for turn in answer)).strip()


def _speaker(turns: list[dict]) -> bool:
    return turns[-1]["role"] == "assistant"


def draft(example: Example, task: Task, tokenizer: Tokenizer) -> Draft:
    """The text of an example that was not refused; DataError where a conversation cannot be written."""
    prompt, answers = example.prompt, _answers(example, task)
    if isinstance(prompt, str):
        return Draft(prompt, [[(str(answer), True)] for answer in answers], plain=True, whole=False)
    if isinstance(example.answer, str) and prompt is None:
        return Draft("", [[(example.answer, True)]], plain=True, whole=True)
    if not tokenizer.has_chat:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat format; set tokenizer.chat_template to chatml, "
            "which adds one, or to a .jinja file"
        )
    turns = [answer for answer in answers if isinstance(answer, list)]
    if prompt is None:
        return Draft("", [chat.conversation(tokenizer, turns[0])], plain=False, whole=True)
    head = tokenizer.render(prompt, generation=True)
    written = [chat.answer(tokenizer, prompt, head, answer) for answer in turns]
    return Draft(head, written, plain=False, whole=False)


def _answers(example: Example, task: Task) -> list[Content]:
    number = {"pairs": 2, "prompts": 0, "rankings": None}.get(task, 1)
    return example.answers[:number]


def tokenise(drafts: Sequence[Draft], tokenizer: Tokenizer) -> list[Tokens]:
    """Ids of all drafts, in one pass over the backend."""
    texts: list[str] = []
    continues: list[bool] = []
    for item in drafts:
        texts.append(item.prompt)
        continues.append(False)
        for chunks in item.answers:
            texts += [text for text, _ in chunks]
            continues += [bool(item.prompt) or i > 0 for i in range(len(chunks))]
    ids = iter(tokenizer.encode_all(texts, continues))
    return [
        _assembled(item, next(ids), [[next(ids) for _ in chunks] for chunks in item.answers], tokenizer)
        for item in drafts
    ]


def _assembled(item: Draft, prompt: list[int], answers: list[list[list[int]]], tokenizer: Tokenizer) -> Tokens:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    first = prompt or (answers[0][0] if answers else [])
    if item.plain and bos is not None and first[:1] != [bos] and (tokenizer.adds_bos or not (prompt or item.whole)):
        prompt = [bos, *prompt]
    ends = item.plain or not tokenizer.turn_end
    done = []
    for chunks, parts in zip(item.answers, answers, strict=True):
        ids = [i for part in parts for i in part]
        learnt = [flag for (_, flag), part in zip(chunks, parts, strict=True) for _ in part]
        if ends and ids[-1:] != [eos]:  # a text may spell its end already, where data.control_tokens allows it
            ids, learnt = [*ids, eos], [*learnt, True]
        done.append((ids, learnt))
    return Tokens(prompt, done, item.whole)


def fit(tokens: Tokens, config: Data, tokenizer: Tokenizer) -> tuple[Tokens | None, str]:
    """Cut to `max_length` and `max_prompt_length` as `truncation` says: (tokens, what was cut) or (None, why not).

    left cuts the beginning of the prompt (BOS stays) and never an answer; right cuts the end of the answers, with their
    end token, and never a prompt. What is learnt as a whole is cut at the end that is named.
    """
    limit, room = config.max_length, config.max_prompt_length or config.max_length
    cut = config.truncation
    if not (tokens.prompt or tokens.whole):
        return None, "the tokenizer has no tokens for the prompt"
    if tokens.whole:
        if len(tokens) <= limit:
            return tokens, ""
        if cut not in ("left", "right"):
            return None, f"longer than data.max_length ({limit} tokens)"
        keep = limit - len(tokens.prompt)
        part = slice(-keep, None) if cut == "left" else slice(keep)
        ids, learnt = (values[part] for values in tokens.answers[0])
        shorter = replace(tokens, answers=[(ids, learnt)])
        learnable = any(shorter.sequence(0)[1])
        return (
            (shorter, f"cut on the {cut} to {limit} tokens") if learnable else (None, "nothing to learn is left of it")
        )
    answer = len(tokens) - len(tokens.prompt)
    if len(tokens.prompt) <= room and len(tokens) <= limit:
        return tokens, ""
    if cut == "left":
        keep = min(room, limit - answer)
        bos = tokens.prompt[:1] if tokenizer.adds_bos and tokens.prompt[:1] == [tokenizer.bos_id] else []
        if keep <= len(bos):
            return None, f"the answer alone fills data.max_length ({limit} tokens)"
        return replace(tokens, prompt=bos + tokens.prompt[len(bos) - keep :]), f"prompt cut on the left, {limit} in all"
    if len(tokens.prompt) > room:
        name = "max_prompt_length" if config.max_prompt_length else "max_length"
        return None, f"the prompt is longer than data.{name} ({room} tokens)"
    keep = limit - len(tokens.prompt)
    if cut != "right" or keep < 1:
        return None, f"longer than data.max_length ({limit} tokens)"
    answers = [(ids[:keep], learnt[:keep]) for ids, learnt in tokens.answers]
    if any(answer in answers[:i] for i, answer in enumerate(answers)):
        return None, "the answers are the same as far as data.max_length reaches"
    return replace(tokens, answers=answers), f"answer cut on the right, {limit} in all"
