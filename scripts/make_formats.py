"""Write docs/formats.md from the table of layouts and an input line for each: `python scripts/make_formats.py`.

What is learnt is what `jaxrlhf data` prints, with a byte-level tokenizer and a ChatML template that shows tools.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxrlhf.config import Data, SFTConfig, TokenizerSource
from jaxrlhf.data import formats, sources
from jaxrlhf.data.layouts import LAYOUTS
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.doctor.data import METHODS, tokenised_rows
from jaxrlhf.doctor.loss_mask import marked
from jaxrlhf.errors import DataError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QUESTION, GOOD, BAD = "What is 2 + 3?", "It is 5.", "It is 6."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def rated(response: str, score: float, honesty: int) -> dict[str, Any]:
    annotations = {"honesty": {"Rating": str(honesty), "Rationale": "..."}}
    return {"model": "m", "response": response, "annotations": annotations, "fine-grained_score": score}


HH = "\n\nHuman: What is 2 + 3?\n\nAssistant:"
TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "Two and three are five."}],
    "conversations": [
        {"messages": [user("Hi"), said("Hello."), user(QUESTION), said(GOOD)]},
        {
            "system": "You count.",
            "tools": json.dumps([TOOL]),
            "conversations": [
                human(QUESTION),
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
                {"from": "observation", "value": "5"},
                gpt(GOOD),
            ],
        },
        {"messages": [user(QUESTION), {**said(BAD), "weight": 0}, user("Sure?"), said("No, 5.")]},
        {"messages": [user(QUESTION), said(BAD)], "label": False},
    ],
    "prompt and completion": [
        {"prompt": "2 + 3 = ", "completion": "5"},
        {"prompt": "2 + 3 = ", "completion": "6", "label": False},
        {"prompt": "2 + 3 = ", "response": "5", "score": 0.9},
    ],
    "question and answer": [{"system": "You count.", "question": QUESTION, "answer": GOOD}],
    "Alpaca, Dolly": [
        {
            "instruction": "Add.",
            "input": "2 and 3",
            "output": GOOD,
            "system": "You count.",
            "history": [["Hi", "Hello."]],
        },
        {"instruction": "Who has 5?", "context": "Ann has 5.", "response": "Ann, with 5.", "category": "closed_qa"},
        {"instruction": "Add.", "input": "2 and 3", "output": BAD, "kto_tag": False},
    ],
    "MetaMath": [{"query": QUESTION, "response": GOOD, "type": "GSM_Rephrased"}],
    "NuminaMath": [
        {"problem": QUESTION, "solution": "2 + 3 is \\boxed{5}.", "answer": "5", "source": "synthetic"},
        {"problem": QUESTION, "answer": "5"},
    ],
    "HelpSteer": [
        {
            "prompt": QUESTION,
            "response": GOOD,
            "helpfulness": 4,
            "correctness": 4,
            "coherence": 4,
            "complexity": 0,
            "verbosity": 1,
        }
    ],
    "verl": [
        {
            "data_source": "gsm8k",
            "prompt": [user(QUESTION)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"split": "train", "index": 0},
        }
    ],
    "pairs": [
        {"prompt": "2 + 3 = ", "chosen": "5", "rejected": "6"},
        {"prompt": [user(QUESTION)], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    ],
    "pairs (Orca)": [{"system": "You count.", "question": QUESTION, "chosen": GOOD, "rejected": BAD}],
    "pairs (Alpaca)": [{"instruction": "Add.", "input": "2 and 3", "chosen": GOOD, "rejected": BAD}],
    "pairs (summaries)": [
        {"input": "Ann has 2 apples and buys 3 more.", "chosen": "Ann has 5.", "rejected": "Ann has 6."}
    ],
    "pairs (LLaMA-Factory)": [{"conversations": [human(QUESTION)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}],
    "pairs (good, bad)": [{"prompt": "2 + 3 = ", "good": GOOD, "bad": BAD}],
    "pairs (good, bad; question)": [{"question": QUESTION, "good": GOOD, "bad": BAD}],
    "pairs with a common beginning (HH)": [
        {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        {
            "prompt": QUESTION,
            "chosen": [user(QUESTION), said(GOOD)],
            "rejected": [user(QUESTION), said(BAD)],
            "messages": [user(QUESTION), said(GOOD)],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
    ],
    "AlpacaEval, AlpacaFarm": [
        {
            "instruction": "Add.",
            "input": "2 and 3",
            "output_1": BAD,
            "output_2": GOOD,
            "preference": 2,
            "annotator": "a",
        }
    ],
    "OpenAI's preference fine-tuning": [
        {
            "input": {"messages": [user(QUESTION)], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said(GOOD)],
            "non_preferred_output": [said(BAD)],
        }
    ],
    "StackExchange pairs": [{"qid": 1, "question": QUESTION, "response_j": GOOD, "response_k": BAD}],
    "SHP": [
        {
            "history": QUESTION,
            "human_ref_A": BAD,
            "human_ref_B": GOOD,
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
            "score_ratio": 4.5,
        }
    ],
    "WebGPT": [
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": QUESTION},
            "answer_0": GOOD,
            "answer_1": BAD,
            "score_0": 0.5,
            "score_1": -0.5,
        }
    ],
    "PKU-SafeRLHF": [
        {"prompt": QUESTION, "response_0": GOOD, "response_1": BAD, "better_response_id": 0, "safer_response_id": 1}
    ],
    "HelpSteer3": [
        {"domain": "stem", "context": [user(QUESTION)], "response1": GOOD, "response2": BAD, "overall_preference": -2}
    ],
    "HelpSteer2 preferences": [{"prompt": QUESTION, "response_1": GOOD, "response_2": BAD, "preference_strength": -1}],
    "Chatbot Arena": [
        {
            "conversation_a": [user(QUESTION), said(BAD)],
            "conversation_b": [user(QUESTION), said(GOOD)],
            "winner": "model_b",
        }
    ],
    "summarize-from-feedback": [
        {
            "info": {
                "id": "t3",
                "post": "I have 2 apples and bought 3.",
                "title": "Apples",
                "subreddit": "fruit",
                "article": None,
            },
            "summaries": [{"text": " I have 6.", "policy": "sup4"}, {"text": " I have 5.", "policy": "ref"}],
            "choice": 1,
            "worker": "w",
        }
    ],
    "UltraFeedback": [
        {
            "source": "s",
            "instruction": QUESTION,
            "completions": [rated(BAD, 1.5, 5), rated("Five?", 3.0, 4), rated(GOOD, 4.5, 5)],
        }
    ],
    "Nectar": [
        {
            "prompt": f"{HH} ",
            "answers": [
                {"answer": "Five?", "model": "m", "rank": 2.0},
                {"answer": GOOD, "model": "n", "rank": 1.0},
                {"answer": BAD, "model": "o", "rank": 3.0},
            ],
        }
    ],
    "rankings": [
        {"prompt": "2 + 3 = ", "responses": ["5", "five?", "6"]},
        {"prompt": "2 + 3 = ", "responses": ["6", "5"], "scores": [0.1, 0.9]},
    ],
    "rankings (question)": [{"question": QUESTION, "responses": [BAD, GOOD], "rank": [2, 1]}],
    "rankings (Alpaca)": [{"instruction": "Add.", "input": "2 and 3", "responses": [BAD, GOOD], "ranks": [2, 1]}],
    "rankings (RRHF)": [{"query": QUESTION, "responses": [BAD, GOOD], "scores": [0.1, 0.9]}],
    "rankings with a common beginning": [{"responses": [f"{HH} {GOOD}", f"{HH} {BAD}"]}],
}
"""Rows of each layout of `formats.LAYOUTS`; each is a file of its own."""

INTRODUCTION = """\
# Data formats

