"""Scores from a server: what it is sent, what it may answer, and how often it is asked."""

import datetime
import email.utils
import json
import socket
import time

import pytest

from jaxrlhf.errors import RewardError
from jaxrlhf.rewards.sources import http
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.protocol import ScoreRequest

ASKED = ScoreRequest(["p", "q"], ["one", "two two"], {"answer": [1, 2]}, step=3)


def ask(url, request=ASKED, timeout=10.0):
    pauses = []
    return Endpoint(url, timeout=timeout, sleep=pauses.append)(request), pauses


def test_the_request_has_all_fields_and_the_scores_are_read(serve):
    url, seen = serve(lambda body: (200, json.dumps({"scores": [len(c) for c in body["completions"]]})))
    answer, pauses = ask(url)
    assert answer.values == [3, 7]
    assert pauses == []
    ((path, headers, body),) = seen
    assert (path, headers["Content-Type"]) == ("/score", "application/json")
    assert {key: body[key] for key in ("prompts", "completions", "columns")} == {
        "prompts": ["p", "q"],
        "completions": ["one", "two two"],
        "columns": {"answer": [1, 2]},
    }


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_server_is_connected_to_and_sent_nothing_before_a_run(serve):
    url, seen = serve((500, "no"))
    Endpoint(url, timeout=10).check()
    assert not seen


def test_a_server_that_is_down_is_named_without_its_secrets():
    pauses, port = [], free_port()
    source = Endpoint(f"http://me:hunter2@127.0.0.1:{port}/s?token=blue-whale", timeout=10, sleep=pauses.append)
    with pytest.raises(RewardError, match="The run has not begun; start the server, or correct") as caught:
        source.check()
    message = str(caught.value)
    assert message.startswith("reward http://") and f"@127.0.0.1:{port}/s?token=" in message
    assert "cannot be reached: " in message and "refused" in message and "\n" not in message
    assert "hunter2" not in message and "blue-whale" not in message
    assert pauses == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/", f"http://{'a' * 70}.org/"])
def test_a_host_without_an_address_cannot_be_reached(url):
    with pytest.raises(RewardError, match="cannot be reached"):
        Endpoint(url, timeout=0.2).check()


def test_the_proxy_is_connected_to_where_there_is_one(serve, monkeypatch):
    url, _ = serve((200, ""))
    monkeypatch.setenv("http_proxy", url.removesuffix("/score"))
    monkeypatch.delenv("no_proxy", raising=False)
    Endpoint("http://no-such-host.invalid/", timeout=0.2).check()
    monkeypatch.setenv("no_proxy", "no-such-host.invalid")
    with pytest.raises(RewardError, match="cannot be reached"):
        Endpoint("http://no-such-host.invalid/", timeout=0.2).check()


def test_server_errors_are_retried_with_growing_pauses(serve):
    url, seen = serve((500, "no"), (None, ""), (429, ""), (200, '{"scores": [1, null]}'))
    answer, pauses = ask(url)
    assert answer.values == [1, None]
    assert len(seen) == 4
    assert pauses == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(("header", "pauses"), [("2", [2.0]), ("0", [0.25]), ("soon", [0.25]), ("11", [])])
def test_the_pause_is_what_the_server_asks_for_if_there_is_time(serve, header, pauses):
    url, seen = serve((429, "", {"Retry-After": header}), (200, '{"scores": [1, 2]}'))
    waited = []
    source = Endpoint(url, timeout=10, sleep=waited.append)
    if pauses:
        assert source(ASKED).values == [1, 2]
    else:
        with pytest.raises(RewardError, match="answered 429"):
            source(ASKED)
    assert waited == pauses


def test_a_date_to_retry_after_is_read(serve):
    date = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5), usegmt=True)
    url, _ = serve((503, "", {"Retry-After": date}), (200, '{"scores": [1, 2]}'))
    (pause,) = ask(url)[1]
    assert 3 < pause <= 5


def test_retries_are_limited(serve):
    url, seen = serve((503, "over\x1b[31mloaded"))
    with pytest.raises(
        RewardError, match=r"\(step 3\) answered 503 .*: 'over\\x1b.*loaded' \(4 attempts\); first comp"
    ):
        ask(url)
    assert len(seen) == http.ATTEMPTS == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "nothing here"), "answered 404 Not Found: 'nothing here'; first completion: 'one'"),
        ((302, ""), "answered 302 Found"),
        ((200, "<html>"), "answered with something other than JSON: b'<html>'"),
        ((200, "[" * 100_000), r"answered with something other than JSON: b'\[\["),
        ((200, "[1, 2]"), r'answered without "scores": \[1, 2\]; expected'),
        ((200, '{"score": [1, 2]}'), 'answered without "scores"'),
        ((200, '{"scores": [1]}'), "returned 1 value for 2 completions; first completion: 'one'"),
        ((200, '{"scores": 1}'), "returned a int for 2 completions; .*one number, or None, per completion$"),
    ],
)
def test_any_other_answer_is_an_error_at_once(serve, answer, message):
    url, seen = serve(answer)
    with pytest.raises(RewardError, match=message):
        ask(url)
    assert len(seen) == 1


def test_values_are_validated_like_those_of_a_function(serve):
    url, _ = serve((200, '{"scores": [NaN, "x"]}'))
    answer, _ = ask(url)
    assert answer.values == [None, None]
    assert answer.failed == [0, 1]
    assert "returned nan, not a finite float32, for completion 0: 'one'" in answer.problem


def test_scores_per_token(serve):
    url, seen = serve((200, '{"scores": [[1, 2], [3]]}'))
    answer, _ = ask(url, ASKED._replace(tokens=[["o", "ne"], ["two two"]]))
    assert answer.values == [[1, 2], [3]]
    assert seen[0].body["tokens"] == [["o", "ne"], ["two two"]]


def test_a_slow_answer_times_out(serve):
    url, _ = serve(lambda body: (time.sleep(3), (200, '{"scores": [1, 2]}'))[1])
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"did not answer 2 completions within 0.4 s|cannot be reached: timed out"):
        ask(url, timeout=0.4)
    assert time.monotonic() - started < 1.5


def test_a_refused_connection_is_an_error():
    with pytest.raises(RewardError, match=r"cannot be reached: .*refused \(4 attempts\)"):
        ask("http://127.0.0.1:9/score")


def test_an_answer_that_is_too_large_is_refused(serve, monkeypatch):
    monkeypatch.setattr(http, "LARGEST", 1 << 20)
    url, _ = serve((200, '{"scores": [' + " " * (1 << 20) + "1, 2]}"))
    with pytest.raises(RewardError, match="answered with more than 1 MiB"):
        ask(url)
