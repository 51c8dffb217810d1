"""What every exchange plugin, and every fake of one, keeps of ``IExchangeAPIClient``.

A test module subclasses ``ExchangeClientContract`` and overrides the fixture ``world``: an
exchange whose candles and time the test decides, and the client under test before it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import pytest
from msgspec.structs import replace

from domain.candle import Candle, CandleUpdate
from domain.interval import Interval
from domain.ticker import Ticker
from domain.time_range import TimeRange
from domain.trade import Trade
from errors import InvalidRequest
from exchange_source.interfaces import (
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    Priority,
)

MINUTE = 60_000
# The exchange's time at the start of each test: half a minute into a period.
OPEN = 1_700_000_040_000
NOW = OPEN + 30_000
MARKET = "BTC/USD"


class ExchangeWorld(ABC):
    """An exchange of BTC/USD and ETH/USD at ``NOW`` without candles, reached by ``client``."""

    client: IExchangeAPIClient
    streamed_interval: str = "1m"
    """An interval whose candles the exchange streams."""

    @abstractmethod
    def put(self, candles: Iterable[Candle]) -> None:
        """Let the exchange have these 1m candles of ``MARKET``."""

    @abstractmethod
    def set_time(self, market_ms: int) -> None:
        """Set the exchange's time."""

    @abstractmethod
    async def push(self, candle: Candle) -> None:
        """Let the exchange have a 1m candle of ``MARKET``, and tell its subscribers of the candle
        of ``streamed_interval`` that this makes."""

    @abstractmethod
    async def push_trades(self, *prices: float) -> list[Trade]:
        """Let trades happen in ``MARKET`` at these prices and be told; what they are, ascending."""

    @abstractmethod
    async def push_ticker(self) -> Ticker:
        """Let the exchange tell the ticker of ``MARKET``; what it says."""

    @abstractmethod
    async def push_book(self, bid: float, ask: float) -> None:
        """Let the best bid and ask of ``MARKET`` be these, with other amounts than before, and let
        that be told."""

    @abstractmethod
    async def subscribed(self) -> None:
        """Wait until the exchange knows of a subscription that was just started."""


def candle(periods_ago: int, price: float = 100.0) -> Candle:
    return Candle(OPEN - periods_ago * MINUTE, price, price, price, price, 1.0)


def minutes(first_ago: int, last_ago: int) -> list[Candle]:
    return [candle(ago) for ago in range(first_ago, last_ago - 1, -1)]


def span(first_ago: int, end_ago: int) -> TimeRange:
    return TimeRange(OPEN - first_ago * MINUTE, OPEN - end_ago * MINUTE)


