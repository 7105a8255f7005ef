"""A small HTTP server whose answers a test gives."""

import contextlib
import http.server
import json
import threading
from typing import Any, NamedTuple


class Seen(NamedTuple):
    path: str
    headers: Any
    body: Any


@contextlib.contextmanager
def serving():
    """A function that starts a server with given answers: (status, body[, headers]) or a function of the request; the
    last goes on for ever, and a status of None hangs up. It returns its URL and the list of requests seen."""
    servers = []

    def start(*answers):
        seen: list[Seen] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append(Seen(self.path, self.headers, json.loads(body)))
                answer = answers[min(len(seen), len(answers)) - 1]
                status, text, *headers = answer(seen[-1].body) if callable(answer) else answer
                if status is None:
                    return
                self.send_response(status)
                for name, value in ({"Location": "/elsewhere"} if status == 302 else dict(*headers)).items():
                    self.send_header(name, value)
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

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
