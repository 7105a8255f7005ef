import dataclasses
from collections import Counter

import pytest

from jaxrlhf.config import Data
from jaxrlhf.data.examples import Example, to_examples
from jaxrlhf.data.file_readers import SourceLocation
from jaxrlhf.data.formats import FORMAT_COLUMNS, answer_column, recognise
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def examples(row, task, chat=False, **options):
    """The examples of a row, without scores, or why there are none."""
    config = Data(path="x", **options)
    rows = Rows("x.jsonl", [row], [SourceLocation("x.jsonl", 37, line=True)])
    found, reason = to_examples(rows, 0, recognise(rows, task, config), config, chat, lambda text: text, Counter())
    return reason or [dataclasses.replace(item, scores=()) for item in found]


def example(row, task, chat=False, **options):
    (only,) = examples(row, task, chat, **options)
    return only


def table(columns):
    return Rows("x", [dict.fromkeys(columns, "some words")], [])


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
TALK = [user("hi"), said("hello"), user("bye"), said("see you")]
RANKED = {"prompt": "q", "chosen": [user("q"), said("good")], "rejected": [user("q"), said("bad")], "score_chosen": 9}
TURNS = Example([user("q")], ([said("c")], [said("r")]))
PLAIN = [
    ("sft", {"text": "abc"}, Example(None, ("abc",))),
    ("sft", {"messages": TALK}, Example(None, (TALK,))),
    ("sft", {"prompt": "q", "completion": " a", "source": "s"}, Example("q", (" a",))),
    ("sft", {"prompt": [user("q")], "completion": [said("a")]}, Example([user("q")], ([said("a")],))),
    ("sft", {"prompt": [user("q")], "completion": "a"}, Example([user("q")], ([said("a")],))),
    ("sft", {"prompt": "q", "completion": [said("a")]}, Example([user("q")], ([said("a")],))),
    ("sft", ALPACA, Example("Add.\n1 and 2\n", ("3",))),
    ("sft", {**ALPACA, "input": ""}, Example("Add.\n", ("3",))),
    ("sft", {**ALPACA, "input": None}, Example("Add.\n", ("3",))),
    ("sft", {"question": "q", "answer": "a"}, Example("q\n", ("a",))),
    ("sft", {**ALPACA, "chosen": "c", "rejected": "r"}, Example("Add.\n1 and 2\n", ("3",))),
    ("pairs", {**ALPACA, "chosen": "c", "rejected": "r"}, Example("Add.\n1 and 2\n", ("c", "r"))),
    ("prompts", {**ALPACA, "chosen": "c", "rejected": "r"}, Example("Add.\n1 and 2\n")),
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r"}, Example("q", ("c", "r"))),
    ("sft", {"prompt": "q", "chosen": "c", "rejected": "r"}, Example("q", ("c", "r"))),
    ("pairs", {"prompt": "q", "accepted": "c", "rejected": "r"}, Example("q", ("c", "r"))),
    ("pairs", {"prompt": [user("q")], "chosen": [said("c")], "rejected": [said("r")]}, TURNS),
    ("pairs", {"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, Example("s\nq\n", ("c", "r"))),
    ("pairs", RANKED, Example([user("q")], ([said("good")], [said("bad")]))),
    ("sft", RANKED, Example([user("q")], ([said("good")], [said("bad")]))),
    ("prompts", {"prompt": "q", "answer": 3}, Example("q")),
    ("prompts", {"prompt": "q", "completion": None}, Example("q")),
    ("prompts", {"question": "q", "answer": "a"}, Example("q\n")),
    ("prompts", {"messages": TALK}, Example(TALK[:3])),
    ("prompts", {"messages": TALK[:3]}, Example(TALK[:3])),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "expected"), PLAIN, ids=lambda value: str(value)[:50])
def test_each_format_for_a_tokenizer_without_a_chat_format(task, row, expected):
    assert example(row, task) == expected


def test_prompts_beside_conversations_are_user_turns():
    assert example(RANKED, "prompts").prompt == [user("q")]


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("sft", ALPACA, Example([user("Add.\n1 and 2")], ([said("3")],))),
        ("sft", {"question": "q", "answer": "a"}, Example([user("q")], ([said("a")],))),
        (
            "pairs",
            {"system": "s", "question": "q", "chosen": "c", "rejected": "r"},
            Example([system("s"), user("q")], ([said("c")], [said("r")])),
        ),
        ("prompts", {"system": "", "question": "q"}, Example([user("q")])),
        ("sft", {"prompt": "q", "completion": "a"}, Example("q", ("a",))),  # a finished prompt stays as it is
        ("pairs", {"chosen": "x y", "rejected": "x z"}, Example("x", (" y", " z"))),
    ],
)
def test_questions_become_user_turns_where_there_is_a_chat_format(task, row, expected):
    assert example(row, task, chat=True) == expected


