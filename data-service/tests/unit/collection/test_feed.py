"""The feed supervisor: who tries when the feed is lost, and whom one bad market disturbs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from structlog.testing import capture_logs

from collection.feed import (
    LONGEST_PAUSE_S,
    PROBE_S,
    RHYTHM_MS,
    FeedState,
    FeedSupervisor,
    OnRefused,
)
from domain.candle import CandleUpdate
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable
from tests.support.clock import ManualClock, settle_loop
from tests.support.exchange import FakeExchange
from tests.support.market import MINUTE, T0, book, candle

AWAY = ExchangeUnavailable("connection lost")
SECOND = 1_000


class World:
    """A supervisor with a candle stream and a book for each market of a fake exchange."""

    def __init__(self, *markets: str) -> None:
        self.clock = ManualClock(T0)
        self.markets = markets or ("BTC/USD",)
        self.exchange = FakeExchange(self.clock, markets=self.markets)
        self.states: list[FeedState] = []
        self.refused: list[str] = []
        self.served_again = asyncio.Event()
        self.feed = FeedSupervisor(
            self.exchange,
            self._heard,
            self.clock,
            on_state=lambda _, state: self.states.append(state),
            rng=random.Random(1),
        )

    async def _heard(self, update: CandleUpdate) -> None:
        self.feed.note_data()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        def on_refused(market: str) -> OnRefused:
            async def refused(error: ExchangeRefused) -> None:
                self.refused.append(market)
                await self.served_again.wait()

            return refused

        tasks = [asyncio.create_task(self.feed.watch())]
        for market in self.markets:
            refused = on_refused(market)
            tasks += [
                asyncio.create_task(self.feed.keep_candles(market, "5m", on_refused=refused)),
                asyncio.create_task(self.feed.keep_book(market, on_refused=refused)),
            ]
        try:
            await settle_loop()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def pass_time(self, milliseconds: int, *, step: int = 100) -> None:
        for _ in range(milliseconds // step):
            await self.clock.advance(step)

    async def speak(self, market: str | None = None) -> None:
        """An update of a market."""
        await self.exchange.push(
            CandleUpdate("crypto.com", market or self.markets[0], "5m", candle(T0))
        )
        await settle_loop()

    @property
    def starts(self) -> int:
        """How many streams were asked for so far."""
        requests = self.exchange.requests
        return requests["start_realtime_stream"] + requests["start_order_book_stream"]

    def kept(self) -> Sequence[str]:
        """The markets whose candle stream runs."""
        return sorted(stream.market for stream in self.exchange.running_streams)


async def test_while_a_feed_is_lost_one_stream_at_a_time_tries_and_pauses_grow() -> None:
    markets = tuple(f"C{number}/USD" for number in range(100))
    world = World(*markets)
    async with world.running():
        await world.speak()
        world.exchange.fail_with = AWAY
        world.exchange.end_streams(AWAY)
        await world.pass_time(SECOND)
        first_second = world.starts - 200
        await world.pass_time(9 * MINUTE, step=SECOND)
        before = world.starts
        await world.pass_time(MINUTE, step=SECOND)
        assert 1 <= first_second <= 3
        assert 1 <= world.starts - before <= 60 / (0.75 * LONGEST_PAUSE_S)
        assert world.states == ["connected", "reconnecting"]


async def test_what_is_heard_first_lets_all_the_others_go_at_once() -> None:
    markets = tuple(f"C{number}/USD" for number in range(100))
    world = World(*markets)
    async with world.running():
        await world.speak()
        world.exchange.fail_with = AWAY
        world.exchange.end_streams(AWAY)
        await world.pass_time(MINUTE, step=SECOND)
        world.exchange.fail_with = None
        world.exchange.book = book(T0 + MINUTE)
        await world.pass_time(40 * SECOND)
        assert world.kept() == sorted(markets)
        assert world.states == ["connected", "reconnecting", "connected"]


async def test_a_probe_of_a_quiet_market_holds_nobody_back_for_long() -> None:
    world = World("LRC/USD", "BTC/USD")
    async with world.running():
        await world.speak()
        world.exchange.end_streams(AWAY)
        # Nobody says anything: each tries in its turn, and all run in the end.
        await world.pass_time(round((4 * PROBE_S + 1) * SECOND))
        assert world.kept() == ["BTC/USD", "LRC/USD"]
        assert world.states == ["connected", "reconnecting"]
        await world.speak("BTC/USD")
        assert world.states == ["connected", "reconnecting", "connected"]


async def test_an_outage_is_logged_once_and_so_is_its_end() -> None:
    world = World("BTC/USD", "ETH/USD")
    with capture_logs() as logs:
        async with world.running():
            await world.speak()
            world.exchange.fail_with = AWAY
            world.exchange.end_streams(AWAY)
            await world.pass_time(5 * MINUTE, step=SECOND)
            world.exchange.fail_with = None
            world.exchange.book = book(T0)
            await world.pass_time(MINUTE, step=SECOND)
    assert [entry["event"] for entry in logs] == ["feed_lost", "feed_restored"]


async def test_a_stream_that_keeps_failing_alone_disturbs_nobody_and_is_told_once() -> None:
    world = World("BTC/USD", "BAD/USD")
    with capture_logs() as logs:
        async with world.running():
            await world.speak("BTC/USD")
            for _ in range(30):
                for stream in world.exchange.running_streams:
                    if stream.market == "BAD/USD":
                        stream.end(ExchangeUnavailable("broken rows"))
                await world.speak("BTC/USD")
                await world.pass_time(SECOND)
            assert world.states == ["connected"]
            assert "BTC/USD" in world.kept()
    assert [entry["event"] for entry in logs] == ["stream_fails"]


async def test_a_refused_market_waits_until_it_is_served_again_and_is_no_loss_of_the_feed() -> None:
    world = World("BTC/USD", "OLD/USD")
    async with world.running():
        await world.speak("BTC/USD")
        world.exchange.markets = ("BTC/USD",)
        for stream in list(world.exchange.streams):
            if stream.market == "OLD/USD":
                stream.end(ExchangeRefused("unknown symbol"))
        await world.pass_time(10 * SECOND)
        started = world.starts
        await world.speak("BTC/USD")
        await world.pass_time(50 * SECOND)
        assert world.refused == ["OLD/USD", "OLD/USD"]
        assert world.starts == started
        assert world.states == ["connected"]
        world.exchange.markets = world.markets
        world.served_again.set()
        await settle_loop()
        assert world.kept() == ["BTC/USD", "OLD/USD"]


async def test_a_mute_feed_is_lost_and_its_connections_are_closed() -> None:
    world = World()
    async with world.running():
        await world.speak()
        await world.pass_time(RHYTHM_MS + 30 * SECOND, step=SECOND)
        assert world.exchange.requests["reset_connections"] >= 1
        assert world.states == ["connected", "reconnecting"]
        await world.speak()
        assert world.states == ["connected", "reconnecting", "connected"]


async def test_a_feed_that_dies_young_is_not_dialled_ever_faster() -> None:
    world = World()
    async with world.running():
        for _ in range(300):
            await world.speak()
            world.exchange.end_streams(AWAY)
            await world.pass_time(SECOND)
        assert world.starts < 60


async def test_a_silent_stream_is_started_anew_when_it_is_asked_for() -> None:
    world = World("BTC/USD", "ETH/USD")
    async with world.running():
        await world.pass_time(SECOND)
        assert world.feed.heard_since("BTC/USD", "5m") == T0
        world.feed.restart_candles("BTC/USD", "5m")
        await settle_loop()
        assert world.kept() == ["BTC/USD", "ETH/USD"]
        assert world.feed.heard_since("BTC/USD", "5m") == T0 + SECOND
        assert world.feed.heard_since("ETH/USD", "5m") == T0
        assert world.exchange.requests["start_realtime_stream"] == 3
