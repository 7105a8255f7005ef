"""Main loop of a worker process: reads requests as JSON lines, calls code of the user, writes answers as JSON lines.

Imports neither jax nor numpy. For the code, standard input is /dev/null and standard output is standard error, so that
nothing it reads or prints corrupts the protocol.
"""

import ctypes
import faulthandler
import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import ConfigError, JaxrlhfError, RewardError

Message = dict[str, Any]


def serve(start: Callable[[], tuple[Message, Callable[[Message], Message]]], parent: int) -> None:
    """Serve the process `parent` until it ends. `start()` returns the first message and the function that answers a
    request; a RewardError of that function is the answer."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)  # a segfault prints a traceback
    _watch(incoming)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(incoming, requests), daemon=True).start()
    _die_with(parent)

    def send(message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(outgoing, line) :]

    try:
        first, answer = start()
    except JaxrlhfError as error:
        send({"error": str(error), "in_config": isinstance(error, ConfigError)})
        os._exit(1)
    send(first)
    while True:
        request = json.loads(requests.get())
        try:
            send(answer(request))
        except RewardError as error:
            send({"error": str(error)})


def _watch(incoming: int) -> None:
    """Start a process that kills this one's group when the parent closes the pipe or ends, also if this one has ended
    before or is in C code."""
    if os.fork():
        return
    try:
        os.dup2(incoming, 0)
        os.closerange(1, 256)
        pipe = select.poll()
        pipe.register(0, 0)  # only its end is reported
        pipe.poll()
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(1)


def _receive(incoming: int, requests: "queue.SimpleQueue[bytes]") -> None:
    """Queue incoming lines until the parent closes the pipe."""
    with os.fdopen(incoming, "rb") as lines:
        for line in lines:
            requests.put(line)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: `_receive` cannot while C code holds the GIL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent has died already
        os._exit(1)
