"""What the collectors make of what the parts of the service count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from api.metrics import (
    LAG_EVERY_S,
    ApiMetrics,
    CollectionCollector,
    ExchangeCollector,
    StorageCollector,
    watch_loop,
)
from collection.channels import QUEUE_BOUND
from collection.interfaces import (
    FEED_PHASES,
    Channel,
    FormingCandle,
    StreamEvent,
    TradesTold,
)
from domain.trade import Trade
from exchange_source.interfaces import ExchangeUnavailable, Priority
from storage.interfaces import StorageStatus, StorageTotals, StorageUnavailable
from storage.manager import StorageManagerImpl
from storage.spool import Spool
from tests.support.clock import ManualClock, settle_loop
from tests.support.collecting import Collecting
from tests.support.entries import FIVE_MINUTES, NOON, make_entry
from tests.support.exchange import FakeExchange
from tests.support.market import FIVE, T0
from tests.support.storage import InMemoryStorage


class Scrape:
    """What a collector shows."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"cb_trade_{name}", labels)


@dataclass
class Storing:
    status: StorageStatus = field(default_factory=StorageStatus)
    totals: StorageTotals = field(default_factory=StorageTotals)


def test_storage_that_is_away_and_what_waits_for_it_show() -> None:
    status = StorageStatus(away="the line is cut", stuck=("a",), spooled=3, spooled_bytes=900)
    scrape = Scrape(StorageCollector(Storing(status), lambda: True))
    assert {
        name: scrape.value(name)
        for name in (
            "collecting",
            "storage_available",
            "storage_stuck_series",
            "spool_entries",
            "spool_bytes",
            "spool_full",
        )
    } == {
        "collecting": 1,
        "storage_available": 0,
        "storage_stuck_series": 1,
        "spool_entries": 3,
        "spool_bytes": 900,
        "spool_full": 0,
    }


async def test_entries_are_counted_by_what_they_did_and_bytes_by_what_was_written() -> None:
    backend = InMemoryStorage()
    storage = StorageManagerImpl(backend)
    scrape = Scrape(StorageCollector(storage, lambda: True))
    entry = make_entry()
    await storage.store_batch([entry, make_entry(NOON + FIVE_MINUTES)])
    await storage.store_batch([entry])
    await storage.store_raw_data(make_entry(book=True))
    await storage.store_raw_data(make_entry(close=101.0))
    changes = {"added": 2, "unchanged": 1, "book_added": 1, "revised": 1}
    for change, count in changes.items():
        labels = {"exchange": "crypto.com", "interval": "5m", "change": change}
        assert scrape.value("entries_stored_total", **labels) == count
    documents = [content for path, content in backend.blobs.items() if path.endswith(".json")]
    written = scrape.value("stored_bytes_total", exchange="crypto.com")
    assert written is not None
    assert written > sum(map(len, documents))
    assert scrape.value("store_seconds_count") == 4
    assert scrape.value("store_seconds_bucket", le="+Inf") == 4


async def test_what_waits_in_the_spool_is_taken_and_not_written_and_what_finds_no_room_is_refused(
    tmp_path: Path,
) -> None:
    backend = InMemoryStorage()
    spool = Spool(tmp_path, most_entries=1)
    await spool.open()
    storage = StorageManagerImpl(backend, spool=spool)
    scrape = Scrape(StorageCollector(storage, lambda: True))
    backend.fail_with = StorageUnavailable("the line is cut")
    await storage.store_raw_data(make_entry(source="stream"))
    with pytest.raises(StorageUnavailable):
        await storage.store_raw_data(make_entry(NOON + FIVE_MINUTES, source="stream"))
    labels = {"exchange": "crypto.com", "interval": "5m", "change": "added"}
    assert scrape.value("entries_stored_total", **labels) == 1
    assert scrape.value("entries_refused_total", exchange="crypto.com") == 1
    assert scrape.value("stored_bytes_total", exchange="crypto.com") is None
    await spool.close()


@pytest.fixture
async def world() -> AsyncIterator[Collecting]:
    world = Collecting()
    async with world.running():
        yield world


