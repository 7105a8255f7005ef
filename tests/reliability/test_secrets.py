"""Secrets are used, and neither written nor printed."""

import json
import re
import stat
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf import cli, config, secrets
from jaxrlhf.config import text
from jaxrlhf.config.file import load_config
from jaxrlhf.errors import ConfigError, StorageError
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.http import Address
from jaxrlhf.rewards.sources.judge import Judge
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.worker import Worker
from jaxrlhf.runs import with_template_date
from jaxrlhf.runs.resume import check_resume
from jaxrlhf.training.facts import changes
from jaxrlhf.training.ppo.trainer import PPOTrainer

ASKED = ScoreRequest(["why?"], ["so"], {})
SECRET = st.from_regex(r"zq[A-Za-z0-9._~-]{6,20}qz", fullmatch=True)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(secrets, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:p@ss@host:80/a?token=abc&v=2#x", "https://***@host:80/a?token=***&v=2#***"),
        ("http://host/?rawtoken", "http://host/?***"),
        ("http://host:8000/score", "http://host:8000/score"),
        ("https://${USER}:${PASS}@host/?key=${KEY}", "https://${USER}:${PASS}@host/?key=${KEY}"),
        ("https://me:${PASS}@host/?key=a${KEY}", "https://***:${PASS}@host/?key=***"),
        ("https://x.azure.com/openai/chat?api-version=2024-02-01", "https://x.azure.com/openai/chat?api-version=2024-02-01"),
        ("hf://org/name", "hf://org/name"),
        ("Authorization: Bearer abcdef", "Authorization: ***"),
        ("a basic question of tokens: what is 1 + 1?", "a basic question of tokens: what is 1 + 1?"),
    ],
)  # fmt: skip
def test_what_is_hidden(text, shown):
    assert secrets.redact(text) == shown == secrets.redact_value(text)
    assert secrets.redact(f"reward {text} (step 3) failed") == f"reward {shown} (step 3) failed"


@pytest.mark.parametrize(
    ("name", "secret"),
    [(name, True) for name in ("api_key", "apiKey", "token", "X-Auth-Token", "hf_token", "password", "Authorization")]
    + [
        (name, False) for name in ("max_tokens", "eos_token", "key", "answer_key", "api_key_env", "tokenizer", "author")
    ],
)
def test_names_of_secrets(name, secret):
    assert secrets.is_secret_name(name) is secret
    assert secrets.redact_value({name: "a b"}) == {name: "***" if secret else "a b"}


@settings(deadline=None)
@given(SECRET, st.sampled_from(["='", " "]))
def test_no_place_of_a_config_shows_a_secret(secret, blank):
    urls = f"https://me:{secret}@host/p", f"https://host/?token={secret}{blank}x", f"http://host/p#{secret}"
    options = {"api_key": secret, "nested": [{"password": secret}], "server": urls[0]}
    components = [config.Component(url=url, name=f"n{i}") for i, url in enumerate(urls)]
    components += [config.Component(judge=config.Judge(url=urls[0], extra_body=options), name="judge")]
    components += [config.Component(function="a.py:f", options=options | {"headers": {"X-Any": secret}})]
    headers = {"Authorization": f"Bearer {secret}", "X-Tenant": secret}
    components += [config.Component(url="http://host/", headers=headers, name="headers")]
    components += [config.Component(judge=config.Judge(url="http://host/", headers=headers), name="judge_headers")]
    made = config.PPOConfig(
        reward=config.RewardSource(components=tuple(components)),
        environment=config.Environment(function="b.py:G", options=options),
    )
    command = ["jaxrlhf", f"--reward.components.0.url={urls[1]}", "--x.api_key", secret]
    command += ["--reward.components.0.url", urls[1]]
    command += [f"--a.headers={{X-Any: {secret}}}", "--a.headers.X-Any", secret, f"--a.headers.X-Any={secret}"]
    command = secrets.redact_command(command)
    for written in (text.dump(made), str(changes(made)), str(command), secrets.redact(f"reward {urls[0]}: no answer")):
        assert secret not in written and "***" in written
    with pytest.raises(ConfigError) as caught:
        config.Component(url=urls[1], model="m")
    assert secret not in str(caught.value)


