"""HistoricalFetcher: storage first, the exchange for the rest, and what was fetched kept."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest

from domain.candle import Candle
from domain.gap import Gap, GapReason, joined
from domain.time_range import TimeRange
from errors import InvalidRequest
from exchange_source.interfaces import ExchangeUnavailable
from historical.columns import NOTHING
from historical.fetcher import MOST_SOURCE_PERIODS, HistoricalFetcher
from historical.interfaces import ResolvedSeries
from reconciliation.reconciler import Reconciler
from storage.manager import StorageManagerImpl
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import BTC_5M, FIVE, HOUR, T0, candle, candles, entry

RESOLVED = ResolvedSeries(BTC_5M, "BTC/USD")
TWO_HOURS = TimeRange(T0, T0 + 2 * HOUR)


def aggregate(parts: Sequence[Candle], timestamp: int) -> Candle:
    """One candle over several ascending ones."""
    return Candle(
        timestamp,
        parts[0].open,
        max(part.high for part in parts),
        min(part.low for part in parts),
        parts[-1].close,
        math.fsum(part.volume for part in parts),
    )


def fetcher(world: Collecting) -> HistoricalFetcher:
    return HistoricalFetcher(world.storage, world.reconciler, world.clock)


def asked_hours(world: Collecting) -> list[tuple[float, float]]:
    """What was asked for, in hours from ``T0`` on."""
    return [
        ((asked.range.start - T0) / HOUR, (asked.range.end - T0) / HOUR)
        for asked in world.exchange.asked
    ]


async def test_a_range_that_is_stored_comes_from_storage_and_asks_nobody() -> None:
    world = Collecting()
    async with world.running():
        await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
        asked = len(world.exchange.asked)
        page = await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
    assert len(world.exchange.asked) == asked
    assert list(page.candles) == candles(T0, 24)
    assert (page.from_storage, page.from_exchange) == (24, 0)


async def test_storage_is_read_for_exactly_the_closed_part_of_the_range() -> None:
    world = Collecting()
    now = world.clock.now_ms()
    async with world.running():
        page = await fetcher(world).fetch_data(RESOLVED, TimeRange(now - HOUR - 1, now + HOUR))
    assert page.range == TimeRange(T0 + 23 * HOUR + FIVE, T0 + 24 * HOUR)
    assert [item.timestamp for item in page.candles] == list(
        range(page.range.start, page.range.end, FIVE)
    )


async def test_a_range_without_closed_periods_is_empty() -> None:
    world = Collecting()
    now = world.clock.now_ms()
    async with world.running():
        page = await fetcher(world).fetch_data(RESOLVED, TimeRange(now, now + HOUR))
    assert page.candles == NOTHING
    assert page.gaps == ()
    assert world.exchange.asked == []


async def test_only_what_storage_lacks_is_fetched_and_it_is_kept() -> None:
    world = Collecting()
    async with world.running():
        await fetcher(world).fetch_data(RESOLVED, TimeRange(T0, T0 + HOUR))
        world.exchange.asked.clear()
        page = await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
    assert len(page.candles) == 24
    assert (page.from_storage, page.from_exchange) == (12, 12)
    assert [asked.range for asked in world.exchange.asked] == [TimeRange(T0 + HOUR, T0 + 2 * HOUR)]
    assert len(await world.stored()) == 24


async def test_of_a_range_with_stored_runs_inside_only_the_runs_between_are_asked_for() -> None:
    world = Collecting()
    world.exchange.history_page = 12
    world.assemble()
    async with world.running():
        for hours in ((1, 2), (3, 5)):
            stored = TimeRange(T0 + hours[0] * HOUR, T0 + hours[1] * HOUR)
            await fetcher(world).fetch_data(RESOLVED, stored)
        world.exchange.asked.clear()
        page = await fetcher(world).fetch_data(RESOLVED, TimeRange(T0, T0 + 6 * HOUR))
    assert list(page.candles) == candles(T0, 72)
    assert (page.from_storage, page.from_exchange) == (36, 36)
    assert asked_hours(world) == [(5, 6), (2, 3), (0, 1)]


async def test_clients_that_ask_for_the_same_at_once_cause_one_set_of_requests() -> None:
    world = Collecting()
    world.exchange.history_page = 12
    world.assemble()
    async with world.running():
        first, second = await asyncio.gather(
            *(fetcher(world).fetch_data(RESOLVED, TWO_HOURS) for _ in range(2))
        )
    assert asked_hours(world) == [(1, 2), (0, 1)]
    assert list(first.candles) == candles(T0, 24)
    assert second == first


async def test_a_client_that_leaves_ends_nothing_for_the_one_that_waits_for_the_same() -> None:
    world = Collecting()
    world.exchange.history_page = 12
    world.assemble()
    world.exchange.gate.clear()
    async with world.running():
        leaving, staying = (
            asyncio.create_task(fetcher(world).fetch_data(RESOLVED, TWO_HOURS)) for _ in range(2)
        )
        await settle_loop()
        leaving.cancel()
        await asyncio.wait([leaving])
        world.exchange.gate.set()
        page = await staying
    assert leaving.cancelled()
    assert asked_hours(world) == [(1, 2), (0, 1)]
    assert list(page.candles) == candles(T0, 24)


async def test_what_two_clients_ask_for_at_once_is_fetched_once_where_it_overlaps() -> None:
    world = Collecting()
    world.exchange.history_page = 12
    world.assemble()
    async with world.running():
        older, newer = await asyncio.gather(
            fetcher(world).fetch_data(RESOLVED, TimeRange(T0, T0 + 3 * HOUR)),
            fetcher(world).fetch_data(RESOLVED, TimeRange(T0 + HOUR, T0 + 4 * HOUR)),
        )
    assert sorted(asked_hours(world)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert list(older.candles) == candles(T0, 36)
    assert list(newer.candles) == candles(T0 + HOUR, 36)


async def test_a_document_that_is_gone_is_fetched_again_and_not_passed_over() -> None:
    world = Collecting()
    async with world.running():
        await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
        (lost,) = [path for path in world.raw.blobs if f"{T0 + FIVE}" in str(world.raw.blobs[path])]
        del world.raw.blobs[lost]
        page = await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
        assert list(page.candles) == candles(T0, 24)
        assert (page.from_storage, page.from_exchange) == (23, 1)
        del world.raw.blobs[lost]
        pages = [page async for page in fetcher(world).pages(RESOLVED, TWO_HOURS, periods=4)]
        assert [candle for page in pages for candle in page.candles] == candles(T0, 24)


async def test_what_overlaps_is_there_once_and_as_the_exchange_corrected_it() -> None:
    world = Collecting()
    await world.storage.store_raw_data(entry(T0 + 12 * FIVE))
    corrected = candle(T0 + 12 * FIVE, close=100)
    world.exchange.put("BTC/USD", "5m", [corrected])
    async with world.running():
        page = await fetcher(world).fetch_data(RESOLVED, TimeRange(T0 + 11 * FIVE, T0 + 14 * FIVE))
    assert [item.timestamp for item in page.candles] == [
        T0 + 11 * FIVE,
        T0 + 12 * FIVE,
        T0 + 13 * FIVE,
    ]
    assert (page.candles[1]) == corrected


async def test_when_the_exchange_is_away_what_is_stored_is_served_with_its_gaps() -> None:
    world = Collecting()
    await world.storage.store_batch([entry(T0 + at * FIVE) for at in range(12)])
    world.exchange.fail_with = ExchangeUnavailable("503")
    async with world.running():
        page = await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
    assert len(page.candles) == 12
    assert page.gaps == (Gap(TimeRange(T0 + HOUR, T0 + 2 * HOUR), GapReason.UNREACHABLE),)
    assert page.error is world.exchange.fail_with


async def test_periods_without_trades_are_told_as_gaps() -> None:
    world = Collecting()
    del world.exchange.candles["BTC/USD", "5m"][T0 + FIVE]
    async with world.running():
        page = await fetcher(world).fetch_data(RESOLVED, TWO_HOURS)
    assert page.gaps == (Gap(TimeRange(T0 + FIVE, T0 + 2 * FIVE), GapReason.NO_TRADES),)


async def test_an_exchange_that_does_not_answer_in_time_leaves_the_range_pending() -> None:
    world = Collecting()
    world.exchange.gate.clear()
    hasty = HistoricalFetcher(world.storage, world.reconciler, world.clock, patience_s=0.01)
    async with world.running():
        page = await hasty.fetch_data(RESOLVED, TWO_HOURS)
        world.exchange.gate.set()
    assert page.candles == NOTHING
    assert page.gaps == (Gap(TWO_HOURS, GapReason.PENDING),)


async def test_pages_cover_the_range_in_order() -> None:
    world = Collecting()
    async with world.running():
        pages = [page async for page in fetcher(world).pages(RESOLVED, TWO_HOURS, periods=10)]
    assert [len(page.candles) for page in pages] == [10, 10, 4]
    assert pages[1].range.start == T0 + 10 * FIVE


def test_gaps_that_touch_and_have_one_reason_are_one() -> None:
    first = Gap(TimeRange(0, 10), GapReason.PENDING)
    second = Gap(TimeRange(10, 20), GapReason.PENDING)
    third = Gap(TimeRange(20, 30), GapReason.NO_TRADES)
    assert joined([first, second, third]) == (Gap(TimeRange(0, 20), GapReason.PENDING), third)


class StoredMeanwhile(StorageManagerImpl):
    """Another process stores an entry between the look for gaps and the reading."""

    async def stored_ranges(self, *asked: Any, **options: Any) -> list[TimeRange]:
        found = await super().stored_ranges(*asked, **options)
        await StorageManagerImpl(self._storage).store_raw_data(entry(T0 + FIVE))
        return found


async def test_what_another_process_stores_meanwhile_is_a_row_and_no_gap() -> None:
    world = Collecting()
    await world.storage.store_batch([entry(T0), entry(T0 + 2 * FIVE)])
    other = await world.beside()
    reconciler = Reconciler(other.exchanges, StoredMeanwhile(other.raw), other.clock)
    reconciler.stand_by()
    page = await HistoricalFetcher(other.storage, reconciler, other.clock).fetch_data(
        RESOLVED, TimeRange(T0, T0 + 4 * FIVE)
    )
    assert [item.timestamp for item in page.candles] == [T0, T0 + FIVE, T0 + 2 * FIVE]
    assert page.gaps == (Gap(TimeRange(T0 + 3 * FIVE, T0 + 4 * FIVE), GapReason.PENDING),)


class TestPages:
    """Pages as they are used: what is settled is read ahead, a bounded part."""

    @staticmethod
    def watched(world: Collecting) -> tuple[HistoricalFetcher, list[TimeRange]]:
        """A fetcher, and the ranges that it reads from storage."""
        read: list[TimeRange] = []
        get = world.storage.get_raw_data_range

        async def get_raw_data_range(
            exchange: str, coin: str, start: int, end: int, **options: Any
        ) -> Any:
            read.append(TimeRange(start, end))
            return await get(exchange, coin, start, end, **options)

        world.storage.get_raw_data_range = get_raw_data_range  # type: ignore[method-assign,assignment]
        return fetcher(world), read

    async def test_pages_are_the_same_as_one_of_the_whole_range(self) -> None:
        world = Collecting()
        del world.exchange.candles["BTC/USD", "5m"][T0 + 77 * FIVE]
        whole = TimeRange(T0, T0 + 20 * HOUR)
        async with world.running():
            for _ in ("fetched", "stored"):
                pages = [page async for page in fetcher(world).pages(RESOLVED, whole, periods=7)]
                assert [page.range for page in pages] == [
                    TimeRange(start, min(start + 7 * FIVE, whole.end))
                    for start in range(whole.start, whole.end, 7 * FIVE)
                ]
                expected = await fetcher(world).fetch_data(RESOLVED, whole)
                assert [candle for page in pages for candle in page.candles] == list(
                    expected.candles
                )
                assert joined(gap for page in pages for gap in page.gaps) == expected.gaps
                assert all(
                    candle.timestamp in page.range for page in pages for candle in page.candles
                )

    async def test_while_nobody_takes_the_next_page_no_more_is_read(self) -> None:
        world = Collecting()
        whole = TimeRange(T0, T0 + 20 * HOUR)
        async with world.running():
            await fetcher(world).fetch_data(RESOLVED, whole)
            ahead, read = self.watched(world)
            async with aclosing(ahead.pages(RESOLVED, whole, periods=6)) as pages:
                first = await anext(pages)
                await settle_loop(100)
                assert first.range == TimeRange(T0, T0 + 6 * FIVE)
                assert read == [first.range, TimeRange(T0 + 6 * FIVE, T0 + 30 * FIVE)]
            assert len(read) == 2

    async def test_what_the_exchange_has_to_be_asked_for_is_not_asked_ahead(self) -> None:
        world = Collecting()
        async with world.running():
            ahead = fetcher(world)
            wanted = TimeRange(T0, T0 + 20 * HOUR)
            async with aclosing(ahead.pages(RESOLVED, wanted, periods=12)) as pages:
                await anext(pages)
                await settle_loop(100)
                assert [asked.range for asked in world.exchange.asked] == [TimeRange(T0, T0 + HOUR)]


class TestResampling:
    """An interval that the exchange does not offer, or does not give."""

    async def test_what_the_exchange_does_not_offer_is_made_of_the_longest_that_fits(self) -> None:
        world = Collecting()
        world.exchange.intervals = ("1m", "5m", "15m", "1h", "1d")
        hours = [aggregate(candles(T0 + at * HOUR, 12), T0 + at * HOUR) for at in range(24)]
        world.exchange.put("BTC/USD", "1h", hours)
        async with world.running():
            resolved = await world.manager.resolve("BTC", exchange=None, interval="4h")
            page = await fetcher(world).fetch_data(resolved, TimeRange(T0, T0 + 24 * HOUR))
            again = await fetcher(world).fetch_data(resolved, TimeRange(T0, T0 + 24 * HOUR))
        assert (resolved.offered, [str(item) for item in resolved.sources]) == (False, ["1h"])
        wanted = [aggregate(hours[at : at + 4], T0 + at * HOUR) for at in range(0, 24, 4)]
        # The market's day is not over by its grace: the last bucket is not proven yet.
        assert list(page.candles) == wanted[: len(page.candles)]
        assert len(page.candles) >= 5
        assert (page.from_storage, page.from_exchange) == (0, len(page.candles))
        assert {asked.interval for asked in world.exchange.asked} == {"1h"}
        assert (again.from_storage, again.from_exchange) == (len(page.candles), 0)

    async def test_a_collected_interval_is_the_source_before_any_other(self) -> None:
        world = Collecting()
        world.exchange.intervals = ("1m", "5m", "15m", "1d")
        async with world.running():
            await world.manager.add_coin("BTC", interval="5m")
            resolved = await world.manager.resolve("BTC", exchange=None, interval="1h")
        assert [str(item) for item in resolved.sources] == ["5m"]

    async def test_what_nothing_fits_into_is_refused(self) -> None:
        world = Collecting()
        world.exchange.intervals = ("5m", "1h")
        async with world.running():
            with pytest.raises(InvalidRequest, match="does not offer the interval 1m"):
                await world.manager.resolve("BTC", exchange=None, interval="1m")

    async def test_what_is_known_in_part_is_a_gap_of_the_longer_interval(self) -> None:
        world = Collecting()
        world.exchange.intervals = ("5m",)
        world.exchange.candles["BTC/USD", "5m"].clear()
        world.exchange.put("BTC/USD", "5m", candles(T0 + FIVE, 200, holes=[30]))
        async with world.running():
            resolved = await world.manager.resolve("BTC", exchange=None, interval="1h")
            page = await fetcher(world).fetch_data(resolved, TimeRange(T0, T0 + 4 * HOUR))
        assert page.gaps == (Gap(TimeRange(T0, T0 + HOUR), GapReason.NOT_OFFERED),)
        assert [item.timestamp for item in page.candles] == [T0 + at * HOUR for at in (1, 2, 3)]

    @pytest.mark.parametrize("trouble", ["away", "not offered any more"])
    async def test_what_the_exchange_does_not_give_is_made_of_what_is_stored_of_a_shorter_one(
        self, trouble: str
    ) -> None:
        world = Collecting()
        now = world.clock.now_ms()
        hour = TimeRange(now - now % HOUR - 4 * HOUR, now - now % HOUR)
        async with world.running():
            await world.manager.add_coin("BTC", interval="5m")
            await world.pass_time(60_000)
            if trouble == "away":
                world.exchange.fail_with = ExchangeUnavailable("gone")
            else:
                world.exchange.put("BTC/USD", "1h", [candle(hour.end)])
            resolved = await world.manager.resolve("BTC", exchange=None, interval="1h")
            page = await fetcher(world).fetch_data(resolved, hour)
        assert resolved.offered
        assert page.gaps == ()
        assert list(page.candles) == [
            aggregate(candles(at, 12), at) for at in range(hour.start, hour.end, HOUR)
        ]
        assert (page.from_storage, page.from_exchange) == (4, 0)

    async def test_a_page_is_made_of_a_bounded_number_of_candles(self) -> None:
        world = Collecting()
        world.exchange.intervals = ("1m",)
        async with world.running():
            resolved = await world.manager.resolve("BTC", exchange=None, interval="1w")
        week = 7 * 24 * 60
        assert fetcher(world).most_periods(resolved) == MOST_SOURCE_PERIODS // week
        assert fetcher(world).most_periods(RESOLVED) is None
