"""What arrives from the streams and from settling: stored where it is final, then told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from collection.hub import Hub
from collection.interfaces import StatusTold
from domain.candle import CandleUpdate
from domain.clock import IClock
from domain.entry import Entry
from domain.series import Series
from storage.interfaces import (
    Change,
    IStorageListener,
    IStorageManager,
    StorageError,
    Stored,
)

log = structlog.get_logger(__name__)

OnUpdate = Callable[[int], None]
"""Told the open (ms) of the period of each forming update."""


class RealTimeProcessor(IStorageListener):
    """The callback of every stream, and the sink of every collected series.

    A forming update is told at once and wakes the settling of its series; it never waits for
    REST or storage. A settled entry is stored, then told; when storage refuses, nothing is told
    and the period stays open. Subscribers are told ``degraded`` while the backend is away, though
    entries go on into the spool.
    """

    def __init__(self, storage: IStorageManager, hub: Hub, clock: IClock) -> None:
        self._storage = storage
        self._hub = hub
        self._clock = clock
        self._routes: dict[tuple[str, str, str], dict[Series, OnUpdate]] = {}
        self._storage_failing = False
        self._storage_away = False
        # Entries of batches that failed: some may have been written, and none was told.
        self._unsure: set[tuple[Series, int]] = set()

    def route(self, series: Series, market: str, on_update: OnUpdate) -> None:
        """Send the updates of a market to a series; several coins may mean one market."""
        key = (series.exchange, market, series.interval.name)
        self._routes.setdefault(key, {})[series] = on_update

    def unroute(self, series: Series, market: str) -> None:
        """Send no more updates to a series."""
        key = (series.exchange, market, series.interval.name)
        routes = self._routes.get(key, {})
        routes.pop(series, None)
        if not routes:
            self._routes.pop(key, None)

    async def process_realtime_entry(self, item: CandleUpdate | Entry) -> None:
        """Take a forming update of a stream, or a settled entry.

        Raises:
            StorageError: the entry could not be stored; it was not told.
        """
        if isinstance(item, CandleUpdate):
            routes = self._routes.get((item.exchange, item.market, item.interval), {})
            for series, on_update in list(routes.items()):
                self._hub.publish_forming(series, item.candle)
                on_update(item.candle.timestamp)
            return
        try:
            stored = await self._storage.store_raw_data(item)
        except StorageError as exc:
            self._note_failure(exc, [item])
            raise
        self._note_success([stored])

    async def process_settled(self, entries: Sequence[Entry]) -> list[Stored]:
        """Take the settled entries of one page of one series, ascending.

        Raises:
            StorageError: the entries could not be stored; none was told.
        """
        try:
            stored = await self._storage.store_batch(entries)
        except StorageError as exc:
            self._note_failure(exc, entries)
            raise
        self._note_success(stored)
        return stored

    def storage_changed(self, *, available: bool) -> None:
        self._storage_away = not available
        self._tell_state("connected" if available else "degraded")

    def entry_settled(self, stored: Stored) -> None:
        self._hub.publish_stored(stored)

    def _note_success(self, stored: Sequence[Stored]) -> None:
        for item in stored:
            self._hub.publish_stored(self._as_news(item))
        if self._storage_failing:
            self._storage_failing = False
            log.info("storage_works_again")
            if not self._storage_away:
                self._tell_state("connected")

    def _tell_state(self, state: Literal["connected", "degraded"]) -> None:
        self._hub.publish_status(StatusTold("storage", state, self._clock.now_ms()))

    def _as_news(self, stored: Stored) -> Stored:
        """What was written by a batch that failed is news when it is found unchanged."""
        key = (stored.entry.series, stored.entry.timestamp)
        if key not in self._unsure:
            return stored
        self._unsure.discard(key)
        if stored.change is not Change.UNCHANGED:
            return stored
        return Stored(stored.entry, Change.REVISED if stored.entry.revision > 1 else Change.ADDED)

    def _note_failure(self, error: StorageError, entries: Sequence[Entry]) -> None:
        self._unsure.update((entry.series, entry.timestamp) for entry in entries)
        if not self._storage_failing:
            self._storage_failing = True
            log.error("storage_refuses", error=error.message)
            if not self._storage_away:
                self._tell_state("degraded")
