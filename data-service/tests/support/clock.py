"""A clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from domain.clock import IClock


class ManualClock(IClock):
    """Market and real time that pass only when ``advance`` is called.

    ``advance`` wakes every sleeper whose moment has come, in order, and lets each run before the
    next is woken.
    """

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now = now_ms
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @property
    def speed(self) -> float:
        return 1.0

    def now_ms(self) -> int:
        return self._now

    def real_ms(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return self._now / 1000

    async def sleep_until(self, market_ms: int) -> None:
        if market_ms <= self._now:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (market_ms, next(self._order), future))
        await future

    async def sleep_real(self, seconds: float) -> None:
        await self.sleep_until(self._now + round(seconds * 1000))

    async def advance(self, milliseconds: int) -> None:
        """Let ``milliseconds`` pass."""
        target = self._now + milliseconds
        while self._sleepers and self._sleepers[0][0] <= target:
            due, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not future.done():
                future.set_result(None)
                await settle_loop()
        self._now = target
        await settle_loop()


async def settle_loop(rounds: int = 25) -> None:
    """Let every task that is ready run; nothing here waits for time."""
    for _ in range(rounds):
        await asyncio.sleep(0)
