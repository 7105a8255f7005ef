"""`jaxrlhf launch`: a run on several processes of this machine, to try what several hosts would do."""

import argparse
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.cli.arguments import count
from jaxrlhf.cli.models import Options, Overrides
from jaxrlhf.config.file import METHODS, method_of
from jaxrlhf.errors import ConfigError, Preempted

GRACE = 60.0
"""Seconds for the other processes to end by themselves once one has failed: more than `distributed.HEARTBEAT_TIMEOUT`,
after which jax ends them."""
_NOISE = b"connected peer ranks"  # in lines, or pieces of them, that gloo prints for every connection

HELP = "run a training command in several processes of this machine, on CPU, as a trial of a run on several hosts"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--procs": {"type": count, "default": 2, "metavar": "N", "help": "number of processes (default: 2)"},
    "--devices-per-process": {
        "type": count,
        "metavar": "D",
        "help": "simulate so many CPU devices in each process (default: one, or as XLA_FLAGS says)",
    },
    "command": {
        "nargs": argparse.REMAINDER,
        "metavar": "COMMAND ...",
        "help": "a training command with its arguments (`ppo CONFIG.yaml ...`), or a config file",
    },
}


def launch(options: Options, overrides: Overrides) -> int:
    """Run the command in all processes; returns the exit code of the first that fails, 0 if none does."""
    command = list(options.command)
    if command and command[0] not in METHODS and Path(command[0]).is_file():
        try:
            command.insert(0, method_of(Path(command[0])))
        except ConfigError as error:
            raise ConfigError(f"{str(error).rpartition('; ')[0]}; name it: launch COMMAND {command[0]}") from None
    if not command or command[0] not in METHODS:
        shown = f", not '{command[0]}'" if command else ""
        raise ConfigError(f"launch takes a training command or a config file ({', '.join(METHODS)}){shown}")
    if clash := [argument for argument in command if argument.startswith(("--distributed", "--process-id"))]:
        raise ConfigError(f"launch itself gives {clash[0]} to the processes; leave it out")
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONUNBUFFERED": "1"}
    if devices := options.devices_per_process:
        flags = [flag for flag in environment.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        environment["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    address = f"127.0.0.1:{_free_port()}"
    shared = ["--distributed", "--coordinator-address", address, "--num-processes", str(options.procs)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxrlhf", *command, *shared, "--process-id", str(number)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C comes to them once, from here
        )
        for number in range(options.procs)
    ]
    return _supervise(processes)


def _supervise(processes: list[subprocess.Popen[bytes]]) -> int:
    """Print the output of the processes and pass signals on until all have ended; their exit code."""

    def forward(number: int, _frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    selector, rest = selectors.DefaultSelector(), [b""] * len(processes)
    for number, process in enumerate(processes):
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        selector.register(process.stdout, selectors.EVENT_READ, number)
    failure, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes) or selector.get_map():
        for key, _ in selector.select(timeout=0.2) if selector.get_map() else ():
            stream: Any = key.fileobj
            data = stream.read() or b""
            *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
            if not data:  # the process has closed it
                selector.unregister(stream)
                lines += [rest[key.data]] if rest[key.data] else []
            _show(key.data, lines)
        for number, process in enumerate(processes):
            if not failure and process.poll():
                failure, deadline = process.returncode, time.monotonic() + GRACE
                if failure != Preempted.exit_code:
                    _say(f"process {number} {_ending(failure)}; the others end, too")
        if time.monotonic() > deadline:
            deadline = float("inf")
            for number, process in enumerate(processes):
                if process.poll() is None:
                    _say(f"process {number} did not end within {GRACE:g} s and is killed")
                    process.kill()
        if not selector.get_map():
            time.sleep(0.05)
    return 128 - failure if failure < 0 else failure


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by signal {-code} ({signal.Signals(-code).name}); its state since the last checkpoint is lost"


def _show(number: int, lines: Sequence[bytes]) -> None:
    for line in lines:
        if _NOISE not in line:
            sys.stdout.buffer.write(b"[%d] %s\n" % (number, line))
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"jaxrlhf launch: {text}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
