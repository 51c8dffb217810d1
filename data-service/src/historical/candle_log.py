"""What the table of sealed candles is to Delta: its schema, its log, its files. Everything blocks.

Nothing else in this package knows deltalake.

The log says of each data file which series, year and days it is of: the days stand in its name
(``{days}-{id}.parquet``, days as the hexadecimal bits of ``sealed_days``), so that they come and go
with its rows in one commit. A file of another name is of no day.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs
from deltalake import DeltaTable, Field, Schema
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
    TableNotFoundError,
)
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction

from domain.interval import KNOWN_INTERVALS, Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_columns import from_parquet, numbers, to_parquet
from historical.interfaces import CandleTableError, CandleTableMismatch, CandleTableUnavailable
from historical.sealed_days import MOST_DAYS
from target_management.delta_engine import NO_HOOKS, DeltaEngine, commit, detail

PARTITIONS: Final = ("exchange", "coin", "interval", "year")
COLUMNS: Final = {
    "exchange": "string",
    "coin": "string",
    "interval": "string",
    "year": "integer",
    "timestamp": "long",
    "open": "double",
    "high": "double",
    "low": "double",
    "close": "double",
    "volume": "double",
    "market": "string",
    "revision": "integer",
    "source": "string",
}
_SCHEMA: Final = Schema(
    [Field(name, PrimitiveType(kind), nullable=False) for name, kind in COLUMNS.items()]
)
# The log is cleared when upkeep asks for it, and never by other writers.
_CONFIGURATION: Final = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 1 days",
    "delta.deletedFileRetentionDuration": "interval 1 days",
}
_NAME: Final = re.compile(rf"([0-9a-f]{{1,{-(-MOST_DAYS // 4)}}})-[0-9a-f]{{32}}\.parquet")
_LOG: Final = "_delta_log"
# A read ends within half a minute, and a handle of somebody's notebook within a day. It also covers
# files that no log names yet.
_RETENTION_HOURS: Final = 24
# A vacuum is two commits, a checkpoint is worth it from so many log entries on.
_LEAST_VACUUM: Final = 50
_CHECKPOINT_EVERY: Final = 10


class WriteConflict(CandleTableError):
    """Another process committed first; nothing was changed, and the write may be tried again."""


class FileDamaged(CandleTableError):
    """A data file is gone, or is none that can be read."""


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A data file of one series and year.

    Attributes:
        path: where it is, below the table.
        days: the bits of the days that it has all the candles of; each row is of one of them.
        rows: how many candles it has.
        size: its bytes.
        times: the opens (ms) of its first and last candle, or None where it has none.
    """

    path: str
    days: int
    rows: int
    size: int
    times: tuple[int, int] | None


Files = Mapping[int, tuple[SealedFile, ...]]
"""The files of a series, by year ascending."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one version of the table."""

    version: int
    series: Mapping[Series, Files]

    def files_of(self, series: Series) -> Files:
        return self.series.get(series, {})


@dataclass(frozen=True, slots=True)
class Change:
    """The files of one series and year that leave, and the one that takes their place."""

    year: int
    removed: tuple[SealedFile, ...]
    added: SealedFile | None


