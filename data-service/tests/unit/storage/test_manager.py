"""What may replace what, on a real folder, on Azurite and on a backend in memory."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import orjson
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from domain.candle import Candle
from domain.entry import Entry
from domain.interval import Interval
from domain.time_range import TimeRange
from errors import InvalidRequest
from storage.implementations.azure_blob_storage import AzureBlobStorage
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import (
    Change,
    IRawDataStorage,
    StorageConflict,
    StorageError,
    StorageUnavailable,
    Stored,
)
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility
from tests.support.azurite import Azurite
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_book, make_entry
from tests.support.storage import InMemoryStorage

LATER = NOON + FIVE_MINUTES
EVER = (0, 2**60)


@pytest.fixture(params=["local", "azure", "in memory"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[IRawDataStorage]:
    backend: IRawDataStorage
    if request.param == "local":
        backend = LocalFileStorage(tmp_path)
    elif request.param == "azure":
        azurite: Azurite = request.getfixturevalue("azurite")
        container: str = request.getfixturevalue("container")
        backend = AzureBlobStorage(container, connection_string=azurite.connection_string)
    else:
        backend = InMemoryStorage()
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
def manager(backend: IRawDataStorage) -> StorageManagerImpl:
    return StorageManagerImpl(backend)


@pytest.fixture
def memory() -> InMemoryStorage:
    return InMemoryStorage()


async def put(backend: IRawDataStorage, at: int, /, **changes: Any) -> None:
    """Put a document with some fields changed into a backend, past the manager."""
    document = make_entry(at).to_document() | changes
    await backend.save_entry("crypto.com", "BTC", at, document)


# Delegation: what the manager is asked reaches the backend it was given.


async def test_a_stored_entry_lies_in_the_backend_as_its_document(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    entry = make_entry(book=True)
    assert await manager.store_raw_data(entry) == Stored(entry, Change.ADDED)
    assert await backend.get_entry("crypto.com", "BTC", NOON) == entry.to_document()


async def test_a_range_is_read_with_its_bounds_limit_offset_and_interval(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    hourly = dataclasses.replace(BTC, interval=Interval.parse("1h"))
    entries = [make_entry(NOON + step * 3_600_000, series=hourly) for step in range(5)]
    for entry in entries:
        await backend.save_entry(
            "crypto.com", "BTC", entry.timestamp, entry.to_document(), interval="1h"
        )
    found = await manager.get_raw_data_range(
        "crypto.com", "BTC", NOON, entries[4].timestamp, 2, 1, interval="1h"
    )
    assert found == entries[1:3]
    assert await manager.get_raw_data_range("crypto.com", "BTC", *EVER) == []


async def test_the_latest_entry_is_the_backends(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    assert await manager.get_latest_entry("crypto.com", "BTC") is None
    await put(backend, NOON)
    await put(backend, LATER)
    assert await manager.get_latest_entry("crypto.com", "BTC") == make_entry(LATER)


async def test_coins_are_the_backends(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    await backend.save_entry("crypto.com", "BTC/EUR", NOON, {})
    assert await manager.list_coins("crypto.com") == ["BTC/EUR"]
    assert await manager.check_coin_exists("crypto.com", "BTC/EUR")
    assert not await manager.check_coin_exists("binance", "BTC/EUR")


async def test_records_lie_beside_the_documents(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    await manager.write_record("ledger/crypto.com/BTC/5m.json", b"{}")
    assert await backend.read_blob("ledger/crypto.com/BTC/5m.json") == b"{}"
    assert await manager.read_record("ledger/crypto.com/BTC/5m.json") == b"{}"
    assert await manager.read_record("ledger/none") is None


async def test_a_record_among_the_documents_is_refused(manager: StorageManagerImpl) -> None:
    with pytest.raises(InvalidRequest, match="documents"):
        await manager.write_record("raw_data/crypto.com/BTC/x.json", b"{}")


async def test_a_failing_backend_is_told_by_every_method(memory: InMemoryStorage) -> None:
    manager = StorageManagerImpl(memory)
    await manager.check_health()
    memory.fail_with = StorageUnavailable("away")
    for call in (
        manager.store_raw_data(make_entry()),
        manager.get_raw_data_range("crypto.com", "BTC", *EVER),
        manager.get_latest_entry("crypto.com", "BTC"),
        manager.stored_ranges("crypto.com", "BTC", *EVER),
        manager.list_coins("crypto.com"),
        manager.check_coin_exists("crypto.com", "BTC"),
        manager.check_health(),
    ):
        with pytest.raises(StorageUnavailable):
            await call


# What may replace what.


async def test_the_same_entry_again_changes_nothing_and_writes_nothing(
    memory: InMemoryStorage,
) -> None:
    manager = StorageManagerImpl(memory)
    entry = make_entry(book=True, source="stream")
    await manager.store_raw_data(entry)
    again = replace(entry, source="rest", order_book=make_book(LATER, bid=98.0))
    assert await manager.store_raw_data(again) == Stored(entry, Change.UNCHANGED)
    assert len(memory.writes) == 1


async def test_a_corrected_candle_is_the_next_revision_and_keeps_the_book(
    manager: StorageManagerImpl,
) -> None:
    first = make_entry(book=True, source="stream")
    await manager.store_raw_data(first)
    corrected = await manager.store_raw_data(make_entry(close=101.0))
    assert corrected.change is Change.REVISED
    assert corrected.entry == replace(
        make_entry(close=101.0), revision=2, order_book=first.order_book
    )
    again = await manager.store_raw_data(make_entry(close=102.0))
    assert again.entry.revision == 3
    assert await manager.get_latest_entry("crypto.com", "BTC") == again.entry


@pytest.mark.parametrize("field", ["open", "high", "low", "close", "volume"])
async def test_a_difference_in_any_value_of_the_candle_is_a_correction(
    manager: StorageManagerImpl, field: str
) -> None:
    entry = make_entry()
    await manager.store_raw_data(entry)
    nudged = replace(entry.candle, **{field: getattr(entry.candle, field) * 1.0001})
    stored = await manager.store_raw_data(replace(entry, candle=nudged))
    assert (stored.change, stored.entry.revision) == (Change.REVISED, 2)


async def test_a_book_is_added_where_none_was_and_keeps_the_revision_and_the_source(
    manager: StorageManagerImpl,
) -> None:
    await manager.store_raw_data(make_entry(close=99.0))
    await manager.store_raw_data(make_entry(source="rest"))
    with_book = make_entry(book=True, source="stream")
    stored = await manager.store_raw_data(with_book)
    assert stored.change is Change.BOOK_ADDED
    assert stored.entry == replace(with_book, revision=2, source="rest")
    assert await manager.get_latest_entry("crypto.com", "BTC") == stored.entry


async def test_a_correction_with_a_book_brings_its_own(manager: StorageManagerImpl) -> None:
    await manager.store_raw_data(make_entry(book=True))
    newer = replace(make_entry(close=101.0), order_book=make_book(LATER, bid=98.0))
    stored = await manager.store_raw_data(newer)
    assert stored.entry.order_book == make_book(LATER, bid=98.0)


async def test_concurrent_corrections_each_take_a_revision_of_their_own(
    manager: StorageManagerImpl,
) -> None:
    closes = [100.0 + step for step in range(10)]
    answers = await asyncio.gather(
        *(manager.store_raw_data(make_entry(close=close)) for close in closes)
    )
    assert sorted(answer.entry.revision for answer in answers) == list(range(1, 11))
    latest = await manager.get_latest_entry("crypto.com", "BTC")
    assert latest == answers[-1].entry


async def test_a_batch_gives_one_answer_an_entry_and_writes_only_what_changed(
    memory: InMemoryStorage,
) -> None:
    manager = StorageManagerImpl(memory)
    times = [NOON + step * FIVE_MINUTES for step in range(4)]
    await manager.store_batch([make_entry(times[0]), make_entry(times[2])])
    memory.writes.clear()
    answers = await manager.store_batch(
        [
            make_entry(times[0]),
            make_entry(times[1]),
            make_entry(times[2], close=101.0),
            make_entry(times[3], book=True),
        ]
    )
    assert [answer.change for answer in answers] == [
        Change.UNCHANGED, Change.ADDED, Change.REVISED, Change.ADDED,
    ]  # fmt: skip
    assert len(memory.writes) == 3
    found = await manager.get_raw_data_range("crypto.com", "BTC", *EVER)
    assert found == [answer.entry for answer in answers]


async def test_an_empty_batch_stores_nothing(manager: StorageManagerImpl) -> None:
    assert await manager.store_batch([]) == []


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([make_entry(LATER), make_entry(NOON)], "ascending"),
        ([make_entry(NOON), make_entry(NOON)], "ascending"),
        (
            [make_entry(NOON), make_entry(LATER, series=dataclasses.replace(BTC, coin="ETH"))],
            "one series",
        ),
        ([make_entry(NOON), make_entry(LATER, market="BTC/EUR")], "one market"),
    ],
)
async def test_a_batch_that_is_no_run_of_one_series_is_refused(
    manager: StorageManagerImpl, batch: list[Entry], reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        await manager.store_batch(batch)
    assert await manager.list_coins("crypto.com") == []


async def test_the_first_entry_fixes_the_market_of_a_series(
    backend: IRawDataStorage, manager: StorageManagerImpl
) -> None:
    await manager.store_raw_data(make_entry())
    other = make_entry(LATER, market="BTC/USDT")
    with pytest.raises(StorageConflict, match=r"BTC/USD .*BTC/USDT"):
        await manager.store_raw_data(other)
    # A restart knows the market from what is stored.
    with pytest.raises(StorageConflict, match=r"BTC/USD .*BTC/USDT"):
        await StorageManagerImpl(backend).store_raw_data(other)
    ether = dataclasses.replace(BTC, coin="ETH")
    await manager.store_raw_data(make_entry(series=ether, market="ETH/USDT"))


async def test_a_failed_first_write_fixes_no_market(memory: InMemoryStorage) -> None:
    manager = StorageManagerImpl(memory)
    memory.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await manager.store_raw_data(make_entry())
    memory.fail_with = None
    await manager.store_raw_data(make_entry(market="BTC/USDT"))


async def test_a_known_market_holds_even_when_nothing_can_be_read_any_more(
    memory: InMemoryStorage,
) -> None:
    manager = StorageManagerImpl(memory)
    await manager.store_raw_data(make_entry())
    memory.blobs.clear()
    with pytest.raises(StorageConflict):
        await manager.store_raw_data(make_entry(LATER, market="BTC/USDT"))


async def test_a_market_that_was_forgotten_is_found_again(memory: InMemoryStorage) -> None:
    manager = StorageManagerImpl(memory, most_markets_remembered=1)
    await manager.store_raw_data(make_entry())
    await manager.store_raw_data(
        make_entry(series=dataclasses.replace(BTC, coin="ETH"), market="ETH/USD")
    )
    with pytest.raises(StorageConflict):
        await manager.store_raw_data(make_entry(LATER, market="BTC/USDT"))


# Documents that are not what they should be.


@pytest.mark.parametrize(
    "changes",
    [
        {"close": -1.0},
        {"high": 1.0},
        {"close": "100"},
        {"revision": 0},
        {"order_book": {"timestamp": NOON}},
        {"coin": "ETH"},
        {"interval": "1h"},
        {"timestamp": NOON + 7},
        {"timestamp": LATER + FIVE_MINUTES},
        {"timestamp": NOON},
        {"schema": None},
    ],
)
async def test_a_broken_document_is_reported_once_counts_as_absent_and_is_repaired(
    manager: StorageManagerImpl, backend: IRawDataStorage, changes: dict[str, Any]
) -> None:
    last = LATER + FIVE_MINUTES
    await put(backend, NOON)
    await put(backend, LATER, **changes)
    await put(backend, last)
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", LATER)

    with capture_logs() as logs:
        for _ in range(2):
            found = await manager.get_raw_data_range("crypto.com", "BTC", *EVER)
            assert [entry.timestamp for entry in found] == [NOON, last]
    assert [(log["event"], log["path"]) for log in logs] == [("storage_document_unreadable", ANY)]
    assert logs[0]["path"].endswith(path)
    assert await manager.stored_ranges("crypto.com", "BTC", *EVER) == [
        TimeRange(NOON, LATER),
        TimeRange(last, last + FIVE_MINUTES),
    ]

    repaired = await manager.store_raw_data(make_entry(LATER))
    assert repaired.change is Change.ADDED
    assert await manager.stored_ranges("crypto.com", "BTC", *EVER) == [
        TimeRange(NOON, last + FIVE_MINUTES)
    ]


async def test_a_broken_newest_document_gives_way_to_the_newest_sound_one(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    await put(backend, NOON)
    await put(backend, LATER, close=-1.0)
    assert await manager.get_latest_entry("crypto.com", "BTC") == make_entry(NOON)
    await put(backend, NOON, close=-1.0)
    assert await manager.get_latest_entry("crypto.com", "BTC") is None


async def test_a_page_is_filled_past_broken_documents(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    times = [NOON + step * FIVE_MINUTES for step in range(5)]
    for step, timestamp in enumerate(times):
        await put(backend, timestamp, **({"close": -1.0} if step in (1, 2) else {}))
    found = await manager.get_raw_data_range("crypto.com", "BTC", *EVER, limit=2)
    assert [entry.timestamp for entry in found] == [times[0], times[3]]


async def test_a_document_that_is_no_json_is_not_stored_data(
    manager: StorageManagerImpl, tmp_path: Path, backend: IRawDataStorage
) -> None:
    await manager.store_raw_data(make_entry())
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", NOON)
    await backend.write_blob(path, b"{half")
    assert await manager.get_latest_entry("crypto.com", "BTC") is None
    assert await manager.stored_ranges("crypto.com", "BTC", *EVER) == []
    assert (await manager.store_raw_data(make_entry())).change is Change.ADDED


async def test_a_document_of_an_unknown_schema_is_refused_with_its_path_and_never_replaced(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    await put(backend, NOON, schema=2)
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", NOON)
    for call in (
        manager.get_raw_data_range("crypto.com", "BTC", *EVER),
        manager.get_latest_entry("crypto.com", "BTC"),
        manager.store_raw_data(make_entry()),
    ):
        with pytest.raises(StorageError, match=f"{path}: .*schema 2.*upgrade"):
            await call
    content = await backend.read_blob(path)
    assert content is not None
    assert orjson.loads(content)["schema"] == 2


async def test_many_entries_are_read_whole_and_in_order(memory: InMemoryStorage) -> None:
    manager = StorageManagerImpl(memory)
    entries = [make_entry(NOON + step * FIVE_MINUTES) for step in range(450)]
    await manager.store_batch(entries)
    assert await manager.get_raw_data_range("crypto.com", "BTC", *EVER) == entries


async def test_stored_ranges_join_periods_that_touch(
    manager: StorageManagerImpl, backend: IRawDataStorage
) -> None:
    for step in (0, 1, 3):
        await manager.store_raw_data(make_entry(NOON + step * FIVE_MINUTES))
    await backend.save_entry("crypto.com", "BTC", NOON + 1_000_000 * 1000 + 7000, {})
    assert await manager.stored_ranges("crypto.com", "BTC", *EVER) == [
        TimeRange(NOON, NOON + 2 * FIVE_MINUTES),
        TimeRange(NOON + 3 * FIVE_MINUTES, NOON + 4 * FIVE_MINUTES),
    ]
    assert await manager.stored_ranges("crypto.com", "BTC", LATER, LATER + 1) == [
        TimeRange(LATER, LATER + FIVE_MINUTES)
    ]
    assert await manager.stored_ranges("crypto.com", "ETH", *EVER) == []


def test_a_candle_equals_itself_after_a_round_trip_through_json() -> None:
    candle = Candle(NOON, 0.1 + 0.2, 1e300, 5e-324, 1 / 3, 1e-9)
    entry = Entry(BTC, "BTC/USD", candle)
    document = orjson.loads(orjson.dumps(entry.to_document()))
    assert Entry.from_document(document) == entry
