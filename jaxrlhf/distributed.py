"""Several processes that train one model: their start, and what they tell each other besides arrays on a mesh.

jax does the rest: each process runs the same program on its own devices, and one mesh spans all of them. Every process
reads the same data and config and takes the same decisions in the same order. What only one process can know (the run
directory, the date, a signal, the score of a row) is told to the others by the functions here. Each of them is a
collective: all processes call it, in the same order. With one process they do nothing.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf import errors, stopping
from jaxrlhf.errors import ConfigError, Interrupted, JaxrlhfError, PeerLost, first_line, quoted, visible

T = TypeVar("T")
START_TIMEOUT = 120
"""Seconds for all processes to connect."""
HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which a process counts as dead, and the others end."""
WAIT = 1.0
"""Seconds between two looks at whether another process has failed."""
_waits = itertools.count()  # the same in all processes
_ending = threading.Event()
_asked: "Request | None" = None  # of the `stoppable` block
_FAILED = "jaxrlhf/failed"  # key under which a process that ends with an error says so


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = START_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Connect this process with the others, before jax uses a device.

    Arguments are those of `jax.distributed.initialize`; what is None is found out from SLURM, Open MPI, Kubernetes or a
    TPU slice. On CPUs collectives go over gloo. Ends the process with a message, as jax would end it with a trace, if
    the others have not connected in `start_timeout` seconds. An exception that nothing catches ends all processes.

    Raises ConfigError if the arguments are incomplete and no cluster is found, or if they contradict each other.
    """
    given = {"--coordinator-address": coordinator_address, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ConfigError(
            f"{' and '.join(missing)} is missing: give all three of {', '.join(given)}, or none of them in a job of "
            "SLURM, Open MPI, Kubernetes or on a TPU slice, where jax finds them"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id is {process_id}; with --num-processes {num_processes} it is from 0 to {num_processes - 1}"
        )
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdecimal():
        raise ConfigError(f"--coordinator-address is {coordinator_address!r}; expected HOST:PORT")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # One program at a time, so that processes exchange data in the same order
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # the run handles signals itself (see `Request`)
    late = threading.Timer(start_timeout, _give_up, (coordinator_address, num_processes, process_id, start_timeout))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=int(start_timeout) + 60,  # `late` comes first
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:  # "coordinator_address should be defined."
        raise ConfigError(
            f"--distributed: jax finds no cluster here ({first_line(error)}). In a job of SLURM (srun), Open MPI, "
            "Kubernetes or on a TPU slice it needs no more; elsewhere give --coordinator-address HOST:PORT, "
            "--num-processes N and --process-id I to each process, or try `jaxrlhf launch` on this machine"
        ) from error
    finally:
        late.cancel()
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()

    report = sys.excepthook

    def end_all(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        report(kind, error, trace)
        end(error, getattr(error, "exit_code", 1))

    sys.excepthook = end_all  # of a program that calls this; commands end by themselves

    @atexit.register
    def finish() -> None:
        jax.distributed.shutdown()  # waits for the other processes
        watch.join()  # a thread that is inside jax when Python ends aborts the process


JOBS = {  # a variable that jax finds the job by, and that of its number of processes
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
}


def job() -> tuple[str, int] | None:
    """The kind of job that started this process and its number of processes, which `start` finds by itself; None
    outside SLURM and Open MPI."""
    for kind, (sign, number) in JOBS.items():
        if sign in os.environ and os.environ.get(number, "").isdecimal():
            return kind, int(os.environ[number])
    return None


def is_started() -> bool:
    """Return True after `start`, or `jax.distributed.initialize`, in this process."""
    return jax.distributed.is_initialized()


def count() -> int:
    """Number of processes."""
    return jax.process_count() if is_started() else 1


def index() -> int:
    """Number of this process, from 0."""
    return jax.process_index() if is_started() else 0


def is_primary() -> bool:
    """Return True in process 0, which alone writes the run directory and the console."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The `value` of every process, which must be JSON, by process number. Floats arrive bit for bit."""
    if count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).tolist()
    width = 1 << max(max(sizes) - 1, 63).bit_length()  # few widths, as each compiles a program
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
    return [json.loads(rows[i, :size].tobytes()) for i, size in enumerate(sizes)]


def shared(function: Callable[[], T]) -> list[T]:
    """The result of `function()`, which must be JSON, in every process. A JaxrlhfError that it raises in one process is
    raised in all of them."""
    if count() == 1:
        return [function()]
    value, error = None, None
    try:
        value = function()
    except JaxrlhfError as raised:
        error = raised
    results = gather([value, error and [type(error).__name__, str(error)]])
    for number, (_, failure) in enumerate(results):
        if failure:
            raised = error or getattr(errors, failure[0])(f"process {number}: {failure[1]}" if number else failure[1])
            raised.in_all_processes = True
            raise raised
    return [result for result, _ in results]


def wait_together(wait: Callable[[float | None], object]) -> None:
    """Call `wait(seconds)`, which raises TimeoutError when they are over, until it returns. A collective.

    What it waits for may itself wait for other processes. So if it raises another exception in one of them, the others
    raise StorageError with its number and reason.
    """
    if count() == 1:
        wait(None)
        return
    key = f"jaxrlhf/wait/{next(_waits)}"
    while True:
        started = time.monotonic()
        try:
            wait(WAIT)
            return
        except Exception as error:
            # a TimeoutError of the operation, not of this wait, comes early
            if not isinstance(error, TimeoutError) or time.monotonic() - started < WAIT / 2:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                    _client().key_value_set(key, json.dumps([index(), first_line(error)]))
                raise
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key
            number, reason = json.loads(_client().key_value_try_get(key))
            raise errors.StorageError(f"process {number}: {reason}")


