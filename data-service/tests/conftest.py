"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.azurite import Azurite, running_azurite

_numbers = count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the tests that start whole processes, often on a fast clock, one runs at a time."""
    for item in items:
        if item.get_closest_marker("e2e") is not None:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One emulator for all tests; each takes a ``container`` of its own."""
    with running_azurite() as running:
        yield running


@pytest.fixture
def container() -> str:
    """The name of a container that no other test uses."""
    return f"test-{next(_numbers)}"
