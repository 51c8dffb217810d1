"""CandleReader: the same to the last bit, whatever of a range is sealed, waits, or is written."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_table import CandleTable
from historical.fetcher import HistoricalFetcher
from historical.interfaces import ResolvedSeries
from historical.reader import CandleReader
from historical.sealed_store import SealedCandleStore
from historical.sealer import CandleSealer
from reconciliation.reconciler import Reconciler
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl
from storage.path_utility import day_start
from target_management.delta_engine import DeltaEngine
from tests.support.clock import ManualClock
from tests.support.entries import BTC
from tests.support.sealing import DAY_MS, day, entries_of, range_of

# A thousand take half a minute.
RANGES = int(os.environ.get("CB_TRADE_RANGES", "150"))
DAYS = 12
NOW = day_start(day(DAYS)) + 2 * 3_600_000
H1, M15 = Interval.parse("1h"), Interval.parse("15m")


class World:
    """Days of documents, some of them sealed, and two ways to read them."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock(NOW)
        self.raw = LocalFileStorage(folder / "root")
        table = CandleTable(DeltaEngine(), str(folder / "candles_delta"), None)
        self.store = SealedCandleStore(table, self.clock)
        self.sealer = CandleSealer(
            self.store, self.raw, ["crypto.com"], self.clock, may_write=lambda: True
        )
        self.storage = StorageManagerImpl(self.raw, sealed=self.sealer)
        # Nobody settles: what is read is what is stored.
        reconciler = Reconciler({}, self.storage, self.clock)
        reconciler.stand_by()
        self.sealed = HistoricalFetcher(self.storage, reconciler, self.clock, sealed=self.store)
        beside = StorageManagerImpl(self.raw)
        by_documents = Reconciler({}, beside, self.clock)
        by_documents.stand_by()
        self.documents = HistoricalFetcher(beside, by_documents, self.clock)

    async def close(self) -> None:
        await self.store.close()
        await self.raw.close()


def resolved(interval: Interval) -> ResolvedSeries:
    """The series of 5m itself, or one that is resampled from it."""
    if interval == BTC.interval:
        return ResolvedSeries(BTC, "BTC/USD")
    series = Series(BTC.exchange, BTC.coin, interval)
    return ResolvedSeries(series, "BTC/USD", sources=(BTC.interval,), offered=False)


async def test_any_range_is_the_same_sealed_and_not_while_days_are_sealed_and_corrected(
    tmp_path: Path,
) -> None:
    rng = Random(20_261_125)
    world = World(tmp_path)
    await world.raw.open()
    await world.sealer.take_over()
    entries = [
        entry
        for at in range(DAYS)
        # Days that are whole, that lack periods, and one that has none.
        for entry in entries_of(day(at), count=(288, 288, 200, 0)[at % 4])
        if rng.random() < 0.99
    ]
    await world.storage.store_batch(entries)
    over = asyncio.Event()

    async def seal_and_correct() -> None:
        """Days come and go in the table while they are read."""
        corrections = Random(1)
        while not over.is_set():
            await world.sealer.seal_now(lambda _: True, progress=lambda *_: None)
            for entry in corrections.sample(entries, 3):
                # Another revision of the same candle: whichever is read, it reads the same.
                await world.storage.store_raw_data(replace(entry, revision=4 + rng.randrange(99)))

    sealing = asyncio.create_task(seal_and_correct())
    span = TimeRange(day_start(day(-1)), day_start(day(DAYS + 1)))
    from_table = 0
    try:
        for _ in range(RANGES):
            series = resolved(rng.choice([BTC.interval, BTC.interval, M15, H1]))
            start = rng.randrange(span.start, span.end)
            wanted = TimeRange(start, start + rng.randrange(1, 2 * DAY_MS))
            periods = rng.randrange(1, 600)
            pages = [page async for page in world.sealed.pages(series, wanted, periods=periods)]
            found = [candle for page in pages for candle in page.candles]
            expected = await world.documents.fetch_data(series, wanted)
            assert found == list(expected.candles)
            told = [gap for page in pages for gap in page.gaps]
            assert sum(gap.range.length for gap in told) == sum(
                gap.range.length for gap in expected.gaps
            )
            from_table += bool((await world.store.read(BTC, wanted)).ranges)
    finally:
        over.set()
        await sealing
        await world.close()
    assert from_table > RANGES / 2


@pytest.mark.parametrize("count", [0, 1, 288])
async def test_a_range_of_one_sealed_day_reads_no_document(tmp_path: Path, count: int) -> None:
    world = World(tmp_path)
    await world.raw.open()
    await world.sealer.take_over()
    entries = entries_of(day(0), count=count)
    await world.store.seal(BTC, {day(0): entries}, read_since=world.store.others)
    await world.raw.close()
    found = await CandleReader(world.storage, world.store).read(BTC, range_of(day(0)))
    assert list(found) == [entry.candle for entry in entries]
    await world.store.close()