AWAY = ExchangeUnavailable("connection lost")
ON = {"exchange": "crypto.com"}


def state_of(scrape: Scrape) -> list[str]:
    """The states that a feed is said to be in."""
    return [name for name in FEED_PHASES if scrape.value("feed_state", **ON, state=name) == 1]


async def test_the_feed_of_an_exchange_of_which_nothing_is_wanted_is_idle(
    world: Collecting,
) -> None:
    scrape = Scrape(CollectionCollector(world.manager))
    assert state_of(scrape) == ["idle"]
    assert scrape.value("feed_lag_seconds", **ON) is None


async def test_a_feed_that_is_lost_and_heard_again_is_counted_and_its_silence_told(
    world: Collecting,
) -> None:
    scrape = Scrape(CollectionCollector(world.manager))
    await world.manager.add_coin("BTC")
    await settle_loop()
    assert state_of(scrape) == ["starting"]
    await world.update(world.clock.now_ms() // FIVE * FIVE)
    assert state_of(scrape) == ["connected"]
    assert scrape.value("feed_lag_seconds", **ON) == 0
    assert scrape.value("feed_streams", **ON) == 2
    world.exchange.fail_with = AWAY
    world.exchange.end_streams(AWAY)
    await world.pass_time(20_000)
    assert state_of(scrape) == ["reconnecting"]
    assert scrape.value("feed_lag_seconds", **ON) == 20
    assert scrape.value("feed_losses_total", **ON) == 1
    assert scrape.value("feed_reconnects_total", **ON) == 0
    failures = scrape.value("feed_stream_failures_total", **ON)
    assert failures is not None
    assert failures > 2
    world.exchange.fail_with = None
    await world.pass_time(60_000)
    await world.update(world.clock.now_ms() // FIVE * FIVE)
    assert state_of(scrape) == ["connected"]
    assert scrape.value("feed_lag_seconds", **ON) == 0
    assert scrape.value("feed_reconnects_total", **ON) == 1


async def test_a_feed_that_went_mute_is_silent_for_as_long_as_nothing_was_heard(
    world: Collecting,
) -> None:
    scrape = Scrape(CollectionCollector(world.manager))
    await world.manager.add_coin("BTC")
    await world.update(world.clock.now_ms() // FIVE * FIVE)
    await world.pass_time(180_000)
    assert state_of(scrape) == ["reconnecting"]
    assert scrape.value("feed_lag_seconds", **ON) == 180


async def test_gaps_show_while_they_are_open(world: Collecting) -> None:
    scrape = Scrape(CollectionCollector(world.manager))
    pending = {**ON, "interval": "5m", "reason": "pending"}
    unreachable = {**ON, "interval": "5m", "reason": "unreachable"}
    assert scrape.value("gaps_open", **pending) is None
    await world.manager.add_coin("BTC")
    await world.pass_time(20_000)
    assert scrape.value("gaps_open", **pending) == 0
    assert scrape.value("gaps_open", **unreachable) == 0
    world.exchange.fail_with = AWAY
    await world.pass_time(3 * FIVE)
    assert scrape.value("gaps_open", **unreachable) == 1
    missing = [scrape.value("gap_periods_open", **labels) for labels in (pending, unreachable)]
    # The newest was not asked for yet.
    assert missing == [1, 2]
    world.exchange.fail_with = None
    await world.pass_time(120_000)
    assert scrape.value("gaps_open", **unreachable) == 0
    assert scrape.value("gap_periods_open", **pending) == 0


def test_requests_show_by_exchange_and_priority() -> None:
    exchange = FakeExchange(ManualClock())
    exchange.totals.sent[Priority.BACKFILL] = 7
    exchange.totals.failed[Priority.BACKFILL] = 2
    exchange.totals.waited_s[Priority.BACKFILL].add(0.3)
    exchange.totals.turned_away[Priority.LIVE] = 1
    exchange.totals.pauses, exchange.totals.waiting = 3, 4
    scrape = Scrape(ExchangeCollector([exchange]))
    backfill = {**ON, "priority": "backfill"}
    assert scrape.value("exchange_requests_total", **backfill) == 7
    assert scrape.value("exchange_requests_total", **ON, priority="live") == 0
    assert scrape.value("exchange_request_failures_total", **backfill) == 2
    assert scrape.value("rate_limit_wait_seconds_bucket", **backfill, le="0.1") == 0
    assert scrape.value("rate_limit_wait_seconds_bucket", **backfill, le="0.5") == 1
    assert scrape.value("rate_limit_wait_seconds_sum", **backfill) == 0.3
    assert scrape.value("rate_limit_turned_away_total", **ON, priority="live") == 1
    assert scrape.value("exchange_pauses_total", **ON) == 3
    assert scrape.value("rate_limit_waiting", **ON) == 4


def trade(number: int) -> Trade:
    return Trade(str(number), T0 + number, 100.0, 0.5, "buy")


async def test_readers_show_by_channel_with_what_waits_and_what_was_not_told_as_it_came(
    world: Collecting,
) -> None:
    scrape = Scrape(CollectionCollector(world.manager))
    await world.manager.add_coin("BTC")
    await settle_loop()
    # Nothing is told of a feed that is as it should be.
    await world.update(world.clock.now_ms() // FIVE * FIVE)

    async def begin(channel: Channel) -> AsyncGenerator[StreamEvent, None]:
        stream = world.manager.stream_realtime_data("BTC", channel=channel)
        await stack.enter_async_context(aclosing(stream))
        await anext(stream)
        await settle_loop()
        return stream

    def unsent(channel: str, policy: str) -> float | None:
        return scrape.value("outbox_unsent_total", channel=channel, policy=policy)

    async with AsyncExitStack() as stack:
        trades = await begin(Channel.TRADES)
        await begin(Channel.TRADES)
        candles = await begin(Channel.CANDLES)
        assert scrape.value("subscribers", channel="trades") == 2
        assert scrape.value("subscribers", channel="candles") == 1
        assert scrape.value("subscribers", channel="ticker") == 0
        await world.exchange.push_trades("BTC/USD", trade(1), trade(2))
        await world.exchange.push_trades("BTC/USD", trade(3))
        assert scrape.value("outbox_depth", channel="trades") == 6
        assert scrape.value("outbox_deepest", channel="trades") == 3
        assert await anext(trades) == TradesTold((trade(1), trade(2), trade(3)))
        assert unsent("trades", "merged") == 1
        assert scrape.value("outbox_depth", channel="trades") == 3
        for _ in range(3):
            await world.update(world.clock.now_ms() // FIVE * FIVE)
        # It began with one.
        assert unsent("candles", "replaced") == 3
        assert isinstance(await anext(candles), FormingCandle)
        flood = [trade(number) for number in range(10, 10 + QUEUE_BOUND)]
        await world.exchange.push_trades("BTC/USD", *flood)
        # One read, and has room; the other lost what it had and what came.
        assert unsent("trades", "dropped") == 3 + QUEUE_BOUND
        assert scrape.value("outbox_depth", channel="trades") == QUEUE_BOUND
    assert scrape.value("subscribers", channel="trades") == 0


class BusyClock(ManualClock):
    """Wakes who sleeps real time too late by ``late_s``."""

    late_s = 0.0
    _lost_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self._lost_s

    async def sleep_real(self, seconds: float) -> None:
        await super().sleep_real(seconds)
        self._lost_s += self.late_s


async def test_how_late_the_loop_wakes_shows() -> None:
    metrics = ApiMetrics(CollectorRegistry())
    clock = BusyClock()
    watching = asyncio.create_task(watch_loop(clock, metrics.loop_lag))
    await settle_loop()
    await clock.advance(round(LAG_EVERY_S * 1000))
    clock.late_s = 2.0
    await clock.advance(round(LAG_EVERY_S * 1000))
    watching.cancel()
    value = metrics.registry.get_sample_value
    assert value("cb_trade_event_loop_lag_seconds_count") == 2
    assert value("cb_trade_event_loop_lag_seconds_bucket", {"le": "1.0"}) == 1
    assert value("cb_trade_event_loop_lag_seconds_sum") == pytest.approx(2.0)