The layouts of rows that are recognised, what is learnt from them, and what each trainer does with them. This page is
written by `scripts/make_formats.py` with the code that `jaxrlhf data FILE` runs.

The columns decide which layout is taken; `jaxrlhf data FILE` names it and lists the columns that are not used. Columns
that fit more than one layout are refused, unless `data.columns` names one of them: `{standard name: name in the file}`
renames columns. `data.template` writes a prompt from any columns.

**Prompts.** A column `prompt` is used as it is: a finished text, or messages. A question or an instruction becomes a
user turn if the tokenizer has a chat template, else a line of text. With a column `system` (or `system_prompt`) a text
`prompt` is a user turn, too. Where `chosen` and `rejected` are whole conversations, these contain the prompt. Texts
without a common beginning are refused if another column of text may hold the prompt; completions that repeat the prompt
are counted. A column of whole conversations is read before columns with a part of the same content.

**Messages** have `role` and `content`, or `from` and `value`; also as JSON text, as CSV files have it. The speakers are
user (human, prompter), assistant (gpt, model, ...), system (developer) and tool (observation, function);
`function_call` is an assistant's tool call. Keys with null values are left out at every depth, as Arrow fills in every
key of a struct; `arguments` of tool calls given as JSON text are parsed. `reasoning` and `thinking` are read as
`reasoning_content`. A message with `weight: 0` (or `train: false`) is not trained on. `tools` (or `functions`), a list
or JSON text, go to the chat template. A system message in the messages is used instead of a column `system`.