def test_sharegpt_speakers_and_text_parts():
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    assert example(row, "sft") == Example(None, ([user("hi"), said("hello")],))
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], "name": None}
        ]
    }
    assert example(parts, "sft") == Example(None, ([user("hi")],))


HH = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " Yes.", HH + " No.", HH),
        (HH + " It is so.", HH + " It is not.", HH),  # what the answers share stays with them
        (HH + " Yes.", HH + " Yes.", HH),
        ("one two three", "one two four", "one two"),
        ("cat", "car", ""),
        ("### Response:\nA", "### Response:\nB", "### Response:"),
    ],
)
def test_the_common_beginning_of_two_texts(chosen, rejected, prompt):
    made = example({"chosen": chosen, "rejected": rejected}, "pairs")
    assert made.prompt == prompt
    assert tuple(made.prompt + completion for completion in made.completions) == (chosen, rejected)


def test_the_common_beginning_of_two_conversations():
    other = [*TALK[:3], said("go")]
    assert example({"chosen": TALK, "rejected": other}, "pairs") == Example(TALK[:3], ([TALK[3]], [said("go")]))
    # they part in the middle: an answer may be several turns
    early = [user("hi"), said("what"), user("bye")]
    assert example({"chosen": TALK, "rejected": early}, "pairs") == Example(TALK[:1], (TALK[1:], early[1:]))
    with pytest.raises(DataError, match=r"x\.jsonl:37: the conversations have no common prompt"):
        example({"chosen": TALK, "rejected": [user("other"), said("x")]}, "pairs")


def test_template_writes_the_prompt():
    strict = "<|user|> {input} <|end|>\n<|assistant|>"
    assert example({"input": "Is it?"}, "prompts", template=strict) == Example("<|user|> Is it? <|end|>\n<|assistant|>")
    full = {**ALPACA, "chosen": "c", "rejected": "r"}
    assert example(full, "sft", template=strict, chat=True) == Example(
        "<|user|> 1 and 2 <|end|>\n<|assistant|>", ("3",)
    )
    assert example(full, "pairs", template="{{{input}}}") == Example("{1 and 2}", ("c", "r"))
    assert example({"n": 3, "completion": "a"}, "sft", template="{n}?") == Example("3?", ("a",))


def test_completion_prefix():
    row = {"prompt": "q", "accepted": "c", "rejected": "r"}
    assert example(row, "pairs", completion_prefix=" ") == Example("q", (" c", " r"))


