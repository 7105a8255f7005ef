"""A tiny reward model with weights, and tokenizers that do and do not agree with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.types import Rollout


@pytest.fixture(scope="session")
def reward_folder(tiny_model, tmp_path_factory) -> Path:
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1), head="linear")
    params["score"]["kernel"] = params["score"]["kernel"] * 30  # so that scores differ visibly
    return weights.export(tmp_path_factory.mktemp("reward") / "m", model, params, source=tiny_model)


@pytest.fixture(scope="session")
def policy_tokenizer(tiny_model) -> Tokenizer:
    return load_tokenizer(tiny_model, TokenizerSource())


@pytest.fixture(scope="session")
def other_tokenizer(tiny_model, tmp_path_factory) -> Tokenizer:
    """The same characters under other ids."""
    folder = tmp_path_factory.mktemp("other") / "t"
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    letters = [token for token in vocab if len(token) == 1]
    ids = [vocab[token] for token in letters]
    vocab |= dict(zip(letters, reversed(ids), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder, TokenizerSource())


class Talk(NamedTuple):
    prompts: list[str]
    completions: list[str]
    finished: list[bool]


@pytest.fixture(scope="session")
def talk() -> Talk:
    return Talk(["what is it? ", "why? ", "hi "], ["a cat.", "because it is so, they say.", "x"], [True, False, True])


@pytest.fixture(scope="session")
def make_rollout(talk) -> Callable[..., Rollout]:
    """Prompts padded on the left, responses on the right, as the policy makes them."""

    def make(tokenizer, prompts=talk.prompts, completions=talk.completions, finished=talk.finished) -> Rollout:
        heads = [tokenizer.encode(p) for p in prompts]
        tails = [tokenizer.encode(c) + [tokenizer.eos_id] * f for c, f in zip(completions, finished, strict=True)]
        left, right = max(map(len, heads)), max(map(len, tails))
        tokens = np.full((len(heads), left + right), tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            tokens[i, left - len(head) : left + len(tail)] = head + tail
            mask[i, left - len(head) : left + len(tail)] = True
        rows = np.arange(len(heads), dtype=np.int32)
        zeros = np.zeros((len(heads), right), np.float32)
        return Rollout(
            tokens=tokens,
            mask=mask,
            response_mask=mask[:, left:],
            logprobs=zeros,
            finished=np.array(finished),
            index=rows,
            sample=rows * 0,
        )

    return make
