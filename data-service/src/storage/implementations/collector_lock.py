"""The collector's lock of a local root: a file that one process at a time keeps locked."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog

from storage.implementations.disk import Disk
from storage.interfaces import ICollectorLock
from storage.path_utility import SERVICE_FOLDER

COLLECTOR_LOCK: Final = f"{SERVICE_FOLDER}/collector.lock"
_NAME: Final = "collector.lock"
_RENEW_EVERY_S: Final = 2.0
_MOST_BYTES: Final = 200

log = structlog.get_logger(__name__)

Take = Callable[[Callable[[], None]], bool]
"""Takes the lock unless the function it is given raises, because nobody waits for it any more."""


class FileCollectorLock(ICollectorLock):
    """Held by a lock on an open file, which the system takes away when the process dies.

    It does not lapse: renewing finds out whether the file was deleted or replaced, so that
    another can lock the new one. What the file says is for people, and names the last holder
    also after that one is gone.

    ``run`` does blocking work in a thread. While ``at_rest`` denies it, something is still being
    written that may land at any time: then the lock is not released before the process is gone.
    """

    def __init__(
        self,
        disk: Disk,
        run: Callable[[Take], Awaitable[bool]],
        *,
        at_rest: Callable[[], bool] = lambda: True,
    ) -> None:
        self._disk = disk
        self._run = run
        self._at_rest = at_rest
        self._turn = asyncio.Lock()
        # The event loop asks whether it is held while a thread renews it.
        self._guard = threading.Lock()
        self._descriptor: int | None = None
        self._holder: str | None = None

    async def acquire(self) -> bool:
        async with self._turn:
            return await self._run(self._take)

    async def release(self) -> None:
        async with self._turn:
            if self._at_rest():
                self._drop()
            else:
                log.warning("lock_kept_to_the_end", reason="a write still stands in the disk")

    @property
    def is_held(self) -> bool:
        with self._guard, suppress(OSError):
            # The system knows this of an open file without asking the disk.
            return self._descriptor is not None and os.fstat(self._descriptor).st_nlink > 0
        return False

    @property
    def holder(self) -> str | None:
        return self._holder

    @property
    def renew_every_s(self) -> float:
        return _RENEW_EVERY_S

    def _take(self, check: Callable[[], None]) -> bool:
        if self._descriptor is not None:
            if self._disk.lies_at(self._descriptor, f"{self._disk.root}/{COLLECTOR_LOCK}"):
                return True
            self._drop()
        descriptor, locked = self._disk.try_lock(SERVICE_FOLDER, _NAME)
        try:
            if not locked:
                said = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace").strip()
                self._holder = said or None
                return False
            me = f"pid {os.getpid()} on {socket.gethostname()}"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, me.encode(), 0)
            check()
            with self._guard:
                self._holder, self._descriptor, descriptor = me, descriptor, -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _drop(self) -> None:
        with self._guard, suppress(OSError):
            descriptor, self._descriptor, self._holder = self._descriptor, None, None
            if descriptor is not None:
                os.close(descriptor)
