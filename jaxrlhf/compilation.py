"""XLA programs: compiled in the background before they are called, and a line for each that took long to get ready.

A jitted function that was lowered and compiled for some shapes, in whatever thread, finds its executable in jax's own
caches when it is called with them. So nothing is handed over, and a call with other shapes compiles as it always did.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

SLOW = 0.5
"""Seconds of tracing, lowering and compiling from which on a program is worth a line."""

_pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="compile")  # no threads before the first use


class Ahead:
    """Jitted functions that are being compiled before their first call.

    `compile` returns at once. `wait` belongs before the first call: one that came too early would compile all over.
    """

    def __init__(self) -> None:
        self._pending: dict[Any, list[Future[Any]]] = {}

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin to compile `program` for these arguments; arrays may be ShapeDtypeStructs with their shardings.

        Returns what will be its `outputs`.
        """
        return self.begin(lambda: compile_shapes(program, *args, **kwargs), program)

    def begin(self, work: Callable[[], Any], program: Any) -> Future[Any]:
        """Begin `work`, which gets `program` ready. It may wait for the result of work that was begun before it: that
        of `outputs`, for a program that takes what another one returns."""
        begun = _pool.submit(work)  # first in, first out: what was begun before is under way, even with one thread
        self._pending.setdefault(program, []).append(begun)
        return begun

    def wait(self, program: Any) -> None:
        """Until everything begun for `program` is ready. An error is left for the call itself to raise again."""
        for begun in self._pending.pop(program, ()):
            begun.exception()

    def finish(self) -> None:
        """Until everything begun is ready; raises what went wrong."""
        while self._pending:
            for begun in self._pending.popitem()[1]:
                begun.result()


def compile_shapes(program: Any, *args: Any, **kwargs: Any) -> Any:
    """Compile a jitted function for these arguments; returns the shapes of what it will return, each with its place."""
    traced = program.trace(*args, **kwargs)
    lowered = traced.lower()
    compiled = lowered.compile()
    made = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        lowered.out_info,
        compiled.output_shardings,
    )
    for watcher in _watchers:
        watcher(Compiled(program, traced.jaxpr, compiled.memory_analysis(), made))
    return made


class Compiled(NamedTuple):
    """What is known of a program before it has run."""

    program: Any  # the jitted function
    jaxpr: Any
    memory: Any  # jax's CompiledMemoryStats: bytes on one device
    outputs: Any  # shapes, each with its place


_watchers: list[Callable[[Compiled], None]] = []


@contextlib.contextmanager
def watched(watcher: Callable[[Compiled], None]) -> Iterator[None]:
    """While the block runs, `watcher` hears of every program that is compiled ahead, in the thread that does it."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


_listeners: list[Callable[[str], None]] = []
_thread = threading.local()  # what jax said of the program that this thread is getting ready


@contextlib.contextmanager
def announce(say: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, `say` a line about every program that takes SLOW seconds or more, in the thread that
    compiles it. An inner block takes over from the outer one."""
    if not _listeners:
        jax.monitoring.register_event_listener(_event)
        jax.monitoring.register_event_duration_secs_listener(_duration)
    _listeners.append(say)
    try:
        yield
    finally:
        _listeners.pop()
        if not _listeners:
            jax.monitoring.unregister_event_listener(_event)
            jax.monitoring.unregister_event_duration_listener(_duration)


def _event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.cached = True


def _duration(event: str, duration_secs: float, **about: str | int) -> None:
    """Of each program jax reports tracing (functions inside it first, it last and in all), lowering, compiling."""
    name, state = str(about.get("fun_name", "")), _thread.__dict__
    if event == "/jax/core/compile/jaxpr_trace_duration":
        state.setdefault("traced", {})[f"jit({name})"] = duration_secs
    elif event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        state["lowered"] = duration_secs
    elif event == "/jax/core/compile/backend_compile_duration":
        before = state.get("traced", {}).get(name, 0.0) + state.get("lowered", 0.0)
        cached = state.get("cached", False)
        state.clear()
        if before + duration_secs >= SLOW and _listeners:
            verb, origin = ("loaded", " from the cache") if cached else ("compiled", "")
            _listeners[-1](f"{verb} {name}{origin} in {duration_secs:.1f} s, after {before:.1f} s of tracing")