def test_a_config_without_secrets_is_written_as_it_is(tmp_path, monkeypatch):
    """References and texts for models included: loading what was written gives an equal config."""
    monkeypatch.setenv("WORD", "blue")
    judge = config.Judge(url="https://${HOST}/v1", instructions="See https://x.org/?a=b, ${x}$ and api_key: 3.")
    components = (
        config.Component(judge=judge),
        config.Component(url="http://host/?key=${KEY}", headers={"Authorization": "Bearer ${KEY}", "Accept": "a/b"}),
        config.Component(function="a.py:f", options={"api_key": "${KEY}", "n": [1, {"text": "${WORD} 2"}]}),
    )
    made = config.PPOConfig(
        run_dir="runs/${WORD}",
        reward=config.RewardSource(components=components),
        sampling=config.Sampling(stop_strings=("${WORD}",)),
    )
    file = tmp_path / "config.yaml"
    file.write_text(text.dump(made))
    assert load_config("ppo", file, partial=True) == made


def test_variables_in_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/fast")
    monkeypatch.delenv("NOPE", raising=False)
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: ${SCRATCH}/run\ndata: {path: a.jsonl, template: '{prompt} costs ${SCRATCH}'}\n")
    loaded = load_config("sft", file, [("model.path", "${SCRATCH}/$${x}")])
    assert (loaded.run_dir, loaded.model.path) == ("/fast/run", "/fast/${x}")
    assert loaded.data.template == "{prompt} costs ${SCRATCH}", "the text for a model"
    monkeypatch.setenv("LR", "1e-3")
    monkeypatch.setenv("ON", "true")
    file.write_text("model: {path: m}\ndata: {path: a.jsonl}\nlora: {enabled: '${ON}'}\n")
    loaded = load_config("sft", file, [("optim.learning_rate", "${LR}"), ("run_dir", "${LR}")])
    assert (loaded.optim.learning_rate, loaded.lora.enabled, loaded.run_dir) == (1e-3, True, "1e-3")
    monkeypatch.setenv("LR", "fast")
    with pytest.raises(ConfigError, match="optim.learning_rate: must be a number, got 'fast'"):
        load_config("sft", file, [("optim.learning_rate", "${LR}")])
    file.write_text("model: {path: m}\ndata:\n  path: ${NOPE}/a.jsonl\n")
    with pytest.raises(ConfigError, match=r"c.yaml:3: data.path has \$\{NOPE\}.*no environment variable NOPE"):
        load_config("sft", file)


