"""Conversations as transformers renders and encodes them, and what is learnt of them."""

import copy
import datetime
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.examples import Example
from jaxrlhf.data.omissions import Omissions
from jaxrlhf.data.tokenise import render, tokenise
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import DataError

from .conftest import byte_level, sentencepiece_like, write_tokenizer
from .templates import END, LEARNT, PLAIN, TEMPLATES, plain

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


def shown(pair: Pair, example: Example, which: int = 0) -> str:
    """The row's text, what is learnt in brackets."""
    ids, mask = pair.row(example, which)
    pieces = zip(pair.ours.convert_ids_to_tokens(ids), mask, strict=True)
    text = "".join(f"[{piece}]" if learnt else piece for piece, learnt in pieces).replace("][", "")
    return text.replace("Ġ", " ").replace("Ċ", "\n")


@pytest.fixture(scope="session")
def byte_level_hf(small_tokenizers: dict[str, Any]) -> Any:
    return small_tokenizers["byte-level"]


def test_one_letter_under_a_generation_prompt_that_says_more_than_the_conversation(byte_level_hf):
    pair = Pair(byte_level_hf, TEMPLATES["opened thought"])
    messages = [USER | {"content": "Which letter comes after r?"}, ASSISTANT | {"content": "s"}]
    assert shown(pair, Example(None, (messages,))).endswith("<|im_start|>assistant\n[s<|im_end|>]")
    # after the prompt that generation sees, as the model would have to write it
    thought = ASSISTANT | {"content": "<think>\nr is before s\n</think>\n\ns"}
    said = shown(pair, Example(messages[:1], ([thought],)))
    assert said.endswith("assistant\n<think>\n[r is before s\n</think>\n\ns<|im_end|>]")


def test_a_completion_of_several_turns_follows_a_prompt_that_says_more(byte_level_hf):
    pair = Pair(byte_level_hf, TEMPLATES["opened thought"])
    ask, say = USER | {"content": "one"}, ASSISTANT | {"content": "two"}
    expected = (
        "assistant\n<think>\n[two<|im_end|>]\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n[two<|im_end|>]"
    )
    assert shown(pair, Example([ask], ([say, ask, say],))).endswith(expected)
    untrained = shown(pair, Example([ask], ([say | {"train": False}, ask, say],)))
    assert untrained.endswith(expected.replace("[two<|im_end|>]", "two<|im_end|>", 1))


def test_an_empty_thought_is_learnt_on_request_and_if_it_was_written(byte_level_hf):
    ask, say = USER | {"content": "one"}, ASSISTANT | {"content": "two"}
    example = Example(None, ([ask, say],))
    empty = "<think>\n\n</think>\n\n"
    pair = Pair(byte_level_hf, TEMPLATES["thinking"])
    assert shown(pair, example).endswith(f"assistant\n{empty}[two<|im_end|>]")
    written = Example(None, ([ask, say | {"content": f"{empty}two"}],))
    assert shown(pair, written).endswith(f"assistant\n[{empty}two<|im_end|>]")
    call = say | {"content": "", "tool_calls": [CALL]}
    assert f"{empty}[<tool_call>" in shown(pair, Example(None, ([ask, call],)))
    pair = Pair(byte_level_hf, TEMPLATES["thinking"], train_empty_thinking=True)
    assert shown(pair, example).endswith(f"assistant\n[{empty}two<|im_end|>]")


def test_a_token_that_would_reach_over_the_end_of_the_prompt_is_two(real_tokenizers):
    pair = Pair(real_tokenizers["qwen3"], PLAIN)
    talk = [USER | {"content": "hi"}, ASSISTANT | {"content": "\none"}]
    prompt = pair.ids(talk[:1], add_generation_prompt=True)
    for example in (Example(None, (talk,)), Example(talk[:1], (talk[1:],))):
        ids, mask = pair.row(example)
        assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)
        assert pair.hf.decode(ids) == pair.ours.render(talk).rstrip("\n")
    assert pair.ids(talk)[: len(prompt)] != prompt


@pytest.mark.parametrize("key", ["byte-level", "prepend", "always", "first"])
def test_text_that_spells_control_tokens_is_text_and_moves_no_boundary(small_tokenizers, key):
    pair = Pair(small_tokenizers[key], PLAIN)
    eos = pair.hf.eos_token
    forged = [USER | {"content": f"the {eos}\nthe"}, ASSISTANT | {"content": f"{eos}the{eos}"}] * 2
    ids, mask = pair.row(Example(None, (forged,)))
    assert ids.count(pair.ours.eos_id) == 4 and mask[-1] and ids[-1] == pair.ours.eos_id
    for i in (1, 3):
        prompt = pair.ours.render_chat(forged[:i], generation=True)
        assert ids[: len(prompt)] == prompt and not mask[len(prompt) - 1] and mask[len(prompt)]
        completion = pair.row(Example(forged[:i], (forged[i : i + 1],)))[0]
        assert completion == ids[: len(completion)]
    begin = mask.index(True)
    assert pair.hf.decode(ids[begin : mask.index(False, begin) - 1]).strip() == f"{eos}the{eos}"


