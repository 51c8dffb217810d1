"""A writer is killed at any moment: what it acknowledged is there, and nothing is half there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from storage.implementations.local_file_storage import LocalFileStorage
from tests.support.storage_processes import StorageProcess, storage_process

SEED: Final = 20_261_122
ROOTS: Final = 10
KILLS_A_ROOT: Final = 10
LONGEST_LIFE_S: Final = 0.08


class Acknowledged:
    """What writers said is stored: revision and whether there is a book, by time."""

    def __init__(self) -> None:
        self.count = 0
        self.entries: dict[int, tuple[int, bool]] = {}

    def note(self, entries: list[tuple[int, int, bool]]) -> None:
        for timestamp, revision, book in entries:
            self.count += 1
            before = self.entries.get(timestamp, (0, False))
            self.entries[timestamp] = (max(before[0], revision), before[1] or book)


def documents_in(root: Path) -> dict[int, dict[str, Any]]:
    """Every document of a root, each of which has to parse."""
    documents = {}
    for path in (root / "raw_data").rglob("*"):
        if path.is_file():
            document = json.loads(path.read_bytes())
            documents[document["timestamp"]] = document
            assert path.suffix == ".json"
    return documents


def leftovers_in(root: Path) -> list[Path]:
    return list((root / ".cb-trade" / "staging").glob("*"))


def run_and_kill(
    writers: StorageProcess, root: Path, seed: int, life_s: float, acknowledged: Acknowledged
) -> None:
    """Let a writer work for a while, then kill it: now and then before it stored anything."""
    writers.tell([str(root), seed])
    started = writers.hear()
    assert isinstance(started, dict)
    if life_s > LONGEST_LIFE_S / 5:
        acknowledged.note(writers.hear() or [])
    until = time.monotonic() + life_s
    while (left := until - time.monotonic()) > 0:
        said = writers.hear(left)
        if said is not None:
            acknowledged.note(said)
    os.kill(started["started"], signal.SIGKILL)
    # What it had still said is in the pipe before its end is.
    while isinstance(said := writers.hear(), list):
        acknowledged.note(said)
    assert said == {"killed": True}


async def reopen(root: Path) -> None:
    storage = LocalFileStorage(root)
    await storage.open()
    await storage.close()


@pytest.fixture(scope="module")
def writers() -> Iterator[StorageProcess]:
    with storage_process("store_until_killed") as process:
        yield process


def test_no_acknowledged_entry_is_lost_by_a_hundred_kills(
    writers: StorageProcess, tmp_path: Path
) -> None:
    random = Random(SEED)
    entries = interrupted = corrected = 0
    for number in range(ROOTS):
        root = tmp_path / str(number)
        acknowledged = Acknowledged()
        for _ in range(KILLS_A_ROOT):
            life_s = random.uniform(0, LONGEST_LIFE_S)
            run_and_kill(writers, root, random.randrange(2**32), life_s, acknowledged)
            stored = documents_in(root)
            for timestamp, (revision, book) in acknowledged.entries.items():
                assert stored[timestamp]["revision"] >= revision
                assert stored[timestamp]["order_book"] is not None or not book
            interrupted += any(list(folder.iterdir()) for folder in leftovers_in(root))
            asyncio.run(reopen(root))
            assert leftovers_in(root) == []
        entries += acknowledged.count
        corrected += sum(revision > 1 for revision, _ in acknowledged.entries.values())
    # The drill is worth something only if kills met writers at work.
    assert entries > 500
    assert corrected > 10
    assert interrupted > 0
