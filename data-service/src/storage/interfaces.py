"""What storage promises, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import Any, Final

from domain.entry import Entry
from domain.interval import DEFAULT_INTERVAL
from domain.series import Series
from domain.time_range import TimeRange
from errors import DataServiceError
from observability.durations import Durations
from storage.documents import read_json

Timestamp = int | datetime
"""Milliseconds since the epoch, or an aware datetime."""

Decode = Callable[[int, bytes], Any | None]
"""Makes something of the bytes of the document that is named by a time (ms).

None says that they are no document of that time; a backend reports it and leaves it out. It runs
where the backend reads, in threads of its own perhaps, and may raise ``StorageError``.
"""


class StorageError(DataServiceError):
    """The storage backend did not do what was asked; the message names the path and what to do."""


class StorageUnavailable(StorageError):
    """The storage backend is away, full or read-only for now."""

    retryable = True


class StorageDenied(StorageUnavailable):
    """The storage backend refuses this service: credentials, roles or permissions are wrong.

    It passes once somebody mends them.
    """


class StorageThrottled(StorageUnavailable):
    """The storage backend is asked too much; ``retry_after`` says how long to leave it alone."""


class NotTheCollector(StorageUnavailable):
    """Another service collects into this root; this one writes nothing."""


class SpoolFull(StorageUnavailable):
    """The backend is away, and the local spool takes no more."""


class StorageConflict(StorageError):
    """What should be stored contradicts what is stored: another market, a root of another kind."""


class StaleVersion(StorageError):
    """What lies there is not what the writer had read; nothing was replaced. Read it again, and
    decide anew: the same write again would fail again."""


def no_root(address: str) -> StorageError:
    """The error of a root that is not there, where none may be made."""
    return StorageError(f"{address}: there is no such storage root; check STORAGE_ROOT")


@dataclass(frozen=True, slots=True)
class Held:
    """A document as it lies in a backend.

    ``content`` is what decoding made of it, or None where it is no document; ``version`` is the
    backend's own mark of just these bytes, for a later write to expect.
    """

    content: Any | None
    version: str


class ICollectorLock(ABC):
    """Who of several services collects into a root.

    Held by one at a time. A holder that dies, or cannot be reached any more, loses it by itself
    after a while, which ``is_held`` of the holder foresees: it never says yes when another may
    have it already.
    """

    @abstractmethod
    async def acquire(self) -> bool:
        """Take it, or renew it where it is held; whether this process holds it now.

        Raises:
            StorageUnavailable: the root cannot be asked; what was held is held until it lapses.
        """

    @abstractmethod
    async def release(self) -> None:
        """Let another take it at once. Idempotent; never raises for a root that is away."""

    @property
    @abstractmethod
    def is_held(self) -> bool:
        """Whether this process surely holds it at this moment."""

    @property
    @abstractmethod
    def holder(self) -> str | None:
        """Who holds it as far as the last try told, for people; None when nobody said."""

    @property
    @abstractmethod
    def renew_every_s(self) -> float:
        """How often ``acquire`` has to be called (real seconds) to keep what is held."""


class IRawDataStorage(ABC):
    """Documents of entries in one root, addressed by exchange, coin, interval and time.

    A backend knows paths and bytes, not what an entry means. Guarantees of every backend:

    - A document appears whole or not at all, also when the process is killed; the last of several
      saves of one entry wins.
    - Ranges are ``[start_time, end_time)`` and results ascend by time.
    - Files that are no documents of this layout are skipped, never fatal, and nothing outside of
      the root is ever read or written. A document of which ``decode`` makes nothing (by default
      one that is no JSON object) is reported once; from then on listings leave it out, so that it
      is repaired like a missing one, until it reads well again or is saved anew.
    - Blocking work runs off the event loop, and no call hangs.

    Every method raises ``StorageUnavailable``, or the kind of it that fits, when the backend is
    away or refuses for now and ``StorageError`` for any other failure. A name that can stand in no
    path, a naive datetime, a negative limit or offset and an interval that does not exist are
    ``InvalidRequest``; a document that JSON cannot express is ``InvalidEntry``.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the root is, without secrets: tells roots apart, and is shown to people."""

    @abstractmethod
    async def open(self, *, read_only: bool = False) -> None:
        """Connect, make the root where that is allowed, and clean up what killed writers left.

        May be called again after it failed. With ``read_only`` nothing is made and nothing is
        cleaned up.

        Raises:
            StorageError: the root is not there, and ``read_only`` forbids to make it.
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
        expected: Mapping[int, str] | None = None,
    ) -> int:
        """Write many documents of one series, each whole or not at all. Durable when it returns.

        With ``expected``, a document is written only where just that version lies, by the open of
        its period (ms); a period that it does not name must be absent.

        When it raises, some of them may have been written.

        Returns:
            How many bytes the documents take.

        Raises:
            StaleVersion: something else lies where a version, or nothing, was expected.
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
        decode: Decode = read_json,
    ) -> dict[int, Held]:
        """What lies there of the documents asked, by the open of their period (ms)."""

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
        decode: Decode = read_json,
    ) -> list[Any]:
        """Documents of a range, after skipping ``offset``, ``limit`` at most.

        Skipping may cost as much as reading: page by ``start_time`` where it matters.
        """

    @abstractmethod
    async def get_latest_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        *,
        interval: str = DEFAULT_INTERVAL,
        decode: Decode = read_json,
    ) -> Any | None:
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
    async def list_days(self, exchange_name: str, coin_symbol: str) -> dict[str, dict[date, int]]:
        """The UTC days that have documents, and how many, by interval, from names alone. Lists all
        of the coin's names: for what happens now and then."""

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
    async def warnings(self) -> list[str]:
        """What will become a failure if nobody acts, such as a disk that is nearly full."""

    @abstractmethod
    def collector_lock(self, *, identity: str | None = None) -> ICollectorLock:
        """The lock of this root; one object for each caller, nothing is taken yet.

        ``identity`` is a UUID. Where a lock outlives the process that took it, one with the same
        identity takes it back at once; none at a time but one may go by it.
        """

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


