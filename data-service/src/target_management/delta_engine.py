"""What a table of this service is to Delta: its files, its errors; and the schema of targets.

Everything blocks. Nothing above ``delta_table`` and ``upkeep`` knows deltalake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs
from deltalake import CommitProperties, DeltaTable, Field, PostCommitHookProperties, Schema
from deltalake.exceptions import (
    CommitFailedError,
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
    TableNotFoundError,
)
from deltalake.fs import DeltaStorageHandler
from deltalake.schema import PrimitiveType

from errors import DataServiceError
from target_management.interfaces import (
    SERVICE,
    TargetError,
    TargetSchemaMismatch,
    TargetStoreDenied,
    TargetStoreUnavailable,
)

COLUMNS: Final = {
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


def schema_of(columns: Mapping[str, str]) -> Schema:
    """A schema of columns of simple types, none of which may be null."""
    return Schema(
        [Field(name, PrimitiveType(kind), nullable=False) for name, kind in columns.items()]
    )


SCHEMA: Final = schema_of(COLUMNS)
# What other writers of the table go by: the log is ours to clear, once the audit has it.
_CONFIGURATION: Final = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.deletedFileRetentionDuration": "interval 1 days",
}
# The library's own upkeep after a commit is off: when it fails, a write that was done is told as
# failed, and it clears the log without an audit.
NO_HOOKS: Final = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_SIGNATURE: Final = re.compile(r"(sig|signature)=[^&\s\"')]+", re.IGNORECASE)
# The library has no type for it, only the answer's status and its own words.
_DENIED: Final = re.compile(
    r"\b40[13] (?:Unauthorized|Forbidden)\b|lacked the necessary privileges"
)
_LONGEST_DETAIL: Final = 300


class WriteConflict(TargetError):
    """Another process committed first; the write changed nothing and may be tried again."""


def commit(**told: Any) -> CommitProperties:
    """A commit of one try that carries what it is.

    A conflict is answered by looking again at what is there, not by committing what was meant for
    an older state.
    """
    return CommitProperties(custom_metadata=told, max_commit_retries=0)


@dataclass(frozen=True, slots=True)
class TableErrors:
    """What a table of ``what`` raises when it does not do what was asked."""

    what: str
    error: type[DataServiceError]
    unavailable: type[DataServiceError]
    denied: type[DataServiceError]
    mismatch: type[DataServiceError]
    conflict: type[DataServiceError]


TARGETS: Final = TableErrors(
    "targets",
    error=TargetError,
    unavailable=TargetStoreUnavailable,
    denied=TargetStoreDenied,
    mismatch=TargetSchemaMismatch,
    conflict=WriteConflict,
)


class DeltaEngine:
    """Opens and makes tables; tests of a cloud stand in for it."""

    def open(self, uri: str, storage_options: dict[str, str] | None) -> DeltaTable:
        """The table at ``uri`` in its newest version."""
        return DeltaTable(uri, storage_options=storage_options)

    def create(
        self,
        uri: str,
        schema: Schema,
        storage_options: dict[str, str] | None,
        *,
        partitions: Sequence[str] = (),
        configuration: Mapping[str, str | None] = _CONFIGURATION,
    ) -> None:
        """Make an empty table at ``uri`` if there is none."""
        DeltaTable.create(
            uri,
            schema,
            mode="ignore",
            partition_by=list(partitions) or None,
            configuration=configuration,
            storage_options=storage_options,
            commit_properties=commit(change="create_table", by=SERVICE),
        )

    def files(
        self,
        uri: str,
        storage_options: dict[str, str] | None,
        sizes: Mapping[str, int] | None = None,
    ) -> pyarrow.fs.FileSystem:
        """The files below ``uri``. Those whose ``sizes`` (bytes, by path) are given open without a
        request; else opening is one, and holds the interpreter for its time."""
        known = None if sizes is None else dict(sizes)
        return pyarrow.fs.PyFileSystem(DeltaStorageHandler(uri, storage_options, known))


def check_schema(table: DeltaTable, uri: str) -> None:
    """Refuse a table that is not one of targets.

    Raises:
        TargetSchemaMismatch: it has other columns, or needs another way of reading.
    """
    if difference := schema_difference(table, COLUMNS, ()):
        raise TargetSchemaMismatch(
            f"{uri} is no table of targets of this version ({difference}); "
            f"set TARGET_TABLE_PATH to another place, or move the table away"
        )


def schema_difference(
    table: DeltaTable, columns: Mapping[str, str], partitions: Sequence[str]
) -> str:
    """What tells a table from one of such columns, none of which may be null, whose rows can be
    read from its data files alone; nothing where it is one."""
    found = {field.name: field for field in table.schema().fields}
    difference = [
        *(f"{name} is missing" for name in columns if name not in found),
        *(f"{name} is unknown" for name in found if name not in columns),
    ]
    for name, kind in columns.items():
        if name not in found:
            continue
        has = found[name].type
        if not isinstance(has, PrimitiveType) or has.type != kind:
            named = has.type if isinstance(has, PrimitiveType) else type(has).__name__
            difference.append(f"{name} is {named} instead of {kind}")
        elif found[name].nullable:
            difference.append(f"{name} may be null")
    partitioned = table.metadata().partition_columns
    if partitioned != list(partitions):
        instead = f" instead of {', '.join(partitions)}" if partitions else ""
        difference.append(f"it is partitioned by {', '.join(partitioned) or 'nothing'}{instead}")
    if features := table.protocol().reader_features:
        difference.append(f"it is written with {', '.join(sorted(features))}")
    return "; ".join(difference)


def vacuum(
    table: DeltaTable,
    files: pyarrow.fs.FileSystem,
    *,
    retention_hours: int,
    least: int,
    recursive: bool = False,
) -> None:
    """Remove files that left the table so long ago, once there are ``least`` of them.

    ``files`` are those below the table, in folders of it where that is ``recursive``.
    """
    # The library names again what it removed before, for as long as the log tells of it.
    named = {path.rpartition("/")[2] for path in _vacuumed(table, retention_hours, dry_run=True)}
    if len(named) < least:
        return
    there = files.get_file_info(pyarrow.fs.FileSelector("", recursive=recursive))
    if sum(info.base_name in named for info in there) >= least:
        _vacuumed(table, retention_hours, dry_run=False)


def _vacuumed(table: DeltaTable, retention_hours: int, *, dry_run: bool) -> list[str]:
    return table.vacuum(
        retention_hours=retention_hours,
        dry_run=dry_run,
        # Tables of other writers may name a longer time.
        enforce_retention_duration=False,
        # A checkpoint forgets which files left the table, once their time is over.
        full=True,
        commit_properties=commit(change="vacuum", by=SERVICE),
        post_commithook_properties=NO_HOOKS,
    )


@contextmanager
def translated(uri: str, *, secret: bool, errors: TableErrors = TARGETS) -> Iterator[None]:
    """Errors of the library as ours.

    Where there are credentials (``secret``) they are not chained: an address in a text may carry a
    signature.
    """
    try:
        yield
    except CommitFailedError as exc:
        raise errors.conflict(f"{uri}: another process wrote first") from (None if secret else exc)
    except SchemaMismatchError as exc:
        raise errors.mismatch(f"{uri}: {detail(exc)}") from (None if secret else exc)
    except TableNotFoundError as exc:
        raise errors.unavailable(
            f"{uri}: there is no table of {errors.what}; restart the service to make one, or bring "
            f"it back"
        ) from (None if secret else exc)
    except DeltaProtocolError as exc:
        raise errors.error(f"{uri}: the table needs a newer Delta library: {detail(exc)}") from (
            None if secret else exc
        )
    except DeltaError as exc:
        raise errors.error(f"{uri}: {detail(exc)}") from (None if secret else exc)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
        raise errors.error(f"{uri}: a file of the table cannot be read: {detail(exc)}") from (
            None if secret else exc
        )
    except TimeoutError:
        raise
    except OSError as exc:
        if secret and _DENIED.search(str(exc)):
            raise errors.denied(
                f"{uri}: access is denied; check the credentials of AZURE_STORAGE_OPTIONS and what "
                f"they are allowed to: {detail(exc)}"
            ) from None
        raise errors.unavailable(
            f"{uri}: the table cannot be reached; check the path, its permissions and, on Azure, "
            f"AZURE_STORAGE_OPTIONS and the network: {detail(exc)}"
        ) from (None if secret else exc)


def detail(exc: BaseException) -> str:
    """What a library said, on one line, without colours and signatures."""
    text = " ".join(_ANSI.sub("", str(exc)).split())
    return _SIGNATURE.sub(r"\1=***", text)[:_LONGEST_DETAIL]
