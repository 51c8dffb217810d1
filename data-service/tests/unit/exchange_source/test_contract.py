"""The plugins, each over the sandbox, and the fake that stands for one elsewhere keep one
contract."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable

import pytest

from domain.candle import Candle, CandleUpdate
from domain.clock import MarketClock
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.ticker import Ticker
from domain.trade import Trade
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.binance_exchange import BinanceExchange
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.cryptocom_exchange import CryptocomExchange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.prices import Trade as SandboxTrade
from tests.contract.exchange_client_contract import (
    MARKET,
    NOW,
    ExchangeClientContract,
    ExchangeWorld,
)
from tests.support.clock import ManualClock, settle_loop
from tests.support.exchange import FakeExchange
from tests.support.scripted_prices import BTC, ScriptedPrices
from tests.unit.exchange_source.plugins.crypto_com_server import until

MINUTE = 60_000
# A multiple of the pace of every feed of the sandbox.
TICK_MS = 2_000
PLUGINS = (CryptocomExchange, BinanceExchange)


def book(bid: float, ask: float, amount: float) -> OrderBook:
    return OrderBook(NOW, bids=((bid, amount), (bid - 1, 2.0)), asks=((ask, 1.5),))


class FakeWorld(ExchangeWorld):
    def __init__(self) -> None:
        self.client: FakeExchange = FakeExchange(ManualClock(NOW))
        self._numbers = itertools.count(1)

    def put(self, candles: Iterable[Candle]) -> None:
        self.client.put(MARKET, "1m", candles)

    def set_time(self, market_ms: int) -> None:
        self.client.clock = ManualClock(market_ms)

    async def push(self, candle: Candle) -> None:
        await self.client.push(CandleUpdate("crypto.com", MARKET, "1m", candle))

    async def push_trades(self, *prices: float) -> list[Trade]:
        trades = [
            Trade(str(number), NOW + number, price, 0.5, "buy")
            for price, number in zip(prices, self._numbers, strict=False)
        ]
        await self.client.push_trades(MARKET, *trades)
        return trades

    async def push_ticker(self) -> Ticker:
        ticker = Ticker(NOW, last=100.0)
        await self.client.push_ticker(MARKET, ticker)
        return ticker

    async def push_book(self, bid: float, ask: float) -> None:
        self.client.change_book(book(bid, ask, next(self._numbers)))

    async def subscribed(self) -> None:
        pass


class SandboxWorld(ExchangeWorld):
    """A plugin before a sandbox whose market, and whose time, stand still until they are moved."""

    def __init__(
        self,
        plugin: type[CCXTExchangeClient],
        sandbox: RunningSandbox,
        prices: ScriptedPrices,
        clock: ManualClock,
    ) -> None:
        limiter = RequestLimiter(clock, name=plugin.exchange_name, rate=1e9, concurrency=4)
        self.client = plugin(clock=ManualClock(NOW), endpoint=sandbox.url, limiter=limiter)
        streamed = plugin.streamed_intervals
        self.streamed_interval = "1m" if streamed is None else min(streamed)
        self._sandbox = sandbox
        self._prices = prices
        self._clock = clock
        self._feeds = 0
        self._numbers = itertools.count(1)

    def put(self, candles: Iterable[Candle]) -> None:
        self._prices.put(BTC, candles)

    def set_time(self, market_ms: int) -> None:
        self._sandbox.venue.clock.skew_ms = market_ms - self._clock.now_ms()

    async def push(self, candle: Candle) -> None:
        self.put([candle])
        await self._clock.advance(TICK_MS)

    async def push_trades(self, *prices: float) -> list[Trade]:
        now = self._clock.now_ms()
        trades = [
            SandboxTrade(number, now + number, price, 0.5, "sell" if number % 2 else "buy")
            for price, number in zip(prices, self._numbers, strict=False)
        ]
        self._prices.put_trades(BTC, *trades)
        await self._clock.advance(TICK_MS)
        return [
            Trade(str(trade.id), trade.timestamp, trade.price, trade.amount, trade.side)
            for trade in trades
        ]

    async def push_ticker(self) -> Ticker:
        await self._clock.advance(TICK_MS)
        told = self._sandbox.venue.ticker(BTC)
        (bid, _), (ask, _) = told.book.bids[0], told.book.asks[0]
        assert told.change is not None
        return Ticker(
            timestamp=told.timestamp,
            last=told.last,
            bid=bid,
            ask=ask,
            high=told.high,
            low=told.low,
            base_volume=told.volume,
            change_percent=round(told.change * 100, 3),
        )

    async def push_book(self, bid: float, ask: float) -> None:
        self._prices.books[BTC] = book(bid, ask, next(self._numbers))
        await self._clock.advance(TICK_MS)

    async def subscribed(self) -> None:
        self._feeds += 1
        await until(lambda: len(self._sandbox.hub.running_feeds) >= self._feeds)
        await settle_loop()


class TestFakeExchange(ExchangeClientContract):
    @pytest.fixture
    def world(self) -> ExchangeWorld:
        return FakeWorld()


class TestPlugins(ExchangeClientContract):
    @pytest.fixture(params=PLUGINS, ids=lambda plugin: plugin.exchange_name)
    async def world(self, request: pytest.FixtureRequest) -> AsyncIterator[ExchangeWorld]:
        clock, prices = ManualClock(NOW), ScriptedPrices()
        async with running_sandbox(SandboxConfig(prices=prices, market_clock=clock)) as sandbox:
            world = SandboxWorld(request.param, sandbox, prices, clock)
            yield world
            await world.client.close()


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.exchange_name)
async def test_history_of_the_sandbox_is_complete_without_gap(
    plugin: type[CCXTExchangeClient],
) -> None:
    clock = MarketClock()
    async with running_sandbox(SandboxConfig()) as sandbox:
        exchange = plugin(clock=clock, endpoint=sandbox.url)
        now = clock.now_ms()
        try:
            data = await exchange.fetch_historical_data(
                MARKET, "1m", now - 2_500 * MINUTE, now - 2 * MINUTE
            )
        finally:
            await exchange.close()
    minute = Interval.parse("1m")
    times = [candle.timestamp for candle in data.candles]
    empty = [at for run in data.empty for at in range(run.start, run.end, MINUTE)]
    first = minute.ceil(now - 2_500 * MINUTE)
    assert sorted(times + empty) == list(range(first, minute.ceil(now - 2 * MINUTE), MINUTE))
    assert abs(data.exchange_time - now) < 10_000
