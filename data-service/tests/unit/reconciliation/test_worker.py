"""The settling worker: who goes first, what is shared, and how an outage is probed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from domain.gap import GapReason
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from exchange_source.interfaces import BadExchangeAnswer, ExchangeUnavailable, Priority
from reconciliation.reconciler import Reconciler
from storage.interfaces import StorageUnavailable
from storage.manager import StorageManagerImpl
from tests.support.clock import ManualClock, settle_loop
from tests.support.exchange import FakeExchange
from tests.support.market import BTC_5M, FIVE, HOUR, T0, candles
from tests.support.storage import InMemoryStorage

ETH_5M = Series("crypto.com", "ETH", Interval.parse("5m"))
DAY_RANGE = TimeRange(T0, T0 + 24 * HOUR)


class World:
    def __init__(self) -> None:
        self.clock = ManualClock(T0 + 24 * HOUR)
        self.exchange = FakeExchange(self.clock)
        self.exchange.history_page = 36
        for market in ("BTC/USD", "ETH/USD"):
            self.exchange.put(market, "5m", candles(T0, 300))
        self.raw = InMemoryStorage()
        self.reconciler = Reconciler(
            {"crypto.com": self.exchange},
            StorageManagerImpl(self.raw),
            self.clock,
            rng=random.Random(7),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reconciler.run())
        try:
            async with asyncio.timeout(20):
                yield
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_a_live_period_does_not_stand_behind_a_whole_backfill() -> None:
    world = World()
    world.exchange.gate.clear()
    async with world.running():
        backfill = asyncio.create_task(
            world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.BACKFILL)
        )
        await settle_loop()
        live = asyncio.create_task(
            world.reconciler.settle(
                ETH_5M,
                "ETH/USD",
                TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR),
                priority=Priority.LIVE,
            )
        )
        await settle_loop()
        world.exchange.gate.set()
        await live
        await backfill
    assert [asked.market for asked in world.exchange.asked].index("ETH/USD") <= 1


async def test_equal_requests_share_one_and_outlive_the_first_that_leaves() -> None:
    world = World()
    world.exchange.gate.clear()
    wanted = TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR)
    async with world.running():
        first, second = (
            asyncio.create_task(
                world.reconciler.settle(BTC_5M, "BTC/USD", wanted, priority=Priority.REQUEST)
            )
            for _ in range(2)
        )
        await settle_loop()
        first.cancel()
        world.exchange.gate.set()
        report = await second
    assert report.gaps == ()
    assert len(world.exchange.asked) == 1


async def test_during_an_outage_one_probe_goes_out_and_the_others_are_told_at_once() -> None:
    world = World()
    world.exchange.fail_with = ExchangeUnavailable("503")
    wanted = TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR)
    async with world.running():
        await world.reconciler.settle(BTC_5M, "BTC/USD", wanted, priority=Priority.LIVE)
        assert world.reconciler.retry_in("crypto.com") > 0
        for _ in range(20):
            report = await world.reconciler.settle(
                ETH_5M, "ETH/USD", wanted, priority=Priority.LIVE
            )
            assert {gap.reason for gap in report.gaps} == {GapReason.UNREACHABLE}
        assert len(world.exchange.asked) == 1
        world.exchange.fail_with = None
        await world.clock.advance(60_000)
        report = await world.reconciler.settle(ETH_5M, "ETH/USD", wanted, priority=Priority.LIVE)
    assert report.gaps == ()
    assert world.reconciler.retry_in("crypto.com") == 0


async def test_the_pause_of_an_outage_honours_what_the_exchange_asked_for() -> None:
    world = World()
    world.exchange.fail_with = ExchangeUnavailable("429", retry_after=120)
    async with world.running():
        await world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.LIVE)
        assert world.reconciler.retry_in("crypto.com") == pytest.approx(120)


async def test_storage_errors_reach_the_caller_and_the_worker_goes_on() -> None:
    world = World()
    world.raw.fail_with = StorageUnavailable("away")
    async with world.running():
        with pytest.raises(StorageUnavailable):
            await world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.LIVE)
        world.raw.fail_with = None
        report = await world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.LIVE)
    assert report.gaps == ()
    assert sum(run.length for run in report.fetched) == 288 * FIVE


async def test_jobs_that_are_left_at_the_end_are_told_so() -> None:
    world = World()
    world.exchange.gate.clear()
    async with world.running():
        waiting = asyncio.create_task(
            world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.LIVE)
        )
        await settle_loop()
    with pytest.raises(ExchangeUnavailable, match="shutting down"):
        await waiting


async def test_listeners_are_told_after_every_page() -> None:
    world = World()
    told: list[Series] = []

    async def listen(series: Series) -> None:
        told.append(series)

    world.reconciler.listen(listen)
    async with world.running():
        await world.reconciler.settle(BTC_5M, "BTC/USD", DAY_RANGE, priority=Priority.LIVE)
    assert told == [BTC_5M] * len(world.exchange.asked)


async def test_an_answer_that_makes_no_sense_is_no_outage_for_the_other_markets() -> None:
    world = World()
    world.exchange.fail_with = BadExchangeAnswer("half a document")
    wanted = TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR)
    async with world.running():
        report = await world.reconciler.settle(BTC_5M, "BTC/USD", wanted, priority=Priority.LIVE)
        assert report.error is world.exchange.fail_with
        world.exchange.fail_with = None
        report = await world.reconciler.settle(ETH_5M, "ETH/USD", wanted, priority=Priority.LIVE)
        assert report.gaps == ()
