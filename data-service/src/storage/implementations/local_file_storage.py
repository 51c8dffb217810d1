"""Documents as files below a local folder."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from domain.interval import DEFAULT_INTERVAL
from domain.time_range import TimeRange
from errors import InvalidRequest
from storage.documents import check_page, encode_document, read_json
from storage.implementations.collector_lock import FileCollectorLock
from storage.implementations.disk import Disk
from storage.interfaces import (
    Decode,
    Held,
    ICollectorLock,
    IRawDataStorage,
    StaleVersion,
    StorageDenied,
    StorageError,
    StorageUnavailable,
    Timestamp,
)
from storage.path_utility import (
    SERVICE_FOLDER,
    TEMPORARY_PREFIX,
    StoragePathUtility,
    day_of,
    to_milliseconds,
    to_range,
)

_T = TypeVar("_T")
_THREADS: Final = 8
_DECEMBER: Final = 12

# What to do about a failure that passes once somebody did it.
_PASSING: Final = {
    errno.ENOSPC: "the disk is full: free space",
    errno.EDQUOT: "the disk quota is used up: free space, or raise it",
    errno.EACCES: "permission denied: let the service's user read and write it",
    errno.EPERM: "not permitted: let the service's user read and write it",
    errno.EROFS: "the file system is read-only: mount it writable",
    errno.EIO: "the disk reports a fault: check it",
    errno.ESTALE: "the network file system is stale: mount it again",
    errno.ENOTCONN: "the network file system is not connected: mount it again",
    errno.ETIMEDOUT: "the network file system does not answer: check it",
    errno.EMFILE: "the process has too many open files: raise its limit",
    errno.ENFILE: "the system has too many open files: raise its limit",
}


class _Abandoned(Exception):
    """Nobody waits for this work any more."""


class _Work:
    """One operation in a thread: whether somebody waits for it, and how far it is."""

    __slots__ = ("abandoned", "steps")

    def __init__(self) -> None:
        self.abandoned = False
        self.steps = 0

    def check(self) -> None:
        """Stop work that nobody waits for, so that it changes nothing late."""
        if self.abandoned:
            raise _Abandoned

    def step(self) -> None:
        """One more file is done."""
        self.steps += 1
        self.check()


class LocalFileStorage(IRawDataStorage):
    """A storage root in a local folder, made when first written.

    Each operation is one visit to a thread of its own pool, so that a hanging disk blocks neither
    the event loop nor what else uses threads. An operation of many files is given up when it stands
    still for ``timeout_s``, not when it is long; what was given up changes nothing later.
    Reading a range lists only the days in it.
    """

    def __init__(self, root: Path, *, timeout_s: float = 30.0, disk: Disk | None = None) -> None:
        self._root = root
        self._timeout_s = timeout_s
        self._disk = disk or Disk()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")
        self._conditional = threading.Lock()
        self._unreadable: set[str] = set()
        self._log = structlog.get_logger(__name__)

    @property
    def address(self) -> str:
        return f"local:{self._root.absolute()}"

    async def open(self) -> None:
        await self._run(lambda _: self._disk.make_folder(self._root), "")

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
    ) -> None:
        paths = [
            StoragePathUtility.get_raw_data_path(
                exchange_name, coin_symbol, timestamp, interval=interval
            )
            for timestamp, _ in entries
        ]

        def save(work: _Work) -> None:
            contents = [
                (path, encode_document(path, data))
                for path, (_, data) in zip(paths, entries, strict=True)
            ]
            if expected is None:
                self._write(contents, work)
                return
            with self._conditional:
                for path, (timestamp, _) in zip(paths, entries, strict=True):
                    held = self._disk.read(self._root / path)
                    if (held and held[1]) != expected.get(to_milliseconds(timestamp)):
                        raise StaleVersion(f"{self._root / path}: changed meanwhile; read it again")
                self._write(contents, work)

        if paths:
            await self._run(save, paths[0])

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

        def read(work: _Work) -> dict[int, Held]:
            found = {}
            for timestamp, path in paths.items():
                held = self._held(timestamp, path, decode, work)
                if held is not None:
                    found[timestamp] = held
            return found

        return await self._run(read, next(iter(paths.values()))) if paths else {}

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

        def read(work: _Work) -> list[Any]:
            found: list[Any] = []
            for timestamp, path in self._files(coin_path, ending, wanted, work):
                if last is not None and len(found) >= last:
                    break
                held = self._held(timestamp, path, decode, work)
                if held is not None and held.content is not None:
                    found.append(held.content)
            return found[offset:]

        return await self._run(read, coin_path)

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

        def read(work: _Work) -> Any | None:
            for day, day_path in self._days(coin_path, None, newest_first=True):
                for timestamp, path in reversed(self._files_of_day(day, day_path, ending, work)):
                    held = self._held(timestamp, path, decode, work)
                    if held is not None and held.content is not None:
                        return held.content
            return None

        return await self._run(read, coin_path)

    async def list_coins(self, exchange_name: str) -> list[str]:
        exchange_path = StoragePathUtility.exchange_path(exchange_name)

        def read(_: _Work) -> list[str]:
            names = self._disk.folders(self._root / exchange_path)
            coins = (StoragePathUtility.decode_name(name) for name in names)
            return sorted(coin for coin in coins if coin is not None)

        return await self._run(read, exchange_path)

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        return await self._run(lambda _: self._disk.is_folder(self._root / coin_path), coin_path)

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

        def read(work: _Work) -> list[int]:
            return [
                timestamp
                for timestamp, path in self._files(coin_path, ending, wanted, work)
                if path not in self._unreadable
            ]

        return await self._run(read, coin_path)

    async def read_blob(self, path: str) -> bytes | None:
        StoragePathUtility.check_blob_path(path)

        def read(_: _Work) -> bytes | None:
            found = self._disk.read(self._inside(path))
            return found and found[0]

        return await self._run(read, path)

    async def write_blob(self, path: str, content: bytes) -> None:
        StoragePathUtility.check_blob_path(path)

        def write(work: _Work) -> None:
            self._inside(path)
            self._write([(path, content)], work)

        await self._run(write, path)

    async def check_writable(self) -> None:
        # Its name is that of a temporary file: a leftover of a killed check is skipped by readers.
        path = f"{TEMPORARY_PREFIX}writable"

        def write(work: _Work) -> None:
            self._write([(path, b"")], work)
            self._disk.remove(self._root / path)

        await self._run(write, path)

    async def warnings(self) -> list[str]:
        return []

    def collector_lock(self) -> ICollectorLock:
        path = f"{SERVICE_FOLDER}/collector.lock"
        return FileCollectorLock(
            self._root / path, lambda take: self._run(lambda work: take(work.check), path)
        )

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[_Work], _T], path: str) -> _T:
        """Do ``work`` in a thread; ``path`` is what a message about no answer names."""
        state = _Work()
        context = contextvars.copy_context()

        def visit() -> _T:
            state.check()
            with self._translated(path):
                return work(state)

        try:
            job = self._threads.submit(context.run, visit)
        except RuntimeError as exc:
            raise StorageUnavailable(f"{self._root}: the storage is closed") from exc
        answer = asyncio.wrap_future(job)
        try:
            seen = 0
            while True:
                done, _ = await asyncio.wait({answer}, timeout=self._timeout_s)
                if done:
                    return answer.result()
                if state.steps == seen:
                    raise StorageUnavailable(
                        f"{self._root / path}: the disk has not answered for "
                        f"{self._timeout_s:g} s; check it"
                    )
                seen = state.steps
        except asyncio.CancelledError:
            # Whoever writes next must find the file system at rest.
            state.abandoned = True
            if not job.cancel():
                await asyncio.wait({answer}, timeout=self._timeout_s)
            raise
        finally:
            state.abandoned = True
            answer.cancel()

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            where = self._root / path
            # The system's own name is the nearer one, unless it is of a file being written.
            if exc.filename is not None and TEMPORARY_PREFIX not in str(exc.filename):
                where = Path(exc.filename)
            advice = _PASSING.get(exc.errno or 0)
            if exc.errno in (errno.EACCES, errno.EPERM):
                raise StorageDenied(f"{where}: {advice}") from exc
            if advice is not None:
                raise StorageUnavailable(f"{where}: {advice}") from exc
            raise StorageError(
                f"{where}: {exc.strerror or exc}; check what lies at this path"
            ) from exc

    def _write(self, contents: Sequence[tuple[str, bytes]], work: _Work) -> None:
        folders: set[Path] = set()
        try:
            for path, content in contents:
                target = self._root / path
                with self._translated(path):
                    if target.parent not in folders:
                        self._disk.make_folder(target.parent)
                        folders.add(target.parent)
                    self._disk.write(target, content, work.check)
                self._unreadable.discard(path)
                work.step()
        finally:
            # Files that did appear must last, also when a later one failed.
            for folder in folders:
                self._disk.sync_folder(folder)

    def _held(self, timestamp: int, path: str, decode: Decode, work: _Work) -> Held | None:
        found = self._disk.read(self._root / path)
        work.step()
        if found is None:
            return None
        content, version = found
        document = decode(timestamp, content)
        if document is not None:
            self._unreadable.discard(path)
        elif path not in self._unreadable:
            self._unreadable.add(path)
            self._log.warning("storage_document_unreadable", path=str(self._root / path))
        return Held(document, version)

    def _files(
        self, coin_path: str, ending: str, wanted: TimeRange, work: _Work
    ) -> Iterator[tuple[int, str]]:
        """Times and paths of the documents of a range, ascending, one day's listing at a time."""
        if wanted:
            for day, day_path in self._days(coin_path, wanted):
                for timestamp, path in self._files_of_day(day, day_path, ending, work):
                    if timestamp in wanted:
                        yield timestamp, path

    def _files_of_day(
        self, day: date, day_path: str, ending: str, work: _Work
    ) -> list[tuple[int, str]]:
        found = []
        for name in self._disk.names(self._root / day_path):
            timestamp = StoragePathUtility.timestamp_of(name, day, ending)
            if timestamp is not None:
                found.append((timestamp, f"{day_path}/{name}"))
        work.step()
        found.sort()
        return found

    def _days(
        self, coin_path: str, wanted: TimeRange | None, *, newest_first: bool = False
    ) -> Iterator[tuple[date, str]]:
        """The day folders of a coin that are there, within a range if one is given.

        Only folders of wanted years and months are opened, so a range costs what lies in it.
        """
        first = day_of(wanted.start) if wanted else date.min
        last = day_of(wanted.end - 1) if wanted else date.max
        for year in self._numbers(coin_path, 4, first.year, last.year, newest_first=newest_first):
            low = first.month if year == first.year else 1
            high = last.month if year == last.year else _DECEMBER
            year_path = f"{coin_path}/{year:04d}"
            for month in self._numbers(year_path, 2, low, high, newest_first=newest_first):
                month_path = f"{year_path}/{month:02d}"
                for number in self._numbers(month_path, 2, 1, 31, newest_first=newest_first):
                    try:
                        day = date(year, month, number)
                    except ValueError:
                        continue
                    if first <= day <= last:
                        yield day, f"{month_path}/{number:02d}"

    def _numbers(
        self, folder: str, digits: int, low: int, high: int, *, newest_first: bool
    ) -> list[int]:
        """The names in a folder that are numbers of so many digits, from ``low`` to ``high``."""
        numbers = [
            int(name)
            for name in self._disk.names(self._root / folder)
            if len(name) == digits and name.isascii() and name.isdigit()
        ]
        return sorted((n for n in numbers if low <= n <= high), reverse=newest_first)

    def _inside(self, path: str) -> Path:
        """The path of a record, whose links do not lead out of the root."""
        root = self._disk.real_path(self._root)
        if not self._disk.real_path(self._root / path).is_relative_to(root):
            raise InvalidRequest(f"path {path!r} leads out of the storage root through a link")
        return self._root / path
