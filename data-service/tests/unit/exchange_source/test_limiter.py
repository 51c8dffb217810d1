"""The limiter: pace, cap, priority, and what cancelled waiters leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from exchange_source.interfaces import ExchangeRateLimited, ExchangeUnavailable, Priority
from exchange_source.limiter import RequestLimiter
from tests.support.clock import ManualClock, settle_loop


class Client:
    """Requests that stay in their slot until they are let go; ``started`` is in order."""

    def __init__(self, limiter: RequestLimiter) -> None:
        self.limiter = limiter
        self.started: list[str] = []
        self.finish: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(
        self, name: str, priority: Priority = Priority.REQUEST, *, weight: float = 1.0
    ) -> None:
        self.finish[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, priority, weight))
        await settle_loop()

    async def done(self, name: str) -> None:
        self.finish[name].set()
        await settle_loop()

    async def _run(self, name: str, priority: Priority, weight: float) -> None:
        async with self.limiter.slot(priority, weight=weight):
            self.started.append(name)
            await self.finish[name].wait()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def limiter_of(clock: ManualClock, **changes: float) -> RequestLimiter:
    settings: dict[str, float] = {"rate": 10, "concurrency": 100} | changes
    return RequestLimiter(clock, name="crypto.com", **settings)  # type: ignore[arg-type]


@pytest.fixture
async def paced(clock: ManualClock) -> AsyncIterator[Client]:
    client = Client(limiter_of(clock))
    yield client
    await finish(client)


@pytest.fixture
async def single(clock: ManualClock) -> AsyncIterator[Client]:
    client = Client(limiter_of(clock, rate=1000, concurrency=1))
    yield client
    await finish(client)


async def test_a_request_of_a_higher_weight_keeps_the_next_one_waiting_as_long(
    paced: Client, clock: ManualClock
) -> None:
    await paced.ask("heavy", weight=12.5)
    await paced.ask("next")
    await clock.advance(1_249)
    assert paced.started == ["heavy"]
    await clock.advance(1)
    assert paced.started == ["heavy", "next"]


async def finish(client: Client) -> None:
    await client.limiter.close()
    for task in client.tasks.values():
        task.cancel()
    await asyncio.gather(*client.tasks.values(), return_exceptions=True)


async def test_requests_start_no_faster_than_the_rate(paced: Client, clock: ManualClock) -> None:
    for name in "abc":
        await paced.ask(name)
    assert paced.started == ["a"]
    await clock.advance(99)
    assert paced.started == ["a"]
    await clock.advance(1)
    assert paced.started == ["a", "b"]
    await clock.advance(100)
    assert paced.started == ["a", "b", "c"]


async def test_an_idle_time_saves_up_no_burst(paced: Client, clock: ManualClock) -> None:
    await clock.advance(60_000)
    for name in "ab":
        await paced.ask(name)
    assert paced.started == ["a"]


async def test_no_more_run_at_once_than_the_cap(single: Client, clock: ManualClock) -> None:
    await single.ask("a")
    await single.ask("b")
    await clock.advance(60_000)
    assert single.started == ["a"]
    assert (single.limiter.running, single.limiter.waiting) == (1, 1)
    await single.done("a")
    assert single.started == ["a", "b"]


async def test_live_goes_before_requests_before_backfill(
    single: Client, clock: ManualClock
) -> None:
    await single.ask("first")
    await single.ask("backfill 1", Priority.BACKFILL)
    await single.ask("request 1", Priority.REQUEST)
    await single.ask("backfill 2", Priority.BACKFILL)
    await single.ask("live", Priority.LIVE)
    await single.ask("request 2", Priority.REQUEST)
    for name in ("first", "live", "request 1", "request 2", "backfill 1", "backfill 2"):
        await clock.advance(1)
        await single.done(name)
    assert single.started == [
        "first",
        "live",
        "request 1",
        "request 2",
        "backfill 1",
        "backfill 2",
    ]


async def test_a_live_request_overtakes_one_that_waits_for_the_pace(
    paced: Client, clock: ManualClock
) -> None:
    await paced.ask("a")
    await paced.ask("backfill", Priority.BACKFILL)
    await paced.ask("live", Priority.LIVE)
    await clock.advance(100)
    assert paced.started == ["a", "live"]


async def test_a_waiter_that_is_cancelled_leaves_its_place(
    single: Client, clock: ManualClock
) -> None:
    await single.ask("a")
    await single.ask("b")
    await single.ask("c")
    single.tasks["b"].cancel()
    await settle_loop()
    assert single.limiter.waiting == 1
    await clock.advance(1)
    await single.done("a")
    assert single.started == ["a", "c"]


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_gives_the_slot_back(
    single: Client, clock: ManualClock
) -> None:
    await single.ask("a")
    await single.ask("b")
    await single.ask("c")
    await clock.advance(1)
    single.finish["a"].set()
    while single.limiter.waiting == 2:  # noqa: ASYNC110  rounds of the loop, not time
        await asyncio.sleep(0)
    single.tasks["b"].cancel()  # its turn was given and it has not run yet
    await clock.advance(1)
    assert single.started == ["a", "c"]
    await single.done("c")
    assert single.limiter.running == 0


async def test_a_request_that_fails_gives_its_slot_back(clock: ManualClock) -> None:
    limiter = limiter_of(clock, concurrency=1)
    with pytest.raises(KeyError):
        async with limiter.slot(Priority.LIVE):
            raise KeyError
    assert limiter.running == 0


async def test_a_penalty_pauses_everybody(paced: Client, clock: ManualClock) -> None:
    paced.limiter.penalize(5.0)
    await paced.ask("live", Priority.LIVE)
    await paced.ask("request")
    await clock.advance(4_999)
    assert paced.started == []
    await clock.advance(1)
    assert paced.started == ["live"]
    await clock.advance(100)
    assert paced.started == ["live", "request"]


async def test_a_penalty_also_holds_those_who_wait_already(
    paced: Client, clock: ManualClock
) -> None:
    await paced.ask("a")
    await paced.ask("b")
    paced.limiter.penalize(5.0)
    await clock.advance(1_000)
    assert paced.started == ["a"]
    await clock.advance(4_000)
    assert paced.started == ["a", "b"]


async def test_a_shorter_penalty_does_not_shorten_a_longer_one(
    paced: Client, clock: ManualClock
) -> None:
    paced.limiter.penalize(5.0)
    paced.limiter.penalize(1.0)
    await paced.ask("a")
    await clock.advance(4_000)
    assert paced.started == []


async def test_a_pause_beyond_the_patience_is_told_at_once(clock: ManualClock) -> None:
    limiter = limiter_of(clock)
    limiter.penalize(120.0)
    with pytest.raises(ExchangeRateLimited, match="120 s") as caught:
        async with limiter.slot(Priority.LIVE):
            pass
    assert caught.value.retry_after == 120.0


async def test_a_full_queue_turns_away(clock: ManualClock) -> None:
    client = Client(limiter_of(clock, concurrency=1, max_waiting=1))
    await client.ask("a")
    await client.ask("b")
    with pytest.raises(ExchangeUnavailable, match="1 requests waiting"):
        async with client.limiter.slot(Priority.LIVE):
            pass
    await finish(client)


async def test_a_turn_that_does_not_come_is_given_up(clock: ManualClock) -> None:
    client = Client(limiter_of(clock, concurrency=1, patience_s=0.01))
    await client.ask("a")
    with pytest.raises(ExchangeUnavailable, match="no turn within"):
        async with asyncio.timeout(5), client.limiter.slot(Priority.LIVE):
            pass
    assert client.limiter.waiting == 0
    await finish(client)


async def test_waits_are_counted_by_priority(clock: ManualClock) -> None:
    client = Client(limiter_of(clock, rate=1))
    await client.ask("a", Priority.LIVE)
    await client.ask("b", Priority.BACKFILL)
    assert client.limiter.totals.waiting == 1
    await clock.advance(1_000)
    totals = client.limiter.totals
    assert totals.waiting == 0
    waits = {priority: (sum(w.counts), w.total_s) for priority, w in totals.waited_s.items()}
    assert waits == {
        Priority.LIVE: (1, 0.0),
        Priority.REQUEST: (0, 0.0),
        Priority.BACKFILL: (1, pytest.approx(1.0)),
    }
    client.limiter.penalize(120.0)
    with pytest.raises(ExchangeRateLimited):
        async with client.limiter.slot(Priority.LIVE):
            pass
    assert (totals.turned_away, totals.pauses) == ({Priority.LIVE: 1}, 1)
    await finish(client)


async def test_closing_turns_everybody_away_and_leaves_no_task(clock: ManualClock) -> None:
    client = Client(limiter_of(clock))
    await client.ask("a")
    await client.ask("b")
    await client.limiter.close()
    await client.limiter.close()
    with pytest.raises(ExchangeUnavailable, match="closed"):
        await client.tasks["b"]
    with pytest.raises(ExchangeUnavailable, match="closed"):
        async with client.limiter.slot(Priority.LIVE):
            pass
    await finish(client)
    assert asyncio.all_tasks() == {asyncio.current_task()}
