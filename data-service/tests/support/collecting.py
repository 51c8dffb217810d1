"""A whole collection over a fake exchange, storage in memory and a clock moved by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from collection.collection_list import CoinCollectionList
from collection.hub import Hub
from collection.manager import DataCollectionManagerImpl
from collection.processor import RealTimeProcessor
from domain.candle import CandleUpdate
from exchange_source.microkernel import DataSourceConnectorImpl, PluginRegistry
from reconciliation.reconciler import Reconciler
from storage.manager import StorageManagerImpl
from tests.support.clock import ManualClock, settle_loop
from tests.support.exchange import FakeExchange
from tests.support.market import FIVE, HOUR, T0, candle, candles
from tests.support.storage import InMemoryStorage
from tests.support.targets import InMemoryTargets

BACKFILL_DAYS = 0.5


class Collecting:
    """Everything that ``main`` wires, over what a test can turn."""

    def __init__(
        self,
        *names: str,
        preferences: Mapping[str, Sequence[str]] | None = None,
        now: int = T0 + 24 * HOUR + 10_000,
    ) -> None:
        self.clock = ManualClock(now)
        self.exchanges = {name: FakeExchange(self.clock, name=name) for name in names} or {
            "crypto.com": FakeExchange(self.clock)
        }
        self.exchange = next(iter(self.exchanges.values()))
        for exchange in self.exchanges.values():
            for market in exchange.markets:
                exchange.put(market, "5m", candles(T0, 1_000))
        self.raw = InMemoryStorage()
        self.targets = InMemoryTargets(clock=self.clock)
        self.preferences = preferences or {}
        self.assemble()

    async def beside(self) -> Collecting:
        """A second process on the same storage and targets, and the same exchanges; it stands by
        until it is told otherwise."""
        other = Collecting(now=self.clock.now_ms())
        other.clock, other.raw, other.targets = self.clock, self.raw, self.targets
        other.exchanges, other.exchange = self.exchanges, self.exchange
        other.assemble()
        other.storage.stand_by()
        other.reconciler.stand_by()
        await other.manager.stand_by()
        return other

    def assemble(self) -> None:
        """What a process has in memory, anew; storage and targets stay."""
        registry = PluginRegistry()
        for exchange in self.exchanges.values():
            registry.add(exchange)
        self.storage = StorageManagerImpl(self.raw)
        self.hub = Hub(self.clock, self.storage)
        self.processor = RealTimeProcessor(self.storage, self.hub, self.clock)
        self.reconciler = Reconciler(self.exchanges, self.storage, self.clock, rng=random.Random(3))
        self.reconciler.listen(self.hub.advance)
        self.collection = CoinCollectionList(self.targets)
        self.manager = DataCollectionManagerImpl(
            connector=DataSourceConnectorImpl(registry),
            collection=self.collection,
            storage=self.storage,
            reconciler=self.reconciler,
            processor=self.processor,
            hub=self.hub,
            clock=self.clock,
            preferences=self.preferences,
            backfill_days=BACKFILL_DAYS,
            rng=random.Random(5),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """One run of the process."""
        tasks = [
            asyncio.create_task(self.reconciler.run()),
            asyncio.create_task(self.manager.run()),
        ]
        try:
            await self.manager.resume()
            await settle_loop()
            async with asyncio.timeout(30):
                yield
        finally:
            for task in reversed(tasks):
                task.cancel()
            await asyncio.wait(tasks)

    async def pass_time(self, milliseconds: int) -> None:
        """Let time pass in steps short enough for every timer to see it."""
        step = 5_000
        await settle_loop(60)
        for _ in range(milliseconds // step):
            await self.clock.advance(step)
            await settle_loop(60)
        await self.clock.advance(milliseconds % step)
        await settle_loop(60)

    async def update(self, timestamp: int, *, market: str = "BTC/USD") -> None:
        """A forming update of the exchange's stream."""
        await self.exchange.push(CandleUpdate(self.exchange.name, market, "5m", candle(timestamp)))
        await settle_loop(60)

    async def stored(self, coin: str = "BTC", exchange: str = "crypto.com") -> list[int]:
        entries = await self.storage.get_raw_data_range(exchange, coin, 0, T0 + 1_000 * HOUR)
        return [entry.timestamp for entry in entries]

    def wanted(self, until: int | None = None) -> list[int]:
        """The periods that a target added at the start should have by now."""
        start = T0 + 24 * HOUR - round(BACKFILL_DAYS * 24 * HOUR)
        return list(range(start, until or (self.clock.now_ms() // FIVE * FIVE), FIVE))
