"""Conversations as transformers renders and encodes them, and what is learnt of them."""

import copy
import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.examples import Example
from jaxrlhf.data.tokenise import render, tokenise
from jaxrlhf.data.tokenizer import Tokenizer

from .conftest import byte_level, sentencepiece_like, write_tokenizer
from .templates import END, LEARNT, TEMPLATES, plain

REAL = ("gpt2", "smollm2", "qwen2.5", "qwen3")
DATE = "2024-02-29"
USER, ASSISTANT = {"role": "user"}, {"role": "assistant"}


def reference(folder: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def small_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A byte-level tokenizer, and the ways in which SentencePiece's begin a text, as transformers loads them."""
    backends = {"byte-level": byte_level()}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for scheme in ("prepend", "always", "first", "never"):
        backends[scheme] = sentencepiece_like()
        if scheme != "prepend":
            backends[scheme].normalizer = normalizers.Sequence([])
            backends[scheme].pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    loaded = {}
    for name, backend in backends.items():
        kind = {"eos_token": "<|im_end|>"} if name == "byte-level" else names
        loaded[name] = reference(write_tokenizer(tmp_path_factory.mktemp(name), backend, **kind))
    return loaded


@pytest.fixture(scope="session")
def real_tokenizers(shared_data: Any) -> dict[str, Any]:
    return {name: reference(shared_data / "tokenizers" / name) for name in REAL}


class Pair:
    """A tokenizer of ours and transformers' own, with the same chat template."""

    def __init__(self, hf: Any, template: str, **source: Any) -> None:
        self.hf, self.template = copy.copy(hf), template
        self.hf.chat_template = plain(template)
        eos = self.hf.eos_token_id
        config = TokenizerSource(template_date=DATE, **source)
        self.ours = Tokenizer(self.hf, config, eos, [], 0, None)

    def ids(self, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[int]:
        return self.hf.apply_chat_template(messages, tools=tools, tokenize=True, **options)["input_ids"]

    def learnt(self, messages: list[dict[str, Any]], tools: Any = None) -> list[tuple[int, int]]:
        """The characters between the template's LEARNT and END."""
        text = self.hf.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=self.template)
        spans, length = [], 0
        for part in text.split(LEARNT)[:-1]:
            length += len(part.replace(END, ""))
            spans.append(length)
        ends = [len(text[: i + 1].replace(LEARNT, "").replace(END, "")) for i, c in enumerate(text) if c == END]
        return list(zip(spans, ends, strict=True))

    def row(self, example: Example, which: int = 0) -> tuple[list[int], list[bool]]:
        (tokens,) = tokenise([render(example, "pairs" if which else "sft", self.ours)], self.ours)
        return tokens.sequence(which)


@pytest.fixture
def leap_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of chat templates stands at DATE."""
    import transformers.utils.chat_template_utils as utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(utils, "datetime", Clock)


SAMPLES = [
    "s",
    "",
    "Which letter comes after r?",
    "assistant",
    "user",
    "You are a helpful assistant",
    "\none\n",
    " two ",
]
SAMPLES += [
    "Today is 29",
    "the the the",
    "a</b>",
    "INST",
    ":",
    "é",
    "🙂 x",
    "ASSISTANT: the",
    "<think>\nwhy\n</think>\n\nso",
]
contents = st.sampled_from(SAMPLES) | st.text("abc \n:<é.", max_size=6)
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "the 'fox'", "n": 3}}}
TOOLS = [{"type": "function", "function": {"name": "search", "description": "the", "parameters": {"type": "object"}}}]


@st.composite
def conversations(draw: Any, system: bool, calls: bool) -> list[dict[str, Any]]:
    """Turns in any order, an assistant's last; perhaps with reasoning and tool calls."""
    messages = [{"role": "system", "content": draw(contents)}] if system and draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4))
    for role in [*roles, "user", "assistant"] if draw(st.booleans()) else [*roles, "assistant"]:
        message: dict[str, Any] = {"role": role, "content": draw(contents)}
        if calls and role == "assistant":
            kind = draw(st.integers(0, 3))
            if kind == 1:
                message["reasoning_content"] = draw(st.sampled_from(["why", "the s", "so\nthat"]))
                message["content"] = message["content"].replace("</think>", "")
            if kind > 1:
                message |= {"content": draw(st.sampled_from(["", "so"])), "tool_calls": [CALL] * (kind - 1)}
        messages.append(message)
    return messages


def check(pair: Pair, messages: list[dict[str, Any]], tools: Any = None) -> bool:
    """Compare a row with transformers' rendering. Return False if tokens of that reach over the end of a generation
    prompt, so that row and prompt cannot both be as transformers has them."""
    ids, mask = pair.row(Example(None, (messages,), tools))
    if not pair.ours.turn_end:  # our own end of the row
        assert (ids[-1], mask[-1]) == (pair.ours.eos_id, True)
        ids, mask = ids[:-1], mask[:-1]
    text, whole = pair.ours.render(messages, tools=tools), pair.ids(messages, tools)
    prompts = {}  # of the turns whose generation prompt is part of the finished conversation
    for i, message in enumerate(messages):
        prompt = pair.ours.render(messages[:i], True, tools) if i and message["role"] == "assistant" else None
        if prompt is not None and text.startswith(prompt):
            prompts[i] = pair.ids(messages[:i], tools, add_generation_prompt=True)
    for i, prompt in prompts.items():
        (tokens,) = tokenise(
            [render(Example(messages[:i], (messages[i : i + 1],), tools), "sft", pair.ours)], pair.ours
        )
        assert tokens.prompt == prompt
    spans = pair.learnt(messages, tools)
    if any(whole[: len(prompt)] != prompt for prompt in prompts.values()):
        first = min(prompts)
        assert ids[: len(prompts[first])] == prompts[first]
        assert "".join(pair.hf.decode(ids).split()) == "".join(text[: spans[-1][1]].split())
        return False
    assert ids == whole[: len(ids)]
    assert all(ids[: len(prompt)] == prompt for prompt in prompts.values())
    encoding = pair.hf(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == whole
    offsets = encoding["offset_mapping"]
    learnt = [any(start < end and stop > begin for begin, end in spans) for start, stop in offsets]
    assert mask == [False, *learnt[1 : len(ids)]] and not any(learnt[len(ids) :])
    return True


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.usefixtures("leap_day")
def test_rows_have_the_tokens_of_transformers_and_learn_what_the_assistant_says(
    name, small_tokenizers, real_tokenizers
):
    pairs = {key: Pair(hf, TEMPLATES[name]) for key, hf in {**small_tokenizers, **real_tokenizers}.items()}
    same = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(key=st.sampled_from(list(pairs)), data=st.data())
    def property_holds(key: str, data: Any) -> None:
        calls = name == "thinking"
        messages = data.draw(conversations(system=name != "no system", calls=calls))
        same.append(check(pairs[key], messages, data.draw(st.sampled_from([None, TOOLS])) if calls else None))

    property_holds()
    assert sum(same) > 0.4 * len(same)
