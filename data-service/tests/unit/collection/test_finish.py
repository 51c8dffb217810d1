"""What is settled before a stop, and what is not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from collection.interfaces import Channel, ClosedCandle, StreamEvent
from collection.keeper import CLOSE_GRACE_MS, FIRST_POLL_MS
from domain.entry import Entry
from exchange_source.interfaces import ExchangeUnavailable
from storage.interfaces import NotTheCollector, StorageUnavailable
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import FIVE, HOUR, T0, book

PERIOD = T0 + 24 * HOUR
CLOSE = PERIOD + FIVE


@asynccontextmanager
async def just_closed(*, published_at: int) -> AsyncIterator[Collecting]:
    """A collection of BTC a second after a period closed with a book; the exchange publishes the
    candle, and the next one, at ``published_at``."""
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(FIVE - 15_000)
        for period in (PERIOD, CLOSE):
            world.exchange.publish_at["BTC/USD", "5m", period] = published_at
        world.exchange.book = book(CLOSE - 100)
        await world.pass_time(6_000)
        assert world.clock.now_ms() == CLOSE + 1_000
        assert await world.stored() == world.wanted(PERIOD)
        yield world


async def subscribed(world: Collecting) -> tuple[list[StreamEvent], asyncio.Task[None]]:
    """What a subscriber of BTC is told from now on, and the task that listens."""
    told: list[StreamEvent] = []

    async def listen() -> None:
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            async for event in events:
                told.append(event)  # noqa: PERF401  what was told so far counts

    listening = asyncio.create_task(listen())
    await settle_loop()
    return told, listening


def closed_of(told: list[StreamEvent]) -> list[Entry]:
    return [event.entry for event in told if isinstance(event, ClosedCandle)]


async def given_up(work: asyncio.Task[None]) -> None:
    """End a stop whose time is over."""
    assert not work.done()
    work.cancel()
    await asyncio.wait([work])


async def test_what_has_closed_is_stored_with_its_book_and_told() -> None:
    async with just_closed(published_at=CLOSE + 3_000) as world:
        told, listening = await subscribed(world)
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(5_000)
        await finishing
        await world.hub.until_read()
        newest = await world.storage.get_latest_entry("crypto.com", "BTC")
        assert newest is not None
        assert (newest.timestamp, newest.order_book) == (PERIOD, book(CLOSE - 100))
        assert closed_of(told) == [newest]
        listening.cancel()
        await asyncio.wait([listening])


async def test_what_is_stored_is_told_though_its_ledger_is_still_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with just_closed(published_at=CLOSE) as world:
        told, listening = await subscribed(world)
        # The disk holds the ledger up, and with it all that comes after it.
        let_go, write = asyncio.Event(), world.raw.write_blob

        async def hold(path: str, content: bytes) -> None:
            if await world.stored() == world.wanted(CLOSE):
                await let_go.wait()
            await write(path, content)

        monkeypatch.setattr(world.raw, "write_blob", hold)
        await world.pass_time(15_000)
        assert await world.stored() == world.wanted(CLOSE)
        await world.manager.finish()
        await world.hub.until_read()
        assert [entry.timestamp for entry in closed_of(told)] == [PERIOD]
        let_go.set()
        listening.cancel()
        await asyncio.wait([listening])


async def test_intake_ends_and_no_later_period_is_begun() -> None:
    async with just_closed(published_at=CLOSE) as world:
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(5_000)
        await finishing
        assert world.exchange.running_streams == []
        asked = len(world.exchange.asked)
        await world.pass_time(3 * FIVE)
        assert len(world.exchange.asked) == asked
        assert await world.stored() == world.wanted(CLOSE)


async def test_what_the_exchange_has_not_told_by_its_grace_is_left() -> None:
    async with just_closed(published_at=CLOSE + HOUR) as world:
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(CLOSE_GRACE_MS)
        assert not finishing.done()
        await world.pass_time(2 * FIRST_POLL_MS)
        await finishing


@pytest.mark.parametrize("what", ["exchange", "storage"])
async def test_who_refuses_is_asked_again_until_the_time_is_over(what: str) -> None:
    async with just_closed(published_at=CLOSE) as world:
        if what == "exchange":
            world.exchange.fail_with = ExchangeUnavailable("it is away")
        else:
            world.raw.fail_with = StorageUnavailable("the line is cut")
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(20_000)
        assert not finishing.done()
        world.exchange.fail_with = world.raw.fail_with = None
        await world.pass_time(60_000)
        await finishing
        assert await world.stored() == world.wanted(CLOSE)


async def test_an_exchange_that_says_nothing_can_be_given_up() -> None:
    async with just_closed(published_at=CLOSE) as world:
        world.exchange.gate.clear()
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(60_000)
        await given_up(finishing)
        assert finishing.cancelled()
        assert await world.stored() == world.wanted(PERIOD)


async def test_where_nothing_is_open_nothing_is_asked() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(FIVE)
        # Second looks are due by now, which the next start takes.
        asked = len(world.exchange.asked)
        await world.manager.finish()
        assert len(world.exchange.asked) == asked


async def test_a_backfill_is_not_waited_for() -> None:
    world = Collecting()
    world.exchange.history_page = 24
    world.assemble()
    async with world.running():
        await world.manager.add_coin("ETH", since=T0)
        world.exchange.gate.clear()
        await settle_loop()
        finishing = asyncio.create_task(world.manager.finish())
        await settle_loop()
        world.exchange.gate.set()
        await world.pass_time(15_000)
        await finishing
        stored = await world.stored("ETH")
        live = range(PERIOD - HOUR, PERIOD, FIVE)
        assert set(live) <= set(stored)
        assert len(stored) < 4 * len(live)


async def test_what_would_begin_something_is_refused_from_then_on() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(5_000)
        await world.manager.finish()
        with pytest.raises(NotTheCollector, match="is stopping"):
            await world.manager.add_coin("ETH")
        with pytest.raises(NotTheCollector, match="is stopping"):
            await world.manager.remove_coin("BTC")
        with pytest.raises(NotTheCollector, match="is stopping"):
            await anext(world.manager.stream_realtime_data("BTC"))


async def test_channels_end_and_their_readers_stay() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(5_000)
        async with aclosing(
            world.manager.stream_realtime_data("BTC", channel=Channel.TRADES)
        ) as events:
            await anext(events)
            following = asyncio.ensure_future(anext(events))
            await settle_loop()
            await world.manager.finish()
            streams = {stream.method for stream in world.exchange.streams if stream.running}
            assert "start_trade_stream" not in streams
            assert not following.done()
            following.cancel()
            await asyncio.wait([following])


async def test_a_reader_that_is_slow_is_waited_for_and_one_that_left_is_not() -> None:
    async with just_closed(published_at=CLOSE) as world:
        events = world.manager.stream_realtime_data("BTC")
        await anext(events)
        finishing = asyncio.create_task(world.manager.finish())
        await world.pass_time(5_000)
        await finishing
        reading = asyncio.create_task(world.hub.until_read())
        await settle_loop()
        assert not reading.done()
        await events.aclose()
        await asyncio.wait_for(reading, 5)
