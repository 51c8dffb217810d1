"""One limiter per exchange: how fast it may be asked, and who goes first.

Guarantees: at most ``rate`` requests start in a second of real time, evenly spaced, where one of a
higher weight counts as so many; at most ``concurrency`` run at once; a waiter of a lower
``Priority`` value goes before all others, within one priority the first come is the first served;
a waiter that is cancelled takes no slot with it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from domain.clock import IClock
from exchange_source.interfaces import (
    ExchangeRateLimited,
    ExchangeUnavailable,
    Priority,
    RequestTotals,
)

_Waiter = tuple[Priority, int, "asyncio.Future[None]", float]


class RequestLimiter:
    """Admits requests to one exchange.

    Args:
        clock: real time is read from it and waited for with it.
        name: the exchange, for messages.
        rate: requests that may start in a second.
        concurrency: requests that may run at once.
        max_waiting: waiters beyond which a request is turned away.
        patience_s: real seconds that a request waits for its turn at most.
    """

    def __init__(
        self,
        clock: IClock,
        *,
        name: str,
        rate: float,
        concurrency: int,
        max_waiting: int = 10_000,
        patience_s: float = 30.0,
    ) -> None:
        self._clock = clock
        self._name = name
        self._spacing = 1 / rate
        self._concurrency = concurrency
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._waiters: list[_Waiter] = []
        self._order = itertools.count()
        self._running = 0
        self._next_start = clock.monotonic()
        self._paused_until = self._next_start
        self._timer: asyncio.Task[None] | None = None
        self._closed = False
        self._totals = RequestTotals()

    @property
    def totals(self) -> RequestTotals:
        """What waiting came to so far; whoever sends what it admits counts that there too."""
        self._totals.waiting = self.waiting
        return self._totals

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._waiters)

    @property
    def running(self) -> int:
        """How many requests run now."""
        return self._running

    @asynccontextmanager
    async def slot(self, priority: Priority, *, weight: float = 1.0) -> AsyncIterator[None]:
        """Hold one of the exchange's slots while the body runs; ``weight`` is what the request
        costs of the rate.

        Raises:
            ExchangeRateLimited: the exchange has paused everybody for longer than the patience.
            ExchangeUnavailable: too many wait already, the turn did not come within the patience,
                or the limiter is closed.
        """
        asked = self._clock.monotonic()
        try:
            await self._acquire(priority, weight)
        except ExchangeUnavailable:
            self._totals.turned_away[priority] += 1
            raise
        self._totals.waited_s[priority].add(self._clock.monotonic() - asked)
        try:
            yield
        finally:
            self._running -= 1
            self._admit()

    def penalize(self, retry_after: float) -> None:
        """Start nothing for ``retry_after`` real seconds: the exchange asked for that."""
        self._totals.pauses += 1
        self._paused_until = max(self._paused_until, self._clock.monotonic() + retry_after)

    async def close(self) -> None:
        """Turn everybody away and leave no task. Idempotent."""
        self._closed = True
        waiters, self._waiters = self._waiters, []
        for _, _, turn, _ in waiters:
            if not turn.done():
                turn.set_exception(ExchangeUnavailable(f"{self._name} is closed"))
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
            self._timer = None

    async def _acquire(self, priority: Priority, weight: float) -> None:
        if self._closed:
            raise ExchangeUnavailable(f"{self._name} is closed")
        if self.waiting >= self._max_waiting:
            raise ExchangeUnavailable(
                f"{self._name} has {self.waiting} requests waiting already, ask again later",
                retry_after=1.0,
            )
        pause = self._paused_until - self._clock.monotonic()
        if pause > self._patience_s:
            raise ExchangeRateLimited(
                f"{self._name} asked for a pause of {pause:.0f} s more", retry_after=pause
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (priority, next(self._order), turn, weight)
        heapq.heappush(self._waiters, waiter)
        self._admit()
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as exc:
            self._forget(waiter)
            if isinstance(exc, TimeoutError):
                raise ExchangeUnavailable(
                    f"{self._name} is asked too much: no turn within {self._patience_s:g} s",
                    retry_after=1.0,
                ) from exc
            raise

    def _forget(self, waiter: _Waiter) -> None:
        """Take back what a waiter that gives up holds: its place, or the slot it just got."""
        turn = waiter[2]
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self._running -= 1
        elif waiter in self._waiters:
            self._waiters.remove(waiter)
            heapq.heapify(self._waiters)
        self._admit()

    def _admit(self) -> None:
        """Let as many go as may go now; have the rest looked at when time allows."""
        while self._waiters and self._running < self._concurrency:
            now = self._clock.monotonic()
            if max(self._next_start, self._paused_until) > now:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().create_task(self._wait())
                return
            _, _, turn, weight = heapq.heappop(self._waiters)
            if turn.done():
                continue
            self._next_start = max(self._next_start, now) + self._spacing * weight
            self._running += 1
            turn.set_result(None)

    async def _wait(self) -> None:
        while self._waiters:
            delay = max(self._next_start, self._paused_until) - self._clock.monotonic()
            if delay <= 0:
                break
            await self._clock.sleep_real(delay)
        self._timer = None
        self._admit()