**Labels.** `label`, `kto_tag` or `tag` (true or false, 1 or 0, good or bad, chosen or rejected) rate a response for
classification and KTO. Without such a column, both read a pair as a good and a bad response. SFT does not learn
responses that are labelled bad; numbers in `label` beside plain `text` are taken for the classes of another task.
`score` rates a response for regression; `data.score` names another column.

**Ties and unjudged rows** are dropped from pairs, counted and listed; `reward` with `loss: ties` trains on ties. A
column `tie` or `tied`, or `label: tie`, marks one beside `chosen` and `rejected`. SFT takes the better of two responses
and the best of a list. Pairs are the best and the worst of a list. Of responses with the same score a ranking has the
first.

**Reward functions** of PPO and GRPO get all columns of a row, used or not; from verl's rows also the ground truth, as
`answer`.

**Held-out rows** come from `data.validation_path`, from another split (`data.validation_split`) or are drawn
(`data.validation_fraction`; with `data.split_by: prompt`, prompts are drawn, so that none is on both sides). Held-out
rows whose prompt is also trained on are counted; a held-out file with nothing but training rows is refused.

In the examples below, text trained on is in [[ ]], `\\n` is a line break, and the chat template is ChatML.
"""


def tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer with a token for each byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return load_tokenizer(folder, TokenizerSource())


def readings(row: dict[str, Any], chat: Tokenizer, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """For each method that can read a file of this row: what it does not use, and what it learns."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = SFTConfig(data=Data(path=str(path), max_length=4096))
    rows = sources.read_rows(config.data)
    found: dict[str, list[tuple[str, str]]] = {}
    for task, methods in METHODS.items():
        try:
            layout = formats.recognise(rows, task, config.data)
        except DataError:
            continue
        unused = layout.unused(rows)
        found[methods] = [("not used", ", ".join(unused))] if unused else []
        try:
            first = tokenised_rows(task, config, chat)[1][0]
            found[methods] += [(name, marked(tokens, mask, chat)) for name, tokens, mask in first.sequences]
        except DataError as error:
            found[methods] += [("dropped", str(error).partition("dropped 1: ")[2].partition(" (line")[0])]
    return found


def page() -> str:
    """The text of docs/formats.md."""
    parts = [INTRODUCTION]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat = tokenizer(folder)
        for layout in LAYOUTS:
            parts.append(f"## {layout.name}\n")
            for row in EXAMPLES[layout.name]:
                parts.append(f"```json\n{json.dumps(row)}\n```\n")
                lines = []
                for methods, texts in readings(row, chat, folder).items():
                    lines.append(methods)
                    lines += [f"  {name:<9} {text}".replace("\n", "\\n") for name, text in texts]
                parts.append("\n".join(["```text", *lines, "```"]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
