"""Reward functions in a process of their own, which can be killed: one that hangs or crashes does not take the run with
it. The two sides speak JSON lines over pipes, never pickle."""

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
from collections.abc import Mapping, Sequence
from typing import IO, Any

from jaxrlhf.errors import ConfigError, RewardError, first_line
from jaxrlhf.metrics.console import visible
from jaxrlhf.rewards.functions import Signature
from jaxrlhf.rewards.sources.answers import Answer, Request

LOADING = 300.0  # seconds a function's file may take to import what it needs
LAST_LINES = 8  # of what a crashed function printed, for the message
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxrlhf.rewards.sources.serve import main; "
    "main(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))"
)


class Worker:
    """The function that `spec` names, in its own process. Raises RewardError or ConfigError if it cannot be loaded.

    The process sees no accelerator, and ends with this one, however that ends. After a call that took longer than
    `timeout` seconds it is killed, with everything it has started; the next call starts another.
    """

    def __init__(self, spec: str, *, options: Mapping[str, Any] | None = None, timeout: float) -> None:
        self.name, self._timeout = spec, timeout
        try:
            self._options = json.dumps(dict(options or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {spec}: its options are not plain values: {error}") from error
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        _kill(self._process)

    def __call__(self, request: Request) -> Answer:
        """Raises RewardError if there is no answer, with what happened instead."""
        where = request.about(self.name)
        if self._process.poll() is not None:
            self._process = self._start()
        self.signature.check(request.columns, where, per_token=request.tokens is not None)
        wanted = {name: values for name, values in request.columns.items() if self.signature.wants(name)}
        line = json_line(request._replace(columns=wanted), where)
        try:
            reply = self._exchange(line, self._timeout)
        except TimeoutError:
            raise RewardError(
                f"{where} did not answer {len(request.completions)} completions within {self._timeout:g} s and was "
                f"killed; raise timeout of its component in reward.components, or make it faster{request.first}"
            ) from None
        except EOFError:
            raise RewardError(f"{where} {self._death()}{request.first}") from None
        if "error" in reply:
            raise RewardError(reply["error"])
        return Answer(**reply)

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [json.dumps(sys.path), self.name, self._options, str(os.getpid())]
        hidden = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=os.environ | hidden,
            start_new_session=True,  # a group of its own, to be killed as one, and out of reach of Ctrl-C
        )
        weakref.finalize(self, _kill, self._process)
        self._said: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        assert self._process.stdin and self._process.stderr
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listener = threading.Thread(target=_repeat, args=(self._process.stderr, self._said), daemon=True)
        self._listener.start()
        try:
            hello = self._exchange(b"", LOADING)
        except TimeoutError:
            raise RewardError(
                f"reward function '{self.name}': loading it took longer than {LOADING:g} s; look at what its file "
                "does when it is imported"
            ) from None
        except EOFError:
            raise RewardError(f"reward function '{self.name}': loading it {self._death()}") from None
        if "error" in hello:
            _kill(self._process)
            raise (ConfigError if hello["in_config"] else RewardError)(hello["error"])
        self.signature = Signature(**hello)
        return self._process

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and read one. Raises TimeoutError, and EOFError where the process ended; it is gone after both,
        and after anything else that interrupts the talk."""
        try:
            return json.loads(_talk(self._process, line, time.monotonic() + seconds))
        except BaseException as error:
            _kill(self._process)
            if isinstance(error, ValueError):  # something else wrote to the pipe
                raise EOFError from error
            raise

    def _death(self) -> str:
        """How the process ended, and what it said last."""
        code = self._process.wait()
        self._listener.join(1)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended its process with exit code {code}"
        said = " | ".join(visible(line) for line in self._said if line.strip())
        return f"{how}{'. It said last: ' + said if said else ''}"


def json_line(request: Request, where: str) -> bytes:
    """A request as a line of JSON. Raises RewardError for a column that JSON cannot carry."""
    try:
        return json.dumps(request._asdict(), default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        found = error
    for name, values in request.columns.items():
        for i, value in enumerate(values):
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError, RecursionError) as error:
                raise RewardError(
                    f"{where} is to get column '{name}', whose value {i} cannot be written as JSON "
                    f"({first_line(error)}); let the function name the columns that it needs instead of taking all, "
                    "or drop the column from the data"
                ) from error
    raise found


def _plain(value: Any) -> Any:
    """Arrays and their scalars as plain values, other sequences as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"a {type(value).__name__}")


def _talk(process: "subprocess.Popen[bytes]", unsent: bytes, deadline: float) -> bytes:
    """Neither side waits for the other to read: sending and receiving go on together until a line has come."""
    assert process.stdin and process.stdout
    received = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if unsent:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = selector.select(min(left, 0.2))
            if not ready and process.poll() is not None:  # a child of its own may still hold the pipe
                raise EOFError
            for key, _ in ready:
                if key.fileobj is process.stdout:
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    if not part:
                        raise EOFError
                    received += part
                    continue
                try:
                    unsent = unsent[os.write(process.stdin.fileno(), unsent[: 1 << 16]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:  # it has gone; reading will say so
                    unsent = b""
                if not unsent:
                    selector.unregister(process.stdin)
    return bytes(received)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process with its group, at once."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _repeat(stream: IO[bytes], said: "collections.deque[str]") -> None:
    """What the function prints goes to our standard error, and the last lines of it are kept."""
    with stream:
        for line in stream:
            text = line.decode("utf-8", "backslashreplace")
            said.append(text.rstrip("\n"))
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()
