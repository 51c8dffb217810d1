"""HistoricalDataManagerImpl: pages, streams, the newest candle, summaries and coverage."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from domain.entry import Entry
from domain.gap import Gap, GapReason
from domain.time_range import TimeRange
from errors import CoinNotAvailable, InvalidRequest, NoData
from exchange_source.interfaces import ExchangeUnavailable
from historical.columns import NOTHING
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher
from historical.manager import HistoricalDataManagerImpl
from storage.interfaces import StorageUnavailable
from storage.path_utility import StoragePathUtility
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import FIVE, HOUR, MINUTE, T0, book, candles, entry


class Socket:
    """A websocket that keeps what it is sent, and breaks when told to."""

    def __init__(self, *, breaks_after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._breaks_after = breaks_after

    async def send_json(self, data: Any) -> None:
        if self._breaks_after is not None and len(self.sent) >= self._breaks_after:
            raise ConnectionResetError("the client is gone")
        self.sent.append(data)


def history(world: Collecting) -> HistoricalDataManagerImpl:
    return HistoricalDataManagerImpl(
        directory=world.manager,
        fetcher=HistoricalFetcher(world.storage, world.reconciler, world.clock),
        current=CurrentDataFetcher(world.storage),
        reconciler=world.reconciler,
        forming=world.hub.forming,
        clock=world.clock,
    )


async def test_streaming_sends_the_fetched_candles_in_chunks_then_completes() -> None:
    world = Collecting()
    socket = Socket()
    async with world.running():
        await history(world).stream_historical_data(
            socket, "btc", T0, T0 + 2 * HOUR, chunk_size=10, request_id="r1"
        )
    *chunks, complete = socket.sent
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2]
    assert chunks[0] | {"rows": []} == {
        "type": "historical_data_chunk",
        "request_id": "r1",
        "index": 0,
        "exchange": "crypto.com",
        "coin": "BTC",
        "market": "BTC/USD",
        "interval": "5m",
        "columns": ("timestamp", "open", "high", "low", "close", "volume"),
        "rows": [],
    }
    first = candles(T0, 1)[0]
    assert list(chunks[0]["rows"][0]) == [
        T0,
        first.open,
        first.high,
        first.low,
        first.close,
        first.volume,
    ]
    assert [row[0] for chunk in chunks for row in chunk["rows"]] == list(
        range(T0, T0 + 2 * HOUR, FIVE)
    )
    assert complete == {
        "type": "historical_data_complete",
        "request_id": "r1",
        "count": 24,
        "chunks": 3,
        "gaps": [],
        "sources": {"storage": 0, "exchange": 24},
    }


async def test_streaming_says_what_is_missing_and_why() -> None:
    world = Collecting()
    for at in (3, 4, 10):
        del world.exchange.candles["BTC/USD", "5m"][T0 + at * FIVE]
    socket = Socket()
    async with world.running():
        await history(world).stream_historical_data(socket, "BTC", T0, T0 + 2 * HOUR, chunk_size=4)
    assert socket.sent[-1]["gaps"] == [
        {"start": T0 + 3 * FIVE, "end": T0 + 5 * FIVE, "count": 2, "reason": "no_trades"},
        {"start": T0 + 10 * FIVE, "end": T0 + 11 * FIVE, "count": 1, "reason": "no_trades"},
    ]


async def test_a_broken_websocket_ends_the_stream_and_is_passed_on() -> None:
    world = Collecting()
    async with world.running():
        with pytest.raises(ConnectionResetError):
            await history(world).stream_historical_data(
                Socket(breaks_after=1), "BTC", T0, T0 + 10 * HOUR, chunk_size=10
            )
        assert len(world.exchange.asked) <= 3


async def test_a_cancelled_stream_sends_nothing_more() -> None:
    world = Collecting()
    world.exchange.gate.clear()
    socket = Socket()
    async with world.running():
        streaming = asyncio.create_task(
            history(world).stream_historical_data(socket, "BTC", T0, T0 + HOUR)
        )
        world.exchange.gate.set()
        streaming.cancel()
        await settle_loop()
        assert streaming.cancelled()
    assert socket.sent == []


async def test_a_stream_of_nothing_from_an_exchange_that_is_away_is_an_error() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC", since=world.clock.now_ms())
        world.exchange.fail_with = ExchangeUnavailable("503")
        with pytest.raises(ExchangeUnavailable):
            await history(world).stream_historical_data(Socket(), "BTC", T0, T0 + HOUR)


async def test_a_page_holds_at_most_its_limit_and_says_where_the_next_starts() -> None:
    world = Collecting()
    async with world.running():
        page = await history(world).get_historical_data("BTC", T0, T0 + 2 * HOUR, limit=20)
        assert list(page.candles) == candles(T0, 20)
        assert page.next_start == T0 + 20 * FIVE
        rest = await history(world).get_historical_data(
            "BTC", page.next_start, T0 + 2 * HOUR, limit=20
        )
    assert len(rest.candles) == 4
    assert rest.next_start is None
    assert (rest.from_storage, rest.from_exchange) == (0, 4)


async def test_holes_do_not_make_a_page_shorter() -> None:
    world = Collecting()
    for at in range(5, 15):
        del world.exchange.candles["BTC/USD", "5m"][T0 + at * FIVE]
    async with world.running():
        page = await history(world).get_historical_data("BTC", T0, T0 + 4 * HOUR, limit=20)
    assert len(page.candles) == 20
    assert page.gaps == (Gap(TimeRange(T0 + 5 * FIVE, T0 + 15 * FIVE), GapReason.NO_TRADES),)


async def test_history_without_rows_is_an_answer() -> None:
    world = Collecting()
    async with world.running():
        page = await history(world).get_historical_data("BTC", T0 - 2 * HOUR, T0 - HOUR)
    assert page.candles == NOTHING
    assert {gap.reason for gap in page.gaps} == {GapReason.NOT_OFFERED}


async def test_with_something_stored_an_exchange_that_is_away_is_told_in_the_gaps() -> None:
    world = Collecting()
    async with world.running():
        await history(world).get_historical_data("BTC", T0, T0 + HOUR)
        world.exchange.fail_with = ExchangeUnavailable("503")
        page = await history(world).get_historical_data("BTC", T0 + 2 * HOUR, T0 + 3 * HOUR)
        assert page.candles == NOTHING
        assert {gap.reason for gap in page.gaps} == {GapReason.UNREACHABLE}
        socket = Socket()
        await history(world).stream_historical_data(socket, "BTC", T0 + 2 * HOUR, T0 + 3 * HOUR)
        (complete,) = socket.sent
        assert [gap["reason"] for gap in complete["gaps"]] == ["unreachable"]
        with pytest.raises(ExchangeUnavailable):
            await history(world).summarize_history("BTC", T0 + 2 * HOUR, T0 + 3 * HOUR)


async def test_with_nothing_stored_an_exchange_that_is_away_is_an_error() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.resolve("BTC", exchange=None, interval="5m")
        world.exchange.fail_with = ExchangeUnavailable("503")
        with pytest.raises(ExchangeUnavailable):
            await history(world).get_historical_data("BTC", T0, T0 + HOUR)


async def test_bad_ranges_and_names_are_refused() -> None:
    world = Collecting()
    async with world.running():
        with pytest.raises(InvalidRequest, match="is not after start"):
            await history(world).get_historical_data("BTC", T0, T0)
        with pytest.raises(InvalidRequest, match="before 1970"):
            await history(world).get_historical_data("BTC", -1, T0)
        with pytest.raises(InvalidRequest, match="does not exist"):
            await history(world).get_historical_data("BTC", T0, T0 + HOUR, interval="5x")
        with pytest.raises(CoinNotAvailable):
            await history(world).get_historical_data("DOGE", T0, T0 + HOUR)


async def test_the_most_current_candle_of_a_collected_coin_is_the_forming_one() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        closed = await history(world).get_most_current_data("BTC")
        assert closed.closed
        assert closed.candle.timestamp == T0 + 24 * HOUR - FIVE
        assert closed.age_ms == world.clock.now_ms() - (T0 + 24 * HOUR)
        await world.update(T0 + 24 * HOUR)
        await world.pass_time(1_000)
        forming = await history(world).get_most_current_data("BTC")
        assert not forming.closed
        assert (forming.candle.timestamp, forming.age_ms) == (T0 + 24 * HOUR, 1_000)
        world.raw.fail_with = StorageUnavailable("away")
        assert await history(world).get_most_current_data("BTC") == forming
        with pytest.raises(StorageUnavailable):
            await history(world).get_most_current_data("ETH")


async def test_the_most_current_candle_of_an_uncollected_coin_is_fetched() -> None:
    world = Collecting()
    async with world.running():
        current = await history(world).get_most_current_data("ETH")
        assert current.candle.timestamp == T0 + 24 * HOUR - FIVE
        assert current.market == "ETH/USD"


async def test_nothing_known_is_no_data() -> None:
    world = Collecting()
    world.exchange.candles.clear()
    async with world.running():
        with pytest.raises(NoData):
            await history(world).get_most_current_data("BTC")
        with pytest.raises(NoData):
            await history(world).summarize_history("BTC", T0, T0 + HOUR)


async def test_a_summary_says_the_range_in_a_few_numbers() -> None:
    world = Collecting()
    async with world.running():
        summary = await history(world).summarize_history("BTC", T0, T0 + 10 * HOUR)
    recorded = candles(T0, 120)
    assert (summary.count, summary.first, summary.last) == (120, recorded[0], recorded[-1])
    assert summary.high == max(item.high for item in recorded)
    assert summary.low == min(item.low for item in recorded)
    assert summary.volume == pytest.approx(180)
    assert summary.change_percent == pytest.approx(
        (recorded[-1].close / recorded[0].open - 1) * 100
    )
    assert summary.vwap == pytest.approx(
        sum((item.high + item.low + item.close) / 3 for item in recorded) / 120
    )
    assert len(summary.candles) == 40
    assert summary.candle_periods == 3
    assert summary.candles[0].timestamp == T0


async def test_coverage_counts_from_since_to_now() -> None:
    world = Collecting()
    del world.exchange.candles["BTC/USD", "5m"][T0 + 20 * HOUR]
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(2 * MINUTE)
        coverage = await history(world).get_coverage("BTC")
    since = T0 + 12 * HOUR
    assert (coverage.first, coverage.last) == (since, T0 + 24 * HOUR - FIVE)
    assert (coverage.expected, coverage.stored) == (144, 143)
    assert coverage.gaps == (
        Gap(TimeRange(T0 + 20 * HOUR, T0 + 20 * HOUR + FIVE), GapReason.NO_TRADES),
    )
    assert coverage.ranges == (
        TimeRange(since, T0 + 20 * HOUR),
        TimeRange(T0 + 20 * HOUR + FIVE, T0 + 24 * HOUR),
    )


async def test_coverage_of_what_is_not_collected_counts_from_its_first_entry() -> None:
    world = Collecting()
    async with world.running():
        empty = await history(world).get_coverage("BTC")
        assert (empty.first, empty.expected, empty.stored) == (None, 0, 0)
        await history(world).get_historical_data("BTC", T0 + 22 * HOUR, T0 + 23 * HOUR)
        coverage = await history(world).get_coverage("BTC")
    assert (coverage.first, coverage.expected, coverage.stored) == (T0 + 22 * HOUR, 24, 12)
    assert {gap.reason for gap in coverage.gaps} == {GapReason.PENDING}


LEDGER = StoragePathUtility.get_ledger_path("crypto.com", "BTC", interval="5m")


async def with_books(world: Collecting, *periods: int) -> None:
    """Half a day that is collected, in which these periods closed with a book."""
    for period in periods:
        stored = entry(period).with_order_book(book(period + FIVE - 50))
        await world.storage.store_raw_data(stored)
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(2 * MINUTE)
    world.assemble()


def document(period: int) -> str:
    return StoragePathUtility.get_raw_data_path("crypto.com", "BTC", period)


async def test_coverage_knows_the_books_of_entries_without_a_ledger() -> None:
    world = Collecting()
    await with_books(world, T0 + 15 * HOUR, T0 + 23 * HOUR)
    del world.raw.blobs[LEDGER]
    async with world.running():
        assert (await history(world).get_coverage("BTC")).with_order_book == 2


async def test_coverage_knows_the_books_stored_after_the_ledger_was_kept_last() -> None:
    world = Collecting()
    await with_books(world, T0 + 15 * HOUR)
    kept = world.raw.blobs[LEDGER]
    async with world.running():
        close = T0 + 24 * HOUR + FIVE
        world.exchange.book = book(close - 50)
        await world.pass_time(close + 20_000 - world.clock.now_ms())
    # The process was killed between storing the entry and keeping the ledger.
    assert Entry.from_document(json.loads(world.raw.blobs[document(close - FIVE)])).order_book
    world.raw.blobs[LEDGER] = kept
    world.assemble()
    async with world.running():
        coverage = await history(world).get_coverage("BTC")
    assert coverage.with_order_book == 2
    assert coverage.last == close - FIVE


async def test_coverage_reads_a_document_once_to_know_of_its_book() -> None:
    world = Collecting()
    await with_books(world, T0 + 15 * HOUR)
    del world.raw.blobs[LEDGER]
    await history(world).get_coverage("BTC")
    world.assemble()
    reads = await documents_read(world)
    # Those that ended a little more than an hour ago may still be given a book.
    assert min(reads) >= T0 + 22 * HOUR + 45 * MINUTE


async def test_coverage_of_what_was_filled_from_history_reads_nothing_old() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(2 * MINUTE)
    world.assemble()
    reads = await documents_read(world)
    assert min(reads) >= T0 + 22 * HOUR + 45 * MINUTE


async def documents_read(world: Collecting) -> list[int]:
    """The periods whose documents a coverage in a fresh process reads."""
    reads: list[int] = []
    get_range = world.raw.get_range

    async def noting(*args: Any, **options: Any) -> list[Any]:
        found = await get_range(*args, **options)
        reads.extend(item.timestamp for item in found)
        return found

    world.raw.get_range = noting  # type: ignore[method-assign]
    await history(world).get_coverage("BTC")
    return reads


async def test_a_book_that_was_lost_with_its_document_is_not_counted() -> None:
    world = Collecting()
    await with_books(world, T0 + 15 * HOUR, T0 + 16 * HOUR)
    async with world.running():
        assert (await history(world).get_coverage("BTC")).with_order_book == 2
        del world.raw.blobs[document(T0 + 15 * HOUR)]
        await world.pass_time(HOUR + 2 * MINUTE)
        coverage = await history(world).get_coverage("BTC")
    # The hourly repair has fetched the candle anew; nobody can fetch its book.
    assert coverage.stored == coverage.expected
    assert coverage.with_order_book == 1


async def test_a_document_deleted_behind_the_services_back_is_a_gap_after_an_hour() -> None:
    world = Collecting()
    await with_books(world)
    async with world.running():
        await world.pass_time(MINUTE)
        del world.raw.blobs[document(T0 + 15 * HOUR)]
        world.exchange.fail_with = ExchangeUnavailable("503")
        await world.pass_time(HOUR + 2 * MINUTE)
        coverage = await history(world).get_coverage("BTC")
    gone = TimeRange(T0 + 15 * HOUR, T0 + 15 * HOUR + FIVE)
    assert gone in [gap.range for gap in coverage.gaps]


async def test_a_deleted_document_of_what_nobody_collects_is_a_gap_after_an_hour() -> None:
    world = Collecting()
    async with world.running():
        await history(world).get_historical_data("BTC", T0, T0 + HOUR)
        assert (await history(world).get_coverage("BTC")).stored == 12
        del world.raw.blobs[document(T0 + FIVE)]
        await world.pass_time(HOUR)
        coverage = await history(world).get_coverage("BTC")
    assert coverage.stored == 11
    assert coverage.gaps[0] == Gap(TimeRange(T0 + FIVE, T0 + 2 * FIVE), GapReason.PENDING)


async def test_coverage_without_storage_is_an_error_and_nothing_is_made_up() -> None:
    world = Collecting()
    await with_books(world, T0 + 15 * HOUR)
    world.raw.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await history(world).get_coverage("BTC")
    world.raw.fail_with = None
    coverage = await history(world).get_coverage("BTC")
    assert (coverage.stored, coverage.with_order_book) == (144, 1)


async def test_coverage_of_a_target_that_begins_later_expects_nothing_yet() -> None:
    world = Collecting()
    async with world.running():
        await history(world).get_historical_data("BTC", T0, T0 + HOUR)
        await world.manager.add_coin("BTC", since=T0 + 24 * HOUR + 10_000)
        coverage = await history(world).get_coverage("BTC")
    assert (coverage.expected, coverage.stored, coverage.first) == (0, 0, None)
    assert (coverage.gaps, coverage.ranges) == ((), ())


async def test_coverage_in_a_process_that_stands_by_says_what_the_other_one_stored() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        world.exchange.book = book(T0 + 24 * HOUR + FIVE)
        await world.pass_time(FIVE)
        other = await world.beside()
        await other.collection.load()
        told = await history(other).get_coverage("BTC")
        assert told.with_order_book == 1
        assert told == await history(world).get_coverage("BTC")
