"""RealTimeProcessor: forming updates are told at once, settled entries are stored, then told."""

from __future__ import annotations

import pytest

from collection.hub import Hub
from collection.interfaces import ClosedCandle, FormingCandle, StatusTold, StreamEvent
from collection.processor import RealTimeProcessor
from domain.candle import CandleUpdate
from domain.series import Series
from reconciliation.series_state import SeriesState
from storage.interfaces import Change, StorageUnavailable, Stored
from storage.manager import StorageManagerImpl
from tests.support.clock import ManualClock
from tests.support.market import BTC_5M, FIVE, T0, candle, entry
from tests.support.storage import InMemoryStorage


class World:
    def __init__(self) -> None:
        self.clock = ManualClock(T0 + FIVE + 10_000)
        self.raw = InMemoryStorage()
        self.storage = StorageManagerImpl(self.raw)
        self.hub = Hub(self.clock, self.storage)
        self.state = SeriesState(BTC_5M, "BTC/USD", self.storage, self.clock)
        self.hub.open(self.state, T0)
        self.processor = RealTimeProcessor(self.storage, self.hub, self.clock)
        self.subscription = self.hub.subscribe(BTC_5M)
        self.woken: list[int] = []
        self.processor.route(BTC_5M, "BTC/USD", self.woken.append)


def update(timestamp: int) -> CandleUpdate:
    return CandleUpdate("crypto.com", "BTC/USD", "5m", candle(timestamp))


async def test_a_settled_entry_is_stored_with_all_that_it_says() -> None:
    world = World()
    await world.processor.process_realtime_entry(entry(T0))
    assert await world.storage.get_latest_entry("crypto.com", "BTC") == entry(T0)
    assert world.raw.writes == ["raw_data/crypto.com/BTC/2023/11/15/20231115000000.json"]


async def test_a_stored_entry_is_told_to_subscribers() -> None:
    world = World()
    await world.processor.process_realtime_entry(entry(T0))
    await world.hub.advance(BTC_5M)
    assert world.subscription.waiting() == [ClosedCandle(entry(T0))]


async def test_a_page_of_settled_entries_is_stored_and_told_in_order() -> None:
    world = World()
    await world.clock.advance(FIVE)
    stored = await world.processor.process_settled([entry(T0), entry(T0 + FIVE)])
    await world.hub.advance(BTC_5M)
    assert [item.entry for item in stored] == [entry(T0), entry(T0 + FIVE)]
    assert world.subscription.waiting() == [
        ClosedCandle(entry(T0)),
        ClosedCandle(entry(T0 + FIVE)),
    ]


async def test_a_forming_update_is_told_and_wakes_the_settling_but_is_not_stored() -> None:
    world = World()
    await world.processor.process_realtime_entry(update(T0 + FIVE))
    event: StreamEvent = await anext(world.subscription.events())
    assert event == FormingCandle(candle(T0 + FIVE))
    assert world.woken == [T0 + FIVE]
    assert world.raw.writes == []


async def test_two_coins_that_mean_one_market_are_both_told() -> None:
    world = World()
    exact = Series("crypto.com", "BTC/USD", BTC_5M.interval)
    woken: list[int] = []
    world.processor.route(exact, "BTC/USD", woken.append)
    await world.processor.process_realtime_entry(update(T0))
    assert (world.woken, woken) == ([T0], [T0])


async def test_updates_of_a_market_that_nobody_collects_are_ignored() -> None:
    world = World()
    world.processor.unroute(BTC_5M, "BTC/USD")
    await world.processor.process_realtime_entry(update(T0))
    assert world.woken == []
    assert world.hub.forming(BTC_5M) is None


async def test_when_storage_refuses_nothing_is_told_but_the_trouble() -> None:
    world = World()
    world.raw.fail_with = StorageUnavailable("disk full")
    with pytest.raises(StorageUnavailable):
        await world.processor.process_realtime_entry(entry(T0))
    with pytest.raises(StorageUnavailable):
        await world.processor.process_settled([entry(T0)])
    await world.hub.advance(BTC_5M)
    assert world.subscription.waiting() == [StatusTold("storage", "degraded", world.clock.now_ms())]


async def test_storage_that_works_again_is_told_once() -> None:
    world = World()
    world.raw.fail_with = StorageUnavailable("disk full")
    with pytest.raises(StorageUnavailable):
        await world.processor.process_realtime_entry(entry(T0))
    world.raw.fail_with = None
    await world.processor.process_realtime_entry(entry(T0))
    await world.processor.process_realtime_entry(entry(T0))
    states = [
        event.state for event in world.subscription.waiting() if isinstance(event, StatusTold)
    ]
    assert states == ["degraded", "connected"]


async def test_an_outage_behind_the_spool_is_told_and_so_is_its_end() -> None:
    world = World()
    world.processor.storage_changed(available=False)
    await world.processor.process_realtime_entry(entry(T0))
    world.processor.storage_changed(available=True)
    states = [
        event.state for event in world.subscription.waiting() if isinstance(event, StatusTold)
    ]
    assert states == ["degraded", "connected"]


async def test_a_correction_found_when_the_spool_is_emptied_is_told() -> None:
    world = World()
    await world.processor.process_realtime_entry(entry(T0))
    await world.hub.advance(BTC_5M)
    world.subscription.waiting()
    corrected = entry(T0).with_revision(2)
    world.processor.entry_settled(Stored(corrected, Change.REVISED))
    assert world.subscription.waiting() == [ClosedCandle(corrected)]
