"""What people and rewards see of a rollout."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.rollout.text import decode_completions
from jaxrlhf.types import Rollout


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model, TokenizerSource())


def rollout_of(tokenizer, prompt, responses, width):
    """Rows of one prompt; a response that ends with </s> is finished."""
    prompt = tokenizer.encode(prompt)
    ids = [tokenizer.encode(text, special=True) for text in responses]
    mask = np.arange(width) < np.array([len(row) for row in ids])[:, None]
    tokens = np.array([prompt + row + [tokenizer.pad_id] * (width - len(row)) for row in ids])
    return Rollout(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(np.concatenate([np.ones((len(ids), len(prompt)), bool), mask], axis=1)),
        response_mask=jnp.asarray(mask),
        logprobs=jnp.where(mask, -1.0, 0.0),
        finished=jnp.array([row[-1] == tokenizer.eos_id for row in ids]),
        index=jnp.arange(len(ids)),
        sample=jnp.zeros(len(ids), jnp.int32),
    )


def test_completions_and_masks_are_cut_at_the_stop_string(tokenizer):
    """The text ends before the stop string, what is learnt with the token that completes it; padding follows."""
    rollout = rollout_of(tokenizer, "ask: ", ["one\n\ntwo", "three</s>", "four"], 8)
    cut, texts = decode_completions(rollout, tokenizer, ("\n\n",))
    assert texts == ["one", "three", "four"]
    assert cut.response_mask.sum(1).tolist() == [5, 6, 4] and cut.finished.tolist() == [True, True, False]
    assert cut.mask.sum(1).tolist() == [10, 11, 9]
    assert (cut.tokens[0, 10:] == tokenizer.pad_id).all() and not cut.logprobs[0, 5:].any()
    whole, texts = decode_completions(rollout, tokenizer, ())
    assert whole is rollout and texts[0] == "one\n\ntwo"


def test_stop_strings_with_control_tokens_match_their_ids(tokenizer):
    """Not the same characters as ordinary text; a whole control token is a stop token, which generation stops at."""
    assert tokenizer.stops(()) == (tokenizer.eos_id,)
    assert tokenizer.stops(("<unk>", "\n\n", "</s>", "<unk>a")) == (tokenizer.eos_id, tokenizer.control_tokens["<unk>"])
    responses = ["one<unk>two", "one\n<unk>two<unk>", "on<unk>e\n<unk>two", "o\n\n<unk>ne", "one<s>", "one\ntwo</s>"]
    rollout = rollout_of(tokenizer, "ask: ", responses, 10)
    cut, texts = decode_completions(rollout, tokenizer, ("\n<unk>", "<unk>t", "\n\n"))
    assert texts == ["one", "one", "one", "o", "one", "one\ntwo"]
    assert cut.response_mask.sum(1).tolist() == [5, 5, 6, 3, 4, 8]
    assert cut.finished.tolist() == [True] * 4 + [False, True]
    _, texts = decode_completions(rollout, tokenizer, ("<unk>",))
    assert texts == ["one", "one\n", "on", "o\n\n", "one", "one\ntwo"]
