"""Scores from a server: what it is sent, what it may answer, and how often it is asked."""

import http.server
import json
import threading
import time

import pytest

from jaxrlhf.errors import RewardError
from jaxrlhf.rewards.sources import endpoint
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.protocol import ScoreRequest

ASKED = ScoreRequest(["p", "q"], ["one", "two two"], {"answer": [1, 2]}, step=3)


@pytest.fixture
def serve():
    """A server whose answers are given: (status, body) or a function of the request; the last goes on for ever."""
    servers = []

    def start(*answers):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((self.path, self.headers["Content-Type"], json.loads(body)))
                answer = answers[min(len(seen), len(answers)) - 1]
                status, text = answer(seen[-1][2]) if callable(answer) else answer
                if status is None:  # hang up
                    return
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that was too impatient
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url, request=ASKED, timeout=10.0):
    pauses = []
    return Endpoint(url, timeout=timeout, sleep=pauses.append)(request), pauses


def test_the_request_has_all_fields_and_the_scores_are_read(serve):
    url, seen = serve(lambda body: (200, json.dumps({"scores": [len(c) for c in body["completions"]]})))
    answer, pauses = ask(url)
    assert answer.values == [3, 7]
    assert pauses == []
    ((path, kind, body),) = seen
    assert (path, kind) == ("/score", "application/json")
    assert {key: body[key] for key in ("prompts", "completions", "columns")} == {
        "prompts": ["p", "q"],
        "completions": ["one", "two two"],
        "columns": {"answer": [1, 2]},
    }


def test_server_errors_are_retried_with_growing_pauses(serve):
    url, seen = serve((500, "no"), (None, ""), (429, ""), (200, '{"scores": [1, null]}'))
    answer, pauses = ask(url)
    assert answer.values == [1, None]
    assert len(seen) == 4
    assert pauses == [0.25, 0.5, 1.0]


def test_retries_are_limited(serve):
    url, seen = serve((503, "over\x1b[31mloaded"))
    with pytest.raises(
        RewardError, match=r"\(step 3\) answered 503 .*: 'over\\x1b.*loaded' \(4 attempts\); first comp"
    ):
        ask(url)
    assert len(seen) == endpoint.ATTEMPTS == 4


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
    assert seen[0][2]["tokens"] == [["o", "ne"], ["two two"]]


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
    monkeypatch.setattr(endpoint, "LARGEST", 1 << 20)
    url, _ = serve((200, '{"scores": [' + " " * (1 << 20) + "1, 2]}"))
    with pytest.raises(RewardError, match="answered with more than 1 MiB"):
        ask(url)
