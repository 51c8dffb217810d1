"""What it costs to say what is stored of a year, against reading it, in the same run.

A year of 5m entries of one coin (105,120 documents, nine of ten with an order book) on the local
disk, its ledger beside it. Each figure is a median of interleaved repeats on a warm page cache.

- fresh: ``HistoricalDataManagerImpl.get_coverage`` of a process that knows nothing yet: it reads
  the ledger and lists the year.
- warm: the same asked again.
- yardstick: ``StorageManagerImpl.get_raw_data_range`` of the year.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

from bench_storage import BATCH, SERIES, STEP, YEAR, YEAR_START, entries, read, show, timed

from domain.clock import MarketClock
from domain.entry import Entry
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher
from historical.interfaces import Coverage, ISeriesDirectory, ResolvedSeries
from historical.manager import HistoricalDataManagerImpl
from reconciliation.reconciler import Reconciler
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl

REPEATS = 5
BAR = 0.1
# The year is over, and so are its looks.
CLOCK = MarketClock(origin=MarketClock().real_ms(), market=YEAR_START + YEAR * STEP + 1)


class OneTarget(ISeriesDirectory):
    """Knows one coin, wanted for the whole year."""

    async def resolve(self, coin: str, *, exchange: str | None, interval: str) -> ResolvedSeries:
        assert (coin, exchange, interval) == (SERIES.coin, None, SERIES.interval.name)
        return ResolvedSeries(SERIES, "BTC/USD", since=YEAR_START)


def fresh(storage: StorageManagerImpl) -> HistoricalDataManagerImpl:
    """A manager whose process has just begun."""
    reconciler = Reconciler({}, storage, CLOCK)
    return HistoricalDataManagerImpl(
        directory=OneTarget(),
        fetcher=HistoricalFetcher(storage, reconciler, CLOCK),
        current=CurrentDataFetcher(storage),
        reconciler=reconciler,
        forming=lambda _: None,
        clock=CLOCK,
    )


async def fill(storage: StorageManagerImpl) -> int:
    """Store the year; how many of its entries have a book."""
    rng = random.Random(5)
    batch: list[Entry] = []
    booked = 0
    for entry in entries(YEAR, books=True):
        has_book = rng.random() < 0.9
        batch.append(entry if has_book else entry.with_order_book(None))
        booked += has_book
        if len(batch) == BATCH:
            await storage.store_batch(batch)
            batch.clear()
    return booked


def check(coverage: Coverage, booked: int) -> None:
    """A wrong answer is no figure."""
    found = (coverage.expected, coverage.stored, coverage.with_order_book, coverage.gaps)
    if found != (YEAR, YEAR, booked, ()):
        raise SystemExit(f"wrong coverage: {found[:3]}, {len(coverage.gaps)} gaps")


async def main() -> None:
    """Measure and print."""
    root = Path(tempfile.mkdtemp(prefix="bench-coverage-"))
    backend = LocalFileStorage(root)
    try:
        await backend.open()
        storage = StorageManagerImpl(backend)
        booked = await fill(storage)
        without_ledger = await timed(lambda: fresh(storage).get_coverage("BTC"))
        print(f"a year without a ledger, every entry read once: {without_ledger:.2f} s", flush=True)
        figures: dict[str, list[float]] = {"fresh": [], "warm": [], "read": []}
        for _ in range(REPEATS):
            manager = fresh(StorageManagerImpl(backend))
            ask = partial(manager.get_coverage, "BTC")
            figures["fresh"].append(await timed(ask))
            check(await ask(), booked)
            figures["warm"].append(await timed(ask))
            figures["read"].append(await timed(lambda: read(storage)))
        yardstick = "get_raw_data_range of the year"
        show("coverage of a year, fresh", figures["fresh"], yardstick, figures["read"])
        show("coverage of a year, warm", figures["warm"], yardstick, figures["read"])
        part = statistics.median(figures["fresh"]) / statistics.median(figures["read"])
        print(f"fresh takes {part:.3f} of reading; the bar is {BAR}: "
              f"{'held' if part < BAR else 'MISSED'}")  # fmt: skip
    finally:
        await backend.close()
        shutil.rmtree(root)


if __name__ == "__main__":
    asyncio.run(main())
