"""Requests to stop, by SIGTERM or Ctrl-C: `handling` notes them, and what waits looks for them.

A step is stopped in its middle only inside `armed`, whose caller knows what to save; elsewhere `check` does nothing. In
a run of several processes a caller of `check` tells the others, as `distributed.shared` does.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxrlhf.errors import Interrupted

FORWARDED = signal.SIGUSR1
"""Signal by which `--restarts` forwards SIGTERM and SIGINT: the process may also receive those, and would count them
twice."""
SUPERVISED = "JAXRLHF_SUPERVISED"
"""Environment variable that is set for a process which `--restarts` has started."""
POLL = 0.2  # seconds between two looks of what waits
_NOTE = b"\nstopping: the state is saved as soon as possible (signal again to exit at once)\n"


class _Requests:
    """The requests of this process. `immediate`: raise where the signal is handled; nothing is open that could be
    saved."""

    made = immediate = False
    raised: type[BaseException] | None = None  # by the signal of an immediate request
    signals = 0  # since `made` was false
    depth = armed = raising = 0  # blocks that are open


_now = _Requests()


@contextlib.contextmanager
def handling(*, immediate: bool = False) -> Iterator[None]:
    """Handle SIGTERM and SIGINT in the block: the first is a request to stop, the second ends the process at once.

    With `immediate` the first SIGTERM raises Interrupted wherever the program is, and the first SIGINT
    KeyboardInterrupt, unless SIGINT is ignored, as a shell arranges it for processes in the background. If Python has
    ignored that exception, as in finalizers and callbacks of the garbage collector, it is raised again when the next
    block is opened inside, or at the end of this one. If an import has made an ImportError of it, it is raised instead.
    Other requests that an outer block has seen stay. Only in the main thread; in another, signals are not handled.
    """
    if not _now.depth:
        _now.made, _now.signals, _now.raised = False, 0, None
    if _now.raised:
        raise _now.raised
    before, _now.immediate = _now.immediate, immediate
    _now.depth += 1
    try:
        ignored = immediate and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with _handlers([signal.SIGTERM, *([] if ignored else [signal.SIGINT])]):
            yield
            if immediate and _now.raised:
                raise _now.raised
    except ImportError as error:
        if immediate and _now.raised:
            raise _now.raised from error  # of a module written in C, whose initialisation it has ended
        raise
    finally:
        _now.depth -= 1
        _now.immediate = before


@contextlib.contextmanager
def _handlers(numbers: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers += [FORWARDED] if SUPERVISED in os.environ else []
    old = {number: signal.signal(number, _handle) for number in numbers}
    hook = sys.unraisablehook
    if _now.immediate:  # Python prints the traceback of an exception that it ignores

        def quiet(ignored: Any) -> None:
            if not (_now.raised and issubclass(ignored.exc_type, _now.raised)):
                hook(ignored)

        sys.unraisablehook = quiet
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code, which cannot be restored


def _handle(number: int, _frame: Any) -> None:
    _now.signals += number != FORWARDED
    if _now.signals == 2:
        os._exit(128 + number)
    if _now.made:
        return
    _now.made = True
    if _now.immediate:
        _now.raised = KeyboardInterrupt if number == signal.SIGINT else Interrupted
        raise _now.raised
    os.write(2, _NOTE)  # not print, which the handler may have interrupted
    if _now.armed and _now.raising:
        raise Interrupted


def requested() -> bool:
    """Return True after a request to stop."""
    return _now.made


def request(made: bool = True) -> None:
    """Make a request to stop, or take it back."""
    _now.made = made


@contextlib.contextmanager
def armed() -> Iterator[None]:
    """Block that a request to stop ends, by Interrupted, wherever `check` is called in it."""
    _now.armed += 1
    try:
        yield
    finally:
        _now.armed -= 1


def check() -> None:
    """Raise Interrupted after a request to stop, in an `armed` block."""
    if _now.made and _now.armed:
        raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Block of code of others, which does not look for requests: in an `armed` block the signal itself raises
    Interrupted in it, as Ctrl-C raises KeyboardInterrupt."""
    check()
    _now.raising += 1
    try:
        yield
    finally:
        _now.raising -= 1


def wait(done: Callable[[float], bool], seconds: float) -> bool:
    """Call `done(timeout)`, which waits so long at most and says whether it is done, until it is or `seconds` are over;
    looks for requests in between. Returns the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        check()
        left = deadline - time.monotonic()
        if done(max(min(left, POLL), 0)):
            return True
        if left <= POLL:
            return False
