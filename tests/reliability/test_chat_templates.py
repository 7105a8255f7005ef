"""Chat templates that hang, fill the memory or are no text: each is one message, and later conversations are rendered.

A template is a program that comes with a model of somebody else.
"""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bounded import MEMORY, bounded, resident
from transformers.utils.chat_template_utils import render_jinja_template

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data import chat_template
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import DataError

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a\n"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "n": 1.5, "é": None}}}]


SANE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


def with_template(folder, tmp_path, template):
    (tmp_path / "t.jinja").write_text(template)
    return load_tokenizer(folder, TokenizerSource(chat_template=str(tmp_path / "t.jinja"), template_date="2026-01-02"))


def theirs(made, template):
    """What transformers makes of the conversation: (text, spans)."""
    texts, spans = render_jinja_template(
        conversations=[TALK],
        tools=TOOLS,
        chat_template=template.replace("strftime_now('%d %b %Y')", "'02 Jan 2026'"),
        return_assistant_tokens_mask="generation %}" in template,
        add_generation_prompt=False,
        **{key: value for key, value in made._hf.special_tokens_map.items() if isinstance(value, str)},
    )
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "longer than 2 s",
        ),
        ("{{ 'a' * 3000000000 }}", "more than 1024 MB"),
        ("{{ 'a' * (messages | length * 1000000000) }}", "more than 1024 MB"),
        ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", " than "),
        ("{% for i in range(99000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 16,000,000 characters"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
        ("{{ 9 ** (9 ** 9) }}", "longer than 2 s"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{{ raise_exception('\x1b[31mroles') }}", r"\x1b[31mroles"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{% if %}", "Expected an expression"),
    ],
    ids=lambda value: value[:40],
)
def test_a_template_that_runs_wild(tiny_model, tmp_path, monkeypatch, template, says):
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(DataError, match="the chat template fails on a conversation") as caught:
        with_template(tiny_model, tmp_path, template)
    assert says in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - started < 20
    sane = with_template(tiny_model, tmp_path, SANE)
    assert sane.render(TALK) == "s</s>a\n</s>b</s>"


@pytest.mark.parametrize("template", [5, [5], {"default": 5}, True])
def test_a_template_that_is_no_text(tiny_model, tmp_path, template):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(DataError, match="chat template|cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}{% continue %}{% endif %}-{% endfor %}",
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages[0] | tojson }}",
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ documents is none }}{{ add_generation_prompt }}",
        "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }};{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}!{% endgeneration %}\n{% endfor %}",
        "{%- set n = namespace(i=0) %}{%- for m in messages %}{% set n.i = n.i + loop.index %}{% endfor %}{{ n.i }}",
        "{{ messages[0].missing }}{{ dict(a=1) }}{{ messages | map(attribute='role') | join(',') }}",
    ],
)
def test_conversations_are_rendered_as_transformers_renders_them(tiny_model, tmp_path, monkeypatch, template):
    made = with_template(tiny_model, tmp_path, SANE)
    made._hf.chat_template = template
    assert made.render_with_spans(TALK, TOOLS) == theirs(made, template)


VALUES = ("messages", "messages[0]", "m.content", "m['role']", "tools", "bos_token", "n.i", "loop.index", "f('b')")
VALUES += (
    "'a'",
    "1",
    "0.5",
    "none",
    "true",
    "[]",
    "{'a': 1}",
    "range(9)",
    "namespace(i=0)",
    "x",
    "raise_exception('no')",
)
VALUES += ("().__class__", "'%s' % m", "'a' * 99999999", "caller()", "'\\ud800'", "9 ** 99", "m.items() | list")
FILTERS = (
    "tojson",
    "trim",
    "upper",
    "length",
    "list",
    "join",
    "first",
    "int",
    "safe",
    "map(attribute='role') | list",
    "e",
)
EXPRESSIONS = st.recursive(
    st.sampled_from(VALUES),
    lambda some: (
        st.builds("{} {} {}".format, some, st.sampled_from((*"+-~*/%<", "//", "**", "==", "in", "and", "is")), some)
        | st.builds("{} | {}".format, some, st.sampled_from(FILTERS))
        | st.builds("({} if {} else {})".format, some, some, some)
        | st.builds("{}[{}:]".format, some, some)
    ),
    max_leaves=4,
)
BLOCKS = (
    *(
        "{{% for m in {0} %}}{1}{{% endfor %}}",
        "{{% if {0} %}}{1}{{% else %}}{1}{{% endif %}}",
        "{{%- set n.i = {0} %}}",
    ),
    *("{{% set n = namespace(i={0}) -%}}{1}", "{{% macro f(x) %}}{1}{{{{ {0} }}}}{{% endmacro %}}", "{{% break %}}{1}"),
    *("{{% generation %}}{1}{{{{ {0} }}}}{{% endgeneration %}}", "{{% filter trim %}}{1}{{% endfilter %}}", "{1}{1}"),
    *("{{% call f({0}) %}}{1}{{% endcall %}}", "{{% include {0} %}}", "{{# {1} #}}\n", "{{% raw %}}{1}{{% endraw %}}"),
)
TEMPLATES = st.recursive(
    st.text(max_size=4)
    | EXPRESSIONS.map("{{{{ {} }}}}".format)
    | st.sampled_from(("{{", "%}", "{% if", "-}}", "\n  ")),
    lambda some: st.builds(lambda block, *parts: block.format(*parts), st.sampled_from(BLOCKS), EXPRESSIONS, some),
    max_leaves=3,
)


@pytest.fixture
def made(tiny_model, tmp_path, monkeypatch):
    """A tokenizer, and the memory of the process that has rendered a conversation for it."""
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)
    found = with_template(tiny_model, tmp_path, SANE)
    found.render(TALK)
    return found, resident(chat_template._renderer._process.pid)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(TEMPLATES)
def test_any_template_is_rendered_as_transformers_renders_it_or_refused(made, template):
    (tokenizer, before), ours, reason = made, None, ""
    tokenizer._hf.chat_template = template
    try:
        with bounded():
            ours = tokenizer.render_with_spans(TALK, TOOLS)
    except DataError as error:
        reason = str(error)
        assert reason.startswith("the chat template fails on a conversation")
    assert resident(chat_template._renderer._process.pid) - before < MEMORY
    try:
        expected = theirs(tokenizer, template)
    except Exception:
        expected = None
    assert ours == expected or "more than" in reason or "longer than" in reason


def test_the_process_is_started_again_if_something_ends_it(tiny_model, tmp_path):
    made = with_template(tiny_model, tmp_path, SANE)
    before = chat_template._renderer._process.pid
    chat_template._renderer._process.close()
    assert made.render(TALK) == "s</s>a\n</s>b</s>"
    assert chat_template._renderer._process.pid != before
