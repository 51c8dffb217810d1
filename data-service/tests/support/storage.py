"""Storage without a disk, for tests of what stands above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from domain.interval import DEFAULT_INTERVAL
from storage.documents import check_page, decode_document, encode_document
from storage.interfaces import IRawDataStorage, StorageError, Timestamp
from storage.path_utility import (
    RAW_DATA,
    RawDataPath,
    StoragePathUtility,
    to_milliseconds,
    to_range,
)


class InMemoryStorage(IRawDataStorage):
    """A storage root in a dictionary.

    ``blobs`` is everything stored, by path; ``fail_with`` is raised by every method while it is
    set; ``writes`` lists the paths written, in order.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.fail_with: StorageError | None = None
        self.closed = False
        self._unreadable: set[str] = set()
        self._parsed: dict[str, RawDataPath | None] = {}

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
    ) -> None:
        encoded = []
        for timestamp, data in entries:
            path = StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            encoded.append((path, encode_document(path, data)))
        self._fail()
        for path, content in encoded:
            self._put(path, content)

    async def get_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> dict[str, Any] | None:
        found = await self.get_entries(exchange_name, coin_symbol, [timestamp], interval=interval)
        return next(iter(found.values()), None)

    async def get_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        timestamps: Sequence[Timestamp],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> dict[int, dict[str, Any]]:
        paths = {
            to_milliseconds(timestamp): StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            for timestamp in timestamps
        }
        self._fail()
        found = {timestamp: self._document(path) for timestamp, path in paths.items()}
        return {
            timestamp: document for timestamp, document in found.items() if document is not None
        }

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
        check_page(limit, offset)
        paths = self._paths(exchange_name, coin_symbol, interval)
        wanted = to_range(start_time, end_time)
        self._fail()
        documents = [self._document(paths[time]) for time in sorted(paths) if time in wanted]
        readable = [document for document in documents if document is not None]
        return readable[offset : None if limit is None else offset + limit]

    async def get_latest_entry(
        self, exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> dict[str, Any] | None:
        paths = self._paths(exchange_name, coin_symbol, interval)
        self._fail()
        documents = (self._document(paths[time]) for time in sorted(paths, reverse=True))
        return next((document for document in documents if document is not None), None)

    async def list_coins(self, exchange_name: str) -> list[str]:
        prefix = StoragePathUtility.exchange_path(exchange_name) + "/"
        self._fail()
        names = {
            path[len(prefix) :].split("/")[0] for path in self.blobs if path.startswith(prefix)
        }
        return sorted(
            coin for name in names if (coin := StoragePathUtility.decode_name(name)) is not None
        )

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        prefix = StoragePathUtility.coin_path(exchange_name, coin_symbol) + "/"
        self._fail()
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
        self._fail()
        return [
            time for time in sorted(paths) if time in wanted and paths[time] not in self._unreadable
        ]

    async def read_blob(self, path: str) -> bytes | None:
        StoragePathUtility.check_blob_path(path)
        self._fail()
        return self.blobs.get(path)

    async def write_blob(self, path: str, content: bytes) -> None:
        StoragePathUtility.check_blob_path(path)
        self._fail()
        self._put(path, content)

    async def check_writable(self) -> None:
        self._fail()

    async def close(self) -> None:
        self.closed = True

    def _fail(self) -> None:
        if self.fail_with is not None:
            raise self.fail_with

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

    def _document(self, path: str) -> dict[str, Any] | None:
        content = self.blobs.get(path)
        if content is None:
            return None
        document = decode_document(content)
        if document is None:
            self._unreadable.add(path)
        else:
            self._unreadable.discard(path)
        return document
