"""Chats: replies are those of `generate`, shown as they are generated; turns, rewards and the terminal's commands."""

import io
import json
import string
import sys
import types

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxrlhf import compilation, weights
from jaxrlhf.chat.conversation import Conversation, Turn
from jaxrlhf.chat.terminal import Terminal
from jaxrlhf.cli import main
from jaxrlhf.config import Data, ModelSource, PPOConfig, Sampling, SFTConfig, TokenizerSource
from jaxrlhf.config import text as config_text
from jaxrlhf.data.datasets import sft_rows
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.evaluation import generation

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}bot: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model with random weights, more decided than new ones, a context of 128 and no chat template."""
    folder = tmp_path_factory.mktemp("chat")
    described = json.loads((tiny_model / "config.json").read_text()) | {"max_position_embeddings": 128}
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(described))
    model, params = weights.load(folder, init="random", key=jax.random.key(1))
    params = jax.tree.map(lambda x: 3 * x, params)
    return weights.export(tmp_path_factory.mktemp("models") / "chat", model, params, source=folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def config(folder, template="auto", **sampling):
    options = {"response_length": 10, "greedy": True} | sampling
    return PPOConfig(
        model=ModelSource(path=str(folder)),
        tokenizer=TokenizerSource(chat_template=template),
        sampling=Sampling(**options),
        data=Data(control_tokens=template != "auto"),  # for `generate`, which gets rendered text
    )


def generated(settings, tokens):
    """Greedy completion of a prompt of these tokens."""
    conversation = Conversation(settings)
    from jaxrlhf.data.datasets import PromptRow
    from jaxrlhf.rollout.text import decode_completions

    model, params = generation.open_model(settings, conversation.tokenizer, 1)
    row = PromptRow(tokens=tokens, text="", columns={}, index=0)
    rollout = generation.generate(settings, model, params, conversation.tokenizer, [row], 1)
    rollout, (text,) = decode_completions(rollout, conversation.tokenizer, settings.sampling.stop_strings)
    return text, bool(rollout.finished[0])


@pytest.mark.parametrize("sampling", [{}, {"greedy": False, "temperature": 0.8}, {"stop_strings": ("e", "q7")}])
def test_replies_are_those_of_generate_on_the_rendered_conversation(folder, template, sampling):
    settings = config(folder, template, **sampling)
    chat = Conversation(settings, "be kind")
    first = "".join(chat.reply("hello"))
    prompt = "system: be kind</s>user: hello</s>bot: "
    assert (first, chat.turns[0].finished) == generated(settings, chat.tokenizer.encode(prompt, special=True))
    if sampling.get("greedy", True):  # later replies of a chat have random numbers of their own
        second = "".join(chat.reply("what now?"))
        prompt = f"system: be kind</s>user: hello</s>assistant: {first}</s>user: what now?</s>bot: "
        assert second == generated(settings, chat.tokenizer.encode(prompt, special=True))[0]


def test_without_a_template_replies_continue_the_text_or_the_message_alone(folder):
    settings = config(folder)
    for history in (True, False):
        chat = Conversation(settings, history=history)
        first, second = ("".join(chat.reply(text)) for text in ("once", "then"))
        prompt = f"once{first}\nthen" if history else "then"
        assert second == generated(settings, chat.tokenizer.encode_prompt(prompt))[0]
        assert bool(chat.notes()) == history
    with pytest.raises(ConfigError, match="needs a chat template"):
        Conversation(settings, "be kind")


@pytest.fixture(scope="module")
def byte_model(tiny_model, tmp_path_factory):
    """A model with a tokenizer of single bytes: its replies are mostly incomplete characters."""
    source = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text((tiny_model / "tokenizer_config.json").read_text())
    described = json.loads((tiny_model / "config.json").read_text()) | {"vocab_size": 260, "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 128}))
    model, params = weights.load(source, init="random", key=jax.random.key(1))
    return weights.export(source / "model", model, params, source=source)


def test_characters_are_shown_once_they_are_whole_and_stop_strings_never(byte_model, monkeypatch):
    """The model's bytes are replaced by those of a text: pieces join to it, whatever it is cut into."""
    said = "añ € 😀 stop sto\u0301p. ÿ END never"
    settings = config(byte_model, stop_strings=("END", "stoq"), response_length=64)
    chat = Conversation(settings)
    ids = chat.tokenizer.encode(said)
    for size in (1, 2, 3, 5):
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        monkeypatch.setattr(chat._stream, "generate", lambda *a, parts=parts, **k: iter(parts))
        pieces = list(chat.reply("x"))
        assert "".join(pieces) == said.partition("END")[0] == chat.turns[-1].reply
        assert len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)
        assert chat.turns[-1].finished and not said.startswith("".join(pieces[:-1]) + "E")
    monkeypatch.setattr(chat._stream, "generate", lambda *a, **k: iter([ids[:3], ids[3:6]]))
    assert "".join(chat.reply("x")) == chat.tokenizer.decode(ids[:6]), "what is left at the length limit is shown"
    assert not chat.turns[-1].finished


