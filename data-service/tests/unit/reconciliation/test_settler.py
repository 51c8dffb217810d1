"""settle(): what it asks, what it stores, what it leaves open and why."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs

from domain.candle import Candle
from domain.entry import Entry
from domain.gap import Gap, GapReason, joined
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable, Priority
from reconciliation.interfaces import SettleReport
from reconciliation.ledger import Ledger
from reconciliation.series_state import SeriesState
from reconciliation.settler import asking, settle
from storage.interfaces import StorageUnavailable
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility
from storage.spool import Spool
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.market import BTC_5M, DAY, FIVE, HOUR, MINUTE, T0, book, candle, candles
from tests.support.storage import InMemoryStorage


class World:
    """An exchange, a storage and a clock; ``restart`` forgets what only memory knew."""

    def __init__(self, now: int = T0 + 3 * HOUR) -> None:
        self.clock = ManualClock(now)
        self.exchange = FakeExchange(self.clock)
        self.raw = InMemoryStorage()
        self.restart()

    def restart(self) -> None:
        self.storage = StorageManagerImpl(self.raw)
        self.state = SeriesState(BTC_5M, "BTC/USD", self.storage, self.clock)

    def trade(self, count: int, *, start: int = T0, holes: tuple[int, ...] = ()) -> None:
        self.exchange.put("BTC/USD", "5m", candles(start, count, holes=holes))

    async def settle(self, start: int = T0, end: int | None = None) -> SettleReport:
        wanted = TimeRange(start, self.clock.now_ms() if end is None else end)
        report = await settle(
            self.state,
            wanted,
            asking(self.exchange, Priority.LIVE),
            page_periods=self.exchange.history_page,
        )
        still_open = [gap for gap in self.state.gaps(wanted) if gap.reason.is_open]
        assert self.state.open_gaps(wanted) == list(joined(still_open))
        return report

    async def stored(self) -> dict[int, Candle]:
        entries = await self.storage.get_raw_data_range("crypto.com", "BTC", 0, T0 + 100 * HOUR)
        return {entry.timestamp: entry.candle for entry in entries}


async def test_everything_closed_is_stored_and_the_forming_candle_is_not() -> None:
    world = World(now=T0 + 2 * FIVE + MINUTE)
    world.trade(10)
    report = await world.settle()
    assert sorted(await world.stored()) == [T0, T0 + FIVE]
    assert report.gaps == ()
    assert list(report.fetched) == [TimeRange(T0, T0 + 2 * FIVE)]


async def test_what_is_stored_is_not_asked_again() -> None:
    world = World()
    world.trade(40)
    await world.settle()
    await world.clock.advance(2 * HOUR)
    await world.settle(end=T0 + 3 * HOUR)
    world.exchange.asked.clear()
    report = await world.settle(end=T0 + 3 * HOUR)
    assert world.exchange.asked == []
    assert report.gaps == ()


async def test_pages_are_asked_newest_first() -> None:
    world = World()
    world.exchange.history_page = 12
    world.trade(40)
    await world.settle()
    starts = [asked.range.start for asked in world.exchange.asked]
    assert starts == [T0 + 2 * HOUR, T0 + HOUR, T0]


async def test_many_holes_within_a_page_cost_one_request() -> None:
    world = World()
    world.trade(36)
    await world.settle()
    await world.clock.advance(2 * HOUR)
    await world.settle(end=T0 + 3 * HOUR)
    for at in (3, 9, 20):
        del world.raw.blobs[
            StoragePathUtility.get_raw_data_path("crypto.com", "BTC", T0 + at * FIVE)
        ]
    world.restart()
    world.exchange.asked.clear()
    await world.settle(end=T0 + 3 * HOUR)
    assert len(await world.stored()) == 36
    assert [asked.range for asked in world.exchange.asked] == [
        TimeRange(T0 + 3 * FIVE, T0 + 21 * FIVE)
    ]


async def test_a_look_is_as_late_as_the_clock_of_the_exchange_says() -> None:
    world = World(now=T0 + HOUR + 65 * MINUTE)
    world.exchange.time_offset_ms = -30 * MINUTE
    world.trade(24)
    last = T0 + 11 * FIVE
    await world.settle(end=T0 + HOUR)
    # It ended 65 minutes ago, and 35 by the clock of the exchange, which may yet correct it.
    world.exchange.put("BTC/USD", "5m", [candle(last, close=200.0)])
    await world.clock.advance(31 * MINUTE)
    due = world.state.looks_due()
    assert due is not None
    assert last in due
    await world.settle(due.start, due.end)
    assert (await world.stored())[last] == candle(last, close=200.0)
    await world.clock.advance(2 * HOUR)
    assert world.state.looks_due() is None


async def test_a_quiet_period_is_empty_provisionally_and_final_after_a_second_proof() -> None:
    world = World()
    world.trade(40, holes=(5,))
    hole = TimeRange(T0 + 5 * FIVE, T0 + 6 * FIVE)
    report = await world.settle(end=T0 + HOUR)
    assert report.gaps == (Gap(hole, GapReason.NO_TRADES),)
    assert world.state.next_look_at() == world.clock.now_ms() + MINUTE

    await world.clock.advance(MINUTE)
    assert world.state.looks_due() == hole
    await world.settle(end=T0 + HOUR)
    assert world.state.looks_due() is None
    ledger = Ledger.from_bytes(await world.raw.read_blob("ledger/crypto.com/BTC/5m.json") or b"")
    assert ledger is not None
    assert list(ledger.empty) == [hole]


async def test_a_candle_found_where_an_empty_period_was_suspected_is_stored() -> None:
    world = World()
    world.trade(40, holes=(5,))
    await world.settle(end=T0 + HOUR)
    world.trade(40)
    await world.clock.advance(MINUTE)
    report = await world.settle(end=T0 + HOUR)
    assert report.gaps == ()
    assert T0 + 5 * FIVE in await world.stored()


async def test_a_candle_published_late_is_pending_until_it_is_there() -> None:
    world = World(now=T0 + HOUR + 10_000)
    world.trade(12)
    last = T0 + HOUR - FIVE
    world.exchange.publish_at[("BTC/USD", "5m", last)] = T0 + HOUR + 40_000
    report = await world.settle()
    assert report.gaps == (Gap(TimeRange(last, T0 + HOUR), GapReason.PENDING),)
    await world.clock.advance(30_000)
    assert (await world.settle()).gaps == ()


async def test_a_correction_becomes_the_next_revision_at_the_second_look() -> None:
    world = World(now=T0 + HOUR + 10_000)
    world.trade(14)
    last = T0 + HOUR - FIVE
    await world.settle()
    world.exchange.put("BTC/USD", "5m", [candle(last, close=100.25)])
    await world.clock.advance(MINUTE)
    await world.settle()
    entry = await world.storage.get_latest_entry("crypto.com", "BTC")
    assert entry is not None
    assert (entry.candle.close, entry.revision) == (100.25, 2)


async def test_the_looks_come_after_one_five_and_sixty_minutes_and_then_end() -> None:
    world = World(now=T0 + FIVE + 10_000)
    world.trade(30)
    end = T0 + FIVE
    await world.settle(end=end)
    for minutes in (1, 5, 60):
        assert world.state.next_look_at() == end + minutes * MINUTE
        await world.clock.advance(end + minutes * MINUTE - world.clock.now_ms())
        await world.settle(end=end)
    assert world.state.next_look_at() is None


async def test_a_look_is_owed_after_a_restart_however_long_ago_it_was() -> None:
    world = World(now=T0 + FIVE + 10_000)
    world.trade(2_000)
    await world.settle()
    world.exchange.put("BTC/USD", "5m", [candle(T0, close=100.25)])
    await world.clock.advance(30 * HOUR)
    world.restart()
    await world.settle()
    assert (await world.stored())[T0].close == 100.25


async def test_without_a_ledger_everything_stored_is_owed_a_look() -> None:
    world = World(now=T0 + 6 * HOUR)
    world.trade(200)
    await world.settle()
    await world.clock.advance(2 * HOUR)
    await world.settle(end=T0 + 6 * HOUR)
    world.raw.blobs.pop("ledger/crypto.com/BTC/5m.json")
    world.restart()
    await world.state.load(TimeRange(T0, T0 + 6 * HOUR))
    assert world.state.looks_due() == TimeRange(T0, T0 + 6 * HOUR)
    world.exchange.asked.clear()
    await world.settle(end=T0 + 6 * HOUR)
    assert world.state.next_look_at() is None
    assert len(world.exchange.asked) == 1


async def test_without_a_ledger_the_newest_daily_candle_is_owed_its_look_too() -> None:
    clock = ManualClock(T0 + 10 * DAY + 2 * HOUR)
    exchange = FakeExchange(clock)
    daily = Series("crypto.com", "BTC", Interval.parse("1d"))
    exchange.put("BTC/USD", "1d", candles(T0, 20, step=DAY))
    storage = StorageManagerImpl(InMemoryStorage())
    provisional = candle(T0 + 9 * DAY, close=1.5)
    await storage.store_raw_data(Entry(series=daily, market="BTC/USD", candle=provisional))
    state = SeriesState(daily, "BTC/USD", storage, clock)
    await settle(
        state,
        TimeRange(T0, T0 + 10 * DAY),
        asking(exchange, Priority.LIVE),
        page_periods=298,
    )
    newest = await storage.get_latest_entry("crypto.com", "BTC", interval="1d")
    assert newest is not None
    assert newest.candle == candle(T0 + 9 * DAY)
    assert state.next_look_at() is None


async def test_what_the_exchange_does_not_offer_is_told_so_and_not_asked_on_and_on() -> None:
    world = World(now=T0 + 10 * HOUR)
    world.trade(200, start=T0 + 5 * HOUR)
    world.exchange.history_page = 20
    report = await world.settle()
    assert report.gaps == (Gap(TimeRange(T0, T0 + 5 * HOUR), GapReason.NOT_OFFERED),)
    assert len(world.exchange.asked) == 4


async def test_a_walk_through_times_long_before_the_oldest_candle_asks_once_an_hour() -> None:
    world = World(now=T0 + 100 * HOUR)
    world.trade(20, start=T0 + 98 * HOUR)
    for at in range(20):
        report = await world.settle(start=T0 + at * HOUR, end=T0 + (at + 1) * HOUR)
        assert {gap.reason for gap in report.gaps} == {GapReason.NOT_OFFERED}
    assert len(world.exchange.asked) == 1
    await world.clock.advance(HOUR)
    await world.settle(start=T0, end=T0 + HOUR)
    assert len(world.exchange.asked) == 2


async def test_an_exchange_that_cannot_be_asked_leaves_the_periods_unreachable() -> None:
    world = World()
    world.trade(40)
    world.exchange.fail_with = ExchangeUnavailable("503")
    report = await world.settle()
    assert report.error is world.exchange.fail_with
    assert {gap.reason for gap in report.gaps} == {GapReason.UNREACHABLE}
    assert await world.stored() == {}
    world.exchange.fail_with = None
    assert (await world.settle()).gaps == ()


async def test_storage_that_cannot_be_listed_means_unknown_and_asks_nobody() -> None:
    world = World()
    world.trade(40)
    world.raw.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await world.settle()
    assert world.exchange.asked == []


async def test_what_closes_while_storage_is_away_is_settled_into_the_spool(tmp_path: Path) -> None:
    world = World(now=T0 + HOUR + 10_000)
    world.trade(40)
    spool = Spool(tmp_path)
    await spool.open()
    world.storage = StorageManagerImpl(world.raw, spool=spool)
    world.state = SeriesState(BTC_5M, "BTC/USD", world.storage, world.clock)
    await world.settle()
    world.raw.fail_with = StorageUnavailable("away")
    with capture_logs() as logs:
        for _ in range(3):
            await world.clock.advance(FIVE)
            assert (await world.settle()).gaps == ()
        assert spool.timestamps(BTC_5M) == [T0 + HOUR + step * FIVE for step in range(3)]
        world.raw.fail_with = None
        await world.state.save()
    told = [log["event"] for log in logs if log["event"].startswith("ledger")]
    assert told == ["ledger_not_kept", "ledger_kept_again"]
    assert sorted(await world.stored()) == [T0 + step * FIVE for step in range(15)]
    await spool.close()


async def test_an_entry_that_could_not_be_stored_stays_missing() -> None:
    world = World()
    world.trade(40)
    await world.state.load(TimeRange(T0, T0 + 3 * HOUR))
    world.raw.fail_with = StorageUnavailable("full")
    with pytest.raises(StorageUnavailable):
        await world.settle()
    world.raw.fail_with = None
    assert (await world.settle()).gaps == ()
    assert len(await world.stored()) == 36


async def test_a_candle_that_the_exchange_drops_later_stays_stored() -> None:
    world = World(now=T0 + HOUR + 10_000)
    world.trade(40)
    await world.settle()
    dropped = T0 + HOUR - 2 * FIVE
    del world.exchange.candles["BTC/USD", "5m"][dropped]
    await world.clock.advance(2 * HOUR)
    await world.settle(end=T0 + HOUR)
    assert dropped in await world.stored()
    # It is looked for again, the more rarely the older it is.
    assert world.state.next_look_at() == world.clock.now_ms() + (2 * HOUR + FIVE + 10_000) // 60
    world.trade(400, start=T0 + HOUR)
    await world.clock.advance(24 * HOUR)
    await world.settle(end=T0 + HOUR)
    assert world.state.next_look_at() == world.clock.now_ms() + (26 * HOUR + FIVE + 10_000) // 60
    # Whenever it is told again, that is its last look.
    world.trade(400)
    await world.clock.advance(HOUR)
    await world.settle(end=T0 + HOUR)
    assert world.state.next_look_at() is None


async def test_what_the_exchange_offers_no_more_is_not_looked_for_after_a_day() -> None:
    world = World(now=T0 + HOUR + 10_000)
    world.trade(600)
    await world.settle()
    world.exchange.history_ms = 2 * HOUR
    await world.clock.advance(20 * HOUR)
    await world.settle(end=T0 + HOUR)
    assert world.state.next_look_at() == world.clock.now_ms() + HOUR
    await world.clock.advance(6 * HOUR)
    await world.settle(end=T0 + HOUR)
    assert world.state.next_look_at() is None
    assert len(await world.stored()) == 12


async def test_the_book_at_the_close_is_stored_with_its_candle() -> None:
    world = World(now=T0 + FIVE + 10_000)
    world.trade(10)
    world.state.note_book(T0, book(T0 + FIVE - 50))
    await world.settle()
    entry = await world.storage.get_latest_entry("crypto.com", "BTC")
    assert entry is not None
    assert entry.order_book == book(T0 + FIVE - 50)
    assert entry.source == "stream"
    assert world.state.booked_count(TimeRange(T0, T0 + FIVE)) == 1


async def test_a_market_that_the_exchange_refuses_is_an_error_of_the_report() -> None:
    world = World()
    world.exchange.markets = ()
    report = await world.settle()
    assert isinstance(report.error, ExchangeRefused)


@pytest.mark.parametrize("away", [False, True])
async def test_a_page_proves_what_its_periods_prove_one_by_one(away: bool, tmp_path: Path) -> None:
    """Of old and young periods, with and without books, stored before, corrected, and empty, and
    also while storage is away."""
    everything = TimeRange(T0, T0 + 2 * HOUR)
    known: list[tuple[list[tuple[int, TimeRange | None]], bytes | None]] = []
    for page in (36, 1):
        # The looks at what ended an hour ago or longer are over.
        world = World(now=everything.end + 10_000)
        spool = Spool(tmp_path / str(page))
        await spool.open()
        world.storage = StorageManagerImpl(world.raw, spool=spool)
        world.exchange.history_page = page
        world.trade(40, holes=(5, 20))
        world.state = SeriesState(BTC_5M, "BTC/USD", world.storage, world.clock)
        for at in (10, 13):
            world.state.note_book(T0 + at * FIVE, book(T0 + (at + 1) * FIVE))
        await world.settle(T0 + 8 * FIVE, T0 + 16 * FIVE)
        corrected = [candle(T0 + at * FIVE, close=100.25) for at in (9, 14, 15)]
        world.exchange.put("BTC/USD", "5m", corrected)
        # The books in hand are lost.
        world.state = SeriesState(BTC_5M, "BTC/USD", world.storage, world.clock)
        await world.state.load(everything)
        await world.clock.advance(6 * MINUTE)
        world.raw.fail_with = StorageUnavailable("away") if away else None
        looks: list[tuple[int, TimeRange | None]] = []
        await world.settle(end=everything.end)
        while (due := world.state.next_look_at()) is not None and len(looks) < 40:
            looks.append((due, world.state.looks_due()))
            await world.clock.advance(max(MINUTE, due - world.clock.now_ms()))
            await world.settle(end=everything.end)
        world.raw.fail_with = None
        await world.state.save()
        assert world.state.booked_count(everything) == 2
        known.append((looks, await world.raw.read_blob("ledger/crypto.com/BTC/5m.json")))
        await spool.close()
    assert known[0] == known[1]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.integers(1, 40)),
        st.tuples(st.just("correct"), st.integers(1, 30)),
        st.tuples(st.just("late"), st.integers(1, 20)),
        st.tuples(st.just("exchange"), st.booleans()),
        st.tuples(st.just("storage"), st.booleans()),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, holes=st.sets(st.integers(0, 90), max_size=12))
def test_any_order_of_faults_corrections_and_restarts_ends_in_the_exchanges_series(
    steps: list[tuple[str, int]], holes: set[int]
) -> None:
    stored, listed = asyncio.run(_story(steps, holes))
    assert stored == listed


async def _story(
    steps: list[tuple[str, int]], holes: set[int]
) -> tuple[dict[int, Candle], dict[int, Candle]]:
    """What is stored at the end, and what the exchange says of the same periods."""
    world = World(now=T0 + 10 * FIVE)
    world.trade(200, holes=tuple(holes))
    for what, amount in steps:
        await _step(world, what, amount)
        with suppress(StorageUnavailable):
            await world.settle()
    world.exchange.fail_with = world.raw.fail_with = None
    end = BTC_5M.interval.floor(world.clock.now_ms())
    # Long enough for every look and second proof.
    for _ in range(4):
        await world.clock.advance(HOUR)
        await world.settle(end=end)
    listed = world.exchange.candles["BTC/USD", "5m"]
    return await world.stored(), {at: value for at, value in listed.items() if at < end}


async def _step(world: World, what: str, amount: int) -> None:
    listed = world.exchange.candles["BTC/USD", "5m"]
    newest = BTC_5M.interval.floor(world.clock.now_ms()) - FIVE
    if what == "pass":
        await world.clock.advance(amount * MINUTE)
    elif what == "correct":
        # Exchanges correct what is young: within an hour of its end.
        period = max(T0, newest - (amount % 10) * FIVE)
        if period in listed:
            listed[period] = replace(listed[period], volume=float(amount))
    elif what == "late":
        world.exchange.publish_at["BTC/USD", "5m", newest + FIVE] = (
            newest + 2 * FIVE + amount * MINUTE
        )
    elif what == "exchange":
        world.exchange.fail_with = ExchangeUnavailable("503") if amount else None
    elif what == "storage":
        world.raw.fail_with = StorageUnavailable("away") if amount else None
    else:
        world.restart()
