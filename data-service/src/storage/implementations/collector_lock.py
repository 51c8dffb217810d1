"""The collector's lock of a local root: a file that one process at a time holds."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from storage.interfaces import ICollectorLock, StorageError

_RENEW_EVERY_S: Final = 2.0
_MOST_TRIES: Final = 10
_HOLDER_BYTES: Final = 200


class FileCollectorLock(ICollectorLock):
    """Held by a lock on an open file, which the system takes away when the process dies.

    The file says who holds it, for people. Where it is deleted or replaced under its holder, the
    holder has lost it, since another can now take the new one.

    ``run`` does blocking work in a thread.
    """

    def __init__(
        self, path: Path, run: Callable[[Callable[[Callable[[], None]], bool]], Awaitable[bool]]
    ) -> None:
        self._path = path
        self._run = run
        self._descriptor: int | None = None
        self._holder: str | None = None

    async def acquire(self) -> bool:
        return await self._run(self._take)

    async def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._holder = None
            # Closing unlocks; what the file says then names somebody who no longer holds it.
            os.close(descriptor)

    @property
    def is_held(self) -> bool:
        # Of an open file, this is told without looking at a disk.
        return self._descriptor is not None and os.fstat(self._descriptor).st_nlink > 0

    @property
    def holder(self) -> str | None:
        return self._holder

    @property
    def renew_every_s(self) -> float:
        return _RENEW_EVERY_S

    def _take(self, check: Callable[[], None]) -> bool:
        if self._descriptor is not None:
            if self._is_at_path(self._descriptor):
                return True
            os.close(self._descriptor)
            self._descriptor = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_MOST_TRIES):
            descriptor = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
            )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_path(descriptor):
                    self._holder = f"pid {os.getpid()} on {socket.gethostname()}"
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._holder.encode(), 0)
                    check()
                    self._descriptor, descriptor = descriptor, -1
                    return True
            except BlockingIOError:
                said = os.pread(descriptor, _HOLDER_BYTES, 0).decode(errors="replace").strip()
                self._holder = said or None
                return False
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        raise StorageError(f"{self._path}: is replaced again and again; leave it to the services")

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the open file is the one that others would open."""
        try:
            there = self._path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))