def test_random_bytes_join_to_the_completion_of_generate(byte_model):
    settings = config(byte_model, greedy=False, response_length=60)
    chat = Conversation(settings)
    pieces = list(chat.reply("x"))
    text, finished = generated(settings, chat.tokenizer.encode_prompt("x"))
    assert "".join(pieces) == text and "\ufffd" in text
    assert chat.turns[0].finished == finished


def test_the_oldest_turns_are_dropped_when_the_context_is_full(folder, template):
    chat = Conversation(config(folder, template), "sys")
    for number in range(6):
        list(chat.reply(f"question {number}"))
        turns = chat.turns[chat.forgotten :]
        rendered = chat.tokenizer.render_chat(chat._messages(turns), generation=True)
        assert len(rendered) + 10 <= chat.context
        if chat.forgotten:  # no more than needed: one more would not fit
            longer = chat._messages(chat.turns[chat.forgotten - 1 :])
            assert len(chat.tokenizer.render_chat(longer, generation=True)) + 10 > chat.context
    assert 0 < chat.forgotten < 6 and len(chat.turns) == 6
    with pytest.raises(DataError, match="no room for a reply"):
        list(chat.reply("x" * 200))
    assert len(chat.turns) == 6
    chat.reset()
    assert (chat.turns, chat.forgotten) == ([], 0)


def talk(monkeypatch, capsys, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = main(["chat", *arguments])
    return code, *capsys.readouterr()


def test_a_piped_chat_prints_a_transcript_and_obeys_commands(folder, template, tmp_path, monkeypatch, capsys):
    options = [str(folder), "--greedy", "--max-new-tokens", "20", "--tokenizer.chat_template", template]
    options += ["--sampling.stop_strings", f"[{', '.join(string.ascii_lowercase)}]"]  # every reply ends soon
    file = tmp_path / "new" / "talk.jsonl"
    lines = ["hello", "", "/undo", "/undo", "hello", "/system be kind", "/system", "what now?", f"/save {file}"]
    lines += ["/rest", "/save", "/system none", "/reset", "hello", " /quit", "/help", "/quit", "unseen"]
    code, out, err = talk(monkeypatch, capsys, lines, *options)
    assert code == 0 and "unseen" not in out
    assert "taken back: hello\nyou: /undo\nthere is nothing to undo" in out
    assert "system prompt: be kind\nyou: /system\nsystem prompt: be kind" in out
    assert "unknown command /rest; did you mean '/reset'?" in out and "/save needs the name of a file" in out
    assert "system prompt: none" in out and "Ctrl-C stops a reply" in out and "you:  /quit\nmodel:" in out
    replies = [block.partition("\n")[0] for block in out.split("you: hello\nmodel:")[1:]]
    assert len(replies) == 3 and len(set(replies)) == 1, "undo and reset leave nothing behind"
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    contents = [turn["content"] for turn in row["messages"]]
    assert contents[:2] == ["be kind", "hello"] and contents[3] == "what now?"
    assert all(f"model:{' ' * (text[:1] != ' ')}{text}".rstrip() in out for text in (contents[2], contents[4]))
    assert [turn["role"] for turn in row["messages"]] == ["system"] + ["user", "assistant"] * 2


def test_saved_rows_are_read_by_sft_with_finished_replies_alone(folder, template, tmp_path):
    for name in (template, "auto"):
        chat = Conversation(config(folder, name))
        chat.turns = [Turn("a", "b", 1, finished=True), Turn("c", "d", 1), Turn("e", "f", 1, finished=True)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat.rows()))
        data = Data(path=str(tmp_path / "rows.jsonl"))
        rows = sft_rows(data, chat.tokenizer, SFTConfig().completion_only).train
        learnt = [
            chat.tokenizer.decode([t for t, on in zip(row.tokens, row.loss_mask, strict=True) if on]) for row in rows
        ]
        assert learnt == (["bf"] if name == template else ["b", "f"])
        assert name == template or chat.rows()[1]["prompt"] == "ab\ncd\ne"


