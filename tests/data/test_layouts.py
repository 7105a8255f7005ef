"""Every layout of public data sets: the prompt is never lost, the better response is the chosen one, and what is not
used or not judged is named. The rows are those of docs/formats.md, and rows of the same schemas."""

import csv
import io
import itertools
import json
import random
from collections import Counter
from typing import Any

import make_formats
import pytest
from make_formats import BAD, EXAMPLES, GOOD, QUESTION, TOOL, gpt, human, rated, said, user

from jaxrlhf.config import Data, DPOConfig, ModelSource, replace
from jaxrlhf.data.datasets import columns, pair_rows, prompt_rows, sft_rows, train_validation_split
from jaxrlhf.data.examples import to_examples
from jaxrlhf.data.file_readers import SourceLocation
from jaxrlhf.data.formats import TASK_NAMES, Task, recognise
from jaxrlhf.data.labelled import label_rows, ranking_rows, score_rows
from jaxrlhf.data.layouts import LAYOUTS
from jaxrlhf.data.sources import Rows, read_rows
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.training.dpo.trainer import read_rows as preference_rows

PROMPTS = (QUESTION, "2 + 3 = ", "2 and 3", "2 apples", "Who has 5?")
ROWS = [(layout.name, i) for layout in LAYOUTS for i in range(len(EXAMPLES[layout.name]))]


@pytest.fixture
def load(tmp_path, chatty):
    """Examples of rows: (prompt, completions, scores), and the report."""

    def load(rows: list[dict[str, Any]], task: Task, tokenizer=chatty, **options: Any):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ties = options.pop("ties", False)
        config = Data(path=str(path), max_length=4096, **options)
        found = []
        split = train_validation_split(config, tokenizer, task, lambda t, e, r, i: found.append(e), ties=ties)
        return found, split.report

    return load


def text(content: Any) -> str:
    return content if isinstance(content, str) else content[-1]["content"]


def test_each_layout_has_examples_and_the_page_shows_them():
    assert list(EXAMPLES) == [layout.name for layout in LAYOUTS]
    assert make_formats.PAGE.read_text(encoding="utf-8") == make_formats.page(), "run scripts/make_formats.py"


@pytest.mark.parametrize(("name", "i"), ROWS)
def test_the_better_answer_is_chosen_and_no_prompt_is_lost(load, name, i):
    """In all examples the better answer is 5 and the worse one is 6, however the verdict is written."""
    row = EXAMPLES[name][i]
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    readable: list[Task] = ["pairs"] if not layout.single else ["prompts"] if not layout.responses else ["sft"]
    readable += ["rankings"] if layout.many else []
    for task in readable:
        if task == "sft" and row.get("label", row.get("kto_tag")) is False:
            with pytest.raises(DataError, match="it is labelled bad"):
                load([row], task)
            continue
        (example,), report = load([row], task)
        if task != "sft" or "messages" not in row:
            assert report.format.startswith(name), report.format
        best, *others = map(text, example.completions or ["5"])
        assert ("five" if name == "text" else "5") in best and "6" not in best
        assert task == "sft" or not others or "6" in others[-1]
        if example.prompt is not None:
            assert any(prompt in text(example.prompt) for prompt in PROMPTS)


EXTRA = {"id": "x1", "source": "the web", "score_chosen": 1.0, "meta": {"a": 1}, "num_turns": 3, "model": "m m",
         "topic": ["a"], "split": "train", "score_A": 1, "annotator": "a b", "rationale": "because it is"}  # fmt: skip


@pytest.mark.parametrize("task", list(TASK_NAMES))
def test_neither_the_order_of_columns_nor_other_columns_change_what_is_read(task):
    def read(row: dict[str, Any]) -> Any:
        rows, config = Rows("x", [row], [SourceLocation("x", 1, True)]), Data(path="x")
        try:
            found = recognise(rows, task, config)
        except DataError:
            return None
        return found.layout.name, to_examples(rows, 0, found, config, True, str, Counter())

    rng = random.Random(task)
    for row in itertools.chain.from_iterable(EXAMPLES.values()):
        items = [*row.items(), *(item for item in rng.sample(list(EXTRA.items()), 5) if item[0] not in row)]
        rng.shuffle(items)
        assert read(dict(items)) == read(row), row


