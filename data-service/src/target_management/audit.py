"""Where the history of the table goes when its log is cleared. Everything blocks."""

from __future__ import annotations

import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.fs

from target_management.file_lock import file_lock

NAME: Final = "targets_audit.jsonl"


class IAudit(ABC):
    """Keeps log entries of tables for good, as JSON lines ``{"table", "version", ...}``."""

    @abstractmethod
    def keep(self, table_id: str, block: int, entries: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep the entries of a table, by version in order, durably; what is kept already stays.

        They come in blocks of fixed limits in the order of the log, ``block`` being the version a
        block begins at. A block that was kept in part before is kept whole then.

        Raises:
            OSError: they are not kept; TimeoutError, which is one, when somebody else keeps on
                writing.
        """


class AuditFile(IAudit):
    """A file that lines are appended to; several processes and tables may share it."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def keep(
        self,
        table_id: str,
        block: int,  # noqa: ARG002  lines follow each other without limits
        entries: Mapping[int, Mapping[str, Any]],
    ) -> None:
        with file_lock(self._path, self._timeout_s), self._path.open("r+b") as file:
            kept, end = _kept(file.fileno(), table_id)
            # A process that was killed may have left the beginning of a line. What it had of it
            # was never kept, and the log still has it.
            file.truncate(end)
            file.seek(end)
            file.writelines(
                _line(table_id, version, entry)
                for version, entry in entries.items()
                if version > kept
            )
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class AuditObjects(IAudit):
    """One object a block below ``targets_audit.jsonl/{table_id}/``.

    What is written needs no order and no lock: the same block has the same name and content,
    whoever writes it. ``files`` gives the place the folder lies in.
    """

    def __init__(self, files: Callable[[], pyarrow.fs.FileSystem]) -> None:
        self._files = files

    def keep(self, table_id: str, block: int, entries: Mapping[int, Mapping[str, Any]]) -> None:
        files = self._files()
        path = f"{NAME}/{table_id}/{block:020}.jsonl"
        if files.get_file_info(path).is_file:
            return
        content = b"".join(_line(table_id, version, entry) for version, entry in entries.items())
        # In one piece from the buffer: what the handler is given otherwise it does not take.
        with files.open_output_stream(path, buffer_size=len(content) + 1) as stream:
            stream.write(content)


def _line(table_id: str, version: int, entry: Mapping[str, Any]) -> bytes:
    line = {"table": table_id, "version": version, **entry}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _kept(descriptor: int, table_id: str) -> tuple[int, int]:
    """The last version of a table in a file, -1 if there is none, and where whole lines end."""
    if os.fstat(descriptor).st_size == 0:
        return -1, 0
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        # A quote in a text is written as \", so that no text can look like the head of a line.
        head = f'{{"table":"{table_id}","version":'.encode()
        at = content.rfind(head, 0, end)
        if at < 0:
            return -1, end
        line: dict[str, Any] = json.loads(content[at : content.find(b"\n", at)])
        return int(line["version"]), end
