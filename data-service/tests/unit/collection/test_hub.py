"""The hub: order, gaps, corrections, lateness, and readers that are slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from collection.hub import Hub
from collection.interfaces import (
    ClosedCandle,
    FormingCandle,
    GapTold,
    SlowConsumer,
    StatusTold,
    StreamEvent,
)
from collection.subscription import Subscription
from domain.entry import Entry
from domain.gap import Gap, GapReason
from domain.time_range import TimeRange
from exchange_source.interfaces import Priority
from reconciliation.series_state import SeriesState
from reconciliation.settler import asking, settle
from storage.interfaces import Change, Stored
from storage.manager import StorageManagerImpl
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.market import BTC_5M, FIVE, HOUR, MINUTE, T0, candle, candles, entry
from tests.support.storage import InMemoryStorage


class World:
    """A hub over a real series state: what is settled is stored, published and told."""

    def __init__(self, *, next_open: int = T0, queue_bound: int = 100) -> None:
        self.clock = ManualClock(T0)
        self.exchange = FakeExchange(self.clock)
        self.exchange.put("BTC/USD", "5m", candles(T0 - HOUR, 100))
        self.storage = StorageManagerImpl(InMemoryStorage())
        self.state = SeriesState(BTC_5M, "BTC/USD", self.storage, self.clock)
        self.hub = Hub(self.clock, self.storage, queue_bound=queue_bound)
        self.hub.open(self.state, next_open)
        self.state.use_sink(self.sink)

    async def sink(self, entries: Sequence[Entry]) -> list[Stored]:
        stored = await self.storage.store_batch(entries)
        for item in stored:
            self.hub.publish_stored(item)
        return stored

    async def settle(self, start: int = T0, end: int | None = None) -> None:
        await settle(
            self.state,
            TimeRange(start, self.clock.now_ms() if end is None else end),
            asking(self.exchange, Priority.LIVE),
            page_periods=298,
        )
        await self.hub.advance(BTC_5M)


def told(subscription: Subscription) -> list[tuple[int, str]]:
    """What is waiting, as (period, kind)."""
    found: list[tuple[int, str]] = []
    for event in subscription.waiting():
        if isinstance(event, ClosedCandle):
            late = " late" if event.late else ""
            found.append((event.entry.timestamp, f"r{event.entry.revision}{late}"))
        elif isinstance(event, GapTold):
            late = " late" if event.late else ""
            found.append((event.gap.range.start, f"{event.gap.reason}{late}"))
    return found


async def test_closed_candles_are_told_once_and_in_order() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(3 * FIVE + 10_000)
    await world.settle()
    await world.settle()
    assert told(subscription) == [(T0, "r1"), (T0 + FIVE, "r1"), (T0 + 2 * FIVE, "r1")]


async def test_a_subscription_says_which_closed_period_came_before_it() -> None:
    world = World()
    assert world.hub.subscribe(BTC_5M).last_closed == T0 - FIVE


async def test_an_empty_period_is_told_as_a_gap_in_its_place() -> None:
    world = World()
    del world.exchange.candles["BTC/USD", "5m"][T0 + FIVE]
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(3 * FIVE + 10_000)
    await world.settle()
    assert told(subscription) == [
        (T0, "r1"),
        (T0 + FIVE, "no_trades"),
        (T0 + 2 * FIVE, "r1"),
    ]


async def test_an_unsettled_period_holds_the_order_for_sixty_seconds_then_comes_late() -> None:
    world = World()
    for period in (T0, T0 + FIVE):
        world.exchange.publish_at["BTC/USD", "5m", period] = T0 + 2 * FIVE + 30_000
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    assert world.hub.next_deadline(BTC_5M) == T0 + FIVE + MINUTE
    assert told(subscription) == []
    await world.clock.advance(50_000)
    await world.hub.advance(BTC_5M)
    assert told(subscription) == [(T0, "pending")]
    await world.clock.advance(2 * FIVE)
    await world.settle()
    assert told(subscription) == [(T0, "r1 late"), (T0 + FIVE, "r1"), (T0 + 2 * FIVE, "r1")]


async def test_a_candle_found_where_no_trades_was_told_comes_late() -> None:
    world = World()
    withheld = world.exchange.candles["BTC/USD", "5m"].pop(T0)
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    assert told(subscription) == [(T0, "no_trades")]
    world.exchange.put("BTC/USD", "5m", [withheld])
    await world.clock.advance(MINUTE)
    await world.settle()
    assert told(subscription) == [(T0, "r1 late")]


async def test_a_period_told_as_open_and_proven_empty_later_is_told_again_late() -> None:
    world = World()
    recorded = world.exchange.candles["BTC/USD", "5m"]
    later = {at: recorded.pop(at) for at in list(recorded) if at >= T0}
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(FIVE + MINUTE)
    await world.settle()
    assert told(subscription) == [(T0, "pending")]
    recorded.update({at: value for at, value in later.items() if at > T0})
    await world.clock.advance(2 * FIVE)
    await world.settle()
    assert (T0, "no_trades late") in told(subscription)


async def test_a_correction_is_told_as_the_same_period_with_its_higher_revision() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    world.exchange.put("BTC/USD", "5m", [candle(T0, close=100.5)])
    await world.clock.advance(MINUTE)
    await world.settle()
    assert told(subscription) == [(T0, "r1"), (T0, "r2")]


async def test_older_backfill_is_history_and_is_not_told() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    await world.clock.advance(10_000)
    await world.settle(start=T0 - HOUR, end=T0)
    assert told(subscription) == []


async def test_what_was_stored_beyond_the_mark_by_another_run_is_read_and_told() -> None:
    world = World(next_open=T0 + FIVE)
    await world.clock.advance(3 * FIVE)
    await world.storage.store_batch([entry(T0 + FIVE), entry(T0 + 2 * FIVE)])
    subscription = world.hub.subscribe(BTC_5M)
    await world.settle()
    assert told(subscription) == [(T0 + FIVE, "r1"), (T0 + 2 * FIVE, "r1")]


async def test_forming_candles_keep_only_the_newest() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    world.hub.publish_forming(BTC_5M, candle(T0, close=100))
    world.hub.publish_forming(BTC_5M, candle(T0, close=101))
    events = subscription.events()
    assert await anext(events) == FormingCandle(candle(T0, close=101))


async def test_a_forming_candle_of_a_period_that_was_told_closed_is_dropped() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    world.hub.publish_forming(BTC_5M, candle(T0, close=100))
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    world.hub.publish_forming(BTC_5M, candle(T0, close=101))
    world.hub.publish_forming(BTC_5M, candle(T0 + FIVE))
    events = subscription.events()
    seen: list[StreamEvent] = [await anext(events), await anext(events)]
    assert isinstance(seen[0], ClosedCandle)
    assert seen[1] == FormingCandle(candle(T0 + FIVE))


async def test_a_new_reader_gets_the_forming_candle_but_not_one_of_a_closed_period() -> None:
    world = World()
    world.hub.publish_forming(BTC_5M, candle(T0, close=100))
    early = world.hub.subscribe(BTC_5M)
    assert await anext(early.events()) == FormingCandle(candle(T0, close=100))
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    late = world.hub.subscribe(BTC_5M)
    world.hub.publish_status(StatusTold("storage", "connected", T0))
    assert isinstance(await anext(late.events()), StatusTold)
    waiting = asyncio.ensure_future(anext(late.events()))
    await asyncio.sleep(0)
    assert not waiting.done()
    world.hub.publish_forming(BTC_5M, candle(T0 + FIVE))
    assert await waiting == FormingCandle(candle(T0 + FIVE))


async def test_a_slow_reader_is_told_so_and_does_not_slow_the_others() -> None:
    world = World(queue_bound=2)
    slow, fast = world.hub.subscribe(BTC_5M), world.hub.subscribe(BTC_5M)
    read: list[tuple[int, str]] = []
    for _ in range(4):
        await world.clock.advance(FIVE)
        await world.settle()
        read += told(fast)
    with pytest.raises(SlowConsumer, match="more than 2 closed candles"):
        await anext(slow.events())
    assert [at for at, _ in read] == [T0 + at * FIVE for at in range(4)]


async def test_a_status_reaches_the_subscribers_of_its_exchange() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    world.hub.publish_status(StatusTold("feed", "reconnecting", T0, "binance"))
    world.hub.publish_status(StatusTold("feed", "reconnecting", T0, "crypto.com"))
    world.hub.publish_status(StatusTold("storage", "degraded", T0))
    assert [
        event.component for event in subscription.waiting() if isinstance(event, StatusTold)
    ] == ["feed", "storage"]


async def test_who_subscribes_during_trouble_is_told_of_it_and_of_its_end() -> None:
    world = World()
    world.hub.publish_status(StatusTold("storage", "degraded", T0))
    world.hub.publish_status(StatusTold("feed", "reconnecting", T0, "crypto.com"))
    world.hub.publish_status(StatusTold("feed", "reconnecting", T0, "binance"))
    world.hub.publish_status(StatusTold("feed", "connected", T0, "crypto.com"))
    subscription = world.hub.subscribe(BTC_5M)
    world.hub.publish_status(StatusTold("storage", "connected", T0 + FIVE))
    assert subscription.waiting() == [
        StatusTold("storage", "degraded", T0),
        StatusTold("storage", "connected", T0 + FIVE),
    ]
    assert world.hub.subscribe(BTC_5M).waiting() == []


async def test_a_subscription_that_left_is_told_nothing() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    assert world.hub.subscriber_count(BTC_5M) == 1
    subscription.close()
    subscription.close()
    await world.clock.advance(FIVE + 10_000)
    await world.settle()
    assert told(subscription) == []
    assert world.hub.subscriber_count(BTC_5M) == 0


async def test_what_settles_where_a_replay_told_a_gap_comes_late_to_that_reader_alone() -> None:
    world = World()
    replayed, other = world.hub.subscribe(BTC_5M), world.hub.subscribe(BTC_5M)
    replayed.expect({T0 - FIVE: GapReason.PENDING})
    stored = Stored(entry(T0 - FIVE), Change.ADDED)
    world.hub.publish_stored(stored)
    world.hub.publish_stored(stored)
    assert told(replayed) == [(T0 - FIVE, "r1 late")]
    assert told(other) == []


async def test_a_reader_waits_until_something_is_told() -> None:
    world = World()
    subscription = world.hub.subscribe(BTC_5M)
    waiting = asyncio.ensure_future(anext(subscription.events()))
    await asyncio.sleep(0)
    assert not waiting.done()
    world.hub.publish_forming(BTC_5M, candle(T0))
    assert await waiting == FormingCandle(candle(T0))


def test_gaps_count_their_periods() -> None:
    gap = Gap(TimeRange(T0, T0 + 3 * FIVE), GapReason.PENDING)
    assert gap.count(BTC_5M.interval) == 3
