"""What a history request costs of which nothing is stored: 14 days of 5m candles, 4,032 of them.

Ours is ``HistoricalFetcher.fetch_data`` into an empty local root: what is missing is found, fetched
through the plugin and its rate limiter, proven, stored synced, and read back. The exchange is a
sandbox in a process of its own that holds every answer back for 10 ms.

The yardsticks, each measured alone:

- pages: ccxt's ``fetch_ohlcv``, paged by hand, one page at a time, as ours has one page of a
  series under way
- save: ``LocalFileStorage.save_entries`` of the same documents in one call into an empty root

Figures are medians of interleaved rounds. Exit code 1 when ours takes more than ``BAR`` times the
sum of the yardsticks.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ccxt.async_support

from domain.clock import MarketClock
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from exchange_source.plugins.ccxt_guards import redirect_urls
from exchange_source.plugins.cryptocom_exchange import CryptocomExchange
from historical.fetcher import HistoricalFetcher
from historical.interfaces import ResolvedSeries
from reconciliation.reconciler import Reconciler
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl

# The sandbox is started as tests start it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import clean_environment, market_clock, program

ROUNDS = 9
BAR = 1.3
DELAY_MS = 10
PAGE = 300
HOUR_MS = 3_600_000
END = 1_763_985_600_000
WANTED = TimeRange(END - 14 * 24 * HOUR_MS, END)
SERIES = Series("crypto.com", "BTC", Interval.parse("5m"))
MARKET = "BTC/USD"
STEP = SERIES.interval.milliseconds
COUNT = WANTED.length // STEP


class Cost(NamedTuple):
    """Seconds that something takes, and how many of them this process computes."""

    took: float
    computed: float


async def cost(work: Callable[[], Awaitable[int]]) -> Cost:
    """What ``work`` costs; it must come to all the candles."""
    gc.collect()
    # What was written before is paid for by now.
    await asyncio.to_thread(os.sync)
    began, computed = time.perf_counter(), time.process_time()
    count = await work()
    found = Cost(time.perf_counter() - began, time.process_time() - computed)
    if count != COUNT:
        raise SystemExit(f"found {count} candles where {COUNT} are")
    return found


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[LocalFileStorage]:
    """Local storage in a folder."""
    storage = LocalFileStorage(root)
    await storage.open()
    try:
        yield storage
    finally:
        await storage.close()


class Measured:
    """What is measured, over clients that are connected and know the market."""

    def __init__(self, url: str, clock: MarketClock) -> None:
        self._clock = clock
        self._client = CryptocomExchange(clock=clock, endpoint=url)
        self._bare = ccxt.async_support.cryptocom({"enableRateLimit": False})
        self._bare.has["fetchCurrencies"] = False
        self._bare.urls = redirect_urls(self._bare.urls, url)
        self._documents: list[tuple[int, dict[str, Any]]] = []

    async def prepare(self, root: Path) -> None:
        """Do all once: connections, lists of markets and invented prices are paid for then."""
        await self._client.check_coin_availability(SERIES.coin)
        await self.ours(root)
        await self.pages(root)
        async with opened(root) as storage:
            held = await storage.get_entries(
                SERIES.exchange, SERIES.coin, range(WANTED.start, WANTED.end, STEP)
            )
        self._documents = [(timestamp, document.content) for timestamp, document in held.items()]

    async def close(self) -> None:
        await self._client.close()
        await self._bare.close()

    async def ours(self, root: Path) -> Cost:
        """A request for the whole range."""
        async with opened(root) as storage:
            manager = StorageManagerImpl(storage)
            reconciler = Reconciler({SERIES.exchange: self._client}, manager, self._clock)
            fetcher = HistoricalFetcher(manager, reconciler, self._clock)
            settling = asyncio.create_task(reconciler.run())

            async def fetch() -> int:
                page = await fetcher.fetch_data(ResolvedSeries(SERIES, MARKET), WANTED)
                return page.from_exchange

            try:
                return await cost(fetch)
            finally:
                settling.cancel()
                await asyncio.wait([settling])

    async def pages(self, _: Path) -> Cost:
        """The bare requests, newest first."""

        async def ask() -> int:
            count = 0
            for end in range(WANTED.end, WANTED.start, -PAGE * STEP):
                start = max(WANTED.start, end - PAGE * STEP)
                rows = await self._bare.fetch_ohlcv(
                    MARKET, "5m", None, PAGE, {"start_ts": start - 1, "end_ts": end - 1}
                )
                count += len(rows)
            return count

        return await cost(ask)

    async def save(self, root: Path) -> Cost:
        """The bare documents."""
        async with opened(root) as storage:

            async def write() -> int:
                await storage.save_entries(SERIES.exchange, SERIES.coin, self._documents)
                return len(self._documents)

            return await cost(write)


async def compare(measured: Measured, folder: Path) -> int:
    """Measure and print; the exit code."""
    await measured.prepare(folder / "first")
    works = {"ours": measured.ours, "pages": measured.pages, "save": measured.save}
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for number in range(ROUNDS):
        # Every other round backwards; no root is deleted in between, which would be paid for by
        # who writes next.
        for name in sorted(works, reverse=number % 2 == 1):
            costs[name].append(await works[name](folder / f"{name}-{number}"))
    middle = {name: statistics.median(item.took for item in found) for name, found in costs.items()}
    for name, found in costs.items():
        computed = statistics.median(item.computed for item in found)
        print(f"{name}: {middle[name]:.3f} s, of which this process computed {computed:.3f} s")
    ratio = middle["ours"] / (middle["pages"] + middle["save"])
    print(
        f"{COUNT} candles, nothing stored: {ratio:.2f} times the bare pages plus the bare save; "
        f"the bar is {BAR:g}: {'held' if ratio <= BAR else 'MISSED'}"
    )
    return 0 if ratio <= BAR else 1


async def main() -> int:
    """Start the exchange and measure."""
    clock = market_clock(END + 2 * HOUR_MS, 1.0)
    with tempfile.TemporaryDirectory(prefix="bench-fetch-") as name:
        folder = Path(name)
        async with program(
            "cli", "sandbox", "--port", "0", "--answer-delay-ms", str(DELAY_MS),
            environment=clean_environment(MARKET_CLOCK=clock.to_setting()),
            folder=folder,
        ) as (_, line):  # fmt: skip
            measured = Measured(line.rsplit(" ", 1)[-1], clock)
            try:
                return await compare(measured, folder)
            finally:
                await measured.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