class ExchangeClientContract:
    @pytest.fixture
    def world(self) -> ExchangeWorld:
        raise NotImplementedError("the subclass brings its world")

    async def history(self, world: ExchangeWorld, first_ago: int, end_ago: int) -> HistoricalData:
        asked = span(first_ago, end_ago)
        async with asyncio.timeout(10):
            return await world.client.fetch_historical_data(
                MARKET, "1m", asked.start, asked.end, priority=Priority.LIVE
            )

    def test_names_are_set(self, world: ExchangeWorld) -> None:
        assert world.client.get_exchange_name() == world.client.get_exchange_name().lower()
        assert world.client.get_exchange_id()
        assert "5m" in world.client.intervals
        assert world.client.history_page > 1

    async def test_a_coin_means_a_market_or_nothing(self, world: ExchangeWorld) -> None:
        assert await world.client.check_coin_availability("btc") == MARKET
        assert await world.client.check_coin_availability("BTC/USD") == MARKET
        assert await world.client.check_coin_availability("NOPE") is None
        assert await world.client.check_coin_availability("BTC/NOPE") is None

    async def test_closed_candles_of_the_range_come_ascending_and_once(
        self, world: ExchangeWorld
    ) -> None:
        world.put(minutes(700, 0))
        data = await self.history(world, 650, -1)
        assert data.candles == tuple(minutes(650, 1))
        assert data.empty == ()
        assert data.not_offered is None
        assert data.exchange_time // 1000 == NOW // 1000

    async def test_the_last_candle_closes_with_a_later_row(self, world: ExchangeWorld) -> None:
        world.set_time(OPEN)
        world.put(minutes(3, 1))
        assert (await self.history(world, 1, 0)).candles == ()
        world.put([candle(0)])
        assert (await self.history(world, 1, 0)).candles == (candle(1),)

    async def test_the_last_candle_closes_with_the_grace(self, world: ExchangeWorld) -> None:
        world.put(minutes(3, 1))
        world.set_time(OPEN + 1_000)
        assert (await self.history(world, 1, 0)).candles == ()
        world.set_time(NOW)
        assert (await self.history(world, 1, 0)).candles == (candle(1),)

    async def test_empty_needs_rows_on_both_sides(self, world: ExchangeWorld) -> None:
        world.put([*minutes(40, 31), *minutes(20, 11)])
        assert (await self.history(world, 28, 24)).empty == (span(28, 24),)
        open_end = await self.history(world, 8, 4)
        assert (open_end.candles, open_end.empty, open_end.not_offered) == ((), (), None)

    async def test_older_than_the_oldest_row_is_not_offered(self, world: ExchangeWorld) -> None:
        world.put(minutes(100, 0))
        data = await self.history(world, 110, 95)
        assert data.not_offered == span(110, 100)
        assert data.candles == tuple(minutes(100, 96))
        assert (await self.history(world, 200, 150)).not_offered == span(200, 100)

    async def test_how_far_the_exchanges_clock_is_ahead_is_known_after_an_answer(
        self, world: ExchangeWorld
    ) -> None:
        assert world.client.clock_skew_ms is None
        await self.history(world, 20, 10)
        assert abs(world.client.clock_skew_ms or 0) < 1_000

    async def test_without_any_row_everything_is_open(self, world: ExchangeWorld) -> None:
        data = await self.history(world, 20, 10)
        assert (data.candles, data.empty, data.not_offered) == ((), (), None)

    async def test_a_correction_is_what_the_next_answer_says(self, world: ExchangeWorld) -> None:
        world.put(minutes(5, 0))
        world.put([candle(3, 120.0)])
        assert candle(3, 120.0) in (await self.history(world, 4, 2)).candles

    async def test_an_empty_range_or_an_unknown_interval_is_an_invalid_request(
        self, world: ExchangeWorld
    ) -> None:
        for interval, start, end in (("1m", 5, 5), ("7m", 0, MINUTE)):
            with pytest.raises(InvalidRequest):
                await world.client.fetch_historical_data(MARKET, interval, start, end)

    async def test_an_unknown_market_is_refused(self, world: ExchangeWorld) -> None:
        with pytest.raises(ExchangeRefused):
            await world.client.fetch_historical_data("NOPE/USD", "1m", OPEN - MINUTE, OPEN)

    async def test_a_stream_tells_updates_in_order_until_it_is_stopped(
        self, world: ExchangeWorld
    ) -> None:
        got: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        interval = Interval.parse(world.streamed_interval)
        handle = await world.client.start_realtime_stream(MARKET, interval.name, got.put)
        await world.subscribed()
        async with asyncio.timeout(10):
            for price in (100.0, 101.0):
                await world.push(candle(0, price))
                update = await got.get()
                assert (update.market, update.interval) == (MARKET, interval.name)
                opened = interval.floor(OPEN)
                assert update.candle == replace(candle(0, price), timestamp=opened)
            await handle.stop()
            await handle.stop()
            await handle.wait()
        await world.push(candle(0, 102.0))
        assert got.empty()

    async def test_trades_arrive_as_they_happened(self, world: ExchangeWorld) -> None:
        got: asyncio.Queue[Sequence[Trade]] = asyncio.Queue()
        handle = await world.client.start_trade_stream(MARKET, got.put)
        await world.subscribed()
        told: list[Trade] = []
        async with asyncio.timeout(10):
            wanted = await world.push_trades(100.0, 101.0)
            wanted += await world.push_trades(102.5)
            while len(told) < len(wanted):
                told += await got.get()
        assert sorted(told, key=lambda trade: trade.timestamp) == wanted
        await handle.stop()
        await world.push_trades(99.0)
        assert got.empty()

    async def test_the_ticker_is_told(self, world: ExchangeWorld) -> None:
        world.put([candle(10, 80.0), *minutes(9, 0)])
        got: asyncio.Queue[Ticker] = asyncio.Queue()
        handle = await world.client.start_ticker_stream(MARKET, got.put)
        await world.subscribed()
        async with asyncio.timeout(10):
            wanted = await world.push_ticker()
            while (ticker := await got.get()).timestamp < wanted.timestamp:
                pass
        assert ticker == wanted
        await handle.stop()

    async def test_the_book_is_kept_and_its_changes_are_told(self, world: ExchangeWorld) -> None:
        changed = asyncio.Event()
        handle = await world.client.start_order_book_stream(MARKET, on_change=changed.set)
        await world.subscribed()

        def best() -> tuple[float, float] | None:
            book = handle.snapshot()
            return None if book is None else (book.bids[0][0], book.asks[0][0])

        ended = asyncio.create_task(handle.wait())
        async with asyncio.timeout(10):
            for bid, ask in ((99.0, 101.0), (99.5, 100.5)):
                changed.clear()
                while best() != (bid, ask):
                    assert not ended.done(), ended
                    # Again and again, for a snapshot may need one more update to have a time.
                    await world.push_book(bid, ask)
                assert changed.is_set()
            await handle.stop()
            await ended
        assert handle.snapshot() is None

    async def test_the_book_is_had_by_request_too(self, world: ExchangeWorld) -> None:
        await world.push_book(99.0, 101.0)
        async with asyncio.timeout(10):
            book = await world.client.fetch_order_book(MARKET)
        assert (book.bids[0][0], book.asks[0][0]) == (99.0, 101.0)
        assert abs(book.timestamp - NOW) < 10_000

    async def test_resetting_ends_every_stream_with_an_error(self, world: ExchangeWorld) -> None:
        got: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        handle = await world.client.start_realtime_stream(MARKET, world.streamed_interval, got.put)
        await world.subscribed()
        book = await world.client.start_order_book_stream(MARKET)
        await world.subscribed()
        await world.client.reset_connections()
        async with asyncio.timeout(10):
            for stream in (handle, book):
                with pytest.raises(ExchangeUnavailable):
                    await stream.wait()
        assert book.snapshot() is None

    async def test_nothing_works_after_closing(self, world: ExchangeWorld) -> None:
        got: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        handle = await world.client.start_realtime_stream(MARKET, world.streamed_interval, got.put)
        await world.client.close()
        await world.client.close()
        async with asyncio.timeout(10):
            await handle.wait()
        with pytest.raises(ExchangeUnavailable):
            await world.client.check_coin_availability("BTC")
        with pytest.raises(ExchangeUnavailable):
            await world.client.start_realtime_stream(MARKET, world.streamed_interval, got.put)