@pytest.mark.parametrize(
    ("row", "task", "options", "message"),
    [
        ({"text": "a", "messages": []}, "sft", {}, "more than one way: text; or messages"),
        ({**ALPACA, "text": "a"}, "sft", {}, "more than one way: text; or instruction, input, output"),
        ({"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}, "pairs", {}, "more than one way"),
        ({"chosen": "a", "accepted": "b", "rejected": "c"}, "pairs", {}, "chosen, rejected; or accepted, rejected"),
        ({"a": "b", "c": "d"}, "sft", {}, "columns a, c: not a known format for supervised fine-tuning"),
        ({"text": "a"}, "pairs", {}, "not a known format for preference pairs"),
        ({"text": "a"}, "prompts", {}, "not a known format for prompts"),
        ({"input_ids": [1], "labels": [1]}, "sft", {}, "token ids; give the text instead"),
        ({"chosen_input_ids": [1], "rejected_input_ids": [1]}, "pairs", {}, "token ids; give the text instead"),
        ({"input": "a"}, "prompts", {"template": "{inptu}"}, "no column 'inptu' in x.jsonl; the columns are input"),
        ({"input": "a"}, "prompts", {"template": "hello"}, r"no \{column\} in it"),
        ({"input": "a"}, "prompts", {"template": "{input"}, r"data.template: "),
        ({"input": "a"}, "prompts", {"template": "{input:d}"}, r"data.template: .* write \{column\}"),
        ({"input": "a"}, "prompts", {"template": "{input!x}"}, r"data.template: .* write \{column\}"),
        ({"input": "a"}, "prompts", {"template": "{input:{width}}"}, r"data.template: .* write \{column\}"),
        ({"input": None}, "prompts", {"template": "{input}"}, "x.jsonl:37: column 'input' is null"),
        ({"prompt": "a", "completion": None}, "sft", {}, "x.jsonl:37: column 'completion' is null"),
        ({"prompt": 5, "completion": "a"}, "sft", {}, "x.jsonl:37: column 'prompt' is int 5"),
        ({"text": TALK}, "sft", {}, "column 'text' should hold text"),
        ({"messages": "a"}, "sft", {}, "column 'messages' should hold messages"),
        ({"messages": [user("a"), "b"]}, "sft", {}, "column 'messages', message 2: is str 'b'"),
        ({"messages": [{"role": "us<er", "content": "a"}]}, "sft", {}, "message 1: role is"),
        ({"messages": [{"role": "user", "content": 3}]}, "sft", {}, "message 1: content is int 3"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "sft", {}, "unknown speaker 'martian'"),
        ({"input": "q", "completion": TALK}, "sft", {"template": "{input}"}, "text or one assistant message"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused(row, task, options, message):
    with pytest.raises(DataError, match=message):
        example(row, task, **options)


def test_a_named_column_settles_an_ambiguity():
    assert example({**ALPACA, "text": "whole"}, "sft", columns={"text": "text"}) == Example(None, ("whole",))


def test_a_column_missing_in_one_row_is_named():
    config = Data(path="x")
    rows = Rows(
        "x",
        [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
        [SourceLocation("x", 1, True), SourceLocation("x", 2, True)],
    )
    reading = recognise(rows, "sft", config)
    with pytest.raises(DataError, match="x:2: column 'completion' is missing"):
        to_examples(rows, 1, reading, config, False, str, Counter())


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (["prompt", "completion", "answer"], {}, "completion"),
        (["system", "question", "answer"], {}, "answer"),
        (["instruction", "input", "output"], {}, "output"),
        (["prompt", "answer"], {}, ""),
        (["messages"], {}, ""),
        (["said", "output"], {"template": "{said}:"}, "output"),
        (["answer", "other"], {"template": "{answer}:"}, ""),
    ],
)
def test_the_answer_that_belongs_to_a_prompt(columns, options, expected):
    assert answer_column(table(columns), Data(path="x", **options)) == expected


def test_columns_that_decide_a_format():
    """Beside a prompt and its answers, those that do not are no matter, and some of those that do are."""
    config = Data(path="x")
    for task, names in (("sft", ("prompt", "completion")), ("pairs", ("prompt", "chosen", "rejected"))):
        for other in ("input", "answer", "output", "score", "source"):
            assert other not in FORMAT_COLUMNS
            assert recognise(table((*names, other)), task, config) == recognise(table(names), task, config)
        with pytest.raises(DataError, match="more than one way"):
            recognise(table((*names, "question", "answer", "text")), task, config)


@pytest.mark.parametrize(
    ("names", "task", "advice"),
    [
        (
            ("q", "better", "worse"),
            "pairs",
            "perhaps with --data.columns '{prompt: q, chosen: better, rejected: worse}",
        ),
        (("prompt", "answer_good", "other"), "pairs", "--data.columns '{chosen: answer_good, rejected: other}'"),
        (
            ("a", "b", "c"),
            "pairs",
            "--data.columns '{prompt: NAME, chosen: NAME, rejected: NAME}', NAME as in",
        ),
        (("prompt",), "pairs", "Needed are 3 columns, e.g. prompt, chosen, rejected; add those that are missing"),
        (("topic",), "prompts", "--data.columns '{prompt: topic}', or write the prompt with --data.template"),
        (("body",), "sft", "--data.columns '{text: body}'"),
    ],
)
def test_unknown_columns_are_answered_with_the_option_to_type(names, task, advice):
    with pytest.raises(DataError) as caught:
        recognise(table(names), task, Data(path="x"))
    *_, known, last = str(caught.value).splitlines()
    assert advice in last and known.startswith("Known: ") and len(known) < 260