def on_primary(function: Callable[[], T]) -> T:
    """The result of `function()`, which must be JSON and is called by process 0 alone, in every process. So is a
    JaxrlhfError that it raises."""
    results: list[Any] = shared(function if is_primary() else lambda: None)
    return results[0]


def require_agreement(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError, in every process, if the JSON `facts` of the processes differ; it names the first differences.
    `what` are they, for the message."""
    if count() == 1:
        return
    first, *others = gather(dict(facts))
    lines = []
    for number, other in enumerate(others, 1):
        different = [key for key in first | other if first.get(key) != other.get(key)]
        for key in different[:5]:
            mine, theirs = (quoted(each.get(key, "(not set)"), 120) for each in (first, other))
            lines.append(f"  {key}: {mine} in process 0, {theirs} in process {number}")
        lines += [f"  and {len(different) - 5} more in process {number}"] if len(different) > 5 else []
    if lines:
        error = ConfigError(
            f"the processes of this run do not have the same {what}:\n" + "\n".join(lines) + "\nStart all of them with "
            "the same command, files and installation"
        )
        error.in_all_processes = True
        raise error


def require_same_code() -> None:
    """Raise ConfigError, in every process, if they do not run the same source of this package, jax and Python."""
    if count() == 1:
        return
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    code = {"source of jaxrlhf (sha256)": digest.hexdigest()[:16], "jax": jax.__version__}
    require_agreement("code", code | {"python": ".".join(map(str, sys.version_info[:3]))})


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Block that a request to stop in any process ends, by Interrupted in all of them, wherever `check_stop` is called
    in it. `stopping.check` sees those of this process; with several it may be called in `shared` alone."""
    global _asked
    outer, _asked = _asked, Request()
    try:
        with stopping.armed():
            check_stop()
            yield
    finally:
        _asked = outer


def check_stop() -> None:
    """Raise Interrupted after a request to stop, in a `stoppable` block. With several processes it is a collective, and
    sees the requests that were made before the last call in the block."""
    if count() == 1:
        stopping.check()
    elif _asked is not None and _asked.seen(stopping.requested()):
        raise Interrupted


class Request:
    """A request that any process may make, such as to stop after a signal, and that all of them see at the same call of
    `seen`.

    With several processes `seen` answers for the call before it, because the exchange is left to the devices in the
    meantime: nobody waits for it.
    """

    def __init__(self) -> None:
        self._pending: Any = None

    def seen(self, made: bool) -> bool:
        """Return True if any process had `made` the request."""
        if count() == 1:
            return made
        before, self._pending = self._pending, _any(made)
        return before is not None and bool(before.addressable_data(0))


def end(error: BaseException, code: int) -> NoReturn:
    """End this process, after an error that it has reported, and the others with it: they would wait for it."""
    _ending.set()
    with contextlib.suppress(Exception):  # another process was first
        _client().key_value_set(_FAILED, json.dumps([index(), code, first_line(error)]))
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit when the others have read why: they lose their connections to this process, the coordinator above all."""
    time.sleep(2 if is_primary() else 1)
    os._exit(code)


def lost_peer(error: BaseException) -> PeerLost | None:
    """The error to show for that of a collective whose partner is gone; None for any other error."""
    if not is_started() or count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if not any(word in str(error) for word in _SIGNS_OF_LOSS):
        return None
    return PeerLost(
        f"another process of this run is gone ({first_line(error)}): see its output. The same command in all processes "
        "resumes from the last checkpoint"
    )


_SIGNS_OF_LOSS = ("Gloo", "gloo", "NCCL", "heartbeat", "UNAVAILABLE", "Connection reset", "Connection closed")


def _any(made: bool) -> jax.Array:
    """bool [], True if any process `made` it: on the devices, where it may not have been computed yet."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    made_here = jax.make_array_from_callback((mesh.size,), rows, lambda _: np.array([made]))
    return _reduce_any(made_here)


@jax.jit
def _reduce_any(x: jax.Array) -> jax.Array:
    return x.any()


def _give_up(address: str | None, processes: int | None, number: int | None, seconds: float) -> None:
    where, name = address or "the coordinator", "this process" if number is None else f"process {number}"
    expected = "all" if processes is None else f"all {processes}"
    print(
        f"jaxrlhf: error: {name}: not {expected} processes have connected to {where} in {seconds:g} s. Check that each "
        "of them was started, with its own --process-id and the same --num-processes and --coordinator-address; that "
        "the address is one of process 0's host which the others can reach (not localhost between hosts); and that no "
        "firewall, proxy or other program holds the port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PeerLost.exit_code)


def _watch() -> None:
    """End this process when another one says that it has failed, or when the coordinator is gone."""
    try:
        while True:
            try:
                number, code, reason = json.loads(_client().blocking_key_value_get(_FAILED, 24 * 3600 * 1000))
                break
            except jax.errors.JaxRuntimeError as error:
                if "CANCELLED" in str(error):  # the run has ended
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    number, code, reason = 0, PeerLost.exit_code, "it is gone"
                    break
    except AttributeError:  # the client was closed
        return
    if not _ending.is_set():
        text = f"jaxrlhf: process {index()} ends because process {number} has: {visible(reason)}"
        print(text, file=sys.stderr, flush=True)
        _leave(code)


def _client() -> Any:
    from jax._src import distributed  # jax has no public door to the store of its coordinator

    return distributed.global_state.client