@dataclass(frozen=True, slots=True)
class _Held:
    """A handle, what was made of its version, and what the version's log entry looked like."""

    table: DeltaTable
    snapshot: Snapshot
    stamp: tuple[int, int] | None


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
        self._using = threading.Lock()

    def prepare(self) -> None:
        """Make the table if it is missing, and check its schema."""
        with self._translated():
            try:
                self._open()
            except TableNotFoundError:
                DeltaTable.create(
                    self._uri,
                    _SCHEMA,
                    mode="ignore",
                    partition_by=list(PARTITIONS),
                    configuration=_CONFIGURATION,
                    storage_options=self._storage_options,
                    commit_properties=commit(change="create_table"),
                )
                self._open()

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
        # In one request: Parquet would ask for a column at a time.
        files = self._engine.files(self._uri, self._storage_options, {file.path: file.size})
        with files.open_input_file(file.path) as opened:
            return pa.BufferReader(opened.read())

    # -- writing ----------------------------------------------------------------------------

    def write(self, series: Series, year: int, days: int, table: pa.Table) -> SealedFile:
        """Write a data file that no log names yet; durable when it returns.

        ``table`` has the rows of ``days`` with every column but the partitions, ascending.
        """
        # As Delta's own writer names them: some engines read the values from there.
        folder = "/".join(
            f"{name}={quote(value, safe='')}" for name, value in _partition(series, year).items()
        )
        path = f"{folder}/{days:x}-{uuid4().hex}.parquet"
        content = to_parquet(table)
        with self._translated():
            if self._storage_options is None:
                _write_durably(Path(self._uri), path, content)
            else:
                files = self._engine.files(self._uri, self._storage_options)
                # In one piece, as bytes: that is all that the handler takes.
                with files.open_output_stream(path, buffer_size=len(content) + 1) as sink:
                    sink.write(content)
        times = numbers(table, "timestamp")
        first_and_last = (int(times[0]), int(times[-1])) if len(times) else None
        return SealedFile(path, days, len(times), len(content), first_and_last)

    def commit(
        self, seen: Snapshot, series: Series, change: str, changes: Sequence[Change]
    ) -> None:
        """Make changes that were decided by the version ``seen``; durable when it returns.

        Raises:
            WriteConflict: there is a newer version.
        """
        with self._translated(), self._alone():
            held = self._held
            if held is None or held.snapshot.version != seen.version:
                raise WriteConflict(f"{self._uri}: another process wrote first")
            held.table.create_write_transaction(
                [action for part in changes for action in _actions(series, part)],
                "append",
                _SCHEMA,
                list(PARTITIONS),
                commit_properties=commit(change=change, series=str(series)),
                post_commithook_properties=NO_HOOKS,
            )
            if self._storage_options is None:
                log = Path(self._uri) / _LOG
                _sync(log / f"{seen.version + 1:020}.json")
                _sync(log)

    # -- upkeep -----------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove files that left the table a day ago, and clear the log behind a checkpoint.

        Takes nothing from a reader, and may be cut off anywhere.
        """
        with self._translated():
            table = self._open()
            # The library names again what it removed before, for as long as the log tells of it.
            named = {path.rpartition("/")[2] for path in _vacuumed(table, dry_run=True)}
            if len(named) >= _LEAST_VACUUM and self._count(named) >= _LEAST_VACUUM:
                _vacuumed(table, dry_run=False)
                table = self._open()
            if self._entries_since_checkpoint(table.version()) >= _CHECKPOINT_EVERY:
                table.create_checkpoint()
                table.cleanup_metadata()

    def _count(self, names: set[str]) -> int:
        """How many files of these names there are."""
        files = self._engine.files(self._uri, self._storage_options)
        there = files.get_file_info(pyarrow.fs.FileSelector("", recursive=True))
        return sum(info.base_name in names for info in there)

    def _entries_since_checkpoint(self, version: int) -> int:
        files = self._engine.files(self._uri, self._storage_options)
        try:
            with files.open_input_file(f"{_LOG}/_last_checkpoint") as file:
                last: int = json.loads(file.read())["version"]
        except FileNotFoundError:
            return version
        return version - last

    # -- following the log ------------------------------------------------------------------

    def _newest(self) -> _Held:
        held = self._held
        if held is not None:
            held = self._followed(held)
        if held is None:
            held = self._taken(self._open())
        self._held = held
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
        return _Held(table, Snapshot(version, _index(table)), stamp)

    def _open(self) -> DeltaTable:
        table = self._engine.open(self._uri, self._storage_options)
        _check(table, self._uri)
        return table

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._using.acquire(timeout=self._timeout_s):
            raise CandleTableUnavailable(
                f"{self._uri}: another thread follows the log for {self._timeout_s:g} s"
            )
        try:
            yield
        finally:
            self._using.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the library as ours; those with credentials are not chained."""
        secret = self._storage_options is not None
        try:
            yield
        except CommitFailedError as exc:
            raise WriteConflict(f"{self._uri}: another process wrote first") from (
                None if secret else exc
            )
        except SchemaMismatchError as exc:
            raise CandleTableMismatch(f"{self._uri}: {detail(exc)}") from (None if secret else exc)
        except DeltaProtocolError as exc:
            raise CandleTableError(
                f"{self._uri}: the table needs a newer Delta library: {detail(exc)}"
            ) from (None if secret else exc)
        except TableNotFoundError as exc:
            raise CandleTableUnavailable(
                f"{self._uri}: there is no table of candles; restart the service to make one, or "
                f"bring it back"
            ) from (None if secret else exc)
        except DeltaError as exc:
            raise CandleTableError(f"{self._uri}: {detail(exc)}") from (None if secret else exc)
        except OSError as exc:
            raise CandleTableUnavailable(
                f"{self._uri}: the table cannot be reached; check the path, its permissions and, "
                f"on Azure, AZURE_STORAGE_OPTIONS and the network: {detail(exc)}"
            ) from (None if secret else exc)


