"""What is stored against what the exchange says: what is told, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from domain.time_range import TimeRange
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    Priority,
)
from reconciliation.verifier import MOST_TOLD, Kind, Verdict, Verifier
from storage.interfaces import StorageUnavailable
from storage.path_utility import StoragePathUtility
from storage.reader import StoredDocuments
from storage.root_stamp import write_stamp
from target_management.interfaces import Target
from tests.support.clock import ManualClock, settle_loop
from tests.support.exchange import FakeExchange
from tests.support.market import FIVE, HOUR, MINUTE, T0, candle, candles, entry
from tests.support.storage import InMemoryStorage

TARGET = Target(
    coin="BTC",
    exchange="crypto.com",
    exchange_id="cryptocom",
    market="BTC/USD",
    interval="5m",
    enabled=True,
    since=T0,
    created_at=T0,
    last_updated=T0,
)
NOW = T0 + 2 * HOUR + MINUTE
COUNT = 24


class Eventful(FakeExchange):
    """An exchange with something happening right after its answers: ``after`` is awaited with
    the number of the question."""

    after: Callable[[int], Awaitable[None]]

    async def fetch_historical_data(
        self,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        answer = await super().fetch_historical_data(
            market, interval, start, end, priority=priority
        )
        await self.after(self.requests["fetch_historical_data"])
        return answer


class World:
    """An exchange with two hours of candles, all of them stored."""

    def __init__(self, spool_folder: Path) -> None:
        self.clock = ManualClock(NOW)
        self.exchange = FakeExchange(self.clock)
        self.exchange.put("BTC/USD", "5m", candles(T0, 100))
        self.raw = InMemoryStorage()
        self.documents = StoredDocuments(self.raw, spool_folder)
        self.verifier = Verifier(self.documents, {"crypto.com": self.exchange}, self.clock)

    def eventful(self, after: Callable[[int], Awaitable[None]], *, page: int = 298) -> Eventful:
        """The same exchange, with something happening."""
        exchange = Eventful(self.clock, candles=self.exchange.candles, history_page=page)
        exchange.after = after
        self.verifier = Verifier(self.documents, {"crypto.com": exchange}, self.clock)
        return exchange

    async def store(self, *periods: int, close: float | None = None) -> None:
        for period in periods:
            document = entry(period).to_document()
            if close is not None:
                document |= {"close": close}
            await self.raw.save_entry("crypto.com", "BTC", period, document)

    def delete(self, period: int) -> None:
        del self.raw.blobs[StoragePathUtility.get_raw_data_path("crypto.com", "BTC", period)]

    async def verify(self, target: Target = TARGET, *, not_before: int = 0) -> Verdict:
        """Verify while the clock lets every pause pass at once."""
        task = asyncio.create_task(self.verifier.verify(target, not_before=not_before))
        async with asyncio.timeout(20):
            while not task.done():
                await settle_loop()
                # Pauses are of whole seconds; market time stays in the same period.
                await self.clock.advance(0 if task.done() else 100)
                await asyncio.sleep(0)
        return task.result()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.raw.open()
    await write_stamp(world.raw, redirected=False)
    await world.documents.open(redirected=False)
    await world.store(*range(T0, T0 + COUNT * FIVE, FIVE))
    yield world
    await world.documents.close()


def told(verdict: Verdict) -> list[tuple[int, Kind]]:
    return [(difference.timestamp, difference.kind) for difference in verdict.told]


async def test_what_is_equal_is_counted(world: World) -> None:
    verdict = await world.verify()
    assert verdict.range == TimeRange(T0, T0 + 2 * HOUR)
    assert (verdict.checked, verdict.differences, verdict.not_checkable) == (COUNT, 0, 0)
    assert verdict.stopped is None


async def test_a_period_that_ended_just_now_is_not_expected_yet(world: World) -> None:
    await world.clock.advance(4 * MINUTE + 59_999)
    assert (await world.verify()).range.end == T0 + 2 * HOUR
    world.exchange.requests.clear()
    await world.clock.advance(1_000)
    assert told(await world.verify()) == [(T0 + 2 * HOUR, Kind.MISSING)]


async def test_the_exchange_is_asked_at_the_priority_of_a_backfill(world: World) -> None:
    await world.verify()
    assert {asked.priority for asked in world.exchange.asked} == {Priority.BACKFILL}


async def test_a_missing_document_is_told_with_what_the_exchange_has(world: World) -> None:
    world.delete(T0 + FIVE)
    verdict = await world.verify()
    (difference,) = verdict.told
    assert (difference.timestamp, difference.kind) == (T0 + FIVE, Kind.MISSING)
    assert f"close {candle(T0 + FIVE).close!r}" in difference.detail
    assert (verdict.checked, verdict.counts[Kind.MISSING]) == (COUNT, 1)


async def test_other_values_are_told_with_both(world: World) -> None:
    held = candle(T0 + FIVE)
    middle = (held.low + held.high) / 2
    await world.store(T0 + FIVE, close=middle)
    (difference,) = (await world.verify()).told
    assert difference.kind is Kind.DIFFERENT
    assert difference.detail == f"close is {middle!r} and {held.close!r} on the exchange"


async def test_a_document_where_the_exchange_proves_none_is_extra(world: World) -> None:
    del world.exchange.candles["BTC/USD", "5m"][T0 + 3 * FIVE]
    (difference,) = (await world.verify()).told
    assert (difference.timestamp, difference.kind) == (T0 + 3 * FIVE, Kind.EXTRA)
    assert f"volume {candle(T0 + 3 * FIVE).volume!r}, the exchange has none" in difference.detail


async def test_a_hole_on_both_sides_is_equal(world: World) -> None:
    del world.exchange.candles["BTC/USD", "5m"][T0 + 3 * FIVE]
    world.delete(T0 + 3 * FIVE)
    verdict = await world.verify()
    assert (verdict.checked, verdict.differences) == (COUNT, 0)


async def test_a_broken_document_and_one_of_another_market_are_differences(world: World) -> None:
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", T0)
    world.raw.blobs[path] = b"{"
    other = entry(T0 + FIVE, market="BTC/EUR").to_document()
    await world.raw.save_entry("crypto.com", "BTC", T0 + FIVE, other)
    verdict = await world.verify()
    assert told(verdict) == [(T0 + FIVE, Kind.DIFFERENT), (T0, Kind.DIFFERENT)]
    assert [difference.detail.split(" ")[:4] for difference in verdict.told] == [
        ["stored", "is", "the", "market"],
        ["the", "document", "is", "broken:"],
    ]


async def test_what_the_exchange_offers_no_more_is_not_checkable(world: World) -> None:
    world.exchange.history_ms = HOUR
    world.exchange.history_page = 6
    world.delete(T0)
    verdict = await world.verify()
    # The candles of the last hour, the one that is forming now not among them.
    assert (verdict.checked, verdict.differences, verdict.not_checkable) == (11, 0, 13)
    assert verdict.stopped is None
    assert world.exchange.requests["fetch_historical_data"] == 2


async def test_a_document_that_cannot_be_right_is_told_where_nothing_is_offered(
    world: World,
) -> None:
    world.exchange.history_ms = HOUR
    world.exchange.history_page = 6
    world.raw.blobs[StoragePathUtility.get_raw_data_path("crypto.com", "BTC", T0)] = b"{"
    verdict = await world.verify()
    assert told(verdict) == [(T0, Kind.DIFFERENT)]
    assert (verdict.checked, verdict.not_checkable) == (12, 12)


async def test_what_the_exchange_proves_nothing_about_is_not_checkable(world: World) -> None:
    for period in range(T0 + 20 * FIVE, T0 + 100 * FIVE, FIVE):
        del world.exchange.candles["BTC/USD", "5m"][period]
    verdict = await world.verify()
    assert (verdict.checked, verdict.differences, verdict.not_checkable) == (20, 0, 4)


async def test_what_is_settled_while_it_is_compared_is_no_difference(world: World) -> None:
    async def settle(question: int) -> None:
        if question == 2:
            await world.store(T0 + FIVE)

    world.eventful(settle)
    world.delete(T0 + FIVE)
    world.delete(T0 + 4 * FIVE)
    verdict = await world.verify()
    assert told(verdict) == [(T0 + 4 * FIVE, Kind.MISSING)]
    assert verdict.checked == COUNT


async def test_what_is_corrected_while_it_is_compared_is_no_difference(world: World) -> None:
    async def correct(question: int) -> None:
        if question == 1:
            world.exchange.put("BTC/USD", "5m", [candle(T0, volume=9.0)])
            document = entry(T0).to_document() | {"volume": 9.0}
            await world.raw.save_entry("crypto.com", "BTC", T0, document)

    world.eventful(correct)
    verdict = await world.verify()
    assert (verdict.checked, verdict.differences) == (COUNT, 0)


async def test_a_broken_document_that_vanishes_while_nothing_is_proven_is_not_counted(
    world: World,
) -> None:
    async def mend(question: int) -> None:
        if question == 2:
            world.delete(T0 + 23 * FIVE)

    world.eventful(mend)
    # Nothing newer proves anything of the last period.
    for period in range(T0 + 23 * FIVE, T0 + 100 * FIVE, FIVE):
        del world.exchange.candles["BTC/USD", "5m"][period]
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", T0 + 23 * FIVE)
    world.raw.blobs[path] = b"{"
    verdict = await world.verify()
    assert (verdict.checked, verdict.differences, verdict.not_checkable) == (COUNT - 1, 0, 1)


async def test_a_long_range_is_paged_newest_first(world: World) -> None:
    world.exchange.history_page = 10
    world.delete(T0)
    world.delete(T0 + 23 * FIVE)
    verdict = await world.verify()
    assert (verdict.checked, verdict.not_checkable) == (COUNT, 0)
    assert told(verdict) == [(T0 + 23 * FIVE, Kind.MISSING), (T0, Kind.MISSING)]
    assert world.exchange.asked[0].range == TimeRange(T0 + 14 * FIVE, T0 + 24 * FIVE)


async def test_only_so_many_differences_are_told_and_all_are_counted(world: World) -> None:
    for at in range(COUNT):
        world.delete(T0 + at * FIVE)
    verdict = await world.verify()
    assert (len(verdict.told), verdict.differences) == (MOST_TOLD, COUNT)


async def test_only_what_opens_from_a_time_on_is_checked(world: World) -> None:
    world.delete(T0)
    verdict = await world.verify(not_before=T0 + 1)
    assert verdict.range.start == T0 + FIVE
    assert verdict.differences == 0


async def test_a_target_that_begins_now_has_nothing_to_check(world: World) -> None:
    verdict = await world.verify(replace(TARGET, since=NOW + HOUR))
    assert (verdict.checked, verdict.not_checkable, verdict.stopped) == (0, 0, None)
    assert world.exchange.requests["fetch_historical_data"] == 0


async def test_an_exchange_that_is_away_ends_the_target_after_a_few_tries(world: World) -> None:
    world.exchange.fail_with = ExchangeUnavailable("crypto.com: away")
    began = world.clock.monotonic()
    verdict = await world.verify()
    assert verdict.stopped is world.exchange.fail_with
    assert (verdict.checked, verdict.not_checkable) == (0, COUNT)
    assert world.exchange.requests["fetch_historical_data"] == 3
    assert world.clock.monotonic() - began >= 4
    # The next target of this exchange does not try it all again.
    assert (await world.verify()).stopped is world.exchange.fail_with
    assert world.exchange.requests["fetch_historical_data"] == 3


async def test_an_exchange_that_comes_back_in_time_is_compared(world: World) -> None:
    world.exchange.fail_with = ExchangeRateLimited("slowly", retry_after=5.0)
    task = asyncio.create_task(world.verifier.verify(TARGET))
    await settle_loop()
    await world.clock.advance(4_900)
    assert world.exchange.requests["fetch_historical_data"] == 1
    world.exchange.fail_with = None
    await world.clock.advance(200)
    assert (await task).checked == COUNT


async def test_a_pause_that_is_asked_for_and_too_long_is_not_waited_for(world: World) -> None:
    world.exchange.fail_with = ExchangeRateLimited("much later", retry_after=3600.0)
    assert (await world.verify()).stopped is world.exchange.fail_with
    assert world.exchange.requests["fetch_historical_data"] == 1


@pytest.mark.parametrize(
    ("error", "tries"),
    [(ExchangeRefused("delisted"), 1), (BadExchangeAnswer("half an answer"), 3)],
)
async def test_what_is_wrong_with_one_market_ends_that_target_alone(
    world: World, error: ExchangeRefused | BadExchangeAnswer, tries: int
) -> None:
    world.exchange.fail_with = error
    assert (await world.verify()).stopped is error
    assert world.exchange.requests["fetch_historical_data"] == tries
    world.exchange.fail_with = None
    assert (await world.verify()).stopped is None


async def test_differences_found_before_the_exchange_went_away_stay_told(world: World) -> None:
    async def leave(question: int) -> None:
        # The newest page was compared, and looked at again, by then.
        if question == 2:
            exchange.fail_with = ExchangeUnavailable("gone")

    exchange = world.eventful(leave, page=10)
    world.delete(T0 + 23 * FIVE)
    verdict = await world.verify()
    assert told(verdict) == [(T0 + 23 * FIVE, Kind.MISSING)]
    assert (verdict.checked, verdict.not_checkable) == (10, 14)
    assert str(verdict.stopped) == "gone"


async def test_a_storage_that_is_away_ends_every_target(world: World) -> None:
    world.raw.fail_with = StorageUnavailable("away")
    assert (await world.verify()).stopped is world.raw.fail_with
    asked = world.exchange.requests["fetch_historical_data"]
    assert (await world.verify()).stopped is world.raw.fail_with
    assert world.exchange.requests["fetch_historical_data"] == asked


async def test_a_target_of_an_exchange_that_is_not_enabled_says_so(world: World) -> None:
    verdict = await world.verify(replace(TARGET, exchange="binance"))
    assert "binance is not enabled; add it to EXCHANGES" in str(verdict.stopped)
