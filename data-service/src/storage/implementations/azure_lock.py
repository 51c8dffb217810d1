"""The collector's lock of a root on Azure: the lease of a blob."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from azure.core.exceptions import HttpResponseError
from azure.storage.blob.aio import BlobClient, BlobLeaseClient

from storage.implementations.azure_calls import AzureCalls, is_leased, is_missing, is_unmet
from storage.interfaces import ICollectorLock, StorageError

# The longest that a lease lasts unless it lasts for ever.
_LEASE_S: Final = 60
_RENEW_EVERY_S: Final = 15.0
# How long before its end a lease is no longer relied on: clocks differ, and writes take a while.
_MARGIN_S: Final = 10.0
_HOLDER: Final = "holder"


class BlobLeaseCollectorLock(ICollectorLock):
    """Held by a lease of 60 s under ``lease_id``, a UUID.

    Taking a lease anew under the same id renews it, and takes it back where it lapsed and nobody
    else did, so that ``acquire`` is always that one request. Metadata of the blob say who holds
    it, for people.

    ``blob`` gives the blob at ``path``, which is made where it is missing; ``monotonic`` counts
    seconds.
    """

    def __init__(
        self,
        path: str,
        calls: AzureCalls,
        blob: Callable[[], BlobClient],
        *,
        lease_id: str,
        monotonic: Callable[[], float],
    ) -> None:
        self._path = path
        self._calls = calls
        self._blob = blob
        self._monotonic = monotonic
        self._id = lease_id
        self._held_until: float | None = None
        # A request whose answer was lost may have taken it.
        self._may_be_ours = False
        self._named = False
        self._holder: str | None = None

    async def acquire(self) -> bool:
        # The lease begins when the service takes the request, which is after this.
        sent = self._monotonic()
        self._may_be_ours = True
        if not await self._calls.at_once(self._path, self._take):
            self._held_until, self._may_be_ours, self._named = None, False, False
            with suppress(StorageError):
                self._holder = await self._calls.at_once(self._path, self._who)
            return False
        self._held_until = sent + _LEASE_S - _MARGIN_S
        self._holder = _own_name()
        if not self._named:
            # Held all the same when this fails; the next renewal tries again.
            with suppress(StorageError):
                await self._calls.at_once(self._path, self._write_name)
                self._named = True
        return True

    async def release(self) -> None:
        self._held_until = self._holder = None
        if self._may_be_ours:
            self._may_be_ours = self._named = False
            # Where it cannot be given back, it lapses by itself.
            with suppress(StorageError):
                await self._calls.at_once(self._path, self._give_back)

    @property
    def is_held(self) -> bool:
        return self._held_until is not None and self._monotonic() < self._held_until

    @property
    def holder(self) -> str | None:
        return self._holder

    @property
    def renew_every_s(self) -> float:
        return _RENEW_EVERY_S

    async def _take(self) -> bool:
        blob = self._blob()
        try:
            await self._lease(blob)
        except HttpResponseError as exc:
            if is_leased(exc):
                return False
            if not is_missing(exc):
                raise
        else:
            return True
        try:
            await blob.upload_blob(b"", overwrite=False)
        except HttpResponseError as exc:
            # Another made it meanwhile.
            if not is_unmet(exc):
                raise
        return await self._take()

    async def _lease(self, blob: BlobClient) -> None:
        await BlobLeaseClient(blob, lease_id=self._id).acquire(lease_duration=_LEASE_S)

    async def _who(self) -> str | None:
        properties = await self._blob().get_blob_properties()
        return (properties.metadata or {}).get(_HOLDER)

    async def _write_name(self) -> None:
        await self._blob().set_blob_metadata({_HOLDER: _own_name()}, lease=self._id)

    async def _give_back(self) -> None:
        await BlobLeaseClient(self._blob(), lease_id=self._id).release()


def seconds_passed() -> float:
    """Seconds from an arbitrary start, those that the machine slept through among them: a lease
    lapses meanwhile."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _own_name() -> str:
    # It travels in a header.
    host = socket.gethostname().encode("ascii", "replace").decode()
    return f"pid {os.getpid()} on {host}"
