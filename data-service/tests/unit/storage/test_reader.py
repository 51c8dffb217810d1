"""What is stored, read beside its writer: backend and spool, nothing made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from domain.entry import Entry
from storage.documents import read_json
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import Decode, Held, StorageConflict, StorageError, StorageUnavailable
from storage.path_utility import StoragePathUtility
from storage.reader import Broken, StoredDocuments
from storage.root_stamp import write_stamp
from storage.spool import Spool
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_entry
from tests.support.storage import InMemoryStorage

LATER = NOON + FIVE_MINUTES
NOON_PATH = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", NOON)


@asynccontextmanager
async def stored(
    raw: InMemoryStorage, spool_folder: Path, *, stamped: bool = True
) -> AsyncIterator[StoredDocuments]:
    """Documents of a root that a service has collected into."""
    await raw.open()
    if stamped:
        await write_stamp(raw, redirected=False)
    documents = StoredDocuments(raw, spool_folder)
    try:
        await documents.open(redirected=False)
        yield documents
    finally:
        await documents.close()


async def save(raw: InMemoryStorage, entry: Entry, **changes: Any) -> None:
    document = entry.to_document() | changes
    await raw.save_entry("crypto.com", "BTC", entry.timestamp, document)


async def spool(folder: Path, *entries: Entry) -> None:
    """What a service leaves in its spool."""
    owner = Spool(folder)
    await owner.open()
    await owner.put(BTC, entries)
    await owner.close()


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every path in a folder, and when it was changed."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def break_documents(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        path.write_bytes(b"{")


async def test_what_is_in_the_backend_and_in_the_spool_is_stored(tmp_path: Path) -> None:
    raw = InMemoryStorage()
    await save(raw, make_entry(NOON))
    await spool(tmp_path, make_entry(LATER))
    async with stored(raw, tmp_path) as documents:
        found = await documents.read(BTC, [NOON, LATER, LATER + FIVE_MINUTES])
    assert found == {NOON: make_entry(NOON), LATER: make_entry(LATER)}


async def test_what_waits_in_the_spool_stands_for_what_it_will_replace(tmp_path: Path) -> None:
    raw = InMemoryStorage()
    await save(raw, make_entry(NOON, close=100.5))
    await spool(tmp_path, make_entry(NOON, close=101.0))
    async with stored(raw, tmp_path) as documents:
        found = await documents.read(BTC, [NOON])
    assert found == {NOON: make_entry(NOON, close=101.0)}


async def test_what_moves_to_the_backend_while_it_is_read_is_found(tmp_path: Path) -> None:
    class Draining(InMemoryStorage):
        """Somebody empties the spool right before this is read."""

        async def get_entries(
            self,
            exchange_name: str,
            coin_symbol: str,
            timestamps: Sequence[Any],
            *,
            interval: str = "5m",
            decode: Decode = read_json,
        ) -> dict[int, Held]:
            owner = Spool(tmp_path)
            await owner.open()
            await save(self, make_entry(NOON))
            await owner.discard(BTC, [NOON])
            await owner.close()
            return await super().get_entries(
                exchange_name, coin_symbol, timestamps, interval=interval, decode=decode
            )

    await spool(tmp_path, make_entry(NOON))
    async with stored(Draining(), tmp_path) as documents:
        assert await documents.read(BTC, [NOON]) == {NOON: make_entry(NOON)}
        assert await documents.read(BTC, [NOON]) == {NOON: make_entry(NOON)}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "no JSON"),
        (orjson.dumps(make_entry(NOON).to_document() | {"low": 300}), "needs low <= open"),
        (orjson.dumps(make_entry(LATER).to_document()), f"of the period {LATER}"),
        (orjson.dumps(make_entry(NOON).to_document() | {"coin": "ETH"}), "is none of"),
        (orjson.dumps(make_entry(NOON).to_document() | {"schema": 2}), "schema 2"),
    ],
)
async def test_a_document_that_is_no_entry_is_told_to_be_broken(
    tmp_path: Path, content: bytes, why: str
) -> None:
    raw = InMemoryStorage()
    raw.blobs[NOON_PATH] = content
    async with stored(raw, tmp_path) as documents:
        found = (await documents.read(BTC, [NOON]))[NOON]
    assert isinstance(found, Broken)
    assert why in found.why


async def test_a_broken_document_in_the_spool_never_reaches_the_backend(tmp_path: Path) -> None:
    raw = InMemoryStorage()
    await save(raw, make_entry(NOON))
    await spool(tmp_path, make_entry(NOON, close=101.0), make_entry(LATER))
    break_documents(tmp_path)
    async with stored(raw, tmp_path) as documents:
        found = await documents.read(BTC, [NOON, LATER])
    assert found[NOON] == make_entry(NOON)
    assert isinstance(found[LATER], Broken)


async def test_nothing_is_made_or_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    owner = LocalFileStorage(root)
    await owner.open()
    await write_stamp(owner, redirected=False)
    await owner.save_entry("crypto.com", "BTC", NOON, make_entry(NOON).to_document())
    before = listing(tmp_path)
    documents = StoredDocuments(LocalFileStorage(root), tmp_path / "spool")
    await documents.open(redirected=False)
    assert list(await documents.read(BTC, [NOON, LATER])) == [NOON]
    await documents.close()
    assert listing(tmp_path) == before
    await owner.close()


async def test_a_root_of_other_exchanges_is_refused(tmp_path: Path) -> None:
    raw = InMemoryStorage()
    async with stored(raw, tmp_path):
        pass
    with pytest.raises(StorageConflict, match="candles of real exchanges"):
        await StoredDocuments(raw, tmp_path).open(redirected=True)


async def test_a_root_that_is_missing_or_that_nobody_collected_into_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(StorageError, match="no such storage root"):
        await StoredDocuments(InMemoryStorage(), tmp_path).open(redirected=False)
    raw = InMemoryStorage()
    with pytest.raises(StorageError, match="no service has collected into it yet"):
        async with stored(raw, tmp_path, stamped=False):
            pass
    assert raw.writes == []


async def test_a_backend_that_is_away_makes_reading_fail(tmp_path: Path) -> None:
    raw = InMemoryStorage()
    await spool(tmp_path, make_entry(NOON))
    async with stored(raw, tmp_path) as documents:
        raw.fail_with = StorageUnavailable("away")
        with pytest.raises(StorageUnavailable, match="away"):
            await documents.read(BTC, [NOON])
