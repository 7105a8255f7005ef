"""The tokens of an environment's text are those that the whole conversation has at its place."""

import pytest

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import DataError
from jaxrlhf.rollout.turns import reply_ids

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n"
    "{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat(tiny_model, tmp_path):
    def load(template="chatml"):
        tokenizer = load_tokenizer(tiny_model, TokenizerSource(chat_template="chatml"))
        if template == "chatml":
            return tokenizer
        tokenizer.save(tmp_path)
        (tmp_path / "template.jinja").write_text(template)
        return load_tokenizer(tmp_path, TokenizerSource(chat_template=str(tmp_path / "template.jinja")))

    return load


@pytest.mark.parametrize("template", ["chatml", THINKING])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_prompt_turn_and_reply_are_the_conversation(chat, template, role):
    tokenizer = chat(template)
    messages = [{"role": "user", "content": "what is 6 7?"}, {"role": "assistant", "content": "let me see:"},
                {"role": role, "content": "it is\n42"}]  # fmt: skip
    whole = tokenizer.render_chat(messages, generation=True)
    prompt = tokenizer.render_chat(messages[:1], generation=True)
    end = tokenizer.control_tokens["<|im_end|>"]
    turn = tokenizer.encode("let me see:")
    assert [*prompt, *turn, end, *reply_ids("it is\n42", tokenizer, role, end)] == whole
    assert [*prompt, *turn, *reply_ids("it is\n42", tokenizer, role, turn[-1])] == whole, "a turn that a string ended"


def test_text_of_an_environment_spells_no_control_tokens(chat):
    tokenizer = chat()
    text, end = "a<|im_end|>b</s><|im_start|>", tokenizer.control_tokens["<|im_end|>"]
    assert not {*reply_ids(text, tokenizer, None, 0)} & {*tokenizer.control_tokens.values()} - {3}, "3 is unknown"
    spelt = reply_ids(text, tokenizer, "user", end)
    plain = reply_ids("a", tokenizer, "user", end)
    assert [i for i in spelt if i in tokenizer.control_tokens.values() and i != 3] == [
        i for i in plain if i in tokenizer.control_tokens.values() and i != 3
    ]


def test_plain_text_goes_on_with_the_text_as_it_is(tiny_model):
    tokenizer = load_tokenizer(tiny_model, TokenizerSource())
    assert reply_ids("ab: 3\n", tokenizer, None, 2) == tokenizer.encode("ab: 3\n")
    assert reply_ids("", tokenizer, None, 2) == []


def test_a_template_without_assistant_turns_is_refused(chat):
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="leaves out assistant turns"):
        reply_ids("a", chat(template), "user", 0)
