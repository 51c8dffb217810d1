"""A ccxt plugin before a sandbox whose market, and whose time, stand still until they are moved."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from domain.candle import Candle
from domain.order_book import OrderBook
from domain.ticker import Ticker
from domain.trade import Trade
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.prices import Trade as SandboxTrade
from tests.contract.exchange_client_contract import NOW, ExchangeWorld
from tests.support.clock import ManualClock, settle_loop
from tests.support.scripted_prices import BTC, ScriptedPrices
from tests.unit.exchange_source.plugins.crypto_com_server import until

# A multiple of the pace of every feed of the sandbox.
TICK_MS = 2_000


def book(bid: float, ask: float, amount: float) -> OrderBook:
    """A small book that differs by its amount."""
    return OrderBook(NOW, bids=((bid, amount), (bid - 1, 2.0)), asks=((ask, 1.5),))


class SandboxWorld(ExchangeWorld):
    """``own_clock`` is the plugin's, ``sandbox`` what it is connected to."""

    def __init__(
        self,
        plugin: type[CCXTExchangeClient],
        sandbox: RunningSandbox,
        prices: ScriptedPrices,
        clock: ManualClock,
        **options: Any,
    ) -> None:
        self.own_clock = ManualClock(NOW)
        # Its clock stands still, so the pace must not need it to move.
        limiter = RequestLimiter(
            self.own_clock, name=plugin.exchange_name, rate=1e9, concurrency=4, patience_s=30
        )
        self.client: CCXTExchangeClient = plugin(
            clock=self.own_clock, endpoint=sandbox.url, limiter=limiter, **options
        )
        streamed = plugin.streamed_intervals
        self.streamed_interval = "1m" if streamed is None else min(streamed)
        self.sandbox = sandbox
        self.prices = prices
        self._clock = clock
        self._feeds = 0
        self._numbers = itertools.count(1)

    def put(self, candles: Iterable[Candle]) -> None:
        self.prices.put(BTC, candles)

    def set_time(self, market_ms: int) -> None:
        self.sandbox.venue.clock.skew_ms = market_ms - self._clock.now_ms()

    async def push(self, candle: Candle) -> None:
        self.put([candle])
        await self._clock.advance(TICK_MS)

    async def push_trades(self, *prices: float) -> list[Trade]:
        now = self._clock.now_ms()
        trades = [
            SandboxTrade(number, now + number, price, 0.5, "sell" if number % 2 else "buy")
            for price, number in zip(prices, self._numbers, strict=False)
        ]
        self.prices.put_trades(BTC, *trades)
        await self._clock.advance(TICK_MS)
        return [
            Trade(str(trade.id), trade.timestamp, trade.price, trade.amount, trade.side)
            for trade in trades
        ]

    async def push_ticker(self) -> Ticker:
        # Some exchanges tell it only when something was just traded.
        at = self._clock.now_ms() + TICK_MS
        self.prices.put_trades(BTC, SandboxTrade(next(self._numbers), at, 100.0, 0.5, "buy"))
        await self._clock.advance(TICK_MS)
        told = self.sandbox.venue.ticker(BTC)
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
        await self.push_whole_book(book(bid, ask, next(self._numbers)))

    async def push_whole_book(self, book: OrderBook) -> None:
        """Let the whole book of the market be this one, and be told."""
        self.prices.put_book(BTC, OrderBook(self._clock.now_ms() + 1, book.bids, book.asks))
        await self._clock.advance(TICK_MS)

    async def pass_time(self, milliseconds: int) -> None:
        """Let time pass at the exchange."""
        await self._clock.advance(milliseconds)

    async def subscribed_anew(self) -> None:
        """Wait until the exchange knows of a subscription that was started after others ended."""
        hub = self.sandbox.hub

        def is_subscribed() -> bool:
            sockets = self.client.vendor.clients.values()
            connected = any(socket.isConnected for socket in sockets)
            return connected and hub.open_sockets == 1 and bool(hub.running_feeds)

        await until(is_subscribed)
        await settle_loop()

    async def subscribed(self) -> None:
        self._feeds += 1
        await until(lambda: len(self.sandbox.hub.running_feeds) >= self._feeds)
        await settle_loop()


@asynccontextmanager
async def plugin_world(
    plugin: type[CCXTExchangeClient], **options: Any
) -> AsyncIterator[SandboxWorld]:
    """The world of one plugin, made with ``options``; closed at the end."""
    clock, prices = ManualClock(NOW), ScriptedPrices()
    async with running_sandbox(SandboxConfig(prices=prices, market_clock=clock)) as sandbox:
        world = SandboxWorld(plugin, sandbox, prices, clock, **options)
        yield world
        await world.client.close()
