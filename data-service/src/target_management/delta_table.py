"""The table of targets as Delta keeps it: its schema, its rows, its errors. Everything blocks.

Nothing above this module knows deltalake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, QueryBuilder, Schema
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
    TableNotFoundError,
)
from deltalake.schema import PrimitiveType

from target_management.interfaces import (
    Target,
    TargetError,
    TargetSchemaMismatch,
    TargetStoreUnavailable,
)

_COLUMNS: Final = {
    "target_id": "string",
    "coin": "string",
    "exchange": "string",
    "exchange_id": "string",
    "market": "string",
    "interval": "string",
    "enabled": "boolean",
    "since": "long",
    "created_at": "long",
    "last_updated": "long",
}
_ARROW_TYPES: Final = {"string": pa.string(), "boolean": pa.bool_(), "long": pa.int64()}
_SCHEMA: Final = Schema(
    [Field(name, PrimitiveType(kind), nullable=False) for name, kind in _COLUMNS.items()]
)
_ARROW_SCHEMA: Final = pa.schema(
    [pa.field(name, _ARROW_TYPES[kind], nullable=False) for name, kind in _COLUMNS.items()]
)
# A conflict is answered by looking again at what is there, not by committing what was meant for
# an older state.
_ONE_TRY: Final = CommitProperties(max_commit_retries=0)
# Every commit leaves a small file, and reading costs by the file.
_MOST_FILES: Final = 32
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_SIGNATURE: Final = re.compile(r"(sig|signature)=[^&\s\"')]+", re.IGNORECASE)
_LONGEST_DETAIL: Final = 300


class WriteConflict(TargetError):
    """Another process committed first; the write changed nothing and may be tried again."""


class DeltaEngine:
    """Opens and makes tables; tests of a cloud stand in for it."""

    def open(self, uri: str, storage_options: dict[str, str] | None) -> DeltaTable:
        """The table at ``uri`` in its newest version."""
        return DeltaTable(uri, storage_options=storage_options)

    def create(self, uri: str, schema: Schema, storage_options: dict[str, str] | None) -> None:
        """Make an empty table at ``uri`` if there is none."""
        DeltaTable.create(uri, schema, mode="ignore", storage_options=storage_options)


class TargetTable:
    """The rows of one table, opened anew for each operation.

    Every method raises ``TargetStoreUnavailable``, ``TargetSchemaMismatch`` or ``TargetError``;
    those that write raise ``WriteConflict`` when another writer was faster.
    """

    def __init__(self, engine: DeltaEngine, uri: str, storage_options: dict[str, str]) -> None:
        self._engine = engine
        self._uri = uri
        self._storage_options = storage_options or None

    def prepare(self) -> None:
        """Make the table if it is missing, check its schema, and merge its small files."""
        with self._translated():
            try:
                table = self._open()
            except TableNotFoundError:
                self._engine.create(self._uri, _SCHEMA, self._storage_options)
                table = self._open()
            if len(table.file_uris()) > _MOST_FILES:
                table.optimize.compact(commit_properties=_ONE_TRY)

    def add(self, target: Target) -> bool:
        """Insert a row unless one of its id is there; whether it was inserted."""
        row = {name: [getattr(target, name)] for name in _COLUMNS}
        with self._translated():
            metrics = (
                self._open()
                .merge(
                    pa.table(row, schema=_ARROW_SCHEMA),
                    "target.target_id = source.target_id",
                    source_alias="source",
                    target_alias="target",
                    commit_properties=_ONE_TRY,
                )
                .when_not_matched_insert_all()
                .execute()
            )
        return bool(metrics["num_target_rows_inserted"])

    def update(self, target_id: str, changes: Mapping[str, Any], now_ms: int) -> Target | None:
        """Change fields of a row; the row as it is then, or None when there is none."""
        with self._translated():
            table = self._open()
            held = _rows(table, target_id)
            if held and any(getattr(held[0], field) != new for field, new in changes.items()):
                values = {**changes, "last_updated": now_ms}
                table.update(
                    updates={field: _literal(new) for field, new in values.items()},
                    predicate=_is(target_id),
                    commit_properties=_ONE_TRY,
                )
                held = _rows(table, target_id)
        return held[0] if held else None

    def delete(self, target_id: str) -> bool:
        """Remove a row; whether it was there."""
        with self._translated():
            table = self._open()
            if not _rows(table, target_id):
                return False
            table.delete(_is(target_id), commit_properties=_ONE_TRY)
        return True

    def rows(self, target_id: str | None = None) -> list[Target]:
        """Every row, or those of one id, by ``target_id``."""
        with self._translated():
            return _rows(self._open(), target_id)

    def _open(self) -> DeltaTable:
        table = self._engine.open(self._uri, self._storage_options)
        found = {
            field.name: field.type.type if isinstance(field.type, PrimitiveType) else "nested"
            for field in table.schema().fields
        }
        difference = [
            *(f"{name} is missing" for name in _COLUMNS if name not in found),
            *(f"{name} is unknown" for name in found if name not in _COLUMNS),
            *(
                f"{name} is {found[name]} instead of {kind}"
                for name, kind in _COLUMNS.items()
                if found.get(name, kind) != kind
            ),
        ]
        if difference:
            raise TargetSchemaMismatch(
                f"{self._uri} is no table of targets of this version ({'; '.join(difference)}); "
                f"set TARGET_TABLE_PATH to another place, or move the table away"
            )
        return table

    @contextmanager
    def _translated(self) -> Iterator[None]:
        # Not chained where there are credentials: an address in a text may carry a signature.
        hidden = self._storage_options is not None
        try:
            yield
        except CommitFailedError as exc:
            raise WriteConflict(f"{self._uri}: another process wrote first") from exc
        except SchemaMismatchError as exc:
            raise TargetSchemaMismatch(f"{self._uri}: {_detail(exc)}") from exc
        except TableNotFoundError as exc:
            raise TargetStoreUnavailable(
                f"{self._uri}: there is no table of targets; restart the service to make one, or "
                f"bring it back"
            ) from (None if hidden else exc)
        except DeltaProtocolError as exc:
            raise TargetError(
                f"{self._uri}: the table needs a newer Delta library: {_detail(exc)}"
            ) from exc
        except DeltaError as exc:
            raise TargetError(f"{self._uri}: {_detail(exc)}") from (None if hidden else exc)
        except OSError as exc:
            raise TargetStoreUnavailable(
                f"{self._uri}: the table cannot be reached; check the path, its permissions and, "
                f"on Azure, AZURE_STORAGE_OPTIONS and the network: {_detail(exc)}"
            ) from (None if hidden else exc)


def _rows(table: DeltaTable, target_id: str | None = None) -> list[Target]:
    # A query engine reads: DeltaTable.to_pyarrow_table may abort the interpreter when it exits.
    where = "" if target_id is None else f" WHERE {_is(target_id)}"
    # Quoted, since ``interval`` is a word of SQL.
    columns = ", ".join(f'"{name}"' for name in _COLUMNS)
    query = f"SELECT {columns} FROM targets{where} ORDER BY target_id"  # noqa: S608  the id is quoted
    answer = QueryBuilder().register("targets", table).execute(query).read_all()
    return [
        Target(**{name: value for name, value in row.items() if name != "target_id"})
        for row in pa.table(answer).to_pylist()
    ]


def _is(target_id: str) -> str:
    return f"target_id = {_literal(target_id)}"


def _literal(value: object) -> str:
    """A value in SQL. Not left to the library: it does not escape quotes."""
    if isinstance(value, str):
        quoted = value.replace("'", "''")
        return f"'{quoted}'"
    return str(value)


def _detail(exc: BaseException) -> str:
    """What a library said, on one line, without colours and signatures."""
    text = " ".join(_ANSI.sub("", str(exc)).split())
    return _SIGNATURE.sub(r"\1=***", text)[:_LONGEST_DETAIL]
