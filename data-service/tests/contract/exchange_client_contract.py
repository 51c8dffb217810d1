"""What every exchange plugin, and every fake of one, keeps of ``IExchangeAPIClient``.

A test module subclasses ``ExchangeClientContract`` and overrides the fixture ``world``: an
exchange whose candles and time the test decides, and the client under test before it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable

import pytest

from domain.candle import Candle, CandleUpdate
from domain.time_range import TimeRange
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

    @abstractmethod
    def put(self, candles: Iterable[Candle]) -> None:
        """Let the exchange have these 1m candles of ``MARKET``."""

    @abstractmethod
    def set_time(self, market_ms: int) -> None:
        """Set the exchange's time."""

    @abstractmethod
    async def push(self, candle: Candle) -> None:
        """Let the exchange tell its subscribers of a 1m candle of ``MARKET``."""

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
        handle = await world.client.start_realtime_stream(MARKET, "1m", got.put)
        await world.subscribed()
        async with asyncio.timeout(10):
            for price in (100.0, 101.0):
                await world.push(candle(0, price))
                update = await got.get()
                assert (update.market, update.interval) == (MARKET, "1m")
                assert update.candle == candle(0, price)
            await handle.stop()
            await handle.stop()
            await handle.wait()
        await world.push(candle(0, 102.0))
        assert got.empty()

    async def test_resetting_ends_every_stream_with_an_error(self, world: ExchangeWorld) -> None:
        got: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        handle = await world.client.start_realtime_stream(MARKET, "1m", got.put)
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
        handle = await world.client.start_realtime_stream(MARKET, "1m", got.put)
        await world.client.close()
        await world.client.close()
        async with asyncio.timeout(10):
            await handle.wait()
        with pytest.raises(ExchangeUnavailable):
            await world.client.check_coin_availability("BTC")
        with pytest.raises(ExchangeUnavailable):
            await world.client.start_realtime_stream(MARKET, "1m", got.put)
