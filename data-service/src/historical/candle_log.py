"""The log and the data files of the table of sealed candles. Everything blocks.

Beside ``candle_files``, nothing else in this package knows deltalake.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs
import structlog
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_columns import from_parquet, numbers, to_parquet
from historical.candle_files import (
    COLUMNS,
    CONFIGURATION,
    PARTITIONS,
    SCHEMA,
    Change,
    Files,
    SealedFile,
    actions_of,
    index_of,
    new_path,
)
from historical.durable_files import sync, write_durably
from historical.interfaces import (
    CandleTableDenied,
    CandleTableError,
    CandleTableMismatch,
    CandleTableUnavailable,
)
from target_management.delta_engine import (
    NO_HOOKS,
    DeltaEngine,
    TableErrors,
    commit,
    detail,
    schema_difference,
    translated,
    vacuum,
)
from target_management.interfaces import SERVICE

_LOG: Final = "_delta_log"
# A read ends within half a minute, and a handle of somebody's notebook within a day. It also covers
# files that no log names yet.
_RETENTION_HOURS: Final = 24
# A vacuum is two commits, a checkpoint is worth it from so many log entries on.
_LEAST_VACUUM: Final = 50
_CHECKPOINT_EVERY: Final = 10
# What is read of a cloud is kept for the next page of the same year: some years of 5m candles.
_MOST_RECENT_BYTES: Final = 32 * 2**20

log = structlog.get_logger(__name__)


class WriteConflict(CandleTableError):
    """Another process committed first; nothing was changed, and the write may be tried again."""


class FileDamaged(CandleTableError):
    """A data file is gone, or is none that can be read."""


_ERRORS: Final = TableErrors(
    "candles",
    error=CandleTableError,
    unavailable=CandleTableUnavailable,
    denied=CandleTableDenied,
    mismatch=CandleTableMismatch,
    conflict=WriteConflict,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one version of the table."""

    version: int
    series: Mapping[Series, Files]

    def files_of(self, series: Series) -> Files:
        return self.series.get(series, {})


@dataclass(frozen=True, slots=True)
class _Held:
    """A handle, what was made of its version, and what the version's log entry looked like."""

    table: DeltaTable
    snapshot: Snapshot
    stamp: tuple[int, int] | None


