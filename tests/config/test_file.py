"""Reading a config: YAML 1.2, overrides, one validation with every problem and its place."""

import dataclasses
import random
import string
from pathlib import Path

import pytest
import yaml

from jaxrlhf.config import GRPO, PPO, Component, ModelSource, PPOConfig, SFTConfig, replace, trl
from jaxrlhf.config.file import METHODS, load_config
from jaxrlhf.config.schema import field_doc, keys
from jaxrlhf.config.spelling import suggestions
from jaxrlhf.config.text import dump, render_new
from jaxrlhf.errors import ConfigError

GIVEN = "model: {path: m}\ndata: {path: d}\nreward: {function: r.py:f}\n"


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def problems(method: str, path: Path | None, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(method, path, overrides)
    assert caught.value.exit_code == 3
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_values_are_read_as_yaml_1_2(write):
    path = write(
        GIVEN + "optim: {learning_rate: 1e-4, eps: .5, beta1: 0}\nseed: 010\nmesh: {data: 0x10}\nrun_dir: on\n"
    )
    config = load_config("ppo", path)
    assert (config.optim.learning_rate, config.optim.eps, config.optim.beta1) == (1e-4, 0.5, 0.0)
    assert (config.seed, config.mesh.data, config.run_dir) == (10, 16, "on")


def test_backslash_n_is_a_newline_in_overrides_and_refused_in_files(write):
    texts = {"data.template": "template", "data.completion_prefix": "completion_prefix"}
    for key in texts:
        for text, meant in (
            (r"Q: {x}\nA:", "Q: {x}\nA:"),
            (r"'a\nb'", "a\nb"),
            (r"\\nabla", r"\nabla"),
            (r"\frac", r"\frac"),
        ):
            data = load_config("sft", None, [(key, text)], partial=True).data
            assert getattr(data, texts[key]) == meant
    for text in (r"[\n]", r"['\n']", r'["\n"]'):
        assert load_config("ppo", None, [("sampling.stop_strings", text)], partial=True).sampling.stop_strings == (
            "\n",
        )
    part = load_config(
        "ppo", None, [("reward.components.0.template", r"{prompt}\n"), ("reward.components.0.model", "m")], partial=True
    )
    assert part.reward.components[0].template == "{prompt}\n"
    assert load_config("sft", None, [("model.path", r"C:\new")], partial=True).model.path == r"C:\new", "not a text"
    for method, line in (("sft", r"data: {template: 'Q\nA'}"), ("ppo", r"sampling: {stop_strings: [\n]}")):
        with pytest.raises(ConfigError, match=r"my\.yaml:1: .*: \\n is a newline only in double quotes"):
            load_config(method, write(line), partial=True)
    assert load_config("sft", write(r'data: {template: "Q\nA"}'), partial=True).data.template == "Q\nA"
    config = replace(SFTConfig(), **{"data.template": r"\nabla", "model.revision": "None", "run_dir": "None"})
    assert load_config("sft", write(dump(config)), partial=True) == config


def test_none_is_null_where_a_key_may_be_null(write):
    path = write("model: {revision: None}\ndata: {max_rows: None, columns: {prompt: None}}\nrun_dir: None\n")
    config = load_config("sft", path, partial=True)
    assert (config.model.revision, config.data.max_rows, config.run_dir) == (None, None, "None")
    assert (
        load_config("sft", None, [("model.revision", "None"), ("data.max_rows", "None")], partial=True) == SFTConfig()
    )
    assert load_config("sft", None, [("model.revision", "'None'")], partial=True).model.revision == "None"


def test_every_answer_to_a_name_of_trl_is_an_option():
    everywhere = {key for cls in METHODS.values() for key, _ in keys(cls)}
    for name, (options, _) in trl.NAMES.items():
        assert set(options) <= everywhere, name
    for method in METHODS.values():
        own = {key for key, _ in keys(method)}
        for name in set(trl.NAMES) & own:  # SFT has TRL's `loss_type`; DPO has another name for it
            assert not set(trl.NAMES[name][0]) & own, name
    assert trl.answer("ppo_epochs", [key for key, _ in keys(PPO)]) == "; TRL's ppo_epochs is num_ppo_epochs here"


@pytest.mark.parametrize("value", ["on", "off", "yes", "no", "1", "'true'"])
def test_only_true_and_false_are_booleans(write, value):
    found = problems("ppo", write(GIVEN + f"sampling:\n  greedy: {value}\n"))
    assert len(found) == 1
    assert "my.yaml:5: sampling.greedy: must be true or false" in found[0]


def test_text_keys_take_numbers_as_they_are_written(write):
    config = load_config(
        "ppo", write("model: {path: 007, revision: 1234567}\ndata: {path: 1e-4, columns: {prompt: 3}}\n"), partial=True
    )
    assert (config.model.path, config.model.revision, config.data.path) == ("007", "1234567", "1e-4")
    assert config.data.columns == {"prompt": "3"}
    assert load_config("ppo", write("tokenizer: {path: , pad_token: }"), partial=True).tokenizer.path == ""


def test_overrides_win_and_take_dashes(write):
    overrides = [
        ("optim.learning-rate", "3e-4"),
        ("sampling.stop_token_ids", "[1, 2]"),
        ("data.template", "<|user|> {input} <|end|>: x"),
        ("data.columns.prompt", "question"),
        ("model.revision", "null"),
        ("optim", "{eps: 1e-6}"),
    ]
    path = write(GIVEN + "optim: {learning_rate: 1, warmup_steps: 5}\n")
    config = load_config("ppo", path, overrides)
    assert config.optim == dataclasses.replace(PPOConfig().optim, learning_rate=3e-4, warmup_steps=5, eps=1e-6)
    assert config.sampling.stop_token_ids == (1, 2)
    assert config.data.template == "<|user|> {input} <|end|>: x"
    assert config.data.columns == {"prompt": "question"}
    assert config.model.revision is None
    assert config.model.path == "m"
    assert load_config("ppo", path, [("data.template", '"a\\nb"')]).data.template == "a\nb"


def test_every_problem_is_listed_with_its_place(write):
    path = write(
        "model:\n  path: m\n  remat: ful\nlearning_rate: 1e-4\n"
        "ppo:\n  batch_size: 1.5\n  batch_size: 2\n  kl_coef: -1\n"
        "mesh: 3\noptim: {beta1: true, beta2: '1e-5', eps: [1]}\noptim.lr: 1\nsampling: {stop_token_ids: [1, x]}\n"
    )
    expected = [
        "my.yaml:3: model.remat: 'ful' is not one of 'auto', 'none', 'full', 'dots'; did you mean 'full'?",
        "my.yaml:4: unknown key 'learning_rate'; did you mean 'optim.learning_rate'",
        "my.yaml:6: ppo.batch_size: must be a whole number, got 1.5",
        "my.yaml:7: duplicate key 'ppo.batch_size' (first at ",
        "my.yaml:8: ppo.kl_coef: must be at least 0, got -1",
        "my.yaml:9: mesh: must be a section",
        "my.yaml:10: optim.beta1: must be a number, got 'true'",
        "my.yaml:10: optim.beta2: must be a number, got '1e-5'",
        "my.yaml:10: optim.eps: must be a number, got the list [1]",
        "my.yaml:11: unknown key 'optim.lr'; did you mean 'optim.learning_rate'",
        "my.yaml:12: sampling.stop_token_ids.1: must be a whole number, got 'x'",
        "override: unknown key 'optim.lr'; did you mean 'optim.learning_rate'",
        "override: ppo.gamma: must be at most 1, got 2",
        "my.yaml: data.path is required. JSON, JSONL",
        "my.yaml: a reward is required",
    ]
    found = problems("ppo", path, [("optim.lr", "1"), ("ppo.gamma", "2")])
    assert len(found) == len(expected)
    for line in expected:
        assert sum(line in f"{problem}" for problem in found) == 1, line


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("environment: {function: 'game.py:Game', max_turn: 3}", "environment.max_turn"),
        ("environment: {funktion: 'game.py:Game'}", "environment.funktion"),
        ("grpo: {method: online_dpo, rejected_text: no, num_generations: 1, gama: 1}", "grpo.gama"),
    ],
)
def test_a_wrong_key_of_what_replaces_a_reward_is_the_only_problem(write, section, key):
    (found,) = problems("grpo", write(f"model: {{path: m}}\ndata: {{path: d}}\n{section}\n"))
    assert f"my.yaml:3: unknown key '{key}'" in found


