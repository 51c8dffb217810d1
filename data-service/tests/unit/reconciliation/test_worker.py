"""The settling worker: who goes first, what is shared, and how an outage is probed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from domain.gap import Gap, GapReason
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from exchange_source.interfaces import BadExchangeAnswer, ExchangeUnavailable, Priority
from reconciliation.interfaces import SettleReport
from reconciliation.reconciler import Reconciler
from reconciliation.worker import RUNNERS
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

    def ask(
        self, series: Series, wanted: TimeRange, priority: Priority
    ) -> asyncio.Task[SettleReport]:
        """A caller of its own."""
        return asyncio.create_task(
            self.reconciler.settle(series, f"{series.coin}/USD", wanted, priority=priority)
        )

    async def stored(self) -> list[int]:
        return await self.raw.list_timestamps("crypto.com", "BTC", 0, T0 + 100 * HOUR)

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


async def test_work_that_nobody_waits_for_any_more_ends_at_the_next_page() -> None:
    world = World()
    world.exchange.gate.clear()
    async with world.running():
        callers = [world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL) for _ in range(2)]
        await settle_loop()
        for caller in callers:
            caller.cancel()
        await settle_loop()
        world.exchange.gate.set()
        await settle_loop(100)
        # The page that was under way is kept, and no other is begun.
        assert [asked.range for asked in world.exchange.asked] == [
            TimeRange(T0 + 21 * HOUR, T0 + 24 * HOUR)
        ]
        assert len(await world.stored()) == 36
        report = await world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        assert report.gaps == ()


async def test_work_that_was_not_begun_when_everybody_left_asks_nothing() -> None:
    world = World()
    async with world.running():
        world.exchange.gate.clear()
        first = world.ask(BTC_5M, TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR), Priority.LIVE)
        left = world.ask(BTC_5M, DAY_RANGE, Priority.REQUEST)
        await settle_loop()
        left.cancel()
        world.exchange.gate.set()
        await first
        await settle_loop(100)
    assert len(world.exchange.asked) == 1


async def test_shared_work_goes_on_while_one_still_waits() -> None:
    world = World()
    world.exchange.gate.clear()
    async with world.running():
        first, second = (world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL) for _ in range(2))
        await settle_loop()
        first.cancel()
        await settle_loop()
        world.exchange.gate.set()
        report = await second
    assert report.gaps == ()
    assert len(world.exchange.asked) == 8


async def test_who_asks_for_work_that_everybody_had_left_takes_it_over() -> None:
    world = World()
    world.exchange.gate.clear()
    async with world.running():
        first = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        await settle_loop()
        first.cancel()
        await settle_loop()
        second = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        await settle_loop()
        world.exchange.gate.set()
        assert (await second).gaps == ()
    assert len(world.exchange.asked) == 8


async def test_a_process_that_stands_by_begins_no_page_of_what_was_asked_for_before() -> None:
    world = World()
    async with world.running():
        world.exchange.gate.clear()
        begun = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        await settle_loop()
        waiting = world.ask(BTC_5M, TimeRange(T0, T0 + HOUR), Priority.REQUEST)
        await settle_loop()
        world.reconciler.stand_by()
        world.exchange.gate.set()
        assert (await begun).gaps == (Gap(TimeRange(T0, T0 + 21 * HOUR), GapReason.PENDING),)
        assert (await waiting).gaps == (Gap(TimeRange(T0, T0 + HOUR), GapReason.PENDING),)
        assert len(world.exchange.asked) == 1


async def test_nothing_of_before_goes_on_when_a_process_collects_again_at_once() -> None:
    world = World()
    async with world.running():
        world.exchange.gate.clear()
        before = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        await settle_loop()
        world.reconciler.stand_by()
        world.reconciler.collect()
        world.exchange.gate.set()
        assert (await before).open != ()
        assert len(world.exchange.asked) == 1
        assert (await world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)).gaps == ()


async def test_what_follows_repairs_and_looks_at_a_series_at_once_asks_once() -> None:
    """The jobs that a reconnect queues: the live hour, everything wanted, and the looks due."""
    world = World()
    newest = TimeRange(T0 + 24 * HOUR - FIVE, T0 + 24 * HOUR)
    # Not published yet: it stays open whoever asks.
    world.exchange.publish_at["BTC/USD", "5m", newest.start] = T0 + 25 * HOUR
    async with world.running():
        await world.ask(BTC_5M, TimeRange(T0, T0 + 23 * HOUR), Priority.BACKFILL)
        world.exchange.asked.clear()
        reports = await asyncio.gather(
            world.ask(BTC_5M, TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR), Priority.LIVE),
            world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL),
            world.ask(BTC_5M, TimeRange(T0 + 20 * HOUR, T0 + 24 * HOUR), Priority.BACKFILL),
            world.ask(BTC_5M, TimeRange(T0 + 22 * HOUR, T0 + 24 * HOUR), Priority.REQUEST),
        )
        assert [report.gaps for report in reports] == [(Gap(newest, GapReason.PENDING),)] * 4
        assert [asked.range for asked in world.exchange.asked] == [
            TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR)
        ]
        # Who asks later than that answer is served afresh.
        await world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        assert [asked.range for asked in world.exchange.asked[1:]] == [newest]


async def test_in_an_outage_what_is_queued_together_sends_one_probe() -> None:
    world = World()
    world.exchange.fail_with = ExchangeUnavailable("503")
    async with world.running():
        for _ in range(2):
            await world.ask(ETH_5M, DAY_RANGE, Priority.LIVE)
        world.exchange.asked.clear()
        reports = await asyncio.gather(
            world.ask(BTC_5M, TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR), Priority.LIVE),
            world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL),
            world.ask(BTC_5M, TimeRange(T0 + 20 * HOUR, T0 + 24 * HOUR), Priority.BACKFILL),
        )
    assert all(isinstance(report.error, ExchangeUnavailable) for report in reports)
    assert len(world.exchange.asked) <= 1


async def test_of_many_books_asked_for_as_an_outage_begins_few_are_sent() -> None:
    world = World()
    markets = tuple(f"C{number}/USD" for number in range(100))
    world.exchange.markets = markets
    world.exchange.gate.clear()
    async with world.running():
        books = [
            asyncio.create_task(world.reconciler.order_book("crypto.com", market))
            for market in markets
        ]
        await settle_loop()
        world.exchange.fail_with = ExchangeUnavailable("connection refused")
        world.exchange.gate.set()
        told = await asyncio.gather(*books, return_exceptions=True)
    assert all(isinstance(error, ExchangeUnavailable) for error in told)
    assert world.exchange.requests["fetch_order_book"] <= RUNNERS + 1


async def test_endless_requests_do_not_keep_a_backfill_waiting_for_ever() -> None:
    world = World()
    async with world.running():
        backfill = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        requests = [
            world.ask(BTC_5M, TimeRange(T0 + at * FIVE, T0 + (at + 1) * FIVE), Priority.REQUEST)
            for at in range(288)
        ]
        await backfill
        assert not all(request.done() for request in requests)
        await asyncio.gather(*requests)


async def test_a_series_whose_page_takes_long_occupies_no_more_than_one_runner() -> None:
    world = World()
    async with world.running():
        world.exchange.gate.clear()
        slow = [
            world.ask(BTC_5M, TimeRange(T0 + at * HOUR, T0 + (at + 1) * HOUR), Priority.LIVE)
            for at in range(2 * RUNNERS)
        ]
        await settle_loop()
        other = world.ask(ETH_5M, TimeRange(T0, T0 + HOUR), Priority.BACKFILL)
        await settle_loop()
        assert [asked.market for asked in world.exchange.asked] == ["BTC/USD", "ETH/USD"]
        world.exchange.gate.set()
        await asyncio.gather(other, *slow)


async def test_no_page_begins_while_the_series_is_held_and_holding_waits_for_one() -> None:
    world = World()
    view = world.reconciler.view(BTC_5M, "BTC/USD")
    async with world.running():
        world.exchange.gate.clear()
        settling = world.ask(BTC_5M, DAY_RANGE, Priority.BACKFILL)
        await settle_loop()
        held, let_go = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with view.exclusive():
                held.set()
                await let_go.wait()

        holding = asyncio.create_task(hold())
        await settle_loop()
        assert not held.is_set()
        world.exchange.gate.set()
        await held.wait()
        # The page that was under way is stored, all of it.
        assert len(await world.stored()) == 36
        await settle_loop(100)
        assert len(world.exchange.asked) == 1
        # The other series are not held.
        await world.ask(ETH_5M, TimeRange(T0, T0 + HOUR), Priority.LIVE)
        let_go.set()
        await holding
        assert (await settling).gaps == ()
