"""The record of what compilers made, and the devices of the targets that they compile for."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import compiled

from jaxrlhf.plan import topology


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="rewrite tests/compiled/record.json with what was compiled")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Facts by program. With --record, those of the programs that a test asks for go into the record."""
    facts = compiled.read_record()
    known = set(facts)
    yield facts
    new = [entry["program"] for key, entry in facts.items() if key not in known]
    if request.config.getoption("--record", default=False):
        compiled.write_record({key: entry for key, entry in facts.items() if entry.pop("used", False)})
    elif new:
        warnings.warn(
            f"not in tests/compiled/record.json, and compiled: {', '.join(new)}; to record them, "
            "python -m pytest -n 0 tests/compiled --record",
            stacklevel=1,
        )


@pytest.fixture(scope="session")
def devices() -> Callable[[str], list[Any]]:
    """The devices of a target; the test is skipped without its compiler."""

    def find(target: str) -> list[Any]:
        try:
            return topology.devices(target)
        except topology.MissingCompiler as error:
            pytest.skip(str(error))

    return find
