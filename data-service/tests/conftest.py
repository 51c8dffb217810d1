"""What tests of several folders share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.azurite import Azurite, running_azurite

_numbers = count(1)


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Processes that tests start can be interrupted, also where a shell runs the tests in the
    background and has them ignore that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One emulator for all tests; each takes a ``container`` of its own."""
    with running_azurite() as running:
        yield running


@pytest.fixture
def container() -> str:
    """The name of a container that no other test uses."""
    return f"test-{next(_numbers)}"
