"""Rows at the edge of what a run can use, and files that are not what they should be: used as documented, or refused by
a message with the place."""

import json

import pytest

from jaxrlhf import PPOTrainer, SFTTrainer, config, load_tokenizer
from jaxrlhf.config import Data, TokenizerSource
from jaxrlhf.data.datasets import sft_rows
from jaxrlhf.demo.tokenizer import write_base
from jaxrlhf.errors import DataError, JaxrlhfError

CONTEXT = 64  # tokens, of the model


@pytest.fixture
def trainers(ppo, tmp_path):
    """SFT and PPO on rows."""

    def make(rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = config.Data(path=str(tmp_path / "rows.jsonl"), **options)
        train = config.Train(batch_size=8, max_steps=2, num_train_epochs=50)
        sft = config.SFTConfig(run_dir=ppo.run_dir, model=ppo.model, data=data, train=train, logging=ppo.logging)
        yield lambda: SFTTrainer(sft).batch(0).mask.sum(1).tolist()
        trained = config.replace(ppo, data=data)
        yield lambda: [len(row.tokens) for row in PPOTrainer(trained, reward=lambda completions: []).prompts(0)]

    return make


ROW, LONG = {"prompt": "a", "completion": "b"}, "a" * CONTEXT


@pytest.mark.parametrize(
    ("rows", "options", "batch", "drawn"),
    [
        ([{"prompt": "", "completion": "b"}], {}, [3] * 8, [1] * 8),  # bos, b, eos; bos
        ([{"prompt": " \n", "completion": "b"}], {}, [4] * 8, [2] * 8),
        ([ROW | {"prompt": LONG[2:]}], {}, [CONTEXT] * 8, "comes to 66 tokens but the model's context is 64"),
        ([ROW | {"prompt": LONG}], {}, "comes to 66 tokens but the model's context is 64; lower data.max_length", "68"),
        (
            [ROW | {"prompt": LONG}],
            {"max_length": 32, "max_prompt_length": 32, "truncation": "left"},
            [32] * 8,
            [32] * 8,
        ),
        (
            [ROW | {"completion": LONG}],
            {"max_length": 32, "max_prompt_length": 32, "truncation": "right"},
            [32] * 8,
            [1] * 8,
        ),
        (
            [ROW, ROW | {"prompt": LONG}],
            {"max_length": 32, "max_prompt_length": 32, "truncation": "error"},
            r"rows\.jsonl:2: the prompt is longer than data\.max_prompt_length",
            r"rows\.jsonl:2: the prompt is longer than data\.max_prompt_length",
        ),
        ([ROW] * 9, {}, [3] * 8, [1] * 8),
        ([ROW], {}, [3] * 8, [1] * 8),
        ([ROW, ROW | {"completion": "bb"}], {}, None, [1] * 8),  # a batch is more than all rows
    ],
)
def test_rows_at_the_edge(trainers, rows, options, batch, drawn):
    for of_rows, expected in zip(trainers(rows, **options), (batch, drawn), strict=True):
        if isinstance(expected, str):
            with pytest.raises(JaxrlhfError, match=expected) as caught:
                of_rows()
            assert caught.value.exit_code in (3, 4)
        elif expected is None:
            assert sorted(of_rows()) == [3, 3, 3, 3, 4, 4, 4, 4], "each of two rows in each of four epochs"
        else:
            assert of_rows() == expected


GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_tokenizer(write_base(tmp_path_factory.mktemp("base")), TokenizerSource())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (GOOD + b'{"prompt": }\n' + GOOD, r"r\.jsonl:2: not JSON \(Expecting value"),
        (GOOD + GOOD[:-8], r"r\.jsonl:2: not JSON \(Unterminated string"),
        (GOOD + GOOD[:-1], 2),  # no line break at the end
        (GOOD + b"\n \n" + GOOD, 2),
        (b"\xef\xbb\xbf" + GOOD, 1),  # byte order mark
        (GOOD.replace(b"\n", b"\r\n") * 2, 2),
        ('{"prompt": "café", "completion": "b"}'.encode("latin-1"), r"r\.jsonl:1: not UTF-8"),
        (GOOD.decode().encode("utf-16"), r"r\.jsonl:1: not UTF-8"),
        (b'{"prompt": "a\0", "completion": "b"}', r"r\.jsonl:1: not JSON \(Invalid control character"),
        (rb'{"prompt": "\ud800", "completion": "b"}', r"r\.jsonl:1: half of a surrogate pair"),
        (GOOD + b'{"prompt": NaN, "completion": "b"}', r"r\.jsonl:2: not JSON \(NaN"),
        (b'{"prompt": "a", "prompt": "b"}', r"r\.jsonl:1: not JSON \(duplicate key 'prompt'\)"),
        (GOOD + b'{"prompt": "b"}\n', r"r\.jsonl:2: column 'completion' is missing"),
        (GOOD + b'{"prompt": "a", "completion": "b", "more": 1}\n', 2),
        (GOOD + b'{"prompt": "a", "completion": 3}\n', r"r\.jsonl:2: column 'completion' is int 3; expected text"),
        (GOOD + b'{"prompt": ["a"], "completion": "b"}\n', r"r\.jsonl:2: column 'prompt', message 1: is str 'a'"),
        (GOOD + b'{"prompt": null, "completion": "b"}\n', r"r\.jsonl:2: column 'prompt' is null; expected text"),
        (b'["a", "b"]\n', r"r\.jsonl:1: expected an object .* not a list"),
        (b"", r"r\.jsonl: there are no rows"),
    ],
)
def test_a_file_of_rows(base, tmp_path, content, found):
    """A line without end is in test_limits.py."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    if isinstance(found, int):
        assert len(sft_rows(Data(path=str(path)), base, True).train) == found
    else:
        with pytest.raises(DataError, match=found):
            sft_rows(Data(path=str(path)), base, True)
