"""What people and rewards see of a rollout."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.rollout.text import decode_completions, token_pieces
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


def written(folder, backend):
    """A tokenizer of the Hugging Face backend `backend`, whose last token ends a text."""
    backend.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return load_tokenizer(folder, TokenizerSource())


def backend(vocabulary, decoder, pre_tokenizer=None):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, "</s>"))
    made.decoder = decoder
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens(["</s>"])
    return made


@pytest.fixture
def of_bytes(tmp_path):
    """A token for each byte; ids are those of the bytes' letters."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return written(tmp_path, backend([*letters, "</s>"], tokenizers.decoders.ByteLevel()))


def ids_of(text: bytes, tokenizer):
    """A token for each byte, by decoding every one in turn (ASCII) or by the table of GPT-2 (others)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    letters = sorted(letter.values())
    return [letters.index(letter[byte]) for byte in text]


def test_a_split_character_belongs_to_its_last_token(of_bytes):
    ids = ids_of("é is 日🙂".encode(), of_bytes)
    pieces = token_pieces([*ids, of_bytes.eos_id], ids_of(b"so ", of_bytes), of_bytes)
    assert pieces == ["", "é", " ", "i", "s", " ", "", "", "日", "", "", "", "🙂", ""]
    assert token_pieces(ids[:-1], [], of_bytes)[-3:] == ["", "", "\ufffd"], "the character never came"
    assert token_pieces([], [], of_bytes) == []


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_decoded_response_whatever_its_bytes(of_bytes, seed):
    rng = np.random.default_rng(seed)
    alphabet = np.frombuffer("aé日🙂 ".encode() + b"\xff\x80", np.uint8)
    ids = ids_of(bytes(rng.choice(alphabet, 40)), of_bytes)
    pieces = token_pieces(ids, [], of_bytes)
    assert len(pieces) == 40 and "".join(pieces) == of_bytes.decode(ids)


def test_pieces_join_where_a_decoder_rewrites_what_it_wrote(tmp_path):
    """The decoder of WordPiece takes the space before "n't" and before punctuation away."""
    tokenizer = written(
        tmp_path,
        backend(["do", "n", "##'", "##t", ".", "we", "n't", "</s>"], tokenizers.decoders.WordPiece(cleanup=True)),
    )
    ids = [5, 0, 6, 4, 0, 1, 2, 3, 7]
    pieces = token_pieces(ids, [5], tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids, after=[5])
