"""Entries that wait on the local disk for a backend that is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog

from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from storage.documents import encode_document
from storage.entry_decoder import entry_decoder
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import SpoolFull, StorageError, StorageUnavailable
from storage.path_utility import StoragePathUtility

MOST_ENTRIES: Final = 100_000
MOST_BYTES: Final = 256 * 1024 * 1024
REFUSED: Final = "refused"
DISK_TIMEOUT_S: Final = 30.0

log = structlog.get_logger(__name__)


class Spool:
    """A bounded folder of documents, each synced before ``put`` returns, so that it survives a
    kill and a power cut; at most one a period: a later one replaces an earlier one.

    What waits is known by an index in memory, read from names by ``open``. Calls for one series
    must not overlap; ``StorageManagerImpl`` sees to that.

    Entries that can be fetched again (``source`` ``rest``) may fill half of it only: the rest is
    kept for live ones, whose books cannot.

    Every method raises ``StorageUnavailable`` when the local disk refuses.
    """

    def __init__(
        self, folder: Path, *, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES
    ) -> None:
        self._folder = folder
        self._files = LocalFileStorage(folder)
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._waiting: dict[Series, dict[int, int]] = {}
        self._entries = 0
        self._bytes = 0

    async def open(self) -> None:
        """Find what a former process left."""
        found: list[tuple[Series, int, int]] = []
        try:
            await self._files.open()
            await self._do(lambda: found.extend(self._scan()))
        except StorageError as exc:
            raise type(exc)(f"STATE_DIR: {exc.message}") from exc
        self._waiting, self._entries, self._bytes = {}, 0, 0
        for series, timestamp, size in found:
            self._note(series, timestamp, size)
        if self._entries:
            log.info("spool_holds_entries", folder=str(self._folder), entries=self._entries)

    async def close(self) -> None:
        """Release what is held. Idempotent; what waits stays."""
        await self._files.close()

    @property
    def entries(self) -> int:
        """How many entries wait."""
        return self._entries

    @property
    def bytes(self) -> int:
        """How much their documents take."""
        return self._bytes

    @property
    def is_full(self) -> bool:
        """Whether a live entry finds no room any more."""
        return self._entries >= self._most_entries or self._bytes >= self._most_bytes

    def holds(self, series: Series) -> bool:
        """Whether anything of the series waits."""
        return series in self._waiting

    def serieses(self) -> list[Series]:
        """The series that wait, in a lasting order."""
        return sorted(self._waiting)

    def timestamps(self, series: Series, within: TimeRange | None = None) -> list[int]:
        """The opens (ms) of the periods that wait, ascending."""
        waiting = self._waiting.get(series, {})
        return sorted(at for at in waiting if within is None or at in within)

    def coins(self, exchange_name: str) -> set[str]:
        """The coins of an exchange of which anything waits."""
        return {series.coin for series in self._waiting if series.exchange == exchange_name}

    async def put(self, series: Series, entries: Sequence[Entry]) -> None:
        """Keep entries of one series, ascending; each is synced when this returns.

        Raises:
            SpoolFull: there is no room; none of them was kept.
        """
        documents = [(entry.timestamp, entry.to_document()) for entry in entries]
        sizes = {at: len(encode_document(str(series), document)) for at, document in documents}
        self._check_room(series, entries, sizes)
        await self._files.save_entries(
            series.exchange, series.coin, documents, interval=series.interval.name
        )
        for at, size in sizes.items():
            self._note(series, at, size)

    async def read(self, series: Series, timestamps: Sequence[int]) -> dict[int, Entry]:
        """The entries that wait for these periods; what cannot be read is left out.

        Raises:
            StorageError: a document is of a schema that this version does not know.
        """
        held = await self._files.get_entries(
            series.exchange,
            series.coin,
            timestamps,
            interval=series.interval.name,
            decode=entry_decoder(series),
        )
        return {at: item.content for at, item in held.items() if item.content is not None}

    async def discard(self, series: Series, timestamps: Iterable[int]) -> None:
        """Forget periods whose entries the backend has."""
        paths = {at: self._path(series, at) for at in timestamps}

        def remove() -> None:
            for path in paths.values():
                path.unlink(missing_ok=True)

        await self._do(remove)
        self._forget(series, paths)

    async def set_aside(self, series: Series, timestamps: Iterable[int]) -> None:
        """Take what the backend refuses for good out of the way, for people to look at."""
        paths = {at: self._path(series, at) for at in timestamps}

        def move() -> None:
            for path in paths.values():
                aside = self._folder / REFUSED / path.relative_to(self._folder)
                aside.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    path.replace(aside)

        await self._do(move)
        self._forget(series, paths)

    def _check_room(self, series: Series, entries: Sequence[Entry], sizes: dict[int, int]) -> None:
        waiting = self._waiting.get(series, {})
        count = self._entries + sum(at not in waiting for at in sizes)
        size = self._bytes + sum(size - waiting.get(at, 0) for at, size in sizes.items())
        share = 1 if all(entry.source == "stream" for entry in entries) else 2
        if count > self._most_entries // share or size > self._most_bytes // share:
            raise SpoolFull(
                f"{self._folder}: the spool has no room for {len(entries)} more entries "
                f"({self._entries} wait, {self._bytes} bytes): bring the storage back"
            )

    async def _do(self, work: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(DISK_TIMEOUT_S):
                await asyncio.to_thread(work)
        except TimeoutError as exc:
            raise StorageUnavailable(
                f"{self._folder}: the disk has not answered for {DISK_TIMEOUT_S:g} s; check it"
            ) from exc
        except OSError as exc:
            raise StorageUnavailable(
                f"{exc.filename or self._folder}: {exc.strerror or exc}; check the spool's folder"
            ) from exc

    def _path(self, series: Series, timestamp: int) -> Path:
        return self._folder / StoragePathUtility.get_raw_data_path(
            series.exchange, series.coin, timestamp, interval=series.interval.name
        )

    def _note(self, series: Series, timestamp: int, size: int) -> None:
        waiting = self._waiting.setdefault(series, {})
        self._entries += timestamp not in waiting
        self._bytes += size - waiting.get(timestamp, 0)
        waiting[timestamp] = size

    def _forget(self, series: Series, timestamps: Iterable[int]) -> None:
        waiting = self._waiting.get(series, {})
        for timestamp in timestamps:
            size = waiting.pop(timestamp, None)
            if size is not None:
                self._entries -= 1
                self._bytes -= size
        if not waiting:
            self._waiting.pop(series, None)

    def _scan(self) -> list[tuple[Series, int, int]]:
        found = []
        for path in self._folder.rglob("*.json"):
            parts = StoragePathUtility.parse_raw_data_path(
                path.relative_to(self._folder).as_posix()
            )
            if parts is not None:
                series = Series(parts.exchange, parts.coin, Interval.parse(parts.interval))
                found.append((series, parts.timestamp, path.stat().st_size))
        return found