def test_a_path_where_a_section_stands_is_pointed_to_its_key(write):
    data = write("data: {path: d}\nmodel: some/folder\n")
    assert "my.yaml:2: model: must be a section" in problems("sft", data)[0]
    assert problems("sft", data)[0].endswith("got 'some/folder'; did you mean 'model.path'?")


def test_a_seed_that_would_meet_another_one_is_refused(write):
    path = write("model: {path: m}\ndata: {path: d}\nseed: 4294967296\n")
    assert "my.yaml:3: seed: must be less than 4294967296" in problems("sft", path)[0]


def test_keys_that_do_not_go_together_are_refused_at_their_place(write):
    (found,) = problems("ppo", write(GIVEN + "ppo:\n  num_mini_batches: 3\n"))
    assert found.endswith("my.yaml:5: ppo.num_mini_batches (3) must divide ppo.batch_size (16); 2 would")
    overrides = [("ppo.micro_batch_size", "3")]
    (found,) = problems("ppo", write(GIVEN + "ppo:\n  num_mini_batches: 2\n"), overrides)
    assert found.strip().startswith("override: ppo.micro_batch_size (3) must divide a mini-batch"), (
        "what is new is wrong"
    )


def test_what_is_given_of_a_section_leaves_the_rest_at_the_methods_defaults(write):
    given = load_config("ppo", write(GIVEN + "optim:\n  schedule: constant\n"))
    assert given.optim == replace(PPOConfig().optim, schedule="constant")
    assert (given.optim.learning_rate, given.optim.eps) == (3e-6, 1e-5)
    assert PPOConfig(optim={"eps": 1e-7}).optim.learning_rate == 3e-6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1", "my.yaml:2: not YAML: the bracket opened here is not closed"),
        ("a: {b: 1\n", "my.yaml:1: not YAML: the bracket opened here is not closed"),
        ("a: 'x\nb: 2\n", "my.yaml:1: not YAML: the quote opened here is not closed"),
        ("- 1\n", "expected a mapping"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("model: !!python/name:os.system {}", "my.yaml:1: the YAML tag"),
        ("seed: !!python/object:x 3", "the YAML tag"),
        ("&a optim: &b\n  eps: *b\n", "alias"),
        ("optim:\n\teps: 1\n", "my.yaml:2: not YAML: found character '\\t' that cannot start any token"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(write, text, message):
    with pytest.raises(ConfigError, match=r"my\.yaml") as caught:
        load_config("sft", write(text))
    assert message in str(caught.value)


def test_a_missing_file_and_bytes_that_are_not_text(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: there is no such file"):
        load_config("sft", tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config("sft", tmp_path / "latin.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_new_and_dump_read_back_as_the_defaults(write, method):
    cls = METHODS[method]
    text = render_new(method, cls)
    assert load_config(method, write(text), partial=True) == cls()
    assert load_config(method, write(dump(cls())), partial=True) == cls()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert {line.split(":")[0].strip() for line in text.splitlines() if "# required" in line} >= {"path"}
    flat = set(yaml.safe_load(text))
    assert flat == {field.name for field in dataclasses.fields(cls)}


def test_dump_keeps_values_that_look_like_something_else(write):
    overrides = [("data.template", "1e-4"), ("run_dir", "on"), ("data.completion_prefix", " "), ("model.path", "null")]
    overrides += [("data.columns", "{'1': '2'}"), ("optim.learning_rate", "1e-7"), ("sampling.stop_token_ids", "[3]")]
    config = load_config("sft", None, overrides, partial=True)
    assert load_config("sft", write(dump(config)), partial=True) == config
    assert config.data.template == "1e-4"
    assert yaml.safe_load(dump(config))["run_dir"] == "on"  # a YAML 1.1 reader agrees


def test_every_documented_field_is_found():
    assert field_doc(PPO, "kl_coef").startswith("KL penalty coefficient")
    assert field_doc(ModelSource, "path").endswith("Required.")
    assert field_doc(PPOConfig, "ppo") == ""
    assert field_doc(SFTConfig, "completion_only").endswith("trained on in full."), "as one line"
    assert field_doc(PPOConfig, "run_dir").startswith("Output directory"), "of a base class"
    assert field_doc(GRPO, "batch_size").endswith("num_generations."), "of the class itself, before that of its base"


@pytest.mark.parametrize("method", METHODS)
def test_misspelt_keys_are_refused_and_the_right_one_is_suggested(method):
    known = [key for key, _ in keys(METHODS[method])]
    rng = random.Random(0)
    right = total = 0
    for key in known:
        for distance in (1, 2):
            wrong = _misspelt(key, distance, rng)
            if wrong in known:
                continue
            total += 1
            right += key in suggestions(wrong, known)
    assert total > 1.5 * len(known)
    assert right / total >= 0.95, f"{right} of {total}"


def test_a_misspelt_key_is_refused_at_any_depth(write):
    rng = random.Random(1)
    known = {key for key, _ in keys(SFTConfig)}
    for key in sorted(known):
        wrong = _misspelt(key, 1, rng)
        if wrong in known or wrong.startswith("data.columns."):
            continue
        with pytest.raises(ConfigError, match=r"unknown key"):
            load_config("sft", None, [(wrong, "1")], partial=True)
        *sections, leaf = wrong.split(".")
        text = (
            "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(sections)) + "  " * len(sections) + f"{leaf}: 1\n"
        )
        with pytest.raises(ConfigError, match=r"my.yaml:\d+: unknown key"):
            load_config("sft", write(text), partial=True)


def _misspelt(key: str, distance: int, rng: random.Random) -> str:
    """`key` with so many letters dropped, doubled, swapped or replaced, in one of its parts."""
    parts = key.split(".")
    which = rng.randrange(len(parts))
    for _ in range(distance):
        word = parts[which]
        i = rng.randrange(len(word))
        edits = [word[:i] + word[i] + word[i:], word[:i] + rng.choice(string.ascii_lowercase) + word[i + 1 :]]
        edits += [word[:i] + word[i + 1 :]] * (len(word) > 2)
        edits += [word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]] * (i + 1 < len(word))
        parts[which] = rng.choice(edits)
    return ".".join(parts)


COMPONENTS = """model: {path: m}
data: {path: d}
reward:
  components:
    - function: r.py:f
      weight: 2
      options: {low: 010, words: [a, 1e-2], deep: {when: on}}
    - model: judge
      revision: 1234567
      template: "{prompt} {response}"
"""


def test_components_of_the_reward_are_a_list_of_sections(write):
    first, second = load_config("ppo", write(COMPONENTS)).reward.components
    assert (first.function, first.weight) == ("r.py:f", 2.0)
    assert first.options == {"low": 10, "words": ["a", 0.01], "deep": {"when": "on"}}
    assert (second.model, second.revision, second.template) == ("judge", "1234567", "{prompt} {response}")


def test_overrides_reach_into_a_list(write):
    overrides = [
        ("reward.components.0.weight", "-1"),
        ("reward.components.0.options.low", "5"),
        ("reward.components.1.micro-batch-size", "3"),
        ("reward.components.2.url", "http://x/y"),
        ("reward.components.2.on_error", "skip"),
    ]
    config = load_config("ppo", write(COMPONENTS), overrides)
    first, second, third = config.reward.components
    assert (first.weight, first.options["low"], first.options["words"]) == (-1, 5, ["a", 0.01])
    assert (second.micro_batch_size, third.url, third.on_error) == (3, "http://x/y", "skip")
    assert load_config("ppo", write(dump(config))) == config
    fresh = [("reward.components.0.function", "r.py:f"), ("model.path", "m"), ("data.path", "d")]
    assert load_config("ppo", None, fresh).reward.components[0].function == "r.py:f"


def test_problems_in_a_component_have_their_key_and_their_line(write):
    text = (
        COMPONENTS + "      wieght: 1\n    - {url: x, per_token: 1}\n    - human: pick\n      on_error: skip\n    - 3\n"
    )
    overrides = [("reward.components.0.tiemout", "1"), ("reward.components.9.weight", "1")]
    found = problems("ppo", write(text + "  model: j\n"), overrides)
    expected = [
        "my.yaml:11: unknown key 'reward.components.1.wieght'; did you mean 'reward.components.1.weight'",
        "my.yaml:12: reward.components.2.per_token: must be true or false, got 1",
        "my.yaml:13: reward.components.3: on_error ('skip') has no meaning for a component with human, only with model",
        "my.yaml:15: reward.components.4: must be a section, a mapping of keys to values, got 3",
        "override: unknown key 'reward.components.0.tiemout'; did you mean 'reward.components.0.timeout'",
        "override: reward.components.9.weight: reward.components has 5 elements, numbered from 0",
    ]
    assert len(found) == len(expected), found
    for line, problem in zip(expected, found, strict=True):
        assert line in problem


def test_two_components_of_one_name_are_refused_at_the_reward(write):
    (found,) = problems("ppo", write(COMPONENTS + "  model: other\n"))
    assert "my.yaml:3: reward: 2 components of the reward are called 'model'; name each one" in found


def test_new_shows_the_keys_of_a_component(write):
    text = render_new("ppo", PPOConfig)
    block = text[text.index("  components: []") :].partition("\n\n")[0].splitlines()[1:]
    element = "\n".join(line.replace("# ", "", 1) for line in block if line.startswith("  # "))
    shown = yaml.safe_load(f"list:\n{element}")["list"]
    assert [set(part) for part in shown] == [{field.name for field in dataclasses.fields(Component)}]
