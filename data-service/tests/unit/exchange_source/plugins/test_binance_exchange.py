"""Binance: what is its own, and what every ccxt plugin keeps, over the sandbox."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import Any

import pytest

from domain.clock import MarketClock
from domain.order_book import OrderBook
from exchange_source.interfaces import BadExchangeAnswer, ExchangeUnavailable, IOrderBookHandle
from exchange_source.plugins.binance_exchange import BinanceExchange
from sandbox.app import SandboxConfig, running_sandbox
from sandbox.binance_books import BOOK_LEVELS
from tests.contract.ccxt_plugin_contract import CcxtPluginContract, ended, fault
from tests.contract.exchange_client_contract import MARKET, MINUTE, OPEN, minutes
from tests.support.plugin_world import SandboxWorld


class TestBinanceExchange(CcxtPluginContract):
    plugin = BinanceExchange
    name = "binance"
    exchange_id = "binance"

    async def test_no_more_rows_are_asked_for_than_the_window_has_periods(
        self, world: SandboxWorld
    ) -> None:
        limits: list[str] = []
        ask = world.client.vendor.publicGetKlines

        async def noted(params: dict[str, Any]) -> Any:
            limits.append(str(params["limit"]))
            return await ask(params)

        world.client.vendor.publicGetKlines = noted
        await world.client.fetch_historical_data(MARKET, "1m", OPEN - 3 * MINUTE, OPEN)
        assert limits == ["5"]

    async def test_rows_before_the_window_that_an_answer_reaches_back_to_are_left_out(
        self, world: SandboxWorld
    ) -> None:
        world.put(minutes(400, 0))
        data = await world.client.fetch_historical_data(
            MARKET, "1m", OPEN - 3 * MINUTE, OPEN - 2 * MINUTE
        )
        assert data.candles == tuple(minutes(3, 3))

    async def test_a_snapshot_that_cannot_be_had_ends_its_book_alone(
        self, world: SandboxWorld
    ) -> None:
        stream, book = await self.opened(world)
        fault(world, "rest_status", status=503, path="/depth")
        other = await world.client.start_order_book_stream("ETH/USD")
        with pytest.raises(ExchangeUnavailable, match="503"):
            await ended(other)
        async with asyncio.timeout(10):
            while (top := book.snapshot(1)) is None or top.bids[0][0] != 97.0:
                await world.push_book(97.0, 103.0)
        assert world.sandbox.hub.sockets_opened == 1
        await stream.stop()

    async def test_a_book_that_leaves_what_its_snapshot_showed_ends_and_what_follows_is_right(
        self, world: SandboxWorld
    ) -> None:
        amounts = itertools.count(1)

        async def push(middle: float) -> None:
            """A whole book round a price, with another amount at its best bid than before."""
            steps = range(1, BOOK_LEVELS + 1)
            await world.push_whole_book(
                OrderBook(
                    OPEN,
                    bids=(
                        (round(middle - 0.01 * step, 2), next(amounts) if step == 1 else 1.0)
                        for step in steps
                    ),
                    asks=((round(middle + 0.01 * step, 2), 1.0) for step in steps),
                )
            )

        async def until_told(book: IOrderBookHandle, middle: float) -> OrderBook:
            async with asyncio.timeout(10):
                while (top := book.snapshot()) is None or top.bids[0][0] != middle - 0.01:
                    await push(middle)
                return top

        book = await world.client.start_order_book_stream(MARKET)
        await world.subscribed()
        await until_told(book, 100.0)
        # Of a book that stays within every level is known.
        assert (await until_told(book, 97.0)).bids[-1][0] == 96.5
        await push(80.0)
        with pytest.raises(BadExchangeAnswer, match="left what its snapshot showed"):
            await ended(book)
        again = await world.client.start_order_book_stream(MARKET)
        assert (await until_told(again, 80.0)).asks[-1][0] == 80.5


async def test_subscriptions_of_many_markets_keep_to_what_a_socket_takes() -> None:
    async with running_sandbox(SandboxConfig()) as sandbox:
        exchange = BinanceExchange(clock=MarketClock(), endpoint=sandbox.url)
        told: dict[str, asyncio.Event] = {}
        markets = [item.symbol for item in sandbox.venue.instruments() if item.active and item.spot]

        def note(name: str) -> asyncio.Event:
            told[name] = asyncio.Event()
            return told[name]

        async def take(event: asyncio.Event, _: Any) -> None:
            event.set()

        for market in markets:
            candles, ticker = note(f"candles of {market}"), note(f"ticker of {market}")
            await exchange.start_realtime_stream(market, "1d", partial(take, candles))
            await exchange.start_ticker_stream(market, partial(take, ticker))
            await exchange.start_order_book_stream(market, on_change=note(f"book of {market}").set)
        async with asyncio.timeout(20):
            for event in told.values():
                await event.wait()
        assert len(told) == 3 * len(markets) > 30
        assert sandbox.hub.sockets_opened == 1
        await exchange.close()
