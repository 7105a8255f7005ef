"""The other end of a worker: the process in which a reward function runs. Lines of JSON come in, lines of JSON go out.

Imports neither jax nor numpy. Standard input and output become /dev/null and standard error for the function, so
whatever it reads or prints, the lines stay whole.
"""

import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from jaxrlhf.errors import ConfigError, JaxrlhfError, RewardError
from jaxrlhf.rewards.functions import load
from jaxrlhf.rewards.sources.answers import Request


def main(spec: str, options: dict[str, Any], parent: int) -> None:
    """Serve the function that `spec` names to the process `parent`, for as long as that lives.

    The first line that goes out is the function's signature; then comes an answer to every request, or an error.
    """
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)  # a segfault then says where it was
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(incoming, requests), daemon=True).start()
    _end_with(parent)

    def say(message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(outgoing, line) :]

    try:
        function = load(spec, options=options)
    except JaxrlhfError as error:
        say({"error": str(error), "in_config": isinstance(error, ConfigError)})
        os._exit(1)
    accepts, needs, everything = function.signature
    say({"accepts": sorted(accepts), "needs": sorted(needs), "everything": everything})
    while True:
        request = Request(**json.loads(requests.get()))
        try:
            say(function(request)._asdict())
        except RewardError as error:
            say({"error": str(error)})


def _listen(incoming: int, requests: "queue.SimpleQueue[bytes]") -> None:
    """Pass lines on until there can be no more: the parent has closed its end, or is gone."""
    with os.fdopen(incoming, "rb") as lines:
        for line in lines:
            requests.put(line)
    os.killpg(0, signal.SIGKILL)  # and whatever the function has started


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies: `_listen` cannot while C code keeps Python locked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # too late
        os._exit(1)
