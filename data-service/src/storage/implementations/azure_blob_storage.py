"""Documents as blobs of one Azure container."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import date
from itertools import groupby
from typing import Any, Final

import structlog
from azure.core.exceptions import HttpResponseError
from azure.storage.blob.aio import ContainerClient

from domain.interval import DEFAULT_INTERVAL, Interval
from storage.documents import check_page, encode_document, read_json
from storage.implementations.azure_account import AzureAccount
from storage.implementations.azure_blobs import BYTES, JSON, AzureBlobs
from storage.implementations.azure_calls import AzureCalls, error_code, in_parallel
from storage.implementations.azure_listing import MOST_DAYS_AHEAD, PAGE, AzureListing, Named
from storage.implementations.azure_lock import BlobLeaseCollectorLock, seconds_passed
from storage.interfaces import (
    Decode,
    Held,
    ICollectorLock,
    IRawDataStorage,
    StaleVersion,
    StorageUnavailable,
    Timestamp,
    no_root,
)
from storage.path_utility import (
    SERVICE_FOLDER,
    StoragePathUtility,
    day_of,
    to_milliseconds,
    to_range,
)

_DAY_MS: Final = 86_400_000
# Later than any time that a name can carry.
_FOREVER: Final = 2**60
# From how many documents of one day on it is listed before they are read: missing ones cost as
# much as others.
_WORTH_A_LISTING: Final = 4
_PATHS_NAMED: Final = 5


class AzureBlobStorage(IRawDataStorage):
    """A storage root in a container, made by ``open`` where that is allowed.

    - A document is one block blob, written by one request; its version is its ETag.
    - No request takes longer than ``request_timeout_s``, its repetitions and its turn included.
      An operation of many requests ends when one of them fails.
    - ``reads_at_once`` and ``writes_at_once`` hold for all callers together.
    - Reading a range lists only the days in it, a limited one only the days that it needs.

    ``monotonic`` counts seconds for the collector's lock, ``sleep`` waits between repetitions.

    Raises:
        ConfigurationError: the connection string or the account URL is none.
    """

    def __init__(
        self,
        container: str,
        *,
        connection_string: str | None = None,
        account_url: str | None = None,
        request_timeout_s: float = 15.0,
        attempt_timeout_s: float = 5.0,
        pauses_s: tuple[float, ...] = (0.5, 1.0),
        reads_at_once: int = 16,
        writes_at_once: int = 8,
        monotonic: Callable[[], float] = seconds_passed,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._account = AzureAccount(container, connection_string, account_url)
        self._account.check()
        self._address = self._account.address
        self._calls = AzureCalls(
            self._address,
            request_timeout_s=request_timeout_s,
            attempt_timeout_s=attempt_timeout_s,
            pauses_s=pauses_s,
            reads_at_once=reads_at_once,
            writes_at_once=writes_at_once,
            sleep=sleep,
        )
        self._blobs = AzureBlobs(self._calls, lambda: self._container)
        self._listing = AzureListing(self._calls, lambda: self._container, at_once=reads_at_once)
        self._reads_at_once = reads_at_once
        self._writes_at_once = writes_at_once
        self._monotonic = monotonic
        self._held = AsyncExitStack()
        self._client: ContainerClient | None = None
        self._unreadable: set[str] = set()
        self._log = structlog.get_logger(__name__)

    @property
    def address(self) -> str:
        return self._address

    async def open(self, *, read_only: bool = False) -> None:
        if self._client is None:
            self._client = self._account.client(self._held)
        if await self._calls.read("", self._container_exists):
            return
        if read_only:
            raise no_root(self._address)
        await self._calls.write("", self._create_container)

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
        contents: dict[str, bytes] = {}
        versions: dict[str, str | None] = {}
        for timestamp, data in entries:
            path = StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            contents[path] = encode_document(path, data)
            if expected is not None:
                versions[path] = expected.get(to_milliseconds(timestamp))

        async def save(path: str) -> bool:
            if expected is None:
                await self._blobs.put(path, contents[path], JSON)
            elif not await self._blobs.put_expecting(path, contents[path], versions[path]):
                return False
            self._unreadable.discard(path)
            return True

        written = await in_parallel(save, contents, self._writes_at_once)
        stale = [path for path, done in zip(contents, written, strict=True) if not done]
        if stale:
            more = len(stale) - _PATHS_NAMED
            raise StaleVersion(
                f"{self._address}: {', '.join(stale[:_PATHS_NAMED])}"
                f"{f' and {more} more' if more > 0 else ''}: changed meanwhile; read it again"
            )
        return sum(map(len, contents.values()))

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
        asked = {
            to_milliseconds(timestamp): StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            for timestamp in timestamps
        }
        missing = await self._missing(exchange_name, coin_symbol, asked, interval)
        named = [(timestamp, path) for timestamp, path in asked.items() if path not in missing]

        async def read(document: tuple[int, str]) -> Held | None:
            return await self._document(*document, decode)

        found = await in_parallel(read, named, self._reads_at_once)
        return {
            timestamp: held
            for (timestamp, _), held in zip(named, found, strict=True)
            if held is not None
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
        decode: Decode = read_json,
    ) -> list[Any]:
        check_page(limit, offset)
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        ending = StoragePathUtility.file_ending(interval)
        wanted = to_range(start_time, end_time)
        last = None if limit is None else offset + limit
        if limit == 0 or not wanted:
            return []

        async def read(document: tuple[int, str]) -> Held | None:
            return await self._document(*document, decode)

        found: list[Any] = []
        ahead = self._reads_at_once if last is None else -(-last // _periods_a_day(interval))
        async with aclosing(
            self._listing.documents(coin_path, ending, wanted, ahead=ahead)
        ) as listed:
            async for named in listed:
                while named and (last is None or len(found) < last):
                    # A page is filled past documents that cannot be read, and not beyond.
                    most = len(named) if last is None else last - len(found)
                    now, named = named[:most], named[most:]  # noqa: PLW2901
                    held = await in_parallel(read, now, self._reads_at_once)
                    found += [one.content for one in held if one and one.content is not None]
                if last is not None and len(found) >= last:
                    break
        return found[offset:]

    async def get_latest_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        *,
        interval: str = DEFAULT_INTERVAL,
        decode: Decode = read_json,
    ) -> Any | None:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        ending = StoragePathUtility.file_ending(interval)
        always = to_range(0, _FOREVER)
        newest = self._listing.documents(coin_path, ending, always, ahead=1, newest_first=True)
        async with aclosing(newest) as listed:
            async for named in listed:
                for timestamp, path in named:
                    held = await self._document(timestamp, path, decode)
                    if held is not None and held.content is not None:
                        return held.content
        return None

    async def list_coins(self, exchange_name: str) -> list[str]:
        names = await self._listing.folders(StoragePathUtility.exchange_path(exchange_name))
        coins = (StoragePathUtility.decode_name(name) for name in names)
        return sorted(coin for coin in coins if coin is not None)

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        return bool(await self._listing.names(f"{coin_path}/", most=1))

    async def list_timestamps(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[int]:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        ending = StoragePathUtility.file_ending(interval)
        wanted = to_range(start_time, end_time)
        found: list[int] = []
        async for named in self._listing.documents(
            coin_path, ending, wanted, ahead=MOST_DAYS_AHEAD
        ):
            found += [timestamp for timestamp, path in named if path not in self._unreadable]
        return found

    async def list_days(self, exchange_name: str, coin_symbol: str) -> dict[str, dict[date, int]]:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        found: dict[str, dict[date, int]] = {}
        async for day, names in self._listing.day_folders(coin_path):
            for interval, count in StoragePathUtility.counts_of(names, day).items():
                found.setdefault(interval, {})[day] = count
        return found

    async def read_blob(self, path: str) -> bytes | None:
        StoragePathUtility.check_blob_path(path)
        found = await self._blobs.get(path)
        return None if found is None else found[0]

    async def write_blob(self, path: str, content: bytes) -> None:
        StoragePathUtility.check_blob_path(path)
        await self._blobs.put(path, content, JSON if path.endswith(".json") else BYTES)

    async def check_writable(self) -> None:
        await self._blobs.put(f"{SERVICE_FOLDER}/writable", b"", BYTES)

    async def warnings(self) -> list[str]:
        return []

    def collector_lock(self, *, identity: str | None = None) -> ICollectorLock:
        path = f"{SERVICE_FOLDER}/collector"
        return BlobLeaseCollectorLock(
            path,
            self._calls,
            lambda: self._blobs.client(path),
            lease_id=identity or str(uuid.uuid4()),
            monotonic=self._monotonic,
        )

    async def close(self) -> None:
        self._client = None
        held, self._held = self._held, AsyncExitStack()
        await held.aclose()

    @property
    def _container(self) -> ContainerClient:
        if self._client is None:
            raise StorageUnavailable(f"{self._address}: the storage is not open")
        return self._client

    async def _container_exists(self) -> bool:
        # Asked in a way that any role and signature allows which lets documents be read.
        pages = self._container.list_blob_names(results_per_page=1).by_page()
        try:
            await anext(pages)
        except HttpResponseError as exc:
            if error_code(exc) != "ContainerNotFound":
                raise
            return False
        return True

    async def _create_container(self) -> None:
        try:
            await self._container.create_container()
        except HttpResponseError as exc:
            # Another made it meanwhile.
            if error_code(exc) != "ContainerAlreadyExists":
                raise

    async def _document(self, timestamp: int, path: str, decode: Decode) -> Held | None:
        found = await self._blobs.get(path)
        if found is None:
            return None
        content, version = found
        document = decode(timestamp, content)
        if document is not None:
            self._unreadable.discard(path)
        elif path not in self._unreadable:
            self._unreadable.add(path)
            self._log.warning("storage_document_unreadable", path=f"{self._address}: {path}")
        return Held(document, version)

    async def _missing(
        self, exchange_name: str, coin_symbol: str, asked: Mapping[int, str], interval: str
    ) -> set[str]:
        """Which of the paths surely hold nothing, as far as it is cheaper to know than to ask."""
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        ending = StoragePathUtility.file_ending(interval)
        pages = 1 + _periods_a_day(interval) // PAGE
        days = {day: list(times) for day, times in groupby(sorted(asked), day_of)}
        dense = [day for day, times in days.items() if len(times) >= _WORTH_A_LISTING * pages]

        async def read(day: date) -> Named:
            return await self._listing.day(coin_path, ending, day)

        listed = await in_parallel(read, dense, self._reads_at_once)
        there = {path for named in listed for _, path in named}
        return {asked[time] for day in dense for time in days[day]} - there


def _periods_a_day(interval: str) -> int:
    return max(1, _DAY_MS // Interval.parse(interval).milliseconds)
