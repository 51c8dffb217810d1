"""Trades, tickers and books: one stream for all who read, nothing twice, nothing stale untold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing

import pytest
from structlog.testing import capture_logs

from collection.channels import QUEUE_BOUND, REMEMBERED_TRADES
from collection.feed import RHYTHM_MS
from collection.interfaces import (
    BookTold,
    Channel,
    SlowConsumer,
    StatusTold,
    StreamEvent,
    SubscriptionStarted,
    TickerTold,
    TradesTold,
)
from domain.ticker import Ticker
from domain.trade import Trade
from errors import CoinNotAvailable, InvalidRequest
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import book

AWAY = ExchangeUnavailable("connection lost")
CHANNELS = (Channel.TRADES, Channel.TICKER, Channel.ORDER_BOOK)


def trade(number: int) -> Trade:
    return Trade(str(number), 1_700_000_000_000 + number, 100.0, 0.5, "buy")


@pytest.fixture
async def world() -> AsyncIterator[Collecting]:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await settle_loop()
        await world.update(world.clock.now_ms() // 300_000 * 300_000)
        yield world


class Listener:
    """One subscriber that has begun."""

    def __init__(self, world: Collecting, channel: Channel, coin: str = "BTC") -> None:
        self.stream: AsyncGenerator[StreamEvent, None] = world.manager.stream_realtime_data(
            coin, channel=channel
        )

    async def begin(self, stack: AsyncExitStack) -> SubscriptionStarted:
        await stack.enter_async_context(aclosing(self.stream))
        started = await anext(self.stream)
        assert isinstance(started, SubscriptionStarted)
        await settle_loop()
        return started

    async def next(self) -> StreamEvent:
        return await anext(self.stream)

    async def next_news(self) -> StreamEvent:
        """The next event that is about the market itself."""
        while isinstance(event := await anext(self.stream), StatusTold):
            pass
        return event


async def listening(
    stack: AsyncExitStack, world: Collecting, channel: Channel, coin: str = "BTC"
) -> Listener:
    listener = Listener(world, channel, coin)
    await listener.begin(stack)
    return listener


def running(world: Collecting, method: str) -> int:
    return sum(stream.running and stream.method == method for stream in world.exchange.streams)


@pytest.mark.parametrize("channel", CHANNELS)
async def test_a_subscription_begins_with_its_market(world: Collecting, channel: Channel) -> None:
    async with AsyncExitStack() as stack:
        started = await Listener(world, channel).begin(stack)
        assert (started.market, started.channel, started.last_closed) == ("BTC/USD", channel, None)


async def test_any_number_of_readers_share_one_stream_that_ends_with_the_last(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        readers = [await listening(stack, world, Channel.TRADES) for _ in range(5)]
        assert running(world, "start_trade_stream") == 1
        await world.exchange.push_trades("BTC/USD", trade(1), trade(2))
        events = [await reader.next() for reader in readers]
        assert events == [TradesTold((trade(1), trade(2)))] * 5
        for reader in readers[1:]:
            await reader.stream.aclose()
        assert running(world, "start_trade_stream") == 1
    assert running(world, "start_trade_stream") == 0


async def test_readers_of_every_channel_may_leave_at_once(world: Collecting) -> None:
    async with AsyncExitStack() as stack:
        readers = [await listening(stack, world, channel) for channel in CHANNELS * 3]
        await asyncio.gather(*(reader.stream.aclose() for reader in readers))
        assert running(world, "start_trade_stream") == 0
        assert running(world, "start_ticker_stream") == 0
        again = await listening(stack, world, Channel.TRADES)
        await world.exchange.push_trades("BTC/USD", trade(1))
        assert await again.next() == TradesTold((trade(1),))


async def test_a_reader_that_is_behind_gets_what_waits_at_once(world: Collecting) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        for number in range(4):
            await world.exchange.push_trades("BTC/USD", trade(number))
        assert await reader.next() == TradesTold(tuple(map(trade, range(4))))


async def test_no_trade_is_told_twice_when_a_new_stream_begins_with_old_ones(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        await world.exchange.push_trades("BTC/USD", trade(1), trade(2))
        assert await reader.next() == TradesTold((trade(1), trade(2)))
        world.exchange.end_streams(AWAY)
        await world.pass_time(10_000)
        await world.exchange.push_trades("BTC/USD", trade(2), trade(3))
        assert await reader.next_news() == TradesTold((trade(3),))


async def test_how_many_trades_are_remembered_is_bounded(world: Collecting) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        await world.exchange.push_trades("BTC/USD", *map(trade, range(REMEMBERED_TRADES + 1)))
        await reader.next()
        await world.exchange.push_trades("BTC/USD", trade(REMEMBERED_TRADES), trade(0))
        assert await reader.next() == TradesTold((trade(0),))


async def test_a_reader_of_trades_that_reads_too_slowly_is_told_and_others_are_not_disturbed(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        slow = await listening(stack, world, Channel.TRADES)
        quick = await listening(stack, world, Channel.TRADES)
        for first in range(0, 2 * QUEUE_BOUND, 1_000):
            await world.exchange.push_trades("BTC/USD", *map(trade, range(first, first + 1_000)))
            await quick.next()
        with pytest.raises(SlowConsumer, match=r"more than 10000 trades of BTC/USD on crypto\.com"):
            await slow.next()


async def test_of_tickers_the_newest_is_told_and_a_new_reader_gets_it_at_once(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        first = await listening(stack, world, Channel.TICKER)
        for price in (1.0, 2.0, 3.0):
            await world.exchange.push_ticker("BTC/USD", Ticker(1, last=price))
        assert await first.next() == TickerTold(Ticker(1, last=3.0))
        second = await listening(stack, world, Channel.TICKER)
        assert await second.next() == TickerTold(Ticker(1, last=3.0))


async def test_of_books_the_newest_is_told_and_a_new_reader_gets_it_at_once(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        now = world.clock.now_ms()
        first = await listening(stack, world, Channel.ORDER_BOOK)
        for passed in (0, 1, 2):
            world.exchange.change_book(book(now + passed))
        assert await first.next() == BookTold(book(now + 2), stale=False)
        second = await listening(stack, world, Channel.ORDER_BOOK)
        assert await second.next() == BookTold(book(now + 2), stale=False)


async def test_a_book_that_stands_still_is_told_as_it_is_and_once_more_when_it_is_stale(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        now = world.clock.now_ms()
        world.exchange.book = book(now)
        reader = await listening(stack, world, Channel.ORDER_BOOK)
        assert await reader.next() == BookTold(book(now), stale=False)
        await world.pass_time(RHYTHM_MS + 5_000)
        assert await reader.next_news() == BookTold(book(now), stale=True)
        later = book(world.clock.now_ms())
        world.exchange.change_book(later)
        assert await reader.next_news() == BookTold(later, stale=False)


async def test_a_book_whose_feed_is_lost_is_stale_at_once_and_fresh_when_it_is_back(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        first = book(world.clock.now_ms())
        world.exchange.book = first
        reader = await listening(stack, world, Channel.ORDER_BOOK)
        assert await reader.next() == BookTold(first, stale=False)
        world.exchange.fail_with = AWAY
        world.exchange.end_streams(AWAY)
        await settle_loop()
        lost = await reader.next()
        assert isinstance(lost, StatusTold)
        assert lost.state == "reconnecting"
        assert await reader.next() == BookTold(first, stale=True)
        world.exchange.fail_with = None
        second = book(world.clock.now_ms() + 5_000)
        world.exchange.book = second
        await world.pass_time(60_000)
        assert await reader.next_news() == BookTold(second, stale=False)


async def test_what_is_known_of_the_feed_is_told_first_to_who_comes_while_it_is_lost(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        world.exchange.fail_with = AWAY
        world.exchange.end_streams(AWAY)
        await world.pass_time(1_000)
        reader = await listening(stack, world, Channel.TRADES)
        event = await reader.next()
        assert isinstance(event, StatusTold)
        assert event.state == "reconnecting"


async def test_a_target_that_is_removed_stays_while_a_channel_of_it_is_read(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        await world.manager.remove_coin("BTC")
        assert [str(item.state) for item in await world.manager.list_targets()] == ["removing"]
        await world.exchange.push_trades("BTC/USD", trade(1))
        assert await reader.next() == TradesTold((trade(1),))
    assert await world.manager.list_targets() == []


async def test_readers_of_a_channel_end_when_this_process_stands_by(world: Collecting) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TICKER)
        await world.manager.stand_by()
        with pytest.raises(CoinNotAvailable):
            await reader.next()


async def test_a_channel_that_the_exchange_refuses_ends_its_readers_and_can_be_asked_for_again(
    world: Collecting,
) -> None:
    refused = ExchangeRefused("no trades of BTC/USD here")
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        for stream in world.exchange.streams:
            if stream.method == "start_trade_stream":
                stream.end(refused)
        with pytest.raises(ExchangeRefused):
            await reader.next()
        again = await listening(stack, world, Channel.TRADES)
        await world.exchange.push_trades("BTC/USD", trade(1))
        assert await again.next() == TradesTold((trade(1),))


async def test_a_channel_that_breaks_is_logged_and_no_reader_waits_for_ever(
    world: Collecting,
) -> None:
    async with AsyncExitStack() as stack:
        reader = await listening(stack, world, Channel.TRADES)
        with capture_logs() as logs:
            for stream in world.exchange.streams:
                if stream.method == "start_trade_stream":
                    stream.end(RuntimeError("a defect"))
            with pytest.raises(ExchangeUnavailable, match="subscribe again"):
                await reader.next()
        assert [entry["event"] for entry in logs] == ["channel_failed"]


@pytest.mark.parametrize("channel", CHANNELS)
async def test_from_is_for_candles_only(world: Collecting, channel: Channel) -> None:
    stream = world.manager.stream_realtime_data("BTC", channel=channel, from_ms=1)
    with pytest.raises(InvalidRequest, match="for candles only"):
        await anext(stream)


async def test_a_coin_that_is_not_collected_has_no_channels(world: Collecting) -> None:
    with pytest.raises(CoinNotAvailable):
        await anext(world.manager.stream_realtime_data("ETH", channel=Channel.TICKER))
