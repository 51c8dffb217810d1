"""Storage without a disk, for tests of what stands above it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import count
from typing import Any

import structlog

from domain.interval import DEFAULT_INTERVAL
from storage.documents import check_page, encode_document, read_json
from storage.interfaces import (
    Decode,
    Held,
    ICollectorLock,
    IRawDataStorage,
    StaleVersion,
    StorageError,
    Timestamp,
    no_root,
)
from storage.path_utility import (
    RAW_DATA,
    RawDataPath,
    StoragePathUtility,
    day_of,
    to_milliseconds,
    to_range,
)


class Blobs(UserDict[str, bytes]):
    """Bytes by path, each write of a path with a version of its own."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._versions: dict[str, str] = {}
        super().__init__()

    def __setitem__(self, path: str, content: bytes) -> None:
        super().__setitem__(path, content)
        self._versions[path] = f"v{next(self._numbers)}"

    def version(self, path: str) -> str | None:
        """The mark of the last write of a path, or None when nothing lies there."""
        return self._versions[path] if path in self else None


class InMemoryStorage(IRawDataStorage):
    """A storage root in a dictionary.

    ``blobs`` is everything stored, by path; ``fail_with`` is raised by every method while it is
    set, ``fail_writes_with`` by those that write; ``writes`` lists the paths written, in order;
    ``warns`` is what it warns about; ``collector`` is who holds the collector's lock, which tests
    may set to somebody else.
    """

    def __init__(self, name: str = "root") -> None:
        self.blobs = Blobs()
        self.writes: list[str] = []
        self.warns: list[str] = []
        self.fail_with: StorageError | None = None
        self.fail_writes_with: StorageError | None = None
        self.collector: str | None = None
        self.opened = False
        self.closed = False
        self._name = name
        self._locks = count(1)
        self._unreadable: set[str] = set()
        self._parsed: dict[str, RawDataPath | None] = {}
        self._log = structlog.get_logger(__name__)

    @property
    def address(self) -> str:
        return f"memory:{self._name}"

    async def open(self, *, read_only: bool = False) -> None:
        self.check()
        if read_only and not self.opened:
            raise no_root(self.address)
        self.opened = True

    async def save_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        data: Mapping[str, Any],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> None:
        await self.save_entries(exchange_name, coin_symbol, [(timestamp, data)], interval=interval)

    async def save_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        entries: Sequence[tuple[Timestamp, Mapping[str, Any]]],
        *,
        interval: str = DEFAULT_INTERVAL,
        expected: Mapping[int, str] | None = None,
    ) -> int:
        encoded = []
        wanted: dict[str, str | None] = {}
        for timestamp, data in entries:
            path = StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            encoded.append((path, encode_document(path, data)))
            if expected is not None:
                wanted[path] = expected.get(to_milliseconds(timestamp))
        self.check_writes()
        for path, version in wanted.items():
            if self.blobs.version(path) != version:
                raise StaleVersion(f"{path}: written by another meanwhile; read it again")
        for path, content in encoded:
            self._put(path, content)
        return sum(len(content) for _, content in encoded)

    async def get_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> dict[str, Any] | None:
        found = await self.get_entries(exchange_name, coin_symbol, [timestamp], interval=interval)
        return next((held.content for held in found.values()), None)

    async def get_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamps: Sequence[Timestamp],
        *,
        interval: str = DEFAULT_INTERVAL,
        decode: Decode = read_json,
    ) -> dict[int, Held]:
        paths = {
            to_milliseconds(timestamp): StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            for timestamp in timestamps
        }
        self.check()
        found = {}
        for timestamp, path in paths.items():
            version = self.blobs.version(path)
            if version is not None:
                found[timestamp] = Held(self._document(timestamp, path, decode), version)
        return found

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
        check_page(limit, offset)
        paths = self._paths(exchange_name, coin_symbol, interval)
        wanted = to_range(start_time, end_time)
        self.check()
        times = [time for time in sorted(paths) if time in wanted]
        documents = (self._document(time, paths[time], decode) for time in times)
        readable = [document for document in documents if document is not None]
        return readable[offset : None if limit is None else offset + limit]

    async def get_latest_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        *,
        interval: str = DEFAULT_INTERVAL,
        decode: Decode = read_json,
    ) -> Any | None:
        paths = self._paths(exchange_name, coin_symbol, interval)
        self.check()
        times = sorted(paths, reverse=True)
        documents = (self._document(time, paths[time], decode) for time in times)
        return next((document for document in documents if document is not None), None)

    async def list_coins(self, exchange_name: str) -> list[str]:
        prefix = StoragePathUtility.exchange_path(exchange_name) + "/"
        self.check()
        names = {
            path[len(prefix) :].split("/")[0]
            for path in self.blobs
            if path.startswith(prefix) and "/" in path[len(prefix) :]
        }
        return sorted(
            coin for name in names if (coin := StoragePathUtility.decode_name(name)) is not None
        )

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        prefix = StoragePathUtility.coin_path(exchange_name, coin_symbol) + "/"
        self.check()
        return any(path.startswith(prefix) for path in self.blobs)

    async def list_timestamps(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[int]:
        paths = self._paths(exchange_name, coin_symbol, interval)
        wanted = to_range(start_time, end_time)
        self.check()
        return [
            time for time in sorted(paths) if time in wanted and paths[time] not in self._unreadable
        ]

    async def list_days(self, exchange_name: str, coin_symbol: str) -> dict[str, dict[date, int]]:
        self.check()
        found: dict[str, dict[date, int]] = {}
        for path in self.blobs:
            parsed = StoragePathUtility.parse_raw_data_path(path)
            if parsed is not None and (parsed.exchange, parsed.coin) == (
                exchange_name, coin_symbol,
            ):  # fmt: skip
                days = found.setdefault(parsed.interval, {})
                day = day_of(parsed.timestamp)
                days[day] = days.get(day, 0) + 1
        return found

    async def read_blob(self, path: str) -> bytes | None:
        StoragePathUtility.check_blob_path(path)
        self.check()
        return self.blobs.get(path)

    async def write_blob(self, path: str, content: bytes) -> None:
        StoragePathUtility.check_blob_path(path)
        self.check_writes()
        self._put(path, content)

    async def check_writable(self) -> None:
        self.check_writes()

    async def warnings(self) -> list[str]:
        self.check()
        return list(self.warns)

    def collector_lock(self, *, identity: str | None = None) -> InMemoryCollectorLock:
        return InMemoryCollectorLock(self, f"lock {next(self._locks)} of {self.address}")

    async def close(self) -> None:
        self.closed = True

    def check(self) -> None:
        """Fail while the storage is told to."""
        if self.fail_with is not None:
            raise self.fail_with

    def check_writes(self) -> None:
        """Fail while writing is told to."""
        self.check()
        if self.fail_writes_with is not None:
            raise self.fail_writes_with

    def _put(self, path: str, content: bytes) -> None:
        self.blobs[path] = content
        self.writes.append(path)
        self._unreadable.discard(path)

    def _paths(self, exchange_name: str, coin_symbol: str, interval: str) -> dict[int, str]:
        prefix = StoragePathUtility.coin_path(exchange_name, coin_symbol) + "/"
        StoragePathUtility.file_ending(interval)
        found = {}
        for path in self.blobs:
            if path.startswith(prefix) and path.startswith(RAW_DATA):
                if path not in self._parsed:
                    self._parsed[path] = StoragePathUtility.parse_raw_data_path(path)
                parts = self._parsed[path]
                if parts is not None and parts.interval == interval:
                    found[parts.timestamp] = path
        return found

    def _document(self, timestamp: int, path: str, decode: Decode) -> Any | None:
        content = self.blobs.get(path)
        if content is None:
            return None
        document = decode(timestamp, content)
        if document is not None:
            self._unreadable.discard(path)
        elif path not in self._unreadable:
            self._unreadable.add(path)
            self._log.warning("storage_document_unreadable", path=path)
        return document


class InMemoryCollectorLock(ICollectorLock):
    """Held by whom ``collector`` of the storage names."""

    def __init__(self, storage: InMemoryStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._holder: str | None = None

    async def acquire(self) -> bool:
        self._storage.check()
        if self._storage.collector is None:
            self._storage.collector = self._name
        self._holder = self._storage.collector
        return self.is_held

    async def release(self) -> None:
        if self.is_held:
            self._storage.collector = self._holder = None

    @property
    def is_held(self) -> bool:
        return self._storage.collector == self._name

    @property
    def holder(self) -> str | None:
        return self._holder

    @property
    def renew_every_s(self) -> float:
        return 0.01
