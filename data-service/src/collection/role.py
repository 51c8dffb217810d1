"""Who collects: this process while it holds the root's lock, else another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from domain.clock import IClock
from errors import DataServiceError
from storage.interfaces import ICollectorLock, StorageUnavailable

# How soon (real seconds) what failed is tried again.
RETRY_S: Final = 1.0

Step = Callable[[], Awaitable[None]]

log = structlog.get_logger(__name__)


class CollectorRole:
    """Takes the lock, keeps it, and begins and ends collecting with it.

    - ``prepare`` is done once, before anything else.
    - ``begin`` is called when the lock was taken, and again until it succeeds; who cannot begin
      gives the lock back, so that another may.
    - ``end`` is called when another process has the lock. While nobody can say whether it is still
      held, collecting goes on: whoever writes asks the lock itself.
    """

    def __init__(
        self, lock: ICollectorLock, clock: IClock, *, prepare: Step, begin: Step, end: Step
    ) -> None:
        self._lock = lock
        self._clock = clock
        self._prepare = prepare
        self._begin = begin
        self._end = end
        self._prepared = False
        self._collecting = False
        self._other: str | None = None
        self._trouble: str | None = None

    @property
    def collecting(self) -> bool:
        """Whether this process collects."""
        return self._collecting

    @property
    def other(self) -> str | None:
        """Who collects instead of this process, or None."""
        return self._other

    @property
    def trouble(self) -> str | None:
        """Why the last try went wrong, or None."""
        return self._trouble

    async def start(self, *, within_s: float | None = None) -> None:
        """The first try, given up after ``within_s`` (real seconds).

        Raises:
            DataServiceError: what stands in the way; ``run`` tries again all the same.
        """
        try:
            async with asyncio.timeout(within_s) as patience:
                await self._try()
        except TimeoutError:
            if not patience.expired():
                raise
            self._trouble = f"what collecting begins with took longer than {within_s:g} s"
            raise StorageUnavailable(self._trouble) from None
        except DataServiceError as exc:
            self._trouble = exc.message
            raise

    async def run(self) -> None:
        """Take and keep the lock until cancelled."""
        unsure = False
        while True:
            await self._clock.sleep_real(
                RETRY_S if self._trouble is not None else self._lock.renew_every_s
            )
            try:
                await self._try()
            except DataServiceError as exc:
                if self._trouble is None:
                    log.warning("collector_role_unsure", error=exc.message)
                    unsure = True
                self._trouble = exc.message
            else:
                if unsure:
                    log.info("collector_role_sure")
                    unsure = False
                self._trouble = None

    async def _try(self) -> None:
        if not self._prepared:
            await self._prepare()
            self._prepared = True
        if await self._lock.acquire():
            self._other = None
            if not self._collecting:
                try:
                    await self._begin()
                except DataServiceError:
                    await self._lock.release()
                    raise
                self._collecting = True
                log.info("collecting")
            return
        other = self._lock.holder or "somebody"
        if self._collecting:
            self._collecting = False
            log.error("collecting_ended", holder=other)
            await self._end()
        elif self._other is None:
            log.warning("standing_by", holder=other)
        self._other = other
