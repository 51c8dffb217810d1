"""Coinbase: what is its own, and what every ccxt plugin keeps, over the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from domain.candle import CandleUpdate
from domain.time_range import TimeRange
from domain.trade import Trade
from exchange_source.interfaces import ExchangeUnavailable, Priority
from exchange_source.plugins.coinbase_exchange import CoinbaseExchange
from tests.contract.ccxt_plugin_contract import CcxtPluginContract, ended, fault, ignore
from tests.contract.exchange_client_contract import MARKET, MINUTE, OPEN, candle, minutes
from tests.support.plugin_world import SandboxWorld

CANDLES = "/api/v3/brokerage/market/products/{product_id}/candles"
DAY = 1440 * MINUTE


class TestCoinbaseExchange(CcxtPluginContract):
    plugin = CoinbaseExchange
    name = "coinbase"
    exchange_id = "coinbase"

    async def test_markets_take_one_request(self, world: SandboxWorld) -> None:
        await world.client.check_coin_availability("BTC")
        assert world.sandbox.log.by_path == {"/api/v3/brokerage/market/products": 1}

    async def test_a_row_long_before_a_hole_is_found_though_no_long_window_may_be_asked_for(
        self, world: SandboxWorld
    ) -> None:
        # Ten days without a trade, of which one answer covers five hours: 50 of them.
        world.put([candle(ago) for ago in range(15_500, 15_400, -1)])
        async with asyncio.timeout(20):
            data = await world.client.fetch_historical_data(
                MARKET, "1m", OPEN - 5_000 * MINUTE, OPEN - 4_900 * MINUTE
            )
        assert data.empty == (TimeRange(OPEN - 5_000 * MINUTE, OPEN - 4_900 * MINUTE),)
        assert data.not_offered is None
        assert world.sandbox.log.by_path[CANDLES] < 20

    async def test_older_than_the_oldest_row_is_not_offered_after_a_look_far_back(
        self, world: SandboxWorld
    ) -> None:
        data = await world.client.fetch_historical_data(
            MARKET, "1m", OPEN - 500 * MINUTE, OPEN - 395 * MINUTE
        )
        assert data.not_offered == TimeRange(OPEN - 500 * MINUTE, OPEN - 400 * MINUTE)
        assert data.candles == tuple(minutes(400, 396))
        assert world.sandbox.log.by_path[CANDLES] < 15

    async def test_an_answer_is_the_newest_rows_of_however_long_a_window(
        self, world: SandboxWorld
    ) -> None:
        period = world.client._interval("1m")
        world.put([candle(ago) for ago in range(9_000, 8_400, -2)])
        for end_ago, wanted in ((0, minutes(299, 0)), (150, None)):
            window = TimeRange(OPEN - 9_500 * MINUTE, OPEN - (end_ago - 1) * MINUTE)
            rows, _ = await world.client.fetch_rows(MARKET, period, window, Priority.LIVE)
            assert len(rows) == 300
            newest = minutes(400, end_ago)
            known = [candle(ago) for ago in range(9_000, 8_400, -2)] + newest
            assert rows == (wanted or known[-300:])

    async def test_candles_of_other_intervals_than_5m_are_made_of_trades(
        self, world: SandboxWorld
    ) -> None:
        told: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        await world.client.start_realtime_stream(MARKET, "1m", told.put)
        await world.subscribed()
        async with asyncio.timeout(10):
            await world.push_trades(90.0)
            await world.pass_time(MINUTE)
            first = await world.push_trades(100.0, 103.0)
            second = await world.push_trades(98.0)
            updates = [await told.get()]
            while updates[-1].candle.close != 98.0:
                updates.append(await told.get())
        last = updates[-1].candle
        assert updates[-1].interval == "1m"
        assert last.timestamp == first[0].timestamp // MINUTE * MINUTE
        assert (last.open, last.high, last.low) == (100.0, 103.0, 98.0)
        assert last.volume == sum(trade.amount for trade in first + second)

    async def test_candles_of_trades_and_trades_share_one_subscription(
        self, world: SandboxWorld
    ) -> None:
        trades: asyncio.Queue[Sequence[Trade]] = asyncio.Queue()
        candles = await world.client.start_realtime_stream(MARKET, "15m", ignore)
        await world.client.start_trade_stream(MARKET, trades.put)
        await world.subscribed()
        assert world.sandbox.hub.running_feeds == {"market_trades BTC-USD": 1}
        await candles.stop()
        async with asyncio.timeout(10):
            wanted = await world.push_trades(90.0)
            assert list(await trades.get()) == wanted

    async def test_a_message_that_was_lost_ends_every_stream_of_its_socket(
        self, world: SandboxWorld
    ) -> None:
        stream, book = await self.opened(world)
        fault(world, "ws_sequence_gap", channel="book", count=1)
        await world.push_book(98.0, 102.0)
        await world.push_book(97.0, 103.0)
        for handle in (stream, book):
            with pytest.raises(ExchangeUnavailable, match="lost"):
                await ended(handle)

    async def test_heartbeats_are_subscribed_once_before_everything_else(
        self, world: SandboxWorld
    ) -> None:
        sent: list[Any] = []
        await self.opened(world)
        socket = next(iter(world.client.vendor.clients.values()))
        await world.client.reset_connections()
        assert socket.url not in world.client.vendor.clients
        again = world.client.vendor.client(socket.url)
        again.connection = _Recording(sent)
        async with asyncio.timeout(10):
            await again.send({"type": "subscribe", "channel": "ticker", "product_ids": ["BTC-USD"]})
            await again.send({"type": "subscribe", "channel": "level2", "product_ids": ["BTC-USD"]})
        assert [text.split('"channel":')[1].split('"')[1] for text in sent] == [
            "heartbeats",
            "ticker",
            "level2",
        ]


class _Recording:
    """A connection that keeps what it is to send."""

    closed = False

    def __init__(self, sent: list[Any]) -> None:
        self._sent = sent

    async def send_str(self, text: str) -> None:
        self._sent.append(text)
