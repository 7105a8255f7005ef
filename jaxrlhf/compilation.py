"""XLA programs compiled without running them, and progress lines about programs that take long to compile.

A jitted function compiled for the shapes of its arguments is found in jax's caches when it is called with them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax

from jaxrlhf.sharding import with_shardings

T = TypeVar("T")
SLOW = 0.5
"""Seconds of tracing, lowering and compiling after which a program is announced."""


class Compiled(NamedTuple):
    """A program compiled for abstract arguments."""

    name: str
    jaxpr: Any
    memory: Any
    """jax's CompiledMemoryStats: bytes on one device."""
    outputs: Any
    """Shapes and shardings of its results."""
    executable: Any
    """jax.stages.Compiled; None for a program that was only traced."""


def compile_shapes(program: Any, *args: Any, **kwargs: Any) -> Compiled:
    """Compile a jitted function for these arguments; arrays may be ShapeDtypeStructs with their shardings."""
    traced = program.trace(*args, **kwargs)
    lowered = traced.lower()
    compiled = lowered.compile()
    outputs = with_shardings(lowered.out_info, compiled.output_shardings)
    return Compiled(program.__name__.lstrip("_"), traced.jaxpr, compiled.memory_analysis(), outputs, compiled)


_listeners: list[Callable[[str], None]] = []
_timers: list[Callable[[float], None]] = []
_thread = threading.local()  # events of the program that this thread is compiling


@contextlib.contextmanager
def announce(note: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, `note` a line about every program that takes SLOW seconds or more, in the thread that
    compiles it. An inner block replaces the outer one."""
    with _listening(_listeners, note):
        yield


@contextlib.contextmanager
def timed(add: Callable[[float], None]) -> Iterator[None]:
    """While the block runs, call `add` with the seconds of tracing, lowering and compiling of every program, in the
    thread that compiles it, when they have passed. An inner block replaces the outer one."""
    with _listening(_timers, add):
        yield


@contextlib.contextmanager
def _listening(listeners: list[T], listener: T) -> Iterator[None]:
    if not _listeners and not _timers:
        jax.monitoring.register_event_listener(_event)
        jax.monitoring.register_event_duration_secs_listener(_duration)
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.pop()
        if not _listeners and not _timers:
            jax.monitoring.unregister_event_listener(_event)
            jax.monitoring.unregister_event_duration_listener(_duration)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keep the lines of the block until its end, and give them to the enclosing `announce` then: for a block that
    prints a line bit by bit."""
    if not _listeners:
        yield
        return
    lines: list[str] = []
    try:
        with announce(lines.append):
            yield
    finally:
        for line in lines:
            _listeners[-1](line)


def _event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.cached = True


def _duration(event: str, duration_secs: float, **about: str | int) -> None:
    """jax reports tracing (inner functions first, the program last with the total), lowering and compiling."""
    name, state = str(about.get("fun_name", "")), _thread.__dict__
    if event == "/jax/core/compile/jaxpr_trace_duration":
        state.setdefault("traced", {})[f"jit({name})"] = duration_secs
    elif event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        state["lowered"] = duration_secs
    elif event == "/jax/core/compile/backend_compile_duration":
        before = state.get("traced", {}).get(name, 0.0) + state.get("lowered", 0.0)
        cached = state.get("cached", False)
        state.clear()
        for timer in _timers[-1:]:  # a copy: another thread may end the block
            timer(before + duration_secs)
        if before + duration_secs >= SLOW:
            verb, origin = ("loaded", " from the cache") if cached else ("compiled", "")
            for listener in _listeners[-1:]:
                listener(f"{verb} {name}{origin} in {duration_secs:.1f} s, after {before:.1f} s of tracing")
