"""The plugins, each over the sandbox, and the fake that stands for one elsewhere keep one
contract."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable

import pytest

from domain.candle import Candle, CandleUpdate
from domain.clock import MarketClock
from domain.interval import Interval
from domain.ticker import Ticker
from domain.trade import Trade
from exchange_source.plugins.binance_exchange import BinanceExchange
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.coinbase_exchange import CoinbaseExchange
from exchange_source.plugins.cryptocom_exchange import CryptocomExchange
from sandbox.app import SandboxConfig, running_sandbox
from tests.contract.exchange_client_contract import (
    MARKET,
    NOW,
    ExchangeClientContract,
    ExchangeWorld,
)
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.plugin_world import book, plugin_world
from tests.unit.exchange_source.plugins.crypto_com_server import until

MINUTE = 60_000
PLUGINS = (CryptocomExchange, BinanceExchange, CoinbaseExchange)


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


class TestFakeExchange(ExchangeClientContract):
    @pytest.fixture
    def world(self) -> ExchangeWorld:
        return FakeWorld()


class TestPlugins(ExchangeClientContract):
    @pytest.fixture(params=PLUGINS, ids=lambda plugin: plugin.exchange_name)
    async def world(self, request: pytest.FixtureRequest) -> AsyncIterator[ExchangeWorld]:
        async with plugin_world(request.param) as world:
            yield world


async def ignore(_: object) -> None:
    """A callback that wants nothing."""


@pytest.mark.parametrize(
    "plugin", [BinanceExchange, CoinbaseExchange], ids=lambda plugin: plugin.exchange_name
)
async def test_subscriptions_that_go_out_together_do_not_wait_for_the_pace_of_requests(
    plugin: type[CCXTExchangeClient],
) -> None:
    clock = ManualClock(NOW)
    async with running_sandbox(SandboxConfig()) as sandbox:
        exchange = plugin(clock=clock, endpoint=sandbox.url)
        markets = [item.symbol for item in sandbox.venue.instruments() if item.active and item.spot]
        for market in markets:
            await exchange.start_realtime_stream(market, "5m", ignore)
            await exchange.start_trade_stream(market, ignore)
            await exchange.start_ticker_stream(market, ignore)
        await until(lambda: bool(sandbox.log.by_path))
        # As long as the list of markets, which is asked for first, keeps everything else waiting.
        await clock.advance(250)
        await until(lambda: len(sandbox.hub.running_feeds) == 3 * len(markets))
        assert set(sandbox.hub.running_feeds.values()) == {1}
        await exchange.close()


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
