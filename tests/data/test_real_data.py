"""Public data sets with the tokenizers of real models, where this machine has them."""

import pytest

from jaxrlhf.config import Data, TokenizerSource
from jaxrlhf.data.datasets import SFTRow, pair_rows, prompt_rows, sft_rows
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer

NAMES = ["tokenizers/gpt2", "tokenizers/smollm2", "tokenizers/qwen3", "models/stories260K"]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request, shared_data) -> Tokenizer:
    return load_tokenizer(shared_data / request.param, TokenizerSource())


def learnt(row: SFTRow, tokenizer: Tokenizer) -> tuple[str, str]:
    """(what is given, what is learnt), the latter as it continues the former."""
    start = row.loss_mask.index(True)
    assert row.loss_mask == [False] * start + [True] * (len(row.tokens) - start)
    assert row.tokens[-1] in tokenizer.stop_ids
    text = tokenizer.decode(row.tokens[start:], after=row.tokens[:start]).removeprefix("<think>\n\n</think>\n\n")
    return tokenizer.decode(row.tokens[:start]), text


def test_polite_and_rude(tokenizer, shared_data):
    path = str(shared_data / "preferences" / "polite_rude.json")
    split = pair_rows(Data(path=path, max_rows=300), tokenizer)
    assert split.report.dropped == {"chosen and rejected are the same": ["row 123", "row 227"]}
    question = "Evaluate the following phrase by transforming it into the spelling given.\nfreind --> friend"
    good = 'The spelling of the given phrase "freind" is incorrect, the correct spelling is "friend".'
    prompt, chosen = learnt(split.train[0].chosen, tokenizer)
    assert (question in prompt, chosen) == (True, good)
    again, rejected = learnt(split.train[0].rejected, tokenizer)
    assert again == prompt and "flat out wrong, get it together" in rejected
    strict = sft_rows(Data(path=path, max_rows=20, template="<|user|> {input} <|end|>\n<|assistant|>"), tokenizer, True)
    assert learnt(strict.train[0], tokenizer) == ("<|user|> freind --> friend <|end|>\n<|assistant|>", good)


def test_harmless_dialogues(tokenizer, shared_data):
    path = str(shared_data / "preferences" / "hh_harmless_base.jsonl.gz")
    split = pair_rows(Data(path=path, max_rows=100, max_length=4096), tokenizer)
    assert len(split.train) + sum(map(len, split.report.dropped.values())) == 100
    for row in split.train:
        (prompt, chosen), (same, rejected) = learnt(row.chosen, tokenizer), learnt(row.rejected, tokenizer)
        assert prompt == same and prompt.endswith("\n\nAssistant:") and chosen != rejected
        assert not {"\n\nHuman:", "\n\nAssistant:"} & {chosen[:8], rejected[:8]}


def test_school_mathematics(tokenizer, shared_data):
    path = str(shared_data / "math" / "gsm8k_train.jsonl")
    split = sft_rows(Data(path=path, max_rows=100, max_length=2048), tokenizer, True)
    prompt, answer = learnt(split.train[0], tokenizer)
    assert "Natalia sold clips to 48 of her friends" in prompt and answer.endswith("#### 72")
    row = prompt_rows(Data(path=path, max_rows=5, max_length=2048), tokenizer).train[0]
    assert row.tokens == split.train[0].tokens[: len(row.tokens)]
    assert row.columns["answer"].endswith("#### 72") and row.text.strip() == row.columns["question"]


def test_instructions(tokenizer, shared_data):
    path = str(shared_data / "instructions" / "llms_from_scratch.json")
    split = sft_rows(Data(path=path, max_rows=100), tokenizer, True)
    prompt, answer = learnt(split.train[2], tokenizer)
    assert "Convert 45 kilometers to meters." in prompt and answer == "45 kilometers is 45000 meters."
