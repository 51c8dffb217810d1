"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.azurite import Azurite, running_azurite

_numbers = count(1)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One emulator for all tests; each takes a ``container`` of its own."""
    with running_azurite() as running:
        yield running


@pytest.fixture
def container() -> str:
    """The name of a container that no other test uses."""
    return f"test-{next(_numbers)}"