def _check(table: DeltaTable, uri: str) -> None:
    """Refuse a table that is not one of sealed candles.

    Raises:
        CandleTableMismatch: it has other columns, or needs another way of reading.
    """
    found = {field.name: field for field in table.schema().fields}
    difference = [
        *(f"{name} is missing" for name in COLUMNS if name not in found),
        *(f"{name} is unknown" for name in found if name not in COLUMNS),
    ]
    for name, kind in COLUMNS.items():
        field = found.get(name)
        if field is None:
            continue
        has = getattr(field.type, "type", str(field.type))
        if has != kind:
            difference.append(f"{name} is {has} instead of {kind}")
        elif field.nullable:
            difference.append(f"{name} may be null")
    partitioned = table.metadata().partition_columns
    if partitioned != list(PARTITIONS):
        difference.append(
            f"it is partitioned by {', '.join(partitioned) or 'nothing'} instead of "
            f"{', '.join(PARTITIONS)}"
        )
    # Rows are read from the data files alone.
    if features := table.protocol().reader_features:
        difference.append(f"it is written with {', '.join(sorted(features))}")
    if difference:
        raise CandleTableMismatch(
            f"{uri} is no table of candles of this version ({'; '.join(difference)}); move it away"
        )


def _index(table: DeltaTable) -> dict[Series, dict[int, tuple[SealedFile, ...]]]:
    """The files of a handle's version."""
    # Not by ``pa.table``, which loads pandas.
    actions = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    # A statistic that no file has is no column.
    there = set(actions.column_names)
    names = (
        *(f"partition.{name}" for name in PARTITIONS),
        *("path", "num_records", "size_bytes", "min.timestamp", "max.timestamp"),
    )
    columns = (
        actions[name].to_pylist() if name in there else repeat(None, actions.num_rows)
        for name in names
    )
    index: dict[Series, dict[int, list[SealedFile]]] = {}
    for exchange, coin, interval, year, path, rows, size, first, last in zip(*columns, strict=True):
        if interval not in KNOWN_INTERVALS:
            continue
        name = _NAME.fullmatch(path.rpartition("/")[2])
        # The log has paths as addresses.
        file = SealedFile(
            path=unquote(path),
            days=int(name[1], 16) if name is not None else 0,
            rows=rows or 0,
            size=size,
            times=None if first is None else (first, last),
        )
        years = index.setdefault(Series(exchange, coin, Interval.parse(interval)), {})
        years.setdefault(year, []).append(file)
    return {
        series: {year: tuple(years[year]) for year in sorted(years)}
        for series, years in index.items()
    }


def _partition(series: Series, year: int) -> dict[str, str]:
    values = (series.exchange, series.coin, series.interval.name, str(year))
    return dict(zip(PARTITIONS, values, strict=True))


def _actions(series: Series, change: Change) -> Iterator[AddAction | RemoveAction]:
    now = time.time_ns() // 1_000_000
    values = _partition(series, change.year)
    for file in change.removed:
        yield RemoveAction(
            file.path,
            data_change=True,
            deletion_timestamp=now,
            size=file.size,
            partition_values={**values},
        )
    if change.added is None:
        return
    statistics: dict[str, Any] = {
        "numRecords": change.added.rows,
        "nullCount": {name: 0 for name in COLUMNS if name not in PARTITIONS},
    }
    if change.added.times is not None:
        first, last = change.added.times
        statistics |= {"minValues": {"timestamp": first}, "maxValues": {"timestamp": last}}
    yield AddAction(
        change.added.path,
        change.added.size,
        values,
        modification_time=now,
        data_change=True,
        stats=json.dumps(statistics),
    )


def _vacuumed(table: DeltaTable, *, dry_run: bool) -> list[str]:
    return table.vacuum(
        retention_hours=_RETENTION_HOURS,
        dry_run=dry_run,
        # Tables of other writers may name a longer time.
        enforce_retention_duration=False,
        # Files that a killed process wrote are in no log.
        full=True,
        commit_properties=commit(change="vacuum"),
        post_commithook_properties=NO_HOOKS,
    )


def _entry(version: int) -> str:
    return f"{_LOG}/{version:020}.json"


def _stamp(info: pyarrow.fs.FileInfo) -> tuple[int, int] | None:
    return (info.size, info.mtime_ns) if info.is_file else None


def _write_durably(root: Path, path: str, content: bytes) -> None:
    target = root / path
    made = []
    folder = target.parent
    while not folder.is_dir():
        made.append(folder)
        folder = folder.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for folder in (target.parent, *(folder.parent for folder in made)):
        _sync(folder)


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
