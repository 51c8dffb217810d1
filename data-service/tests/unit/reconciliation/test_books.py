"""Which entries have an order book: known by the ledger, and read where it does not say."""

from __future__ import annotations

import pytest

from domain.entry import Entry
from domain.time_range import TimeRange
from exchange_source.interfaces import Priority
from reconciliation.series_state import BOOKS_PAGE, SeriesState
from reconciliation.settler import asking, settle
from storage.interfaces import StorageUnavailable, Timestamp
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility, to_range
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.market import BTC_5M, DAY, FIVE, HOUR, T0, book, candles, entry
from tests.support.storage import InMemoryStorage

LEDGER = "ledger/crypto.com/BTC/5m.json"


class CountingStorage(StorageManagerImpl):
    """Tells what was read of it."""

    def __init__(self, raw: InMemoryStorage) -> None:
        super().__init__(raw)
        self.read: list[TimeRange] = []

    async def get_raw_data_range(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        limit: int | None = None,
        offset: int = 0,
        *,
        interval: str = "5m",
    ) -> list[Entry]:
        self.read.append(to_range(start_time, end_time))
        return await super().get_raw_data_range(
            exchange_name, coin_symbol, start_time, end_time, limit, offset, interval=interval
        )


class World:
    """``count`` entries from ``T0`` on, an odd one without a book, ``now`` long after."""

    def __init__(self, count: int = 24, now: int = T0 + 20 * DAY) -> None:
        self.clock = ManualClock(now)
        self.exchange = FakeExchange(self.clock)
        self.exchange.put("BTC/USD", "5m", candles(T0, count + 1))
        self.raw = InMemoryStorage()
        self.wanted = TimeRange(T0, T0 + count * FIVE)
        self.restart()

    def restart(self) -> None:
        self.storage = CountingStorage(self.raw)
        self.state = SeriesState(BTC_5M, "BTC/USD", self.storage, self.clock)

    async def fill(self) -> None:
        await self.storage.store_batch(
            [
                entry(at).with_order_book(book(at + FIVE - 50) if at % (2 * FIVE) == 0 else None)
                for at in range(self.wanted.start, self.wanted.end, FIVE)
            ]
        )

    async def count(self) -> int:
        await self.state.load(self.wanted)
        await self.state.learn_books(self.wanted)
        return self.state.booked_count(self.wanted)

    async def settle(self) -> None:
        await settle(
            self.state,
            self.wanted,
            asking(self.exchange, Priority.LIVE),
            page_periods=self.exchange.history_page,
        )

    def path(self, at: int) -> str:
        return StoragePathUtility.get_raw_data_path("crypto.com", "BTC", T0 + at * FIVE)


async def test_without_a_ledger_books_are_counted_by_reading_once_a_page_at_a_time() -> None:
    world = World(count=2 * BOOKS_PAGE + 10)
    await world.fill()
    assert await world.count() == BOOKS_PAGE + 5
    assert [read.length // FIVE for read in world.storage.read] == [BOOKS_PAGE, BOOKS_PAGE, 10]
    world.restart()
    assert await world.count() == BOOKS_PAGE + 5
    assert world.storage.read == []


async def test_with_a_ledger_from_before_the_newest_entries_only_those_are_read() -> None:
    world = World()
    whole, world.wanted = world.wanted, TimeRange(T0, T0 + HOUR)
    await world.fill()
    assert await world.count() == 6
    world.wanted = TimeRange(T0 + HOUR, whole.end)
    await world.fill()
    world.wanted = whole
    world.restart()
    assert await world.count() == 12
    assert world.storage.read == [TimeRange(T0 + HOUR, whole.end)]


async def test_killed_between_storing_a_book_and_saving_the_ledger_it_is_counted() -> None:
    world = World(count=1, now=T0 + FIVE + 10_000)
    world.state.note_book(T0, book(T0 + FIVE - 50))
    await world.settle()
    del world.raw.blobs[LEDGER]
    world.restart()
    assert await world.count() == 1


async def test_killed_after_a_lost_entry_was_stored_anew_its_old_book_is_not_counted() -> None:
    world = World()
    await world.fill()
    assert await world.count() == 12
    del world.raw.blobs[world.path(2)]
    world.restart()
    await world.state.load(world.wanted)
    known = world.raw.blobs[LEDGER]
    await world.settle()
    world.raw.blobs[LEDGER] = known
    world.restart()
    assert await world.count() == 11
    assert world.state.stored_ranges(world.wanted) == [world.wanted]


async def test_a_period_that_may_still_get_its_book_is_read_again() -> None:
    world = World(count=1, now=T0 + FIVE + 10_000)
    await world.settle()
    assert await world.count() == 0
    assert await world.count() == 0
    assert len(world.storage.read) == 2
    await world.storage.store_batch([entry(T0).with_order_book(book(T0 + FIVE - 50))])
    assert await world.count() == 1


async def test_a_broken_document_is_no_entry_and_no_book() -> None:
    world = World()
    await world.fill()
    world.raw.blobs[world.path(4)] = b"{"
    assert await world.count() == 11
    hole = TimeRange(T0 + 4 * FIVE, T0 + 5 * FIVE)
    assert [gap.range for gap in world.state.gaps(world.wanted)] == [hole]


async def test_documents_deleted_behind_the_back_are_gaps_and_not_counted_after_a_refresh() -> None:
    world = World()
    await world.fill()
    assert await world.count() == 12
    del world.raw.blobs[world.path(2)]
    del world.raw.blobs[world.path(3)]
    await world.state.refresh(world.wanted)
    hole = TimeRange(T0 + 2 * FIVE, T0 + 4 * FIVE)
    assert [gap.range for gap in world.state.gaps(world.wanted)] == [hole]
    assert await world.count() == 11


async def test_documents_that_cannot_be_read_are_an_error_and_nothing_is_concluded() -> None:
    world = World()
    await world.fill()
    await world.state.load(world.wanted)
    world.raw.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await world.state.learn_books(world.wanted)
    assert world.state.booked_count(world.wanted) == 0
    world.raw.fail_with = None
    assert await world.count() == 12
