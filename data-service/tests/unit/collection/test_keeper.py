"""The keeper of one target: what it does about its market and its stream, by what is seen of it."""

from __future__ import annotations

from contextlib import aclosing

from structlog.testing import capture_logs

from collection.interfaces import ClosedCandle, GapTold, TargetState, TargetStatus
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable
from storage.path_utility import StoragePathUtility
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import DAY, FIVE, HOUR, MINUTE, T0, book, candles

FIRST_OPEN = T0 + 24 * HOUR


def as_delisted(world: Collecting, market: str = "BTC/USD") -> None:
    """Take a market off the exchange, as exchanges do: its streams end refused."""
    world.exchange.markets = [name for name in world.exchange.markets if name != market]
    for stream in list(world.exchange.streams):
        if stream.market == market:
            stream.end(ExchangeRefused(f"unknown symbol {market}"))


async def status_of(world: Collecting, coin: str = "BTC") -> TargetStatus:
    found = await world.manager.list_targets()
    return next(status for status in found if status.target.coin == coin)


def asked_of(world: Collecting, market: str = "BTC/USD") -> int:
    return sum(asked.market == market for asked in world.exchange.asked)


async def trade(world: Collecting, milliseconds: int, market: str = "BTC/USD") -> None:
    """Let time pass while a market trades."""
    for _ in range(milliseconds // 30_000):
        await world.update(world.clock.now_ms() // FIVE * FIVE, market=market)
        await world.pass_time(30_000)
    await world.update(world.clock.now_ms() // FIVE * FIVE, market=market)


async def test_a_delisted_market_is_a_state_and_no_loop_of_errors() -> None:
    world = Collecting()
    with capture_logs() as logs:
        async with world.running():
            await world.manager.add_coin("BTC")
            await world.pass_time(MINUTE)
            as_delisted(world)
            await world.pass_time(10 * MINUTE)
            assert (await status_of(world)).state is TargetState.DELISTED
            before = world.exchange.requests.total()
            await world.pass_time(6 * HOUR)
            assert (await status_of(world)).state is TargetState.DELISTED
            # Each repair asks for history and for the list.
            assert world.exchange.requests.total() - before <= 6 * 2
    told = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert told == ["market_delisted"]


async def test_a_delisted_market_disturbs_no_other() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.manager.add_coin("ETH")
        await world.pass_time(MINUTE)
        as_delisted(world)
        await trade(world, HOUR, "ETH/USD")
        assert (await status_of(world)).state is TargetState.DELISTED
        assert (await status_of(world, "ETH")).state is TargetState.LIVE
        assert [stream.market for stream in world.exchange.running_streams] == ["ETH/USD"]
        assert await world.stored("ETH") == world.wanted()


async def test_a_market_that_is_listed_again_is_complete_and_live_within_an_hour() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        as_delisted(world)
        await world.pass_time(3 * HOUR)
        world.exchange.markets = ("BTC/USD", "ETH/USD")
        await world.pass_time(HOUR)
        await trade(world, MINUTE)
        assert (await status_of(world)).state is TargetState.LIVE
        assert await world.stored() == world.wanted()
        assert [stream.market for stream in world.exchange.running_streams] == ["BTC/USD"]


async def test_a_market_that_is_listed_and_not_traded_is_delisted_too() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        rows = world.exchange.candles["BTC/USD", "5m"]
        for period in [period for period in rows if period >= FIRST_OPEN]:
            del rows[period]
        world.exchange.inactive.add("BTC/USD")
        await world.pass_time(HOUR)
        assert (await status_of(world)).state is TargetState.DELISTED
        before = asked_of(world)
        await world.pass_time(6 * HOUR)
        assert asked_of(world) - before <= 6
        # Trading goes on: the first update says so, and nothing waits for the next hour.
        world.exchange.inactive.clear()
        now = world.clock.now_ms() // FIVE * FIVE
        world.exchange.put("BTC/USD", "5m", candles(now, 100))
        await trade(world, 2 * MINUTE)
        assert (await status_of(world)).state is TargetState.LIVE


async def test_what_is_refused_of_a_listed_market_is_asked_for_ever_more_rarely() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        world.exchange.refuse_history = True
        await world.pass_time(10 * MINUTE)
        assert (await status_of(world)).state is TargetState.DEGRADED
        before = asked_of(world)
        await world.pass_time(6 * HOUR)
        assert asked_of(world) - before <= 9
        world.exchange.refuse_history = False
        await world.pass_time(HOUR)
        await trade(world, MINUTE)
        assert (await status_of(world)).state is TargetState.LIVE
        assert await world.stored() == world.wanted()


async def test_a_market_that_always_fails_costs_the_others_nothing() -> None:
    world = Collecting()
    with capture_logs() as logs:
        async with world.running():
            await world.manager.add_coin("BTC")
            await world.manager.add_coin("ETH")
            await trade(world, MINUTE, "ETH/USD")
            world.exchange.failing_markets.add("BTC/USD")
            world.exchange.book = book(FIRST_OPEN)
            async with aclosing(world.manager.stream_realtime_data("ETH")) as events:
                await anext(events)
                await trade(world, HOUR, "ETH/USD")
                told: list[int] = []
                while len(told) < 12:
                    event = await anext(events)
                    assert not isinstance(event, GapTold)
                    if isinstance(event, ClosedCandle):
                        told.append(event.entry.timestamp)
            assert (await status_of(world)).state is TargetState.DEGRADED
            assert (await status_of(world, "ETH")).state is TargetState.LIVE
            assert await world.stored("ETH") == world.wanted()
            # By the pauses of its own: what closes, what is owed a look, what is repaired.
            assert asked_of(world) < 300
    warned = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warned == ["series_not_settled"]


async def test_an_outage_is_not_taken_for_a_delisting() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        world.exchange.fail_with = ExchangeUnavailable("503")
        world.exchange.end_streams(world.exchange.fail_with)
        await world.pass_time(DAY // 4)
        assert (await status_of(world)).state is TargetState.DEGRADED


async def test_a_stream_that_says_nothing_of_a_period_with_trades_is_started_anew() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.manager.add_coin("ETH")
        await trade(world, 3 * FIVE, "ETH/USD")
        by_market = [stream.market for stream in world.exchange.streams if stream.interval]
        assert by_market.count("ETH/USD") == 1
        assert by_market.count("BTC/USD") == 2
        assert await world.stored() == world.wanted()


async def test_after_a_loss_of_the_feed_everything_wanted_is_looked_at() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.update(FIRST_OPEN)
        await world.pass_time(10_000)
        old = FIRST_OPEN - 6 * HOUR
        del world.raw.blobs[StoragePathUtility.get_raw_data_path("crypto.com", "BTC", old)]
        world.exchange.end_streams(ExchangeUnavailable("connection lost"))
        await world.pass_time(5_000)
        await world.update(FIRST_OPEN)
        await settle_loop(100)
        await world.pass_time(5_000)
        assert old in await world.stored()