@dataclass(frozen=True, slots=True)
class StorageStatus:
    """How storing goes at this moment, without asking anybody.

    Attributes:
        away: why the backend cannot be written to, or None.
        stuck: why the entries of single series cannot be written though the backend can be.
        spooled: how many entries wait in the local spool.
        spooled_bytes: how much their documents take.
        spool_full: whether a further entry would be refused.
    """

    away: str | None = None
    stuck: tuple[str, ...] = ()
    spooled: int = 0
    spooled_bytes: int = 0
    spool_full: bool = False


# Upper bounds (real seconds) of how long storing takes: a local disk syncs within the first few, a
# cloud that is asked again and again reaches the last.
STORE_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class StorageTotals:
    """What storing came to since the process started.

    Attributes:
        entries: how many entries were taken, by exchange, interval and what they did to what was
            stored; those that went into the spool count when they do.
        written_bytes: what the documents take that were written to the backend, by exchange.
        store_s: how long it took (real time) to answer a batch: until it was durable.
        refused: how many entries could not be stored, by exchange.
    """

    entries: Counter[tuple[str, str, Change]] = field(default_factory=Counter)
    written_bytes: Counter[str] = field(default_factory=Counter)
    store_s: Durations = field(default_factory=lambda: Durations(STORE_BOUNDS_S))
    refused: Counter[str] = field(default_factory=Counter)


class IStorageListener(ABC):
    """Who wants to know what happens to storage behind the callers' backs. Must not block."""

    @abstractmethod
    def storage_changed(self, *, available: bool) -> None:
        """The backend went away, so that entries wait in the spool; or it came back."""

    @abstractmethod
    def entry_settled(self, stored: Stored) -> None:
        """An entry that was taken while the backend was away, and could not be compared with what
        it held then, turned out to be a correction."""


@dataclass(frozen=True, slots=True)
class SealedPeriods:
    """What is known of a range without listing documents.

    ``known`` are the parts of it that this speaks for, ``stored`` the runs of periods in them that
    have an entry; both ascend.
    """

    known: tuple[TimeRange, ...] = ()
    stored: tuple[TimeRange, ...] = ()


class ISealedDays(ABC):
    """Keeps copies of the documents of closed UTC days, sealed, which are read instead of them.

    A day is sealed while its copy has just what its documents have; who writes a document unseals
    its day first.
    """

    @abstractmethod
    def changing(
        self, series: Series, timestamps: Iterable[int]
    ) -> AbstractAsyncContextManager[None]:
        """Entered before documents of these periods (ms) are written, left once they are or could
        not be. Inside, none of their days is sealed, durably, nor will be.

        Raises:
            StorageUnavailable: a day cannot be unsealed for now; nothing may be written.
        """

    @abstractmethod
    async def periods(self, series: Series, within: TimeRange) -> SealedPeriods:
        """What the sealed days of a range say of it; nothing where they cannot be read."""


class IStorageManager(ABC):
    """Validated entries: decides what may replace what.

    - Storing the same entry twice changes nothing. One whose open, high, low, close or volume
      differs replaces it with the next revision; no revision is ever lowered.
    - A null book never replaces a book.
    - The first entry fixes the market of a series; an entry of another market is refused.
    - Writes of one series are applied one after the other, in the order of the calls.
    - An entry is stored once it is in the backend or, while that is away, synced in the local
      spool: readers see both, and the spool is written to the backend when it returns. A read
      that needs a backend that is away fails: what cannot be listed is unknown, never missing.

    Raises what ``IRawDataStorage`` raises, and ``InvalidEntry`` for a document that breaks the
    rules of its shape.
    """

    @abstractmethod
    async def store_raw_data(self, entry: Entry) -> Stored:
        """Store one entry; returns once it is durable.

        Raises:
            StorageConflict: the series is of another market.
            SpoolFull: the backend is away and the spool has no room.
            NotTheCollector: another service collects into this root.
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
    async def get_waiting(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[Entry]:
        """Those of a range that wait in the spool and are no documents yet, ascending; each
        replaces the document of its period."""

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
        from_documents: bool = False,
    ) -> list[TimeRange]:
        """Runs of periods that have an entry, ascending, found without reading documents.

        Those of sealed days are taken from there, unless the documents themselves are asked for.
        """

    @abstractmethod
    async def read_record(self, path: str) -> bytes | None:
        """A record beside the documents (the ledger), or None. ``path`` is relative to the root."""

    @abstractmethod
    async def write_record(self, path: str, content: bytes) -> None:
        """Replace a record beside the documents, whole or not at all."""

    @abstractmethod
    async def check_health(self) -> None:
        """Return when the backend does its part, raise ``StorageError`` when it does not."""

    @abstractmethod
    async def warnings(self) -> list[str]:
        """What will become a failure if nobody acts."""

    @property
    @abstractmethod
    def status(self) -> StorageStatus:
        """How storing goes."""

    @property
    @abstractmethod
    def totals(self) -> StorageTotals:
        """What storing came to so far; it goes on counting."""