VERDICTS = [
    ("AlpacaEval, AlpacaFarm", "preference",
     {1: 0, 2: 1, 1.0000048: 0, 1.9: 1, "2": 1, 1.5: "tie", 0: "tie", None: None}),
    ("SHP", "labels", {1: 0, 0: 1}),
    ("PKU-SafeRLHF", "better_response_id", {0: 0, 1: 1, None: None}),
    ("HelpSteer3", "overall_preference", {-3: 0, 2: 1, 0: "tie", None: None}),
    ("HelpSteer2 preferences", "preference_strength", {-1: 0, 3: 1, 0: "tie"}),
    ("Chatbot Arena", "winner", {"model_a": 0, "model_b": 1, "tie": "tie", "tie (bothbad)": "tie", None: None}),
    ("summarize-from-feedback", "choice", {0: 0, 1: 1, None: None}),
    ("WebGPT", "score_1", {-1.0: 0, 0.9: 1, 0.5: "tie"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "meanings"), VERDICTS, ids=[name for name, _, _ in VERDICTS])
def test_every_verdict_ties_and_no_verdict(load, name, column, meanings):
    row = EXAMPLES[name][0]
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    stored = row["summaries"] if layout.many else [row[key] for key in layout.responses.split()]
    texts = [item["text"] if isinstance(item, dict) else item for item in stored]
    texts = [item[-1]["content"] if isinstance(item, list) else item for item in texts]
    rows = [{**row, column: value} for value in meanings]
    found, report = load(rows, "pairs")
    expected = [(texts[better], texts[1 - better]) for better in meanings.values() if better in (0, 1)]
    assert [tuple(map(text, example.completions)) for example in found] == expected
    where = [f"line {i + 1}" for i, meaning in enumerate(meanings.values()) if meaning is None]
    tied = [f"line {i + 1}" for i, meaning in enumerate(meanings.values()) if meaning == "tie"]
    assert report.dropped.get("it is not judged", []) == where and report.dropped.get("it is a tie", []) == tied
    with_ties, _ = load(rows, "pairs", ties=True)
    assert sum(example.scores[0] == example.scores[1] for example in with_ties) == len(tied)
    best, report = load(rows, "sft")  # either response of a tie is as good
    assert len(best) == len(rows) - len(where)
    assert report.dropped.get("it is not judged", []) == where


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("summarize-from-feedback", {"choice": 2}, "'choice' is int 2; expected one of 0, 1"),
        ("summarize-from-feedback", {"info": {"id": 1}}, "expected an object with post or article"),
        ("Chatbot Arena", {"winner": "a"}, "'winner' is str 'a'; expected one of model_a"),
        ("SHP", {"labels": "x"}, "'labels' is str 'x'; expected a finite number"),
        ("OpenAI's preference fine-tuning", {"input": "hi"}, "expected an object with messages"),
        ("WebGPT", {"question": {"id": 1}}, "column 'question' is null; expected text"),
        ("Nectar", {"answers": [{"answer": "a"}, {"answer": "b"}]}, "expected an object with 'rank'"),
        ("UltraFeedback", {"completions": [{"response": "a"}, {"response": "b"}]}, "one of its keys in data.score"),
        ("rankings", {"scores": [1]}, "'scores' is list .* expected a number for each of 3"),
    ],
)
def test_a_verdict_that_is_not_understood_names_row_and_column(load, name, change, message):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        load([EXAMPLES[name][0] | change], "pairs")