def test_json_in_ascii_keeps_text_text(byte_level_hf):
    template = PLAIN.replace("m.content", "m.content | tojson(ensure_ascii=true)")
    pair = Pair(byte_level_hf, template)
    content = "é <|im_end|> \\ufdd0"
    ids = pair.ours.render_chat([USER | {"content": content}], generation=False)
    assert ids.count(pair.ours.eos_id) == 1
    assert r'"\u00e9 <|im_end|> \\ufdd0"' in pair.hf.decode(ids)


def test_arguments_reach_every_rendering_and_the_saved_template(byte_level_hf, tmp_path):
    talk = [USER | {"content": "one"}, ASSISTANT | {"content": "two"}]
    pair = Pair(byte_level_hf, TEMPLATES["thinking"], template_kwargs={"enable_thinking": False})
    prompt = pair.ids(talk[:1], add_generation_prompt=True, enable_thinking=False)
    assert prompt != pair.ids(talk[:1], add_generation_prompt=True)
    assert pair.ours.render_chat(talk[:1], generation=True) == prompt
    for example in (Example(None, (talk,)), Example(talk[:1], (talk[1:],))):
        ids, mask = pair.row(example)
        assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)
    assert any("enable_thinking is false" in note for note in pair.ours.notes)
    # the saved template has the argument as its default, in transformers too, and still takes another
    pair.ours.save(tmp_path)
    saved = reference(tmp_path)
    assert saved.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"] == prompt
    again = load_tokenizer(tmp_path, TokenizerSource())
    assert again.render_chat(talk[:1], generation=True) == prompt
    other = load_tokenizer(tmp_path, TokenizerSource(template_kwargs={"enable_thinking": True}))
    assert other.render_chat(talk[:1], generation=True) == pair.ids(talk[:1], add_generation_prompt=True)


@pytest.mark.parametrize("value", [None, True, 3, 0.5, 'it\'s "é"\n{{', [1, "a"], {"a": [None, False]}])
def test_every_value_of_an_argument_is_saved_as_it_is(byte_level_hf, tmp_path, value):
    template = "  {% if true %}{{ given | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = Pair(byte_level_hf, template, template_kwargs={"given": value})
    pair.ours.save(tmp_path)
    talk = [USER | {"content": "one"}]
    expected = pair.hf.apply_chat_template(talk, tokenize=False, given=value)
    assert reference(tmp_path).apply_chat_template(talk, tokenize=False) == expected == pair.ours.render(talk)


def test_arguments_are_checked_at_the_door(byte_level_hf, base_folder):
    with pytest.raises(DataError, match=r"reads no variable 'enable_thinkin'; did you mean 'enable_thinking'"):
        Pair(byte_level_hf, TEMPLATES["thinking"], template_kwargs={"enable_thinkin": False})
    with pytest.raises(DataError, match=r"template_kwargs is set and there is no chat template"):
        load_tokenizer(base_folder, TokenizerSource(template_kwargs={"enable_thinking": False}))
    for name, reason in (("messages", "is set by every rendering"), ("a b", "is not the name of a variable")):
        with pytest.raises(ValueError, match=f"'{name}' {reason}"):
            TokenizerSource(template_kwargs={name: 1})
    for date in ("2024-2-3", "20240203", "tomorrow"):
        with pytest.raises(ValueError, match="expected YYYY-MM-DD"):
            TokenizerSource(template_date=date)


def test_the_date_is_the_given_one_and_the_clock_is_left_to_others(byte_level_hf):
    talk = [USER | {"content": "one"}]
    first, second = Pair(byte_level_hf, TEMPLATES["dated"]), Pair(byte_level_hf, TEMPLATES["dated"])
    later = Tokenizer(second.hf, TokenizerSource(template_date="2030-12-01"), second.hf.eos_token_id, [], 0, None)
    assert "Today is 29 February 2024<" in first.ours.render(talk)
    assert "Today is 01 December 2030<" in later.render(talk)
    assert "Today is 29 February 2024<" in first.ours.render(talk)
    assert datetime.date.today().strftime("%d %B %Y") in first.hf.apply_chat_template(talk, tokenize=False)
    assert any("its date is 2024-02-29" in note for note in first.ours.notes)


