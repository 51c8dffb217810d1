"""What storage promises, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from domain.entry import Entry
from domain.interval import DEFAULT_INTERVAL
from domain.time_range import TimeRange
from errors import DataServiceError

Timestamp = int | datetime
"""Milliseconds since the epoch, or an aware datetime."""


class StorageError(DataServiceError):
    """The storage backend did not do what was asked; the message names the path and what to do."""


class StorageUnavailable(StorageError):
    """The storage backend is away, full or read-only for now."""

    retryable = True


class StorageConflict(StorageError):
    """What should be stored contradicts what is stored: another market, a root of another kind."""


class IRawDataStorage(ABC):
    """Documents of entries in one root, addressed by exchange, coin, interval and time.

    A backend knows paths and bytes, not what an entry means. Guarantees of every backend:

    - A document appears whole or not at all, also when the process is killed; the last of several
      saves of one entry wins.
    - Ranges are ``[start_time, end_time)`` and results ascend by time.
    - Files that are no documents of this layout are skipped, never fatal. A document that is no
      JSON object is reported once; from then on listings leave it out, so that it is repaired like
      a missing one, until it reads well again.
    - Blocking work runs off the event loop.

    Every method raises ``StorageUnavailable`` when the backend is away or refuses for now and
    ``StorageError`` for any other failure. A name that can stand in no path, a naive datetime, a
    negative limit or offset and an interval that does not exist are ``InvalidRequest``; a document
    that JSON cannot express is ``InvalidEntry``.
    """

    @abstractmethod
    async def save_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        data: Mapping[str, Any],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> None:
        """Write one document, replacing what was there. Durable when it returns."""

    @abstractmethod
    async def save_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        entries: Sequence[tuple[Timestamp, Mapping[str, Any]]],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> None:
        """Write many documents of one series, each whole or not at all. Durable when it returns.

        When it raises, some of them may have been written.
        """

    @abstractmethod
    async def get_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> dict[str, Any] | None:
        """The document of the period that opens at ``timestamp``, or None."""

    @abstractmethod
    async def get_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamps: Sequence[Timestamp],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> dict[int, dict[str, Any]]:
        """The documents that are there of those asked, by the open of their period (ms)."""

    @abstractmethod
    async def get_range(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        limit: int | None = None,
        offset: int = 0,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[dict[str, Any]]:
        """Documents of a range, after skipping ``offset``, ``limit`` at most.

        Skipping may cost as much as reading: page by ``start_time`` where it matters.
        """

    @abstractmethod
    async def get_latest_entry(
        self, exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> dict[str, Any] | None:
        """The newest document of the series, or None when there is none."""

    @abstractmethod
    async def list_coins(self, exchange_name: str) -> list[str]:
        """The coins that have a folder, sorted, as they were saved (``BTC``, ``BTC/EUR``)."""

    @abstractmethod
    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        """Whether the coin has a folder."""

    @abstractmethod
    async def list_timestamps(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[int]:
        """The opens (ms) of the documents of a range, from names alone, ascending."""

    @abstractmethod
    async def read_blob(self, path: str) -> bytes | None:
        """The bytes at ``path`` (relative to the root, ``/`` between names), or None."""

    @abstractmethod
    async def write_blob(self, path: str, content: bytes) -> None:
        """Replace the bytes at ``path``, whole or not at all; durable when it returns."""

    @abstractmethod
    async def check_writable(self) -> None:
        """Return when the root can be written, raise ``StorageError`` when it cannot."""

    @abstractmethod
    async def close(self) -> None:
        """Release what is held. Idempotent."""


class Change(StrEnum):
    """What storing an entry did."""

    ADDED = "added"
    REVISED = "revised"
    BOOK_ADDED = "book_added"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Stored:
    """The entry as storage holds it now, and what storing it changed."""

    entry: Entry
    change: Change


class IStorageManager(ABC):
    """Validated entries: decides what may replace what.

    - Storing the same entry twice changes nothing. One whose open, high, low, close or volume
      differs replaces it with the next revision; no revision is ever lowered.
    - A null book never replaces a book.
    - The first entry fixes the market of a series; an entry of another market is refused.
    - Writes of one series are applied one after the other, in the order of the calls.

    Raises what ``IRawDataStorage`` raises, and ``InvalidEntry`` for a document that breaks the
    rules of its shape.
    """

    @abstractmethod
    async def store_raw_data(self, entry: Entry) -> Stored:
        """Store one entry; returns once it is durable.

        Raises:
            StorageConflict: the series is of another market.
        """

    @abstractmethod
    async def store_batch(self, entries: Sequence[Entry]) -> list[Stored]:
        """Store entries of one series, ascending; the same rules, one answer an entry."""

    @abstractmethod
    async def get_raw_data_range(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        limit: int | None = None,
        offset: int = 0,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[Entry]:
        """Entries of ``[start_time, end_time)``, ascending."""

    @abstractmethod
    async def get_latest_entry(
        self, exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> Entry | None:
        """The newest entry of the series, or None."""

    @abstractmethod
    async def list_coins(self, exchange_name: str) -> list[str]:
        """The coins that have data on the exchange, sorted."""

    @abstractmethod
    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        """Whether anything is stored for the coin on the exchange."""

    @abstractmethod
    async def stored_ranges(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[TimeRange]:
        """Runs of periods that have an entry, ascending, found without reading documents."""

    @abstractmethod
    async def read_record(self, path: str) -> bytes | None:
        """A record beside the documents (the ledger), or None. ``path`` is relative to the root."""

    @abstractmethod
    async def write_record(self, path: str, content: bytes) -> None:
        """Replace a record beside the documents, whole or not at all."""

    @abstractmethod
    async def check_health(self) -> None:
        """Return when entries can be stored, raise ``StorageError`` when they cannot."""
