"""What keeps the table as fast after a thousand changes as after ten. Everything blocks."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import suppress
from typing import Any, Final

import pyarrow.fs
from deltalake import DeltaTable

from target_management.audit import IAudit
from target_management.delta_engine import (
    NO_HOOKS,
    DeltaEngine,
    commit,
    translated,
    vacuum,
)
from target_management.interfaces import SERVICE, TargetError

# A checkpoint and, if there is need, a merging of small files come every so many commits.
# Opening costs by the log entries since the last checkpoint, reading and merging by the file.
_EVERY: Final = 10
_MOST_FILES: Final = 10
# Vacuum and the clearing of the log come every so many commits; the log is cleared in blocks of it.
_BLOCK: Final = 100
# 1,000 changes, and the commits of upkeep among them, however often the table is opened: files
# are merged for ten changes at the earliest, and a vacuum, which is two commits, removes the files
# of fifty.
_KEPT_COMMITS: Final = 1_150
_LEAST_VACUUM: Final = 50
# A read of the service ends within half a minute, and a handle of somebody's notebook within a
# day. It also covers a writer whose files no log names yet.
_RETENTION_HOURS: Final = 24
_LOG: Final = "_delta_log"
_LOG_FILE: Final = re.compile(r"(\d{20})\.(.+)")
# Listing and deleting hold the interpreter for the time of a request.
_IMPATIENT: Final = {"max_retries": "0", "timeout": "2s"}
# What is long and can be computed from the table.
_NOT_KEPT: Final = ("operationMetrics", "operationParameters")


class Upkeep:
    """Checkpoints, merges small files, removes what nobody reads, and moves old history away.

    Each step leaves a sound table, whoever else writes, and may be cut off anywhere. No step takes
    anything from a reader: a file that left the table stays for 24 hours.

    Methods raise as those of ``TargetTable`` do; after a ``WriteConflict`` the rest is left to the
    next time.
    """

    def __init__(
        self,
        engine: DeltaEngine,
        uri: str,
        storage_options: dict[str, str] | None,
        audit: IAudit,
    ) -> None:
        self._engine = engine
        self._uri = uri
        self._storage_options = storage_options
        self._audit = audit

    @staticmethod
    def due(version: int) -> bool:
        """Whether something is to be done after the commit of that version."""
        return version % _EVERY == 0

    def after(self, version: int) -> None:
        """Do what is due after the commit of ``version``."""
        self._do(tidy=version % _BLOCK == 0)

    def at_start(self) -> None:
        """Do whatever is to be done, for the case that nobody could when it was due."""
        self._do(tidy=True)

    def _do(self, *, tidy: bool) -> None:
        with translated(self._uri, secret=self._storage_options is not None):
            table = self._engine.open(self._uri, self._storage_options)
            if len(table.file_uris()) > _MOST_FILES:
                table.optimize.compact(
                    commit_properties=commit(change="merge_files", by=SERVICE),
                    post_commithook_properties=NO_HOOKS,
                )
            if tidy:
                files = self._engine.files(self._uri, self._storage_options)
                vacuum(table, files, retention_hours=_RETENTION_HOURS, least=_LEAST_VACUUM)
            # After the vacuum, whose commits it covers.
            if table.version() >= _EVERY:
                table.create_checkpoint()
            if tidy and table.version() > _KEPT_COMMITS:
                self._clear_log(table)

    def _clear_log(self, table: DeltaTable) -> None:
        """Move log entries before those to keep into the audit; the checkpoint covers them."""
        keep_from = (table.version() - _KEPT_COMMITS) // _BLOCK * _BLOCK
        options = self._storage_options
        options = None if options is None else {**options, **_IMPATIENT}
        files = self._engine.files(self._uri, options)
        blocks: dict[int, dict[str, int]] = defaultdict(dict)
        for info in files.get_file_info(pyarrow.fs.FileSelector(_LOG)):
            name = _LOG_FILE.fullmatch(info.base_name)
            if name is not None and (version := int(name[1])) < keep_from:
                blocks[version // _BLOCK * _BLOCK][f"{_LOG}/{info.base_name}"] = info.size
        table_id = str(table.metadata().id)
        for block, sizes in sorted(blocks.items()):
            sized = self._engine.files(self._uri, options, sizes)
            entries = {
                int(path.rpartition("/")[2][:20]): _entry(sized, path)
                for path in sorted(sizes)
                if re.fullmatch(rf"{_LOG}/\d{{20}}\.json", path)
            }
            if entries:
                self._audit.keep(table_id, block, entries)
            # In order, so that what a killed process leaves is still a log without a hole.
            for path in sorted(sizes):
                # Another process may clear the log as well, and be faster.
                with suppress(FileNotFoundError):
                    files.delete_file(path)


def _entry(files: pyarrow.fs.FileSystem, path: str) -> dict[str, Any]:
    """What a log entry tells of its commit."""
    with files.open_input_file(path) as file:
        content = file.read()
    try:
        actions = [json.loads(line) for line in content.splitlines()]
        told: dict[str, Any] = next(
            (action["commitInfo"] for action in actions if "commitInfo" in action), {}
        )
        return {name: value for name, value in told.items() if name not in _NOT_KEPT}
    except (ValueError, TypeError, AttributeError) as exc:
        raise TargetError(f"{path}: this is no log entry") from exc