def test_a_template_for_tools_is_used_where_there_are_tools(byte_level_hf, tmp_path):
    templates = {"default": PLAIN, "tool_use": "{{ tools[0].function.name }}: " + PLAIN}
    hf = copy.copy(byte_level_hf)
    hf.chat_template = {name: plain(template) for name, template in templates.items()}
    hf.save_pretrained(tmp_path / "made")
    ours = load_tokenizer(tmp_path / "made", TokenizerSource())
    ours.save(tmp_path / "saved")
    talk = [USER | {"content": "one"}]
    for tokenizer in (ours, load_tokenizer(tmp_path / "saved", TokenizerSource())):
        for tools in (None, TOOLS):
            expected = hf.apply_chat_template(talk, tools=tools, tokenize=False)
            assert tokenizer.render(talk, tools=tools) == expected and ("search: " in expected) == bool(tools)


def left_out(pair: Pair, *examples: Example) -> list[str]:
    omissions = Omissions(pair.ours)
    for i, example in enumerate(examples):
        omissions.add(example, render(example, "sft" if example.completions else "prompts", pair.ours), f"line {i + 1}")
    return omissions.notes()


def test_what_a_template_leaves_out_is_counted(byte_level_hf):
    system, ask, say = {"role": "system", "content": "user"}, USER | {"content": "a user"}, ASSISTANT | {"content": "b"}
    dropping = Pair(byte_level_hf, TEMPLATES["system-dropping"])
    # the text of the system turn occurs elsewhere, too
    talks = (Example(None, ([system, ask, say],)), Example([system, ask], ([say],)), Example([system, ask]))
    for talk in talks:
        (note,) = left_out(dropping, Example(None, ([ask, say],)), talk)
        assert note.startswith("the chat template leaves out part of 1 message (line 2)")
    assert left_out(dropping, Example(None, ([ask, say],))) == []
    thinking = Pair(byte_level_hf, TEMPLATES["thinking"])
    thought = say | {"reasoning_content": "so it is"}
    inline = say | {"content": "<think>so it is</think>b"}
    assert left_out(thinking, Example(None, ([system, ask, thought],)), Example(None, ([system, ask, inline],))) == []
    for dropped in (thought, inline):
        (note,) = left_out(thinking, *[Example(None, ([ask, dropped, ask, say],), TOOLS)] * 2)
        assert "part of 2 messages (line 1, line 2)" in note
    calls = Example(None, ([ask, say | {"tool_calls": [CALL]}],), TOOLS)
    assert left_out(thinking, calls) == []
    messages, tools = left_out(dropping, calls)
    assert "part of 1 message (" in messages and "leaves out the tools of 1 row (line 1)" in tools


def test_every_tokenizer_of_the_fixtures_shows_all_of_a_plain_conversation(real_tokenizers, small_tokenizers):
    talk = [USER | {"content": ' "one"\n\n  two'}, ASSISTANT | {"content": "é\n"}, USER | {"content": "<b>"}]
    for hf in [*real_tokenizers.values(), *small_tokenizers.values()]:
        for name in ("trimming", "folded", "marked"):
            assert left_out(Pair(hf, TEMPLATES[name]), Example(talk), Example(None, (talk[:2],))) == []


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "qwen3"])
def test_real_templates(shared_data, real_tokenizers, name):
    ours, hf = load_tokenizer(shared_data / "tokenizers" / name, TokenizerSource()), real_tokenizers[name]
    ask, say, call = USER | {"content": "user"}, ASSISTANT | {"content": "user"}, {"tool_calls": [CALL]}
    calls = "" if name == "smollm2" else f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"
    thought = "<think>\nwhy\n</think>\n\n"
    talks = [
        ([ask, say], ["user"]),
        ([{"role": "system", "content": "user"}, ask, say, ask, say], ["user", "user"]),
        ([ask, ASSISTANT | {"content": ""} | call, {"role": "tool", "content": "4"}, say], [calls, "user"]),
        ([ask, say | call], [f"user\n{calls}" if calls else "user"]),
        ([ask, say, ask, ASSISTANT | {"content": f"{thought}user"}], ["user", f"{thought}user"]),
    ]
    for messages, said in talks:
        for tools in (None, TOOLS):
            (tokens,) = tokenise([render(Example(None, (messages,), tools), "sft", ours)], ours)
            ids, mask = tokens.sequence(0)
            assert ids == hf.apply_chat_template(messages, tools=tools)["input_ids"][: len(ids)]
            learnt = [token for token, flag in zip(ids, mask, strict=True) if flag]
            assert hf.decode(learnt) == "".join(f"{text}<|im_end|>" for text in said)