class _Recent:
    """The content of the files read last, which never changes, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._using = threading.Lock()

    def get(self, path: str) -> bytes | None:
        with self._using:
            content = self._contents.get(path)
            if content is not None:
                self._contents.move_to_end(path)
            return content

    def put(self, path: str, content: bytes) -> None:
        with self._using:
            self._bytes += len(content) - len(self._contents.pop(path, b""))
            self._contents[path] = content
            while self._bytes > self._most_bytes:
                _, gone = self._contents.popitem(last=False)
                self._bytes -= len(gone)


class CandleLog:
    """The log and the files of one table. Several threads may use it.

    Every method raises ``CandleTableUnavailable``, ``CandleTableMismatch`` or ``CandleTableError``.
    ``timeout_s`` is how long (s) one waits while another thread follows the log.
    """

    def __init__(
        self,
        engine: DeltaEngine,
        uri: str,
        storage_options: dict[str, str] | None,
        *,
        timeout_s: float = 30.0,
    ) -> None:
        self._engine = engine
        self._uri = uri
        self._storage_options = storage_options
        self._timeout_s = timeout_s
        self._held: _Held | None = None
        # Whether the handle has all that this process committed.
        self._sure = False
        self._using = threading.Lock()
        self._recent = _Recent(_MOST_RECENT_BYTES)

    def prepare(self) -> bool:
        """Make the table if it is missing, and check its schema; whether it was missing. Nobody
        else may write."""
        with self._translated():
            if self._storage_options is None:
                _drop_torn_entry(Path(self._uri) / _LOG)
            try:
                self._open()
            except TableNotFoundError:
                self._engine.create(
                    self._uri,
                    SCHEMA,
                    self._storage_options,
                    partitions=PARTITIONS,
                    configuration=CONFIGURATION,
                )
                self._open()
                self._sync_log()
                return True
            return False

    # -- reading ----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The newest version, whoever made it."""
        with self._translated(), self._alone():
            return self._newest().snapshot

    def read(
        self, file: SealedFile, columns: Sequence[str], wanted: TimeRange | None = None
    ) -> pa.Table:
        """Rows of a file, ascending: all of them, or those in ``wanted``.

        Raises:
            FileDamaged: it is gone, or cannot be read.
        """
        with self._translated():
            try:
                source = self._opened(file)
            except FileNotFoundError as exc:
                raise FileDamaged(f"{self._uri}/{file.path}: is gone") from exc
        try:
            with source:
                return from_parquet(source, columns, wanted)
        except (pa.ArrowException, OSError) as exc:
            raise FileDamaged(f"{self._uri}/{file.path}: cannot be read: {detail(exc)}") from exc

    def _opened(self, file: SealedFile) -> Any:
        if self._storage_options is None:
            return pa.OSFile(f"{self._uri}/{file.path}")
        content = self._recent.get(file.path)
        if content is None:
            # In one request: Parquet would ask for a column at a time.
            files = self._engine.files(self._uri, self._storage_options, {file.path: file.size})
            with files.open_input_file(file.path) as opened:
                content = opened.read()
            self._recent.put(file.path, content)
        return pa.BufferReader(content)

    # -- writing ----------------------------------------------------------------------------

    def write(self, series: Series, year: int, days: int, table: pa.Table) -> SealedFile:
        """Write a data file that no log names yet; durable when it returns.

        ``table`` has the rows of ``days`` with every column but the partitions, ascending.
        """
        path = new_path(series, year, days)
        content = to_parquet(table)
        with self._translated():
            if self._storage_options is None:
                write_durably(Path(self._uri), path, content)
            else:
                files = self._engine.files(self._uri, self._storage_options)
                # In one piece, as bytes: that is all that the handler takes.
                with files.open_output_stream(path, buffer_size=len(content) + 1) as sink:
                    sink.write(content)
        times = numbers(table, "timestamp")
        first_and_last = (int(times[0]), int(times[-1])) if len(times) else None
        return SealedFile(path, days, len(times), len(content), first_and_last)

    def known(self) -> Snapshot | None:
        """The version that was followed last, without a look; None before the first, and while it
        is open whether this process made a newer one."""
        held = self._held
        return held.snapshot if held is not None and self._sure else None

    def commit(
        self, seen: Snapshot, change: str, changes: Mapping[Series, Sequence[Change]]
    ) -> None:
        """Make changes that were decided by the version ``seen``; durable when it returns.

        Raises:
            WriteConflict: there is a newer version.
        """
        with self._translated(), self._alone():
            held = self._held
            if held is None or held.snapshot.version != seen.version:
                raise WriteConflict(f"{self._uri}: another process wrote first")
            # One that fails may have been made all the same.
            self._sure = False
            held.table.create_write_transaction(
                [
                    action
                    for series, parts in changes.items()
                    for part in parts
                    for action in actions_of(series, part)
                ],
                "append",
                SCHEMA,
                list(PARTITIONS),
                commit_properties=commit(
                    change=change, series=", ".join(map(str, changes)), by=SERVICE
                ),
                post_commithook_properties=NO_HOOKS,
            )
            if self._storage_options is None:
                log = Path(self._uri) / _LOG
                sync(log / f"{seen.version + 1:020}.json")
                sync(log)
            self._newest()

    # -- upkeep -----------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove files that left the table a day ago, and clear the log behind a checkpoint.

        Takes nothing from a reader, and may be cut off anywhere.
        """
        with self._translated():
            files = self._engine.files(self._uri, self._storage_options)
            vacuum(
                self._open(),
                files,
                retention_hours=_RETENTION_HOURS,
                least=_LEAST_VACUUM,
                recursive=True,
            )
            # After the vacuum, whose commits it covers.
            table = self._open()
            is_long = table.version() - _last_checkpoint(files) >= _CHECKPOINT_EVERY
            if is_long:
                table.create_checkpoint()
            self._sync_log()
            if is_long:
                table.cleanup_metadata()

    def _sync_log(self) -> None:
        """Make what the library wrote durable, before something is built upon it."""
        if self._storage_options is not None:
            return
        root = Path(self._uri)
        for file in (root / _LOG).iterdir():
            # Another process may clear the log.
            with suppress(FileNotFoundError):
                sync(file)
        for folder in (root / _LOG, root, root.parent):
            sync(folder)

    # -- following the log ------------------------------------------------------------------

    def _newest(self) -> _Held:
        held = self._held
        if held is not None:
            held = self._followed(held)
        if held is None:
            held = self._taken(self._open())
        self._held = held
        self._sure = True
        return held

    def _followed(self, held: _Held) -> _Held | None:
        """The handle in the table's newest version; None when it does not lead there."""
        version = held.snapshot.version
        files = self._engine.files(self._uri, self._storage_options)
        entry, following = files.get_file_info([_entry(version), _entry(version + 1)])
        # The library takes a log entry that is gone for the end of the log, and does not see that
        # another table lies there now.
        if held.stamp is None or held.stamp != _stamp(entry):
            return None
        if not following.is_file:
            return held
        try:
            held.table.update_incremental()
            _check(held.table, self._uri)
            return self._taken(held.table)
        except (DeltaError, FileNotFoundError):
            return None

    def _taken(self, table: DeltaTable) -> _Held:
        version = table.version()
        files = self._engine.files(self._uri, self._storage_options)
        stamp = _stamp(files.get_file_info(_entry(version)))
        return _Held(table, Snapshot(version, index_of(table)), stamp)

    def _open(self) -> DeltaTable:
        table = self._engine.open(self._uri, self._storage_options)
        _check(table, self._uri)
        return table

    def _alone(self) -> AbstractContextManager[None]:
        return held(self._using, self._timeout_s, f"{self._uri}: another thread follows the log")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        secret = self._storage_options is not None
        try:
            with translated(self._uri, secret=secret, errors=_ERRORS):
                yield
        except TimeoutError as exc:
            raise CandleTableUnavailable(f"{self._uri}: no answer in time") from (
                None if secret else exc
            )


