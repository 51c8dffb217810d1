"""The plugin and the fake that stands for it elsewhere keep one contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest

from domain.candle import Candle, CandleUpdate
from domain.clock import MarketClock
from exchange_source.limiter import RequestLimiter
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
from tests.unit.exchange_source.plugins.crypto_com_server import (
    CryptoComServer,
    instrument,
    running_server,
)

MINUTE = 60_000


class FakeWorld(ExchangeWorld):
    def __init__(self) -> None:
        self.client: FakeExchange = FakeExchange(ManualClock(NOW))

    def put(self, candles: Iterable[Candle]) -> None:
        self.client.put(MARKET, "1m", candles)

    def set_time(self, market_ms: int) -> None:
        self.client.clock = ManualClock(market_ms)

    async def push(self, candle: Candle) -> None:
        await self.client.push(CandleUpdate("crypto.com", MARKET, "1m", candle))

    async def subscribed(self) -> None:
        pass


class ServerWorld(ExchangeWorld):
    def __init__(self, server: CryptoComServer) -> None:
        clock = ManualClock(NOW)
        self.server = server
        server.instruments = [instrument("BTC_USD"), instrument("ETH_USD")]
        limiter = RequestLimiter(clock, name="crypto.com", rate=1e9, concurrency=4)
        self.client = CryptocomExchange(clock=clock, endpoint=server.url, limiter=limiter)

    def put(self, candles: Iterable[Candle]) -> None:
        self.server.put(MARKET, "1m", candles)

    def set_time(self, market_ms: int) -> None:
        self.server.clock = ManualClock(market_ms)

    async def push(self, candle: Candle) -> None:
        await self.server.send_candles(MARKET, "1m", candle)

    async def subscribed(self) -> None:
        await self.server.received("subscribe")


class TestFakeExchange(ExchangeClientContract):
    @pytest.fixture
    def world(self) -> ExchangeWorld:
        return FakeWorld()


class TestCryptocomExchange(ExchangeClientContract):
    @pytest.fixture
    async def world(self) -> AsyncIterator[ExchangeWorld]:
        async with running_server(ManualClock(NOW)) as server:
            world = ServerWorld(server)
            yield world
            await world.client.close()


async def test_history_of_the_sandbox_is_complete_without_gap() -> None:
    clock = MarketClock()
    async with running_sandbox(SandboxConfig()) as sandbox:
        exchange = CryptocomExchange(clock=clock, endpoint=sandbox.url)
        now = clock.now_ms()
        try:
            data = await exchange.fetch_historical_data(
                MARKET, "1m", now - 700 * MINUTE, now - 2 * MINUTE
            )
        finally:
            await exchange.close()
    times = [candle.timestamp for candle in data.candles]
    empty = sum(run.length for run in data.empty) // MINUTE
    assert len(times) + empty == 698
    assert abs(data.exchange_time - now) < 10_000
