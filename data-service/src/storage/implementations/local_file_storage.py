"""Documents as files below a local folder."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from domain.interval import DEFAULT_INTERVAL
from domain.time_range import TimeRange
from storage.documents import check_page, encode_document, read_json
from storage.implementations.collector_lock import COLLECTOR_LOCK, FileCollectorLock
from storage.implementations.disk import Disk, Folder, ForeignFile, Replaced, RootGone, version_of
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
    no_root,
)
from storage.path_utility import (
    StoragePathUtility,
    day_of,
    to_milliseconds,
    to_range,
)

_T = TypeVar("_T")
_THREADS: Final = 8
_DECEMBER: Final = 12
_ONE_DAY: Final = timedelta(days=1)
# So many days of a range are opened without looking first which of them are there.
_FEW_DAYS: Final = 31
# Files between two looks at whether somebody still waits for them.
_READ_AT_ONCE: Final = 256
# What is written, and kept in memory, at once of a long batch.
_MOST_DOCUMENTS_AT_ONCE: Final = 4096
_MOST_BYTES_AT_ONCE: Final = 32 * 2**20
# Where a root has less left, it is told to run short. A document takes an inode and a block.
_SHORT_SHARE: Final = 0.05
_SHORT_BYTES: Final = 2**30
_SHORT_INODES: Final = 200_000

_DENIED: Final = {
    errno.EACCES: "permission denied: let the service's user read and write it",
    errno.EPERM: "not permitted: let the service's user read and write it",
}
# What to do about a failure that passes once somebody did it.
_PASSING: Final = {
    errno.ENOSPC: "the disk is full: free space",
    errno.EDQUOT: "the disk quota is used up: free space, or raise it",
    errno.EROFS: "the file system is read-only: mount it writable",
    errno.EIO: "the disk reports a fault: check it",
    errno.ENODEV: "the disk is gone: attach it again",
    errno.ENXIO: "the disk is gone: attach it again",
    errno.ESTALE: "the network file system is stale: mount it again",
    errno.ENOTCONN: "the network file system is not connected: mount it again",
    errno.EHOSTDOWN: "the network file system does not answer: check it",
    errno.EHOSTUNREACH: "the network file system does not answer: check it",
    errno.ETIMEDOUT: "the network file system does not answer: check it",
    errno.EMFILE: "the process has too many open files: raise its limit",
    errno.ENFILE: "the system has too many open files: raise its limit",
    errno.ENOMEM: "the system is out of memory: free some",
    errno.EAGAIN: "another process keeps it locked: look for one that hangs",
    errno.ENOLCK: "the file system is out of locks: look for processes that keep many",
}
# What to do about one that stays until somebody decides otherwise.
_LASTING: Final = {
    errno.ENOTDIR: "a file lies where a folder belongs: move it away",
    errno.EEXIST: "a file lies where a folder belongs: move it away",
    errno.EISDIR: "a folder lies where a file belongs: move it away",
    errno.ENOTEMPTY: "a folder lies where a file belongs: move it away",
    errno.ELOOP: "a link lies where a folder of the root belongs: put the folder itself there",
    errno.EXDEV: "another file system begins below the root: the root must be on one",
    errno.EOPNOTSUPP: "the file system cannot lock: put the root on one that can",
    errno.ENAMETOOLONG: "the path is too long: use a root with a shorter one",
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
        """Something more is done."""
        self.steps += 1
        self.check()


class LocalFileStorage(IRawDataStorage):
    """A storage root in a local folder, made by ``open`` or when first written. One that was opened
    and is gone is unavailable, never empty.

    Each operation is one visit to a thread of its own pool, so that a hanging disk blocks neither
    the event loop nor what else uses threads. An operation of many files is given up when it stands
    still for ``timeout_s``, not when it is long; what was given up changes nothing later.
    Reading a range opens only what lies in it.

    Other processes may read and write the same root; of those that use this class, conditional
    saves hold against all. All of the root must be on one file system that has ``flock``.
    """

    def __init__(self, root: Path, *, timeout_s: float = 30.0, disk: Disk | None = None) -> None:
        self._root = root
        self._timeout_s = timeout_s
        self._disk = disk or Disk(root)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")
        # Also what nobody waits for any more, while it stands in a disk that does not answer.
        self._unfinished: set[Future[Any]] = set()
        self._closed = False
        self._unreadable: set[str] = set()
        self._log = structlog.get_logger(__name__)

    @property
    def address(self) -> str:
        return f"local:{self._disk.root}"

    async def open(self, *, read_only: bool = False) -> None:
        def find(_: _Work) -> None:
            folder = self._disk.open_folder("")
            if folder is None:
                raise no_root(self.address)
            folder.close()

        await self._run(find if read_only else lambda _: self._disk.open(), "")

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
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        paths = self._paths(exchange_name, coin_symbol, [time for time, _ in entries], interval)
        versions = None
        if expected is not None:
            versions = {path: expected.get(timestamp) for timestamp, path in paths}

        def save(work: _Work) -> int:
            written = 0
            for files in _batches(
                (path, data) for (_, path), (_, data) in zip(paths, entries, strict=True)
            ):
                work.check()
                self._disk.write(files, work.step, lock=coin_path, expected=versions)
                self._unreadable.difference_update(f"{self._disk.root}/{path}" for path in files)
                written += sum(map(len, files.values()))
            return written

        return await self._run(save, paths[0][1]) if paths else 0

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
        by_folder: dict[str, list[tuple[int, str]]] = {}
        for timestamp, path in self._paths(exchange_name, coin_symbol, timestamps, interval):
            folder_path, _, name = path.rpartition("/")
            by_folder.setdefault(folder_path, []).append((timestamp, name))

        def read(work: _Work) -> dict[int, Held]:
            found = {}
            for folder_path, asked in by_folder.items():
                folder = self._disk.open_folder(folder_path)
                if folder is None:
                    continue
                with folder:
                    for timestamp, name in asked:
                        work.step()
                        document = self._read(folder, name, timestamp, decode)
                        if document is not None:
                            content, status = document
                            found[timestamp] = Held(content, version_of(status))
            return found

        return await self._run(read, next(iter(by_folder))) if by_folder else {}

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
        last = sys.maxsize if limit is None else offset + limit

        def read(work: _Work) -> list[Any]:
            found: list[Any] = []
            with closing(self._listed(coin_path, ending, wanted, work)) as listed:
                for folder, files in listed:
                    # A page is filled past documents that cannot be read, and not beyond.
                    while files and len(found) < last:
                        most = last - len(found)
                        self._read_all(folder, files[:most], decode, found)
                        files = files[most:]  # noqa: PLW2901
                    if len(found) >= last:
                        break
            return found[offset:]

        return await self._run(read, coin_path) if last else []

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
            with closing(self._listed(coin_path, ending, None, work)) as listed:
                for folder, files in listed:
                    for timestamp, name in files:
                        document = self._read(folder, name, timestamp, decode)
                        if document is not None and document[0] is not None:
                            return document[0]
            return None

        return await self._run(read, coin_path)

    async def list_coins(self, exchange_name: str) -> list[str]:
        exchange_path = StoragePathUtility.exchange_path(exchange_name)

        def read(_: _Work) -> list[str]:
            folder = self._disk.open_folder(exchange_path)
            if folder is None:
                return []
            with folder:
                names = self._disk.folders(folder)
            coins = (StoragePathUtility.decode_name(name) for name in names)
            return sorted(coin for coin in coins if coin is not None)

        return await self._run(read, exchange_path)

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)

        def look(_: _Work) -> bool:
            folder = self._disk.open_folder(coin_path)
            if folder is not None:
                folder.close()
            return folder is not None

        return await self._run(look, coin_path)

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
            found: list[int] = []
            with closing(self._listed(coin_path, ending, wanted, work)) as listed:
                for folder, files in listed:
                    found.extend(
                        timestamp
                        for timestamp, name in files
                        if f"{folder.path}/{name}" not in self._unreadable
                    )
            return found

        return await self._run(read, coin_path)

    async def list_days(self, exchange_name: str, coin_symbol: str) -> dict[str, dict[date, int]]:
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)

        def read(work: _Work) -> dict[str, dict[date, int]]:
            found: dict[str, dict[date, int]] = {}
            for day, path in self._days(coin_path, None):
                work.step()
                folder = self._disk.open_folder(path)
                if folder is None:
                    continue
                with folder:
                    names = self._disk.names(folder)
                for interval, count in StoragePathUtility.counts_of(names, day).items():
                    found.setdefault(interval, {})[day] = count
            return found

        return await self._run(read, coin_path)

    async def read_blob(self, path: str) -> bytes | None:
        StoragePathUtility.check_blob_path(path)
        folder_path, _, name = path.rpartition("/")

        def read(_: _Work) -> bytes | None:
            folder = self._disk.open_folder(folder_path)
            if folder is None:
                return None
            with folder:
                found = self._disk.read(folder, name)
            return None if found is None else found[0]

        return await self._run(read, path)

    async def write_blob(self, path: str, content: bytes) -> None:
        StoragePathUtility.check_blob_path(path)
        await self._run(lambda work: self._disk.write({path: content}, work.step), path)

    async def check_writable(self) -> None:
        def write(_: _Work) -> None:
            self._disk.remove(self._disk.stage("", b"writable", durable=True))

        await self._run(write, "")

    async def warnings(self) -> list[str]:
        space = await self._run(lambda _: self._disk.space(), "")
        return _shortages(self._disk.root, space)

    def collector_lock(self, *, identity: str | None = None) -> ICollectorLock:  # noqa: ARG002
        # The system frees the lock of a process that is dead: there is nothing to take back.
        return FileCollectorLock(
            self._disk,
            lambda take: self._run(lambda work: take(work.check), COLLECTOR_LOCK),
            at_rest=lambda: not self._unfinished,
        )

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # What a disk that is away does not let go is swept by whoever opens the root next.
        with suppress(StorageError):
            await self._run(lambda _: self._disk.close(), "")
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
            self._unfinished.add(job)
            job.add_done_callback(self._unfinished.discard)
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
        """Errors of the system as those of storage; ``path`` is named where they name none."""
        try:
            yield
        except Replaced as exc:
            raise StaleVersion(
                f"{exc.path}: something else lies there than was expected; read it again"
            ) from exc
        except ForeignFile as exc:
            raise StorageError(f"{exc}; move it out of the storage root") from exc
        except RootGone as exc:
            raise StorageUnavailable(
                f"{self._disk.root}: the storage root is gone: mount its disk, or put it back"
            ) from exc
        except OSError as exc:
            named = isinstance(exc.filename, str) and os.path.isabs(exc.filename)  # noqa: PTH117
            where = exc.filename if named else f"{self._disk.root}/{path}".rstrip("/")
            code = exc.errno or 0
            if code in _DENIED:
                raise StorageDenied(f"{where}: {_DENIED[code]}") from exc
            if code in _PASSING:
                raise StorageUnavailable(f"{where}: {_PASSING[code]}") from exc
            what = exc.strerror or str(exc)
            advice = _LASTING.get(code, "check what lies at this path")
            raise StorageError(f"{where}: {what}; {advice}") from exc

    @staticmethod
    def _paths(
        exchange_name: str, coin_symbol: str, timestamps: Sequence[Timestamp], interval: str
    ) -> list[tuple[int, str]]:
        paths = StoragePathUtility.get_raw_data_paths(
            exchange_name, coin_symbol, timestamps, interval=interval
        )
        return list(zip(map(to_milliseconds, timestamps), paths, strict=True))

    def _read(
        self, folder: Folder, name: str, timestamp: int, decode: Decode
    ) -> tuple[Any | None, os.stat_result] | None:
        """What ``decode`` makes of a document, and its status; None when there is no document."""
        try:
            found = self._disk.read(folder, name)
        except ForeignFile:
            self._report(f"{folder.path}/{name}")
            return None
        if found is None:
            return None
        document = decode(timestamp, found[0])
        if document is None:
            self._report(f"{folder.path}/{name}")
        elif self._unreadable:
            self._unreadable.discard(f"{folder.path}/{name}")
        return document, found[1]

    def _read_all(
        self, folder: Folder, files: Sequence[tuple[int, str]], decode: Decode, found: list[Any]
    ) -> None:
        """Add what ``decode`` makes of documents; a year has a hundred thousand of them."""
        read, unreadable = self._disk.read_small, self._unreadable
        for timestamp, name in files:
            content = read(folder, name)
            document = decode(timestamp, content) if content is not None else None
            if document is None or (unreadable and f"{folder.path}/{name}" in unreadable):
                # A closer look, which also reports what cannot be read and what can be again.
                looked = self._read(folder, name, timestamp, decode)
                document = looked[0] if looked is not None else None
            if document is not None:
                found.append(document)

    def _report(self, path: str) -> None:
        if path not in self._unreadable:
            self._unreadable.add(path)
            self._log.warning("storage_document_unreadable", path=path)

    def _listed(
        self, coin_path: str, ending: str, wanted: TimeRange | None, work: _Work
    ) -> Generator[tuple[Folder, Sequence[tuple[int, str]]], None, None]:
        """Times and names of the documents of a range, ascending, each lot with its open folder.

        Without a range it is those of the whole series, descending.
        """
        for day, path in self._days(coin_path, wanted):
            work.step()
            folder = self._disk.open_folder(path)
            if folder is None:
                continue
            with folder:
                files = StoragePathUtility.times_of(self._disk.names(folder), day, ending)
                if wanted is None:
                    files.reverse()
                else:
                    files = [file for file in files if wanted.start <= file[0] < wanted.end]
                for at in range(0, len(files), _READ_AT_ONCE):
                    work.step()
                    yield folder, files[at : at + _READ_AT_ONCE]

    def _days(self, coin_path: str, wanted: TimeRange | None) -> Iterator[tuple[date, str]]:
        """Days that may have a folder, ascending within a range, or all, descending.

        A short range names its days itself. Of a longer one only folders of its years and months
        are listed, so that it costs what lies in it.
        """
        if wanted is None:
            yield from self._days_there(coin_path, date.min, date.max, newest_first=True)
            return
        if not wanted:
            return
        first, last = day_of(wanted.start), day_of(wanted.end - 1)
        if (last - first).days >= _FEW_DAYS:
            yield from self._days_there(coin_path, first, last, newest_first=False)
            return
        for number in range((last - first).days + 1):
            day = first + number * _ONE_DAY
            yield day, f"{coin_path}/{day:%Y/%m/%d}"

    def _days_there(
        self, coin_path: str, first: date, last: date, *, newest_first: bool
    ) -> Iterator[tuple[date, str]]:
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
        self, path: str, digits: int, low: int, high: int, *, newest_first: bool
    ) -> list[int]:
        """The names in a folder that are numbers of so many digits, from ``low`` to ``high``."""
        folder = self._disk.open_folder(path)
        if folder is None:
            return []
        with folder:
            names = self._disk.names(folder)
        return StoragePathUtility.numbers_of(names, digits, low, high, newest_first=newest_first)


def _batches(documents: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[dict[str, bytes]]:
    """Documents as bytes by path, so many at once that they fit into memory."""
    files: dict[str, bytes] = {}
    size = 0
    for path, data in documents:
        content = encode_document(path, data)
        if len(files) >= _MOST_DOCUMENTS_AT_ONCE or size + len(content) > _MOST_BYTES_AT_ONCE:
            yield files
            files, size = {}, 0
        files[path] = content
        size += len(content)
    if files:
        yield files


def _shortages(root: str, space: os.statvfs_result) -> list[str]:
    """What runs short on a file system, in sentences."""
    found = []
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    if free < _SHORT_BYTES or free < _SHORT_SHARE * size:
        found.append(
            f"{root}: {free / 2**30:.1f} GiB of {size / 2**30:.1f} GiB are free; free space, or "
            f"move the root to a larger disk, before documents can no longer be stored"
        )
    # File systems that make inodes as they need them say that they have none.
    inodes = space.f_files
    if inodes and (space.f_favail < _SHORT_INODES or space.f_favail < _SHORT_SHARE * inodes):
        found.append(
            f"{root}: {space.f_favail} of {inodes} inodes are free and each document takes one; "
            f"remove files, or move the root to a file system with more inodes"
        )
    return found