def test_lists_with_scores_are_pairs_rankings_or_scored_responses(load, tmp_path, chatty):
    row = EXAMPLES["UltraFeedback"][0]
    scored, _ = load([row], "scores")
    assert [(text(example.completions[0]), example.scores) for example in scored] == [
        (BAD, (1.5,)), ("Five?", (3.0,)), (GOOD, (4.5,))]  # fmt: skip
    by_honesty, _ = load([row], "scores", score="honesty")
    assert [example.scores for example in by_honesty] == [(5.0,), (4.0,), (5.0,)]
    (pair,), _ = load([row], "pairs", score="honesty")
    assert [text(c) for c in pair.completions] == [BAD, "Five?"]
    ranking, report = load([row], "rankings", score="honesty")
    assert [text(c) for c in ranking[0].completions] == [BAD, "Five?"]
    assert "responses left out of rankings, as another one has the same score: 1" in str(report)
    missing = {**rated(BAD, 1, 3), "fine-grained_score": None}
    unrated = {"instruction": QUESTION, "completions": [rated(GOOD, 3, 3), missing]}
    with pytest.raises(DataError, match="it is not judged"):
        load([unrated], "pairs")
    (only,), _ = load([unrated], "sft")
    assert text(only.completions[0]) == GOOD
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (row, row | {"instruction": "Again?"})))
    data = Data(path=str(path), max_length=4096)
    assert len(score_rows(data, chatty).train) == 6 and len(ranking_rows(data, chatty).train) == 2
    halves = score_rows(Data(path=str(path), max_length=4096, validation_fraction=0.5), chatty)
    assert [len(halves.train), len(halves.validation)] == [3, 3]  # the responses to a prompt stay together
    (row,) = prompt_rows(data, chatty).train[:1]
    assert row.text == QUESTION and "completions" not in row.columns and row.columns["source"] == "s"


def test_a_score_is_chosen_by_name(load):
    row = EXAMPLES["HelpSteer"][0]
    assert load([row], "scores")[0][0].scores == (4.0,)
    (example,), report = load([row], "scores", score="verbosity")
    assert example.scores == (1.0,) and "columns not used: helpfulness, correctness" in str(report)
    with pytest.raises(DataError, match=r"data.score: no column 'vérité'.*the columns are prompt, response"):
        load([row], "scores", score="vérité")


def test_responses_labelled_bad_are_for_kto_and_not_for_sft(load, tmp_path, chatty):
    good, bad = [user(QUESTION), said(GOOD)], [user(QUESTION), said(BAD)]
    sources = [
        [{"messages": good, "label": True}, {"messages": bad, "label": False}],
        [{"messages": good, "kto_tag": True}, {"messages": bad, "kto_tag": False}],
        [{"instruction": QUESTION, "output": o, "kto_tag": o == GOOD} for o in (GOOD, BAD)],
        [{"prompt": QUESTION, "completion": GOOD, "tag": True}, {"prompt": QUESTION, "completion": BAD, "tag": False}],
        [{"messages": good, "label": 1}, {"messages": bad, "label": 0}],
        [{"prompt": QUESTION, "response": GOOD, "label": "1"}, {"prompt": QUESTION, "response": BAD, "label": "0"}],
    ]  # fmt: skip
    for rows in sources:
        (example,), report = load(rows, "sft")
        assert GOOD in text(example.completions[0]) and report.dropped == {"it is labelled bad": ["line 2"]}
        labelled, _ = load(rows, "labels")
        assert [example.scores for example in labelled] == [(1.0,), (0.0,)]
        config = DPOConfig(model=ModelSource(path="m"), data=Data(path=str(tmp_path / "rows.jsonl"), max_length=4096))
        config = replace(config, **{"dpo.loss": "kto"})
        assert [row.label for row in preference_rows(config, chatty).train] == [True, False]
    unlabelled, _ = load([*sources[0], {"messages": good, "label": None}], "sft")
    assert len(unlabelled) == 2  # a missing label does not say that the response is bad
    classes = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    examples, report = load(classes, "sft")
    assert len(examples) == 2 and "columns not used: label" in str(report)
    topics = [{"prompt": "a", "completion": "b", "tag": "algebra"}]
    assert "columns not used: tag" in str(load(topics, "sft")[1])


def test_columns_of_a_format_are_used_and_others_are_named(load):
    talk = [human("hi"), gpt("hello")]
    for row in ({"conversations": talk, "system": "be"}, {"messages": talk, "system_prompt": "be"}):
        (example,), _ = load([row], "sft")
        assert example.completions[0][0] == {"role": "system", "content": "be"}
    own = [{"from": "system", "value": "mine"}, *talk]
    assert load([{"conversations": own, "system": "be"}], "sft")[0][0].completions[0][0]["content"] == "mine"
    whole = {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "system": "be"}
    assert load([whole], "pairs")[0][0].prompt == [{"role": "system", "content": "be"}, user("q")]
    (asked,), _ = load([{"prompt": "q", "completion": "a", "system": "be"}], "sft")
    assert asked.prompt == [{"role": "system", "content": "be"}, user("q")]
    alpaca = EXAMPLES["Alpaca, Dolly"][0]
    (full, bare), _ = load([alpaca, {**alpaca, "history": None, "system": ""}], "sft")
    assert [turn["content"] for turn in full.prompt] == ["You count.", "Hi", "Hello.", "Add.\n2 and 3"]
    assert bare.prompt == [user("Add.\n2 and 3")]
    _, report = load([{"prompt": "q", "completion": "a", "id": 7, "empty": None, "source": "web"}], "sft")
    assert "columns not used: id, source" in str(report)
    lists = {"question": "q", "context": [["a"]], "answer": "a"}  # not a text: HotpotQA
    assert "columns not used: context" in str(load([lists], "sft")[1])


