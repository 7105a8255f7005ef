"""The table of layouts: the ways in which data sets store prompts, responses and what rates them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxrlhf.data import labels
from jaxrlhf.data.labels import Judge

Style = Literal["as_is", "question", "template", "common_beginning", "whole", "post", "request"]


@dataclass(frozen=True)
class Layout:
    """A way to store prompts and responses in columns.

    prompt, responses, verdict: columns, separated by blanks. `a|b` is either (both are ambiguous), `a>b` the first one
    that exists, `[a]` is optional. A layout whose verdict is not optional is recognised by it.

    style: how the prompt is written. `as_is` uses text or messages unchanged; `question` makes a user turn if the
    tokenizer has a chat template; `common_beginning` takes what all responses begin with; `whole` has no prompt;
    `post` writes the post or article of `info`; `request` takes `messages` and `tools` of an object.
    judge: scores of the responses from the values of the verdict columns; by default the first response is the best.
    many: the only column of responses is a list.    keys: of a column of objects, the key of the text.
    weak: used only if no other layout fits.
    """

    name: str
    prompt: str
    responses: str
    verdict: str = ""
    style: Style = "question"
    judge: Judge = labels.in_order
    many: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    weak: bool = False

    @property
    def single(self) -> bool:
        """A row holds one response."""
        return not self.many and len(self.responses.split()) < 2


_INSTRUCTION = "instruction [input] [context] [history]"
_PAIR, _TIE = "chosen|accepted rejected", "[tie>tied>label]"
_RANKED = "[ranks>rank] [scores]"
LAYOUTS = (
    Layout("text", "", "text", style="whole"),
    Layout("conversations", "", "messages|conversations", style="whole"),
    Layout("prompt and completion", "prompt", "completion>response", style="as_is"),
    Layout("question and answer", "question [context]", "answer>response"),
    Layout("Alpaca, Dolly", _INSTRUCTION, "output>response"),
    Layout("MetaMath", "query", "response"),
    Layout("NuminaMath", "problem", "solution>answer"),
    Layout("HelpSteer", "prompt", "response", "helpfulness", judge=labels.by_score),
    Layout("verl", "prompt", "", "reward_model", style="as_is", keys={"reward_model": "ground_truth"}),
    Layout("pairs", "prompt", _PAIR, _TIE, style="as_is", judge=labels.unless_tied),
    Layout("pairs (Orca)", "question [context]", _PAIR, _TIE, judge=labels.unless_tied),
    Layout("pairs (Alpaca)", _INSTRUCTION, _PAIR, _TIE, judge=labels.unless_tied),
    Layout("pairs (summaries)", "input", _PAIR, _TIE, judge=labels.unless_tied, weak=True),
    Layout("pairs (LLaMA-Factory)", "messages|conversations", _PAIR, _TIE, style="as_is",
           judge=labels.unless_tied, weak=True),
    Layout("pairs (good, bad)", "prompt", "good bad", style="as_is", weak=True),
    Layout("pairs (good, bad; question)", "question>instruction>query>problem>input", "good bad", weak=True),
    Layout("pairs with a common beginning (HH)", "", _PAIR, _TIE, style="common_beginning",
           judge=labels.unless_tied, weak=True),
    Layout("AlpacaEval, AlpacaFarm", "instruction [input]", "output_1 output_2", "preference",
           judge=labels.by_preference(lambda value: value and value - 1.5, 0, 2)),
    Layout("OpenAI's preference fine-tuning", "input", "preferred_output non_preferred_output", style="request"),
    Layout("StackExchange pairs", "question", "response_j response_k"),
    Layout("SHP", "history", "human_ref_A human_ref_B", "labels",
           judge=labels.by_preference(lambda value: 0.5 - value, 0, 1)),
    Layout("WebGPT", "question", "answer_0 answer_1", "score_0 score_1", judge=labels.by_score,
           keys={"question": "full_text"}),
    Layout("PKU-SafeRLHF", "prompt", "response_0 response_1", "better_response_id",
           judge=labels.by_preference(lambda value: value - 0.5, 0, 1)),
    Layout("HelpSteer3", "context", "response1 response2", "overall_preference", style="as_is",
           judge=labels.by_preference(lambda value: value, -3, 3)),
    Layout("HelpSteer2 preferences", "prompt", "response_1 response_2", "preference_strength",
           judge=labels.by_preference(lambda value: value, -3, 3)),
    Layout("Chatbot Arena", "", "conversation_a conversation_b", "winner", style="common_beginning",
           judge=labels.by_winner),
    Layout("summarize-from-feedback", "info", "summaries", "choice", style="post", judge=labels.by_choice, many=True,
           keys={"summaries": "text"}),
    Layout("UltraFeedback", "instruction", "completions", many=True, keys={"completions": "response"},
           judge=labels.by_rating),
    Layout("Nectar", "prompt", "answers", style="as_is", many=True, keys={"answers": "answer"},
           judge=labels.by_item_rank),
    Layout("rankings", "prompt", "responses", _RANKED, style="as_is", many=True, judge=labels.by_rank),
    Layout("rankings (question)", "question [context]", "responses", _RANKED, many=True, judge=labels.by_rank),
    Layout("rankings (Alpaca)", _INSTRUCTION, "responses", _RANKED, many=True, judge=labels.by_rank),
    Layout("rankings (RRHF)", "query", "responses", _RANKED, many=True, judge=labels.by_rank),
    Layout("rankings with a common beginning", "", "responses", _RANKED, style="common_beginning", many=True,
           judge=labels.by_rank, weak=True),
)  # fmt: skip
