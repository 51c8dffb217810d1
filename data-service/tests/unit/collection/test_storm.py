"""An outage of the exchange with many targets: what reaches it meanwhile, and right after."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from collection.interfaces import TargetState
from exchange_source.interfaces import ExchangeUnavailable
from tests.support.collecting import Collecting
from tests.support.market import FIVE, HOUR, MINUTE, T0, book, candles
from tests.support.targets import make_target

COUNT = 200
MARKETS = [f"T{number:03d}/USD" for number in range(COUNT)]
START = T0 + 24 * HOUR + 10_000
SINCE = T0 + 22 * HOUR
OUTAGE_MS = 10 * MINUTE
STEP_MS = 5_000
MOST_A_TARGET = 3
ASKING = ("fetch_historical_data", "fetch_order_book", "check_coin_availability")
CONNECTING = ("start_realtime_stream", "start_order_book_stream")


class Many(Collecting):
    """Targets of 200 markets on one exchange."""

    def __init__(self) -> None:
        super().__init__(now=START)
        self.exchange.markets = MARKETS
        recorded = candles(SINCE - HOUR, 60)
        for market in MARKETS:
            self.exchange.put(market, "5m", recorded)

    async def add_targets(self) -> None:
        for market in MARKETS:
            coin = market.partition("/")[0]
            await self.targets.add_target(make_target(coin, since=SINCE, now=START))

    async def live(self, milliseconds: int) -> None:
        """Let time pass on an exchange whose feeds tell something."""
        until = self.clock.now_ms() + milliseconds
        while (now := self.clock.now_ms()) < until:
            if self.exchange.fail_with is None:
                # The book of the next moment too, so that there is a fresh one at each close.
                self.exchange.book = book(min(now + STEP_MS, until))
                await self.update(now // FIVE * FIVE, market=MARKETS[0])
            await self.clock.advance(min(STEP_MS, until - now))

    async def lose_exchange(self, milliseconds: int) -> None:
        """An outage: nothing is answered, and nothing can be connected to."""
        self.exchange.fail_with = ExchangeUnavailable("crypto.com: connection refused")
        self.exchange.end_streams(ExchangeUnavailable("crypto.com: connection lost"))
        await self.live(milliseconds)
        self.exchange.fail_with = None

    def begin_to_count(self) -> None:
        self.exchange.requests.clear()
        self.exchange.asked.clear()

    def requests(self, methods: tuple[str, ...]) -> int:
        return sum(self.exchange.requests[method] for method in methods)

    def most_of_one_market(self) -> int:
        return max(Counter(asked.market for asked in self.exchange.asked).values(), default=0)

    async def missing(self) -> list[str]:
        """The markets of which a closed period is not stored."""
        end = self.clock.now_ms() // FIVE * FIVE
        wanted = list(range(SINCE, end, FIVE))
        coins = [market.partition("/")[0] for market in MARKETS]
        return [coin for coin in coins if await self.stored(coin) != wanted]


@asynccontextmanager
async def collecting() -> AsyncIterator[Many]:
    """Everything is collected, live and at rest."""
    world = Many()
    await world.add_targets()
    async with world.running():
        await world.live(4 * MINUTE)
        states = Counter(status.state for status in await world.manager.list_targets())
        assert states == {TargetState.LIVE: COUNT}
        assert await world.missing() == []
        yield world


@pytest.mark.parametrize(
    "into_period_ms",
    [pytest.param(MINUTE, id="between closes"), pytest.param(FIVE - MINUTE // 2, id="at a close")],
)
async def test_an_outage_costs_few_requests_and_a_minute_after_it_everything_is_stored(
    into_period_ms: int,
) -> None:
    async with collecting() as world:
        # It is four minutes into a period; the outage begins so that it ends where it should.
        now = world.clock.now_ms()
        await world.live((into_period_ms - now - STEP_MS) % FIVE)
        await world.lose_exchange(STEP_MS)
        # What was under way when it began has failed by now: it is probed, and not asked by every
        # target.
        world.begin_to_count()
        await world.lose_exchange(OUTAGE_MS)
        assert world.requests(ASKING) < COUNT / 2
        assert world.requests(CONNECTING) < COUNT / 2

        world.begin_to_count()
        await world.live(MINUTE)
        assert world.requests(ASKING) <= MOST_A_TARGET * COUNT
        assert world.most_of_one_market() <= MOST_A_TARGET
        assert await world.missing() == []
