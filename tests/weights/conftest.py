import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_watched: dict[str, list[tuple[Any, ...]]] = {}


@pytest.fixture(scope="session")
def audit():
    """`with audit("open") as calls:` records the arguments of every such audit event of the interpreter."""

    # A hook cannot be taken back, so there is one for the whole session, and it records only while asked to
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _watched:
            _watched[event].append(arguments)

    sys.addaudithook(hook)

    @contextmanager
    def watch(event: str) -> Iterator[list[tuple[Any, ...]]]:
        calls = _watched[event] = []
        try:
            yield calls
        finally:
            del _watched[event]

    return watch