def test_replies_are_scored_by_a_function_with_the_turn_it_answers(folder, template, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.py").write_text(
        "def score(prompts, completions):\n    return [len(prompts[0]) + len(completions[0]) / 100]\n"
    )
    options = [str(folder), "--greedy", "--max-new-tokens", "6", "--reward", f"{tmp_path}/r.py:score", "--no-history"]
    code, out, _ = talk(monkeypatch, capsys, ["hello"], *options, "--tokenizer.chat_template", template)
    assert code == 0
    _, reply, facts = out.rstrip("\n").split("\n")
    assert facts.startswith(f"[reward {5 + len(reply.removeprefix('model: ')) / 100:.4g}")


def test_the_reward_of_a_run_is_its_default_and_no_error_if_it_needs_a_column(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for path in folder.iterdir():
        (run / "export").mkdir(exist_ok=True)
        (run / "export" / path.name).write_bytes(path.read_bytes())
    for body, said in (("completions", "[reward 1"), ("completions, answer", "replies are not scored")):
        (tmp_path / "r.py").write_text(f"def score({body}):\n    return [1.0] * len(completions)\n")
        settings = PPOConfig(
            model=ModelSource(path="m"),
            reward={"function": f"{tmp_path}/r.py:score"},  # type: ignore[arg-type]
            sampling=Sampling(response_length=3, greedy=True),
        )
        (run / "config.yaml").write_text(f"# jaxrlhf ppo, every option resolved\n{config_text.dump(settings)}")
        code, out, err = talk(monkeypatch, capsys, ["hello"], str(run))
        assert code == 0 and "model:" in out
        assert said in out + err
    assert main(["chat", str(folder), "--reward", f"{tmp_path}/r.py:score"]) == 5, "asked for, it is an error"


def test_a_reply_can_be_interrupted(byte_model):
    chat = Conversation(config(byte_model, greedy=False, response_length=60, temperature=0.5))
    pieces = chat.reply("x")
    next(pieces)
    chat.interrupt()
    list(pieces)
    first = chat.turns[0]
    assert not first.finished and first.tokens < 60
    list(chat.reply("y"))  # and the chat goes on
    assert len(chat.turns) == 2 and chat.turns[1].tokens > 12


def test_control_characters_of_a_reply_are_spelt_out(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        Conversation, "reply", lambda self, text: self.turns.append(Turn(text)) or iter(["a\x1b[2J", "\tb\r"])
    )
    _, out, _ = talk(monkeypatch, capsys, ["x\x1b]0;"], str(folder))
    assert "model: a\\x1b[2J\tb\\r\n" in out and "you: x\\x1b]0;" in out and "\x1b" not in out


def test_lines_about_compiling_come_after_the_reply(monkeypatch, capsys):
    def reply(_):
        yield "Listen"
        compilation._listeners[-1]("compiled jit(f) in 7.1 s")
        yield " carefully."

    chat = types.SimpleNamespace(reply=reply, forgotten=0, scorer=None, turns=[Turn("x", finished=True)], notes=list)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    with compilation.announce(print):
        Terminal(chat).run()  # type: ignore[arg-type]
    assert capsys.readouterr().out == "you: x\nmodel: Listen carefully.\ncompiled jit(f) in 7.1 s\n"
