"""Who a collector is, also after it was killed and started again."""

from __future__ import annotations

import asyncio
import fcntl
import os
import uuid
from pathlib import Path
from typing import Final

from storage.interfaces import StorageUnavailable

_NAME: Final = "collector-id"
_ID_BYTES: Final = 36
_TIMEOUT_S: Final = 30.0


class CollectorIdentity:
    """An id kept in a local folder, which one process at a time goes by.

    A lease on a cloud outlives the process that took it. Started again, it takes its lease back
    at once under the same id, and need not wait for it to lapse. That is safe, since the system
    unlocks the file of the id only when the process that goes by it is dead; a second process
    beside it gets an id of its own, which is kept nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._descriptor: int | None = None

    async def claim(self) -> str:
        """The id.

        Raises:
            StorageUnavailable: the folder cannot be written, or its disk does not answer.
        """
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await asyncio.to_thread(self._claim)
        except TimeoutError as exc:
            raise StorageUnavailable(
                f"STATE_DIR: {self._path}: the disk has not answered for {_TIMEOUT_S:g} s; check it"
            ) from exc

    def _claim(self) -> str:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                return self._kept(descriptor)
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
        except OSError as exc:
            raise StorageUnavailable(
                f"STATE_DIR: {self._path}: {exc.strerror or exc}; let the service's user write it"
            ) from exc

    def release(self) -> None:
        """Let another process go by the id. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _kept(self, descriptor: int) -> str:
        fresh = str(uuid.uuid4())
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return fresh
        self._descriptor = descriptor
        try:
            return str(uuid.UUID(os.pread(descriptor, _ID_BYTES, 0).decode("ascii", "replace")))
        except ValueError:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, fresh.encode(), 0)
            os.fsync(descriptor)
            return fresh
