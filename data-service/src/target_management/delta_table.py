"""The rows of the table of targets: writes to its newest version, reads from a kept snapshot.

Everything blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from arro3.core import Array, Table
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from target_management.delta_engine import (
    COLUMNS,
    NO_HOOKS,
    SCHEMA,
    DeltaEngine,
    check_schema,
    commit,
    translated,
)
from target_management.interfaces import Target

_FIELDS: Final = [name for name in COLUMNS if name != "target_id"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Who changes the table, and when (ms since the epoch); told in its history."""

    by: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The rows of one version, by id in order, and the handle that has it.

    ``stamp`` is size (bytes) and change time (ns) of the log entry the version ends with.
    """

    table: DeltaTable
    version: int
    stamp: tuple[int | None, int | None]
    rows: dict[str, Target]


class TargetTable:
    """The rows of one table.

    Every method raises ``TargetStoreUnavailable``, ``TargetSchemaMismatch`` or ``TargetError``;
    those that write also ``WriteConflict``, when another writer was faster. A write looks at the
    newest version; it returns its answer and the version it made, None when it changed nothing.

    Several threads may use it. Readers share a snapshot, which follows the table by its log;
    ``timeout_s`` is how long (s) one waits while another brings it up to date.
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
        # The rows of each data file of the newest version seen. A data file never changes.
        self._files: dict[str, list[Target]] = {}
        self._snapshot: _Snapshot | None = None
        self._reading = threading.Lock()

    def prepare(self) -> None:
        """Make the table if it is missing, and check its schema."""
        with self._translated():
            try:
                self._open()
            except TableNotFoundError:
                self._engine.create(self._uri, SCHEMA, self._storage_options)
                self._open()

    def add(self, target: Target, origin: Origin) -> tuple[bool, int | None]:
        """Insert a row unless one of its id is there; whether it was inserted."""
        row = {name: getattr(target, name) for name in COLUMNS}
        with self._translated():
            table = self._open()
            metrics = (
                table.merge(
                    _table_of(row),
                    "target.target_id = source.target_id",
                    source_alias="source",
                    target_alias="target",
                    commit_properties=_change("add_target", target.target_id, origin, row),
                    post_commithook_properties=NO_HOOKS,
                )
                .when_not_matched_insert_all()
                .execute()
            )
        added = bool(metrics["num_target_rows_inserted"])
        return added, table.version() if added else None

    def update(
        self, target_id: str, changes: Mapping[str, Any], origin: Origin
    ) -> tuple[Target | None, int | None]:
        """Change fields of a row; the row as it is then, or None when there is none."""
        with self._translated():
            table = self._open()
            held = self._rows(table).get(target_id)
            if held is None or all(getattr(held, field) == new for field, new in changes.items()):
                return held, None
            values = {**changes, "last_updated": origin.at_ms}
            table.update(
                updates={field: _literal(new) for field, new in values.items()},
                predicate=_is(target_id),
                commit_properties=_change("update_target", target_id, origin, changes),
                post_commithook_properties=NO_HOOKS,
            )
        return replace(held, **values), table.version()

    def delete(self, target_id: str, origin: Origin) -> tuple[bool, int | None]:
        """Remove a row; whether it was there."""
        with self._translated():
            table = self._open()
            if target_id not in self._rows(table):
                return False, None
            table.delete(
                _is(target_id),
                commit_properties=_change("delete_target", target_id, origin, {}),
                post_commithook_properties=NO_HOOKS,
            )
        return True, table.version()

    def rows(self) -> dict[str, Target]:
        """Every row by ``target_id``, in its order; not to be changed."""
        with self._translated(), self._one_reader():
            snapshot = self._followed(self._snapshot) if self._snapshot else None
            if snapshot is None:
                table = self._open()
                snapshot = self._taken(table)
            self._snapshot = snapshot
        return snapshot.rows

    def _followed(self, snapshot: _Snapshot) -> _Snapshot | None:
        """The snapshot in the table's newest version; None when it does not lead there."""
        # The library takes a log entry that is gone for the end of the log, and does not see that
        # another table lies there now.
        if self._stamp(snapshot.version) != snapshot.stamp or None in snapshot.stamp:
            return None
        try:
            snapshot.table.update_incremental()
            if snapshot.table.version() == snapshot.version:
                return snapshot
            check_schema(snapshot.table, self._uri)
            return self._taken(snapshot.table)
        except (DeltaError, FileNotFoundError):
            return None

    def _taken(self, table: DeltaTable) -> _Snapshot:
        version = table.version()
        return _Snapshot(table, version, self._stamp(version), self._rows(table))

    def _stamp(self, version: int) -> tuple[int | None, int | None]:
        files = self._engine.files(self._uri, self._storage_options)
        info = files.get_file_info(f"_delta_log/{version:020}.json")
        return (info.size, info.mtime_ns) if info.is_file else (None, None)

    def _rows(self, table: DeltaTable) -> dict[str, Target]:
        """The rows of a handle's version, read from the files that were not read before.

        Not by the library's queries, which hold the interpreter while they wait for the storage,
        nor by its Arrow tables, which may abort the interpreter when it ends.
        """
        held = self._files
        # Not by ``pa.table``, which loads pandas.
        actions = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
        sizes = dict(
            zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
        )
        if not sizes.keys() <= held.keys():
            files = self._engine.files(self._uri, self._storage_options, sizes)
            held = {path: held.get(path) or _read(files, path) for path in sizes}
            self._files = held
        rows = [row for path in sizes for row in held[path]]
        return {row.target_id: row for row in sorted(rows, key=lambda row: row.target_id)}

    def _open(self) -> DeltaTable:
        table = self._engine.open(self._uri, self._storage_options)
        check_schema(table, self._uri)
        return table

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self._uri, secret=self._storage_options is not None)

    @contextmanager
    def _one_reader(self) -> Iterator[None]:
        if not self._reading.acquire(timeout=self._timeout_s):
            raise TimeoutError(f"another reader of {self._uri} waits for {self._timeout_s:g} s")
        try:
            yield
        finally:
            self._reading.release()


def _read(files: pyarrow.fs.FileSystem, path: str) -> list[Target]:
    with files.open_input_file(path) as file:
        content = file.read()
    table = pq.ParquetFile(pa.BufferReader(content)).read(columns=_FIELDS, use_threads=False)
    return [Target(**row) for row in table.to_pylist()]


def _table_of(row: Mapping[str, Any]) -> Table:
    """One row as the library takes it. Not by pyarrow, which loads pandas for values of Python."""
    schema = SCHEMA.to_arrow()
    columns = [Array([row[name]], schema.field(name).type) for name in COLUMNS]
    return Table.from_arrays(columns, schema=schema)


def _change(change: str, target_id: str, origin: Origin, values: Mapping[str, Any]) -> Any:
    """What the history tells of a commit."""
    return commit(
        change=change, target_id=target_id, by=origin.by, at=origin.at_ms, values=dict(values)
    )


def _is(target_id: str) -> str:
    return f"target_id = {_literal(target_id)}"


def _literal(value: object) -> str:
    """A value in SQL. Not left to the library: it does not escape quotes."""
    if isinstance(value, str):
        quoted = value.replace("'", "''")
        return f"'{quoted}'"
    return str(value)
