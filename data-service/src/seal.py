"""The command ``cb-trade-data seal``: copy the closed days of a root into the table of candles.

A service that collects does the same by itself, a while after each day. This is for a root that
nobody collects into: before it is given to others, or after documents were brought into it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TextIO

from config import Settings
from domain.interval import Interval
from domain.series import Series
from errors import InvalidRequest
from historical.candle_table import CandleTable
from historical.sealed_store import SealedCandleStore
from historical.sealer import CandleSealer
from observability.progress import show_progress
from storage.factory import create_storage
from storage.interfaces import ICollectorLock, StorageConflict
from storage.root_stamp import demand_stamp


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which series to seal; None stands for all."""

    coin: str | None = None
    exchange: str | None = None
    interval: str | None = None

    def fits(self, series: Series) -> bool:
        return (
            self.coin in (None, series.coin)
            and self.exchange in (None, series.exchange)
            and self.interval in (None, series.interval.name)
        )


def run(settings: Settings, wanted: Wanted, *, progress: TextIO = sys.stderr) -> int:
    """Seal every closed day of the wanted series that is not sealed, and say how many.

    Raises:
        InvalidRequest: the exchange is not one of ``EXCHANGES``, or the interval does not exist.
        StorageConflict: a service collects into the root.
        StorageError, CandleTableError: something cannot be read or written.
    """
    if wanted.exchange is not None and wanted.exchange not in settings.exchanges:
        raise InvalidRequest(
            f"exchange {wanted.exchange!r} is not enabled; these are: "
            f"{', '.join(settings.exchanges)}"
        )
    if wanted.interval is not None:
        Interval.parse(wanted.interval)
    sealed = asyncio.run(_seal(settings, wanted, progress))
    print(f"{settings.candles_path}: {sealed} days sealed")
    return 0


async def _seal(settings: Settings, wanted: Wanted, progress: TextIO) -> int:
    async with AsyncExitStack() as stack:
        storage = create_storage(settings)
        stack.push_async_callback(storage.close)
        await storage.open(read_only=True)
        await demand_stamp(storage, redirected=None)
        lock = storage.collector_lock()
        await stack.enter_async_context(_held(lock, storage.address))
        clock = settings.market_clock
        store = SealedCandleStore(CandleTable.from_settings(settings), clock)
        stack.push_async_callback(store.close)
        sealer = CandleSealer(
            store, storage, settings.exchanges, clock, may_write=lambda: lock.is_held
        )
        await sealer.take_over()
        return await sealer.seal_now(wanted.fits, progress=partial(show_progress, progress))


@asynccontextmanager
async def _held(lock: ICollectorLock, address: str) -> AsyncIterator[None]:
    """Keep the root's lock, so that no service begins to collect meanwhile."""
    if not await lock.acquire():
        raise StorageConflict(
            f"{address}: {lock.holder or 'a service'} collects into it, and seals closed days by "
            f"itself"
        )

    async def keep() -> None:
        while True:
            await asyncio.sleep(lock.renew_every_s)
            await lock.acquire()

    keeping = asyncio.create_task(keep(), name="the lock")
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        await lock.release()
