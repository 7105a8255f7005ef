"""Code of others in a worker process, so that what hangs or crashes does not take the run with it.

The two processes exchange JSON lines over pipes, never pickles; serve.py is the main loop of the worker.
"""

import codecs
import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import IO, Any

from jaxrlhf import stopping
from jaxrlhf.errors import ConfigError, RewardError, visible

LOAD_TIMEOUT = 300.0  # seconds in which the module must be imported
LAST_LINES = 8  # lines of a crashed process's output that the error message shows
LINE_END = 500  # characters of each of them, from its end
BLOCK = 1 << 16  # bytes read or written at a time
_OPTIONS = "JAXRLHF_WORKER_OPTIONS"  # a variable, as every user of the machine can read the arguments of a process
_PROGRAM = (
    "import importlib, json, os, sys; sys.path[:] = json.loads(sys.argv[1]); "
    f"options = json.loads(os.environ.pop({_OPTIONS!r})); "
    "importlib.import_module(sys.argv[2]).main(sys.argv[3], options, int(sys.argv[4]))"
)


class WorkerProcess:
    """A process that runs `main` of the module `serve` with what `spec` names; `subject` is its name in errors.

    It sees no accelerator, and ends when this one ends, however that happens, with all processes that it has started
    (but for those that have left its process group). A request that takes too long kills it. Raises RewardError or
    ConfigError if what `spec` names cannot be loaded.
    """

    def __init__(self, serve: str, spec: str, subject: str, options: Mapping[str, Any]) -> None:
        self._serve, self._spec, self._subject = serve, spec, subject
        try:
            self._options = json.dumps(dict(options))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{subject}: its options cannot be written as JSON: {error}") from error
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        _kill(self._process)

    def start(self) -> None:
        """Start the process, again if it has ended, and wait until it has loaded: then `first` is what it sent."""
        if "_process" in vars(self):
            _kill(self._process)  # what it has started may be left
        arguments = [json.dumps(sys.path), self._serve, self._spec, str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", _PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", _OPTIONS: self._options},
            start_new_session=True,  # a process group that can be killed as one and does not get Ctrl-C
        )
        weakref.finalize(self, _kill, self._process)
        self._last_output: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        assert self._process.stdin and self._process.stderr
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listener = threading.Thread(
            target=_forward_output, args=(self._process.stderr, self._last_output), daemon=True
        )
        self._listener.start()
        try:
            reply = self.exchange(b"", LOAD_TIMEOUT)
        except TimeoutError:
            raise RewardError(
                f"{self._subject}: loading it took longer than {LOAD_TIMEOUT:g} s; check what its file does on import"
            ) from None
        except EOFError:
            raise RewardError(f"{self._subject}: loading it {self.exit_reason()}") from None
        if "error" in reply:
            _kill(self._process)
            raise (ConfigError if reply["in_config"] else RewardError)(reply["error"])
        self.first = reply

    def exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and read one. Raises TimeoutError, or EOFError if the process has ended; any error kills it."""
        try:
            return json.loads(_send_and_receive(self._process, line, time.monotonic() + seconds))
        except BaseException as error:
            _kill(self._process)
            if self._process.returncode == -signal.SIGTERM:  # meant for the whole run, it may be here a moment later
                stopping.wait(lambda seconds: bool(time.sleep(seconds)), 1.0)
            if isinstance(error, ValueError):  # something else wrote to the pipe
                raise EOFError from error
            raise

    def exit_reason(self) -> str:
        """The exit code or signal of the process, with its last output. Waits for its end."""
        code = self._process.wait()
        self._listener.join(1)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended its process with exit code {code}"
        output = " | ".join(visible(line) for line in self._last_output if line.strip())
        return f"{how}{'. Its last output: ' + output if output else ''}"


def _send_and_receive(process: "subprocess.Popen[bytes]", unsent: bytes, deadline: float) -> bytes:
    """Send while receiving, so that neither side blocks on a full pipe, until a whole line has arrived."""
    assert process.stdin and process.stdout
    received = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if unsent:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while not received.endswith(b"\n"):
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise TimeoutError
            stopping.check()
            ready = selector.select(min(seconds_left, stopping.POLL))
            if not ready and process.poll() is not None:  # one of its children may still hold the pipe
                raise EOFError
            for key, _ in ready:
                if key.fileobj is process.stdout:
                    chunk = os.read(process.stdout.fileno(), BLOCK)
                    if not chunk:
                        raise EOFError
                    received += chunk
                    continue
                try:
                    unsent = unsent[os.write(process.stdin.fileno(), unsent[:BLOCK]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:  # the process has ended; the read will raise EOFError
                    unsent = b""
                if not unsent:
                    selector.unregister(process.stdin)
    return bytes(received)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its group, once. The group is there even if the process has ended: serve.py's watcher is in
    it until this pipe is closed."""
    assert process.stdin and process.stdout
    if process.stdin.closed:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _forward_output(stream: IO[bytes], last_lines: "collections.deque[str]") -> None:
    """Copy what the process prints to standard error, and keep the end of the last lines. Reads in blocks: line by line
    it would keep the process waiting."""
    decoder, begun = codecs.getincrementaldecoder("utf-8")("backslashreplace"), ""
    with stream:
        while block := os.read(stream.fileno(), BLOCK):
            text = decoder.decode(block).replace("\r\n", "\n")
            *lines, begun = (begun + text).split("\n")
            last_lines.extend(line[-LINE_END:] for line in lines[-LAST_LINES:])
            begun = begun[-LINE_END:]
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(visible(text))
                sys.stderr.flush()
        last_lines.append(begun)
