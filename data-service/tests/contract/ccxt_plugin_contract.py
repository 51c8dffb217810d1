"""What every ccxt plugin does when its exchange does wrong, over the sandbox and its faults.

A test module subclasses ``CcxtPluginContract`` and says which ``plugin`` it is about. What it keeps
of the interface itself is in ``exchange_client_contract``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest

from domain.ticker import Ticker
from errors import InvalidRequest
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
)
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from tests.contract.exchange_client_contract import MARKET, MINUTE, OPEN, minutes
from tests.support.clock import settle_loop
from tests.support.plugin_world import SandboxWorld, plugin_world


async def ignore(_: Any) -> None:
    """A callback that wants nothing."""


async def ended(handle: IStreamHandle) -> None:
    async with asyncio.timeout(10):
        await handle.wait()


async def ask(world: SandboxWorld) -> Any:
    async with asyncio.timeout(10):
        return await world.client.fetch_historical_data(MARKET, "1m", OPEN - 5 * MINUTE, OPEN)


def fault(world: SandboxWorld, kind: str, **fields: Any) -> None:
    world.sandbox.venue.faults.add({"kind": kind, **fields})


class CcxtPluginContract:
    plugin: ClassVar[type[CCXTExchangeClient]]
    name: ClassVar[str]
    exchange_id: ClassVar[str]

    @pytest.fixture
    async def world(self) -> AsyncIterator[SandboxWorld]:
        async with plugin_world(self.plugin) as world:
            world.put(minutes(400, 0))
            yield world

    async def opened(self, world: SandboxWorld) -> tuple[IStreamHandle, IOrderBookHandle]:
        """A candle stream and a live book."""
        stream = await world.client.start_realtime_stream(MARKET, world.streamed_interval, ignore)
        await world.subscribed()
        book = await world.client.start_order_book_stream(MARKET)
        await world.subscribed()
        await self.told(world, book)
        return stream, book

    async def told(self, world: SandboxWorld, book: IOrderBookHandle) -> None:
        async with asyncio.timeout(10):
            while book.snapshot() is None:
                await world.push_book(99.0, 101.0)

    def test_it_implements_every_method_of_its_interface(self) -> None:
        assert issubclass(self.plugin, IExchangeAPIClient)
        assert not self.plugin.__abstractmethods__

    async def test_its_names(self, world: SandboxWorld) -> None:
        assert world.client.get_exchange_name() == self.name
        assert world.client.get_exchange_id() == self.exchange_id

    async def test_a_coin_that_it_lists_is_available_and_another_is_not(
        self, world: SandboxWorld
    ) -> None:
        assert await world.client.check_coin_availability("BTC") == MARKET
        assert await world.client.check_coin_availability("NOPE") is None

    async def test_a_valid_range_is_fetched_and_translated(self, world: SandboxWorld) -> None:
        data = await ask(world)
        assert data.candles == tuple(minutes(5, 1))

    async def test_invalid_ranges_and_intervals_are_refused_before_anything_is_asked(
        self, world: SandboxWorld
    ) -> None:
        for interval, start, end in (("1m", 5, 5), ("1m", -1, 5), ("7m", 0, MINUTE)):
            with pytest.raises(InvalidRequest):
                await world.client.fetch_historical_data(MARKET, interval, start, end)
        assert not world.sandbox.log.by_path

    async def test_a_range_from_the_beginning_of_time_is_answered(
        self, world: SandboxWorld
    ) -> None:
        data = await world.client.fetch_historical_data(MARKET, "1m", 0, 10 * MINUTE)
        assert data.candles == ()

    async def test_a_range_of_several_pages_is_whole(self, world: SandboxWorld) -> None:
        world.put(minutes(2_500, 0))
        async with asyncio.timeout(20):
            data = await world.client.fetch_historical_data(
                MARKET, "1m", OPEN - 2_400 * MINUTE, OPEN
            )
        assert data.candles == tuple(minutes(2_400, 1))

    async def test_after_a_refusal_for_asking_too_much_it_waits_as_long_as_it_was_told(
        self, world: SandboxWorld
    ) -> None:
        await ask(world)
        fault(world, "rest_status", status=429, retry_after=7, count=1)
        with pytest.raises(ExchangeRateLimited) as caught:
            await ask(world)
        assert caught.value.retry_after == 7
        asked = world.sandbox.log.by_path.total()
        waiting = asyncio.create_task(ask(world))
        await world.own_clock.advance(6_900)
        assert world.sandbox.log.by_path.total() == asked
        await world.own_clock.advance(200)
        assert (await waiting).candles

    @pytest.mark.parametrize("body", ["json", "html"])
    @pytest.mark.parametrize("status", [418, 500, 502, 503, 403])
    async def test_an_exchange_that_does_not_serve_is_unavailable_and_its_words_are_kept(
        self, world: SandboxWorld, status: int, body: str
    ) -> None:
        await ask(world)
        fault(world, "rest_status", status=status, body=body, retry_after=1)
        with pytest.raises(ExchangeUnavailable, match=f"{self.name}: HTTP {status}") as caught:
            await ask(world)
        assert not isinstance(caught.value, BadExchangeAnswer)
        assert isinstance(caught.value, ExchangeRateLimited) == (status == 418)

    @pytest.mark.parametrize(
        "asked", [{"kind": "rest_garbage"}, {"kind": "rest_garbage", "body": "html"},
                  {"kind": "rest_empty"}],
        ids=["half", "html", "empty"],
    )  # fmt: skip
    async def test_what_is_no_answer_is_not_believed_though_its_status_says_all_is_well(
        self, world: SandboxWorld, asked: dict[str, Any]
    ) -> None:
        world.sandbox.venue.faults.add(asked)
        with pytest.raises(BadExchangeAnswer):
            await world.client.check_coin_availability("BTC")
        world.sandbox.venue.faults.clear()
        await ask(world)
        world.sandbox.venue.faults.add(asked)
        with pytest.raises(BadExchangeAnswer):
            await ask(world)
        with pytest.raises(BadExchangeAnswer):
            await world.client.fetch_order_book(MARKET)

    async def test_an_exchange_that_never_answers_costs_the_timeout(self) -> None:
        async with plugin_world(self.plugin, timeout_s=0.2) as world:
            world.put(minutes(10, 0))
            await ask(world)
            fault(world, "rest_hang")
            with pytest.raises(ExchangeUnavailable):
                await ask(world)

    async def test_an_exchange_that_is_away_is_unavailable(self, world: SandboxWorld) -> None:
        fault(world, "refuse_connections")
        with pytest.raises(ExchangeUnavailable):
            await world.client.check_coin_availability("BTC")

    async def test_a_day_without_a_change_is_told_as_one(self, world: SandboxWorld) -> None:
        got: asyncio.Queue[Ticker] = asyncio.Queue()
        await world.client.start_ticker_stream(MARKET, got.put)
        await world.subscribed()
        async with asyncio.timeout(10):
            wanted = await world.push_ticker()
            while (ticker := await got.get()).timestamp < wanted.timestamp:
                pass
        assert ticker.change_percent == wanted.change_percent == 0

    async def test_an_unknown_market_is_refused(self, world: SandboxWorld) -> None:
        with pytest.raises(ExchangeRefused):
            await world.client.fetch_order_book("NOPE/USD")
        for start in (world.client.start_trade_stream, world.client.start_ticker_stream):
            with pytest.raises(ExchangeRefused):
                await ended(await start("NOPE/USD", ignore))

    async def test_a_market_that_is_delisted_is_refused_and_then_not_available(
        self, world: SandboxWorld
    ) -> None:
        await ask(world)
        fault(world, "delisted", instrument=MARKET)
        with pytest.raises(ExchangeRefused):
            await ask(world)
        await world.own_clock.advance(6_000)
        assert await world.client.check_coin_availability("BTC") is None

    async def test_a_broken_frame_ends_what_it_may_have_been_about_and_what_follows_works(
        self, world: SandboxWorld
    ) -> None:
        stream, book = await self.opened(world)
        fault(world, "ws_broken_frame")
        await world.push_book(98.0, 102.0)
        for handle in (stream, book):
            with pytest.raises(BadExchangeAnswer):
                await ended(handle)
        assert book.snapshot() is None
        world.sandbox.venue.faults.clear()
        again = await world.client.start_order_book_stream(MARKET)
        await world.subscribed_anew()
        await self.told(world, again)

    async def test_a_lost_connection_ends_every_stream_and_what_follows_works(
        self, world: SandboxWorld
    ) -> None:
        stream, book = await self.opened(world)
        fault(world, "drop_sockets")
        for handle in (stream, book):
            with pytest.raises(ExchangeUnavailable):
                await ended(handle)
        assert book.snapshot() is None
        again = await world.client.start_order_book_stream(MARKET)
        await world.subscribed_anew()
        await self.told(world, again)

    async def test_a_book_of_which_an_update_was_lost_ends_and_what_follows_is_right(
        self, world: SandboxWorld
    ) -> None:
        _, book = await self.opened(world)
        fault(world, "ws_sequence_gap", channel="book", count=1)
        await world.push_book(98.0, 102.0)
        await world.push_book(97.0, 103.0)
        with pytest.raises(ExchangeUnavailable):
            await ended(book)
        assert book.snapshot() is None
        again = await world.client.start_order_book_stream(MARKET)
        await world.subscribed_anew()
        await self.told(world, again)
        async with asyncio.timeout(10):
            while (top := again.snapshot(1)) is None or top.bids[0][0] != 96.0:
                await world.push_book(96.0, 104.0)
        assert top.asks[0][0] == 104.0

    async def test_all_markets_share_one_socket(self, world: SandboxWorld) -> None:
        await self.opened(world)
        for market in (MARKET, "ETH/USD"):
            await world.client.start_trade_stream(market, ignore)
            await world.subscribed()
            await world.client.start_ticker_stream(market, ignore)
            await world.subscribed()
        assert world.sandbox.hub.sockets_opened == 1

    async def test_what_is_stopped_is_unsubscribed_and_can_be_started_again(
        self, world: SandboxWorld
    ) -> None:
        stream, book = await self.opened(world)
        trades = await world.client.start_trade_stream(MARKET, ignore)
        await world.subscribed()
        async with asyncio.timeout(10):
            await asyncio.gather(stream.stop(), book.stop(), trades.stop())
            while world.sandbox.hub.running_feeds:
                await settle_loop()
        again = await world.client.start_order_book_stream(MARKET)
        await world.subscribed_anew()
        await self.told(world, again)
        assert world.sandbox.hub.sockets_opened == 1

    async def test_credentials_show_nowhere(self) -> None:
        secrets = {"apiKey": "the-key", "secret": "the-secret"}
        async with plugin_world(self.plugin, credentials=secrets) as world:
            fault(world, "rest_status", status=503)
            with pytest.raises(ExchangeUnavailable) as caught:
                await world.client.check_coin_availability("BTC")
            for text in (str(caught.value), repr(world.client)):
                assert "the-key" not in text
                assert "the-secret" not in text
