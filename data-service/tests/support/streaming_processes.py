"""A process that streams history to a client that keeps nothing, and tells what memory it took."""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa

from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from historical.candle_columns import table_of, use_returning_memory
from historical.candle_files import Change
from historical.candle_log import CandleLog
from historical.candle_table import CandleTable
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher
from historical.interfaces import ISeriesDirectory, ResolvedSeries
from historical.manager import HistoricalDataManagerImpl
from historical.sealed_days import bits_within
from historical.sealed_store import SealedCandleStore
from historical.sealer import CandleSealer
from reconciliation.ledger import Ledger
from reconciliation.reconciler import Reconciler
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility, day_of, day_start
from target_management.delta_engine import DeltaEngine
from tests.support.clock import ManualClock
from tests.support.entries import BTC
from tests.support.exchange import FakeExchange
from tests.support.sealing import entries_of

STEP: Final = BTC.interval.milliseconds


async def make_years(root: Path, first: int, count: int) -> TimeRange:
    """Seal whole years, and let the ledger say that all of it is verified; what was sealed."""
    log = CandleLog(DeltaEngine(), str(root / "candles_delta"), None)
    log.prepare()
    starts = [day_start(day_of(0).replace(year=first + at)) for at in range(count + 1)]
    sample = table_of(entries_of(day_of(starts[0])))
    for start, end in pairwise(starts):
        year = day_of(start).year
        times = np.arange(start, end, STEP, dtype=np.int64)
        rows = sample.take(pa.array(np.arange(len(times)) % len(sample)))
        at = sample.schema.get_field_index("timestamp")
        rows = rows.set_column(at, sample.schema.field(at), pa.array(times))
        file = log.write(BTC, year, bits_within(TimeRange(start, end), year), rows)
        log.commit(log.snapshot(), "seal", {BTC: [Change(year, (), file)]})
    whole = TimeRange(starts[0], starts[-1])
    storage = LocalFileStorage(root)
    await storage.open()
    ledger = Ledger(verified=RangeSet([whole]))
    await storage.write_blob(
        StoragePathUtility.get_ledger_path(BTC.exchange, BTC.coin), ledger.to_bytes()
    )
    await storage.close()
    return whole


class _Directory(ISeriesDirectory):
    async def resolve(self, coin: str, *, exchange: str | None, interval: str) -> ResolvedSeries:
        return ResolvedSeries(Series(BTC.exchange, BTC.coin, BTC.interval), "BTC/USD")


class _Client:
    """Reads everything, and keeps the last message."""

    def __init__(self) -> None:
        self.bytes = 0
        self.last: dict[str, Any] = {}

    async def send_json(self, data: Any) -> None:
        self.bytes += len(orjson.dumps(data))
        self.last = data


def peak_mb() -> float:
    """The most memory that this process held at a time. What the system counts for its parent
    begins with that of who started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def stream(root: Path, wanted: TimeRange) -> dict[str, Any]:
    """Stream a range; what the client was told last, and the most memory (MB) of the process."""
    use_returning_memory()
    clock = ManualClock(wanted.end + 40 * 86_400_000)
    storage = LocalFileStorage(root)
    await storage.open()
    table = CandleTable(DeltaEngine(), str(root / "candles_delta"), None)
    store = SealedCandleStore(table, clock)
    sealer = CandleSealer(store, storage, [BTC.exchange], clock, may_write=lambda: True)
    manager = StorageManagerImpl(storage, sealed=sealer)
    exchange = FakeExchange(clock)
    reconciler = Reconciler({BTC.exchange: exchange}, manager, clock, rng=Random(1))
    history = HistoricalDataManagerImpl(
        directory=_Directory(),
        fetcher=HistoricalFetcher(manager, reconciler, clock, sealed=store),
        current=CurrentDataFetcher(manager),
        reconciler=reconciler,
        forming=lambda _: None,
        clock=clock,
    )
    running = asyncio.create_task(reconciler.run())
    client = _Client()
    await history.stream_historical_data(client, BTC.coin, wanted.start, wanted.end)
    running.cancel()
    await asyncio.wait([running])
    await store.close()
    await storage.close()
    return {
        "last": client.last,
        "bytes": client.bytes,
        "asked": len(exchange.asked),
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    folder, start, end = sys.argv[1:]
    told = asyncio.run(stream(Path(folder), TimeRange(int(start), int(end))))
    sys.stdout.write(json.dumps(told))