def test_basic_authentication_and_variables_are_sent_and_hidden(serve, monkeypatch):
    monkeypatch.setenv("PASS", "p/w:1 d")
    monkeypatch.setenv("KEY", "k+1=secret")
    url, seen = serve((401, "no user me with p/w:1 d or k+1=secret or bWU6cC93OjEgZA=="), (200, '{"scores": [1]}'))
    source = Endpoint(url.replace("://", "://me:${PASS}@") + "?key=${KEY}", timeout=5)
    with pytest.raises(Exception, match="answered 401") as caught:
        source(ASKED)
    assert "/score?key=${KEY}: answered" in str(caught.value) or "?key=${KEY} answered 401" in str(caught.value)
    assert not re.search("p/w|k.1=|bWU6", str(caught.value))
    assert source(ASKED).values == [1.0]
    assert seen[0].headers["Authorization"] == "Basic bWU6cC93OjEgZA==", "me:p/w:1 d, RFC 7617"
    assert seen[0].path == "/score?key=k%2B1%3Dsecret"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/?token=${NOPE}", r"has \$\{NOPE\}, and there is no environment variable NOPE"),
        ("http://host/?token=***", r"is 'http://host/\?token=\*\*\*': a run does not keep secrets"),
        ("http://host/?token=two words", r"is 'http://host/\?token=\*\*\*'; .* no blanks"),
        ("http://me:hidden@host:port/", r"is 'http://\*\*\*@host:port/'; it must begin with"),
        ("${ADDRESS}", r"is '\$\{ADDRESS\}'; it must begin with http"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_by_name(url, message, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setenv("ADDRESS", "ftp://hidden")
    with pytest.raises(ConfigError, match=f"^url {message}") as caught:
        Address.of(url, "url")
    assert not re.search("two|hidden", str(caught.value))


def test_a_judge_with_basic_authentication(serve, tmp_path):
    reply = json.dumps({"choices": [{"message": {"content": "Score: 5"}}]})
    url, seen = serve((200, reply))
    with_password = [url.replace("://", f"://me:{word}@") for word in ("first-pw", "second-pw")]
    for address in with_password:
        Judge(config.Judge(url=address), timeout=5, directory=tmp_path)(ASKED)
    assert seen[0].headers["Authorization"] == "Basic bWU6Zmlyc3QtcHc="
    assert len(seen) == 1, "with another password the stored answers stay valid"
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "first-pw" not in file.read_text()
    with pytest.raises(ConfigError, match="both authenticate"):
        config.Judge(url=with_password[0], api_key_env="KEY")


def test_headers_are_sent_and_hidden(serve, monkeypatch):
    monkeypatch.setenv("KEY", "the-secret-key")
    headers = {"Authorization": "Bearer ${KEY}", "x-tenant": "blue-whale", "accept": "text/plain"}
    url, seen = serve(
        (401, "no the-secret-key of blue-whale accepts text/plain"),
        (200, '{"scores": [1]}'),
        (200, json.dumps({"choices": [{"message": {"content": "Score: 5"}}]})),
    )
    source = Endpoint(url, timeout=5, headers=headers)
    with pytest.raises(Exception, match=r"no \*\*\* of \*\*\* accepts text/plain"):
        source(ASKED)
    assert source(ASKED).values == [1.0]
    monkeypatch.setenv("OTHER", "another-key")
    Judge(config.Judge(url=url, headers={"X-Tenant": "blue-whale"}, api_key_env="OTHER"), timeout=5)(ASKED)
    sent = [{name.lower(): value for name, value in request.headers.items()} for request in seen]
    assert [request["authorization"] for request in sent[:2]] == ["Bearer the-secret-key"] * 2
    assert sent[0]["accept"] == "text/plain" and sent[0]["content-type"] == "application/json"
    assert all(request["x-tenant"] == "blue-whale" for request in sent)
    assert sent[2]["authorization"] == "Bearer another-key"


def test_headers_that_cannot_be_used_are_refused_by_name(monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setenv("KEY", "two\nlines")
    for value, message in (
        (
            "Bearer ${NOPE}",
            r"headers beside url.Authorization has \$\{NOPE\}, and there is no environment variable NOPE",
        ),
        ("Bearer ***", "headers beside url.Authorization is '\\*\\*\\*': a run does not keep secrets"),
        ("Bearer ${KEY}", "the value of Authorization has characters that no header can have"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            Address.of("http://host/", "url", {"Authorization": value})
        assert "lines" not in str(caught.value).partition("such as")[0]
    key = {"Authorization": "x"}
    with pytest.raises(ConfigError, match="url has a user name: both authenticate"):
        config.Component(url="http://me:pw@host/", headers=key)
    with pytest.raises(ConfigError, match="api_key_env is KEY: both authenticate"):
        config.Judge(url="http://host/", headers=key, api_key_env="KEY")
    with pytest.raises(ConfigError, match="not the name of a header"):
        config.Component(url="http://host/", headers={"a b": "x"})
    with pytest.raises(ConfigError, match="given twice"):
        config.Component(url="http://host/", headers={"a": "x", "A": "y"})
    with pytest.raises(ConfigError, match="headers"):
        config.Component(model="m", headers=key)


def test_options_of_a_function_reach_it_and_no_process_list(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "the-secret-key")
    file = tmp_path / "r.py"
    file.write_text(
        "import os, pathlib\n"
        "def reward(prompts, completions, api_key=''):\n"
        "    assert 'JAXRLHF_WORKER_OPTIONS' not in os.environ\n"
        "    assert api_key not in pathlib.Path('/proc/self/cmdline').read_bytes().decode()\n"
        "    return [float(api_key == 'the-secret-key')] * len(prompts)\n"
    )
    worker = Worker(f"{file}:reward", options=secrets.resolve({"api_key": "${KEY}"}, "options"), timeout=20)
    assert worker(ASKED).values == [1.0]


def test_a_run_leaves_no_secret_behind_and_resumes_with_another(ppo, serve, tmp_path, monkeypatch):
    hidden = ("tok-in-query", "pw-in-userinfo", "key-in-options", "key-in-environment", "tok-rotated", "in-a-header")
    monkeypatch.setenv("OPTION", hidden[3])
    (tmp_path / "r.py").write_text(
        "def reward(prompts, completions, api_key='', other_token=''):\n    return [len(c) for c in completions]\n"
    )
    url, seen = serve(lambda body: (200, json.dumps({"scores": [len(c) for c in body["completions"]]})))
    secret_url = url.replace("://", f"://me:{hidden[1]}@") + "?token="

    def made(token, **options):
        parts = (
            config.Component(url=secret_url + token, headers={"X-Tenant": f"{hidden[5]}-{token}"}),
            config.Component(
                function=f"{tmp_path}/r.py:reward", options={"api_key": hidden[2], "other_token": "${OPTION}"}
            ),
        )
        return config.replace(ppo, reward=config.RewardSource(components=parts), **options)

    command = ["jaxrlhf", "ppo", "c.yaml", "--reward.components.0.url", secret_url + hidden[0]]
    command += [f"--reward.components.1.options.api_key={hidden[2]}"]
    command += ["--reward.components.0.headers.X-Tenant", hidden[5]]
    monkeypatch.setattr(sys, "argv", command)
    first = made(hidden[0], **{"logging.tensorboard": True})
    PPOTrainer(first).train()
    run = tmp_path / "run"
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "report.html", "README.md", "metrics.jsonl"} <= {file.name for file in files}
    for file in files:
        assert not [word for word in hidden if word.encode() in file.read_bytes()], file
    assert all(stat.S_IMODE((run / name).stat().st_mode) == 0o600 for name in ("config.yaml", "run.json"))
    card = (run / "export" / "README.md").read_text()
    assert "token=***" in card and "${OPTION}" in card
    assert seen[0].path.endswith("?token=tok-in-query")
    for again in (made(hidden[4]), made("${TOKEN}")):
        check_resume(run, with_template_date(again, fresh=False), "ppo")
    elsewhere = config.replace(ppo, reward=config.RewardSource(components=(config.Component(url=url + "/x"),)))
    with pytest.raises(StorageError, match="another config") as caught:
        check_resume(run, elsewhere, "ppo")
    assert not [word for word in hidden if word in str(caught.value)]
    stored = yaml.safe_load((run / "config.yaml").read_text())["reward"]["components"]
    assert stored[0]["url"] == url.replace("://", "://***@") + "?token=***"


def test_the_command_line_shows_no_secret(tmp_path, capsys):
    url = "https://me:hidden-pw@host/?token=hidden-token"
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "a"}\n')
    common = ["ppo", "--model.path", "nowhere", "--data.path", str(data), "--run_dir", str(tmp_path / "r")]
    for options in (
        ["--reward.components.0.url", url],
        ["--reward.components.0.url", f"ftp{url[5:]}"],
        ["--reward.components.0.url", url, "--reward.components.0.model", "x"],
        ["--reward.components", f"[{{url: {url}}}", "--reward.components.0.options.api_key", "hidden-key"],
        ["--reward.components.0.weight", url],
        ["--reward.components.0.url", url, "--dry-run"],
    ):
        assert cli.main([*common, *options]) != 0
        printed = "".join(capsys.readouterr())
        assert "hidden" not in printed and printed, printed