@contextmanager
def held(lock: threading.Lock, timeout_s: float, why_not: str) -> Iterator[None]:
    """Hold a lock that others hold for a while.

    Raises:
        CandleTableUnavailable: they held it for ``timeout_s``; ``why_not`` says who does.
    """
    if not lock.acquire(timeout=timeout_s):
        raise CandleTableUnavailable(f"{why_not} for {timeout_s:g} s")
    try:
        yield
    finally:
        lock.release()


def _check(table: DeltaTable, uri: str) -> None:
    """Refuse a table that is not one of sealed candles.

    Raises:
        CandleTableMismatch: it has other columns, or needs another way of reading.
    """
    if difference := schema_difference(table, COLUMNS, PARTITIONS):
        raise CandleTableMismatch(
            f"{uri} is no table of candles of this version ({difference}); move it away"
        )


def _drop_torn_entry(log_folder: Path) -> None:
    """Remove the newest log entry where it was not written whole when the power failed: nobody was
    told that it was made, and the library opens no table that ends with one."""
    newest = max(log_folder.glob(f"{'[0-9]' * 20}.json"), default=None)
    if newest is None:
        return
    try:
        lines = newest.read_bytes().splitlines()
        torn = not [json.loads(line) for line in lines]
    except ValueError:
        torn = True
    if torn:
        newest.unlink()
        sync(log_folder)
        log.warning("candle_log_entry_torn", path=str(newest))


def _last_checkpoint(files: pyarrow.fs.FileSystem) -> int:
    """The version of the last checkpoint, 0 when there is none."""
    try:
        with files.open_input_file(f"{_LOG}/_last_checkpoint") as file:
            version: int = json.loads(file.read())["version"]
    except FileNotFoundError:
        return 0
    return version


def _entry(version: int) -> str:
    return f"{_LOG}/{version:020}.json"


def _stamp(info: pyarrow.fs.FileInfo) -> tuple[int, int] | None:
    return (info.size, info.mtime_ns) if info.is_file else None