def test_tools_reach_the_template_in_every_spelling(load, base):
    expected = [{"type": "function", "function": TOOL}]
    talk = {"messages": [user("q"), said("a")]}
    null = {**TOOL, "parameters": {**TOOL["parameters"], "required": None}}
    for tools in ([TOOL], json.dumps([TOOL]), expected, [json.dumps(TOOL)], json.dumps(TOOL), [null]):
        assert load([{**talk, "tools": tools}], "sft")[0][0].tools == expected
        pair = {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")], "tools": tools}
        assert load([pair], "pairs")[0][0].tools == expected
        assert load([{"prompt": "q", "completion": "a", "tools": tools}], "sft")[0][0].tools == expected
        assert load([{"prompt": "q", "tools": tools}], "prompts")[0][0].tools == expected
    for tools in (None, "", "[]", []):
        assert load([{**talk, "tools": tools}], "sft")[0][0].tools is None
    openai = EXAMPLES["OpenAI's preference fine-tuning"][0]
    assert load([{**openai, "input": {"messages": [user("q")], "tools": expected}}], "pairs")[0][0].tools == expected
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'tools' has a tool that is int"):
        load([{**talk, "tools": [TOOL]}, {**talk, "tools": [5]}], "sft")
    _, report = load([{"prompt": "q", "completion": "a", "tools": [TOOL]}], "sft", tokenizer=base)
    assert "columns not used: tools" in str(report)  # there is no template to show them


def test_tool_calls_are_objects_without_nulls(load):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    named = {"name": "add", "arguments": '{"a": 1}'}
    spellings = [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": named}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": None}}]},
        {"role": "assistant", "content": None, "function_call": named},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'},
    ]  # fmt: skip
    for said_so in spellings:
        turns = [user("q"), said_so, {"from": "observation", "value": "2"}, gpt("done")]
        (example,), _ = load([{"messages": turns}], "sft")
        assert example.completions[0][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert example.completions[0][2] == {"role": "tool", "content": "2"}

    def called(arguments: str) -> dict[str, Any]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return {"messages": [user("q"), {**spellings[0], "tool_calls": calls}]}

    (example,), _ = load([called('{"a": null}')], "sft")  # a null that the author wrote
    assert example.completions[0][1]["tool_calls"][0]["function"]["arguments"] == {"a": None}
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'messages', message 2: arguments of a tool call are"):
        load([called("{a")], "sft")


def test_nulls_that_arrow_adds_to_structs_are_no_keys(tmp_path, chatty):
    """A Parquet file gives every call the arguments of all calls, and every message tool_calls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    talks = [
        [user("q"), called("add", {"a": 1, "deep": {"b": 2}})],
        [user("q"), called("sub", {"c": [{"d": 3}, {"e": 4}]})],
    ]
    tools = [[TOOL], [{**TOOL, "parameters": {"type": "object", "properties": {"z": {"type": "string"}}}}]]
    rows = [{"messages": talk, "tools": tool} for talk, tool in zip(talks, tools, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = []
    data = Data(path=str(tmp_path / "rows.parquet"), max_length=4096)
    assert "c" in read_rows(data).rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    train_validation_split(data, chatty, "sft", lambda t, e, r, i: found.append(e))
    assert [list(example.completions[0]) for example in found] == talks
    assert [[tool["function"] for tool in example.tools] for example in found] == tools


def test_roles_weights_and_reasoning(load):
    turns = [
        {"role": "system", "content": "be"}, {"role": "developer", "content": "kind"},
        {"role": "Human", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "r", "weight": None},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "weight": 1},
    ]  # fmt: skip
    (example,), _ = load([{"messages": turns}], "sft")
    assert example.completions[0] == [
        {"role": "system", "content": "be\n\nkind"}, user("q"), {**said("a"), "train": False}, user("r"),
        {**said("b"), "reasoning_content": "hm"},
    ]  # fmt: skip
    for flag in ({"train": False}, {"training": False}, {"loss": 0}):
        (example,), _ = load([{"messages": [user("q"), {**said("a"), **flag}, user("r"), said("b")]}], "sft")
        assert example.completions[0][1] == {**said("a"), "train": False}
    with pytest.raises(DataError, match="message 2: its weight is float 0.5; expected 1, or 0 not to train"):
        load([{"messages": [user("q"), {**said("a"), "weight": 0.5}]}], "sft")
    for name in ("reasoning", "thinking"):
        (example,), report = load([{"messages": [user("q"), {**said("a"), name: "hm"}]}], "sft")
        assert example.completions[0][1] == {**said("a"), "reasoning_content": "hm"}
        assert "leaves out part of 1 message" in str(report)
        with pytest.raises(DataError, match=r"message 2: reasoning is list .*; expected text"):
            load([{"messages": [user("q"), {**said("a"), name: ["hm"]}]}], "sft")


def test_a_completion_that_is_not_trained_on_is_dropped(load):
    ignored = [{**said("b"), "weight": 0}]
    rows = [{"prompt": [user("q")], "completion": ignored}, {"prompt": [user("q")], "completion": [said("b")]}]
    examples, report = load(rows, "sft")
    assert len(examples) == 1 and "dropped 1: no assistant turn is trained on (line 1)" in str(report)
    pairs = [{"prompt": [user("q")], "chosen": [said("a")], "rejected": ignored}]
    with pytest.raises(DataError, match="dropped 1: no assistant turn is trained on"):
        load(pairs, "pairs")


def test_a_system_prompt_that_is_not_used_is_counted(load):
    def row(column: str | None, *turns: dict[str, str]) -> dict[str, Any]:
        return {"system": column, "messages": [*turns, user("q"), said("a")]}

    system = {"role": "system", "content": "Be brief."}
    examples, report = load([row("Rhyme.", system), row("Be brief.", system), row(None, system), row("Rhyme.")], "sft")
    assert [example.completions[0][0]["content"] for example in examples] == ["Be brief."] * 3 + ["Rhyme."]
    note = "rows with another system prompt in their messages, used instead of column 'system': 1"
    assert note in report.notes


def test_rows_of_text_and_of_messages_are_counted(load):
    rows = [{"prompt": "q", "completion": "a"}, *[{"prompt": [user("q")], "completion": [said("a")]}] * 2]
    (*_, report) = load(rows, "sft")
    assert "formatted as plain text: 1 of 3 rows; the others with the tokenizer's chat template" in report.notes


@pytest.mark.parametrize(
    ("layout", "column", "value"),
    [
        ("AlpacaEval, AlpacaFarm", "preference", 3),
        ("SHP", "labels", 2),
        ("PKU-SafeRLHF", "better_response_id", -1),
        ("HelpSteer3", "overall_preference", 4),
        ("HelpSteer2 preferences", "preference_strength", -100),
    ],
)
def test_a_preference_out_of_range_is_refused(load, layout, column, value):
    with pytest.raises(DataError, match=f"column '{column}' is {value}; expected -?[0-9] to [0-9]"):
        load([EXAMPLES[layout][0] | {column: value}], "pairs")


def test_messages_as_text_of_a_csv_file(tmp_path, chatty):
    turns, answer = [user(QUESTION), said(GOOD)], [user(QUESTION), said(BAD)]

    def written(cells: dict[str, str]) -> Data:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
        (tmp_path / "rows.csv").write_text(file.getvalue())
        return Data(path=str(tmp_path / "rows.csv"), max_length=4096)

    expected = chatty.render_chat(turns[:1], generation=True)
    for spell in (json.dumps, str):  # pandas writes lists as Python prints them
        (row,) = sft_rows(written({"messages": spell(turns)}), chatty, True).train
        assert row.tokens[: len(expected)] == expected
        (pair,) = pair_rows(written({"chosen": spell(turns), "rejected": spell(answer)}), chatty).train
        assert pair.chosen.tokens[: len(expected)] == expected
        (row,) = prompt_rows(written({"prompt": spell(turns[:1]), "answer": "5"}), chatty).train
        assert row.tokens == expected
    numpy_array = str(turns).replace("}, {", "}\n {")
    with pytest.raises(DataError, match="holds messages as text that is not JSON"):
        sft_rows(written({"messages": numpy_array}), chatty, True)
    with pytest.raises(DataError, match=r"'text' should hold text; .*data.columns, \{messages: text\}"):
        sft_rows(written({"text": json.dumps(turns)}), chatty, True)
    ranked = written({"question": QUESTION, "responses": json.dumps([BAD, GOOD]), "ranks": "[2, 1]"})
    assert len(ranking_rows(ranked, chatty).train) == 1


def test_the_prompt_of_pairs_is_not_lost(load):
    """What has no common beginning beside a column that may hold the prompt is refused, not trained without it."""
    pair = {"chosen": "The fox ran.", "rejected": "The dog ran."}
    with pytest.raises(DataError, match=r"the prompt may be in post; name .*data.columns, \{prompt: post\}"):
        load([{**pair, "post": "Who ran away?"}], "pairs")
    (named,), _ = load([{**pair, "post": "Who ran away?"}], "pairs", columns={"prompt": "post"})
    assert named.prompt == "Who ran away?"
    (none,), _ = load([{**pair, "post": "Who ran away?"}], "pairs", columns={"chosen": "chosen"})
    assert none.prompt == "The"
    dialogue = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c", "source": "a web page"}
    (kept,), report = load([dialogue], "pairs")
    assert kept.prompt == "Human: a\n\nAssistant:" and "columns not used: source" in str(report)
    chatml = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    (turns,), _ = load([{"chosen": chatml + "The fox", "rejected": chatml + "The dog"}], "pairs", control_tokens=True)
    assert turns.prompt == chatml


def test_pairs_without_a_common_beginning_are_counted(load, base):
    _, report = load([{"chosen": "fox", "rejected": "dog"}, {"chosen": "a fox", "rejected": "a dog"}], "pairs", base)
    assert "no common beginning, so an empty prompt: 1 row" in str(report)
    with pytest.raises(DataError, match="no messages before the assistant's answer; name the column"):
        load([{"query_text": "q q", "chosen": [said("a")], "rejected": [said("b")]}], "pairs")


def test_of_columns_with_the_same_content_the_fuller_one_is_read(load):
    talk = [user(QUESTION), said(GOOD)]
    pair = {"chosen": talk, "rejected": [user(QUESTION), said(BAD)]}
    numina = {"problem": QUESTION, "solution": "5", "answer": "5", "messages": talk}
    (example,), report = load([numina], "sft")
    assert example.completions == (talk,) and "columns not used: problem, solution, answer" in str(report)
    assert load([numina], "prompts")[0][0].prompt == talk[:1]
    mixed = {"source": "orpo-dpo-mix", "prompt": QUESTION, "question": QUESTION, **pair}  # with two columns of prompts
    (example,), report = load([mixed], "pairs")
    assert example.prompt == talk[:1] and report.format == "pairs with a common beginning (HH) from chosen, rejected"
    no_robots = {"prompt": QUESTION, "messages": [{"role": "system", "content": "be"}, *talk]}
    assert load([no_robots], "prompts")[0][0].prompt[0]["content"] == "be"
    both = {"prompt": "p", "chosen": "c", "rejected": "r", "responses": ["a", "b"], "response": "c"}
    (example,), _ = load([both], "pairs")
    assert example.completions == ("c", "r")
    (example,), _ = load([both], "sft")
    assert example.completions == ("c",)
    truthy = {"id": 1, "system": "be", "prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
    (example,), _ = load([truthy], "pairs")
    assert example.prompt == [{"role": "system", "content": "be"}, user(QUESTION)]


def test_text_that_only_looks_like_data_stays_text(load, recwarn):
    texts = ['{"role": "user", "name": "Bob"}', '[{"role": "admin", "content": "x"}]', "{'from': 'a', 'value': 'b'}"]
    for prompt in (*texts, '{"a": 1}', "[1, 2]", "[INST] \\d [/INST]", "{\\d}", "[{'a': 1}]", "{role: user}"):
        (example,), _ = load([{"prompt": prompt, "completion": prompt}], "sft")
        assert (example.prompt, example.completions) == (prompt, (prompt,))
    assert not [warning for warning in recwarn if issubclass(warning.category, SyntaxWarning)]


def test_prompts_that_completions_repeat_are_counted(load):
    pair = {"prompt": "Human: a", "chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    other = {"prompt": "Human: a", "chosen": "b", "rejected": "Human: a and c"}
    note = "prompt repeated at the beginning of each completion: 1 row"
    assert note in str(load([pair, other], "pairs")[1])
    turns = {"prompt": [user("q?")], "completion": [said("q? yes")]}
    assert note in str(load([turns, {**turns, "completion": [said("yes")]}], "sft")[1])
    assert "repeat" not in str(load([other], "pairs")[1]) + str(load([{"messages": turns["prompt"]}], "prompts")[1])


def test_another_column_called_reward_model_is_left_alone(tmp_path, chatty):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [user("q")], "reward_model": "some/model"}))
    (row,) = prompt_rows(Data(path=str(path), max_length=512), chatty).train
    assert [*row.columns] == ["prompt", "reward_model"]


def test_the_ground_truth_of_verl_is_the_answer(tmp_path, chatty):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(EXAMPLES["verl"][0]) + "\n")
    rows = prompt_rows(Data(path=str(path)), chatty).train
    assert columns(rows)["answer"] == ["5"] and columns(rows)["data_source"] == ["gsm8k"]
    config = Data(path=str(path))
    assert recognise(read_rows(config), "prompts", config).layout.name == "verl"


def test_labels_of_one_kind_beside_pairs_are_no_ties(load):
    """Numbers in `label` beside chosen and rejected may mean anything; only the words tie and tied mark a tie."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert len(load([pair | {"label": 1}, pair | {"label": 0}], "pairs")[0]) == 2
    found, report = load([pair | {"label": "tie"}, pair | {"label": "chosen"}], "pairs")
    assert len(found) == 1 and report.dropped == {"it is a tie": ["line 1"]}


def test_held_out_rows_are_another_split(tmp_path, base):
    import datasets

    def part(*numbers: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": f"say {i}", "completion": f" {i}"} for i in numbers])

    folder = str(tmp_path / "saved")
    datasets.DatasetDict({"train": part(1, 2, 3), "test": part(4), "validation": part(5, 6)}).save_to_disk(folder)

    def held(**options: Any) -> list[str]:
        split = sft_rows(Data(path=folder, **options), base, True)
        assert len(split.train) == 3
        return [base.decode(row.tokens) for row in split.validation]

    assert held(validation_path=folder) == ["say 5 5", "say 6 6"]  # not train again
    assert held(validation_path=folder, validation_split="test") == held(validation_split="test") == ["say 4 4"]
    with pytest.raises(DataError, match="all 3 held-out rows are also trained on"):
        held(validation_path=folder, validation_split="train")
    with pytest.raises(DataError, match="no split 'other'"):
        held(validation_split="other")
    with pytest.raises(ConfigError, match=r"data.validation_split and data.validation_fraction \(0.5\) both"):
        held(validation_split="test", validation_fraction=0.5)
    (tmp_path / "files").mkdir()
    for name, number in (("train", 1), ("dev", 2)):
        part(number).to_json(str(tmp_path / "files" / f"{name}.jsonl"))
    files = str(tmp_path / "files")
    split = sft_rows(Data(path=files, validation_path=files), base, True)
    assert [base.decode(row.tokens) for row in (*split.train, *split.validation)] == ["say 1 1", "say 2 2"]
    file = str(tmp_path / "files" / "dev.jsonl")
    with pytest.raises(DataError, match="validation_split is 'test', and .*dev.jsonl has no splits"):
        sft_rows(Data(path=files, validation_path=file, validation_split="test"), base, True)
    with pytest.raises(DataError, match="all 1 held-out rows are also trained on"):
        sft_rows(Data(path=file, validation_path=file), base, True)


def test_prompts_on_both_sides_are_counted_and_can_be_kept_on_one(tmp_path, base):
    rows = [{"prompt": f"say {i % 10}", "completion": f" {i}"} for i in range(40)]
    rows += rows[:4]  # the same rows again
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")

    def prompts(part) -> list[str]:
        return [base.decode(row.tokens[: row.loss_mask.index(True)]) for row in part]

    split = sft_rows(Data(path=path, validation_fraction=0.25), base, True)
    train, held_out = prompts(split.train), prompts(split.validation)
    both = sum(prompt in train for prompt in held_out)
    equal = sum(row in split.train for row in split.validation)
    assert both and equal
    note = f"{both} of 11 held-out rows have a prompt that is also trained on, {equal} of them with the same completion"
    assert note in str(split.report) and "data.split_by: prompt keeps a prompt on one side" in str(split.report)
    split = sft_rows(Data(path=path, validation_fraction=0.25, split_by="prompt"), base, True)
    train, held_out = prompts(split.train), prompts(split.validation)
    assert len({*held_out}) == 2 and not {*train} & {*held_out} and len(train) + len(held_out) == 44
    assert "also trained on" not in str(split.report)
    other = sft_rows(Data(path=path, validation_fraction=0.25, split_by="prompt", split_seed=1), base, True)
    assert {*prompts(other.validation)} != {*held_out}


def test_labels_of_both_kinds_from_public_rows(tmp_path, chatty):
    path = tmp_path / "rows.jsonl"
    rows = [EXAMPLES["Alpaca, Dolly"][2], EXAMPLES["Alpaca, Dolly"][2] | {"kto_tag": True}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.label for row in label_rows(Data(path=str(path), max_length=512), chatty).train] == [False, True]


def test_reading_needs_no_second_pass_over_columns():
    """A column that is empty in every row is searched once, however many layouts ask for it."""

    class Counted(dict):
        asked = 0

        def get(self, key, default=None):
            Counted.asked += 1
            return super().get(key, default)

    rows = Rows("x", [Counted(prompt="q", completion="a", context=None) for _ in range(100)], [])
    for _ in range(5):
        recognise(rows, "sft", Data(path="x"))
    assert Counted.asked < 1000


def test_completions_that_the_template_writes_alike_are_dropped(load):
    thought, plain, other = [{**said("a"), "reasoning": "hm"}], [said("a")], [said("b")]
    pairs = [{"prompt": [user("q")], "chosen": chosen, "rejected": plain} for chosen in (thought, other)]
    lists = [{"prompt": [user("q")], "responses": responses} for responses in ([thought, plain, other], [plain, other])]
    for task, rows in (("pairs", pairs), ("rankings", lists)):
        examples, report = load(rows, task)
        assert len(examples) == 1 and report.dropped == {"the chat template writes two completions alike": ["line 1"]}
        assert "leaves out part of 1 message (line 1)" in str(report)


def test_empty_cells_of_csv_are_no_verdict(tmp_path, chatty):
    def rows(read, cells: str) -> list[str]:
        path = tmp_path / "rows.csv"
        path.write_text(cells)
        split = read(Data(path=str(path), max_length=512), chatty)
        return [chatty.decode(getattr(row, "chosen", row).tokens) for row in split.train]

    assert rows(pair_rows, "prompt,chosen,rejected,tie\nq,a,b,\nq,a,b,1\n") == ["qa"]
    assert rows(lambda c, t: sft_rows(c, t, True), "prompt,completion,label\nq,a,\nq,b,true\nq,c,false\n") == [
        "qa",
        "qb",
    ]
    with pytest.raises(DataError, match=r"rows.csv:2: column 'label' is null; expected true or false"):
        rows(label_rows, "prompt,completion,label\nq,a,\nq,b,true\n")


def test_a_message_without_content_is_refused(load):
    with pytest.raises(DataError, match="message 1: has no content, only role, text; rename the key"):
        load([{"messages": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]}], "sft")


def test_a_prompt_that_ends_with_an_answer_is_counted(load):
    talk = [human("q"), gpt("a")]
    rows = [{"conversations": turns, "chosen": gpt("b"), "rejected": gpt("c")} for turns in (talk, talk[:1])]
    note = "rows whose prompt ends with an assistant turn; the completion is a second one after it: 1"
    assert note in load(rows, "pairs")[1].notes


def test_a_winner_that_is_no_name_is_refused(load):
    with pytest.raises(DataError, match="column 'winner' is list .* expected one of model_a, model_b, tie"):
        load([EXAMPLES["Chatbot Arena"][0] | {"winner": [1]}], "pairs")
