"""The few things that local storage asks of a file system, blocking."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from storage.path_utility import TEMPORARY_PREFIX

# Another process may be writing what is younger; what is older was left by one that was killed.
_LEFTOVER_AGE_S: Final = 600.0
_MOST_FOLDERS_REMEMBERED: Final = 4096


class Disk:
    """Whole files, durable when told so. Raises ``OSError`` as the system gives it."""

    def __init__(self) -> None:
        self._swept: set[Path] = set()

    def read(self, path: Path) -> tuple[bytes, str] | None:
        """The bytes of a file and the version of just these bytes, or None when there is none."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                version = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
                return file.read(), version
        except FileNotFoundError:
            return None

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, in no order; none when it is not there or is no folder."""
        try:
            return os.listdir(folder)  # noqa: PTH208  a fifth of the cost of iterdir
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self, folder: Path) -> list[str]:
        """The names of the folders in a folder, in no order."""
        try:
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def real_path(self, path: Path) -> Path:
        """The path with every link followed, as far as it exists."""
        return path.resolve()

    def make_folder(self, folder: Path) -> None:
        """Make a folder and what is missing above it, durably."""
        missing = []
        at = folder
        while not at.is_dir():
            missing.append(at)
            if at.parent == at:
                break
            at = at.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self.sync_folder(path.parent)

    def write(self, path: Path, content: bytes, check: Callable[[], None]) -> None:
        """Put a whole file in place; its name lasts once ``sync_folder`` was called.

        ``check`` is called right before the file appears and stops that by raising.
        """
        self._sweep(path.parent)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                # The kernel's own clock may be too coarse to tell two writes apart.
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            check()
            temporary.replace(path)
        except BaseException:
            # What stopped the write matters more than a leftover that cannot be removed either.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        """Remove what killed processes left in a folder, once in the life of this object."""
        if folder in self._swept:
            return
        if len(self._swept) >= _MOST_FOLDERS_REMEMBERED:
            self._swept.clear()
        self._swept.add(folder)
        for name in self.names(folder):
            if name.startswith(TEMPORARY_PREFIX):
                leftover = folder / name
                # Somebody else may sweep, or finish writing it, at the same time.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                        leftover.unlink()
