"""What completeness costs: settling and reading back 14 days, against the bare minimum.

Each figure is a median of interleaved repeats in one run, beside the named yardstick:

- settle: 4,032 five-minute candles from the sandbox exchange into local storage, every entry
  validated, synced to disk and accounted for; yardstick: ccxt's ``fetch_ohlcv`` paged by hand, and
  ``json.dump`` of the same documents without a sync.
- read: the same 14 days back as validated entries through the storage manager; yardstick:
  ``sorted(rglob("*.json"))`` and ``json.loads``.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import ccxt.async_support

from config import load_settings
from domain.clock import MarketClock
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from exchange_source.interfaces import Priority
from exchange_source.microkernel import DataSourceConnectorImpl
from reconciliation.reconciler import Reconciler
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl

REPEATS = 5
DAY_MS = 86_400_000
END = 1_763_985_600_000
WANTED = TimeRange(END - 14 * DAY_MS, END)
SERIES = Series("crypto.com", "BTC", Interval.parse("5m"))
# The yardstick's documents: what is stored, made without any of our code.
HEAD = {"exchange": "crypto.com", "coin": "BTC", "market": "BTC/USD", "interval": "5m"}
COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
TAIL = {"order_book": None, "source": "rest", "revision": 1, "schema": 1}
CLOCK = MarketClock(origin=time.time_ns() // 1_000_000, market=END + 2 * 3_600_000)


async def settled(sandbox: RunningSandbox, root: Path) -> int:
    """Settle the range into an empty root."""
    settings = load_settings(_env_file=None, exchange_endpoints={"crypto.com": sandbox.url})
    connector = DataSourceConnectorImpl.from_settings(settings, CLOCK)
    storage = LocalFileStorage(root)
    client = connector.get_client("crypto.com")
    reconciler = Reconciler({"crypto.com": client}, StorageManagerImpl(storage), CLOCK)
    task = asyncio.create_task(reconciler.run())
    try:
        report = await reconciler.settle(SERIES, "BTC/USD", WANTED, priority=Priority.REQUEST)
        return sum(run.length for run in report.fetched) // SERIES.interval.milliseconds
    finally:
        task.cancel()
        await asyncio.wait([task])
        await connector.close()
        await storage.close()


async def paged_by_hand(sandbox: RunningSandbox, root: Path) -> int:
    """The yardstick of settling."""
    exchange = ccxt.async_support.cryptocom({"enableRateLimit": False})
    exchange.urls["api"] = {
        key: url.replace("https://api.crypto.com", sandbox.url)
        for key, url in exchange.urls["api"].items()
    }
    count, step = 0, SERIES.interval.milliseconds
    try:
        for start in range(WANTED.start, WANTED.end, 300 * step):
            end = min(start + 300 * step, WANTED.end)
            rows = await exchange.fetch_ohlcv(
                "BTC/USD", "5m", None, 300, {"start_ts": start - 1, "end_ts": end - 1}
            )
            for row in rows:
                document = HEAD | dict(zip(COLUMNS, row, strict=True)) | TAIL
                with (root / f"{row[0]}.json").open("w") as file:
                    json.dump(document, file)
            count += len(rows)
    finally:
        await exchange.close()
    return count


async def read_back(root: Path) -> int:
    """Read the range as validated entries."""
    storage = LocalFileStorage(root)
    try:
        entries = await StorageManagerImpl(storage).get_raw_data_range(
            "crypto.com", "BTC", WANTED.start, WANTED.end
        )
        return len(entries)
    finally:
        await storage.close()


async def read_by_hand(root: Path) -> int:
    """The yardstick of reading."""
    paths = sorted((root / "raw_data").rglob("*.json"))
    return len([json.loads(path.read_text()) for path in paths])


async def timed(work: Callable[[], Awaitable[int]]) -> float:
    """Seconds that ``work`` takes; it must find every candle."""
    started = time.perf_counter()
    count = await work()
    taken = time.perf_counter() - started
    expected = WANTED.length // SERIES.interval.milliseconds
    if count != expected:
        raise SystemExit(f"found {count} candles where {expected} are")
    return taken


def show(what: str, ours: list[float], yardstick: str, theirs: list[float]) -> None:
    """One line: a figure, its yardstick, and the ratio."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"{what}: {mine:.2f} s; {yardstick}: {other:.2f} s; ratio {mine / other:.2f}")


async def main() -> None:
    """Measure and print."""
    figures: dict[str, list[float]] = {"settle": [], "paged": [], "read": [], "rglob": []}
    base = Path(tempfile.mkdtemp(prefix="bench-settle-"))
    try:
        async with running_sandbox(SandboxConfig(market_clock=CLOCK)) as sandbox:
            # The sandbox makes up its prices once; nobody pays for that in the measurement.
            warm = base / "warm"
            warm.mkdir()
            await paged_by_hand(sandbox, warm)
            for repeat in range(REPEATS):
                mine, other = base / f"ours-{repeat}", base / f"theirs-{repeat}"
                mine.mkdir()
                other.mkdir()
                figures["settle"].append(await timed(partial(settled, sandbox, mine)))
                figures["paged"].append(await timed(partial(paged_by_hand, sandbox, other)))
                figures["read"].append(await timed(partial(read_back, mine)))
                figures["rglob"].append(await timed(partial(read_by_hand, mine)))
    finally:
        shutil.rmtree(base)
    show(
        "settle 14 days of 5m, synced and accounted for",
        figures["settle"],
        "ccxt paged by hand and json.dump, not synced",
        figures["paged"],
    )
    show(
        "read 14 days back as validated entries",
        figures["read"],
        "sorted(rglob) and json.loads",
        figures["rglob"],
    )


if __name__ == "__main__":
    asyncio.run(main())
