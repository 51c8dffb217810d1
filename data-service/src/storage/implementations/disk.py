"""Whole files below one local folder: what local storage asks of a file system, blocking."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Final, Self
from zlib import crc32

from storage.implementations.staging import Staging, sweep
from storage.path_utility import RAW_DATA, SERVICE_FOLDER

_STAGING: Final = f"{SERVICE_FOLDER}/staging"
_LOCKS: Final = f"{SERVICE_FOLDER}/locks"
_LOCK_FILES: Final = 64
_LOCK_PATIENCE_S: Final = 20.0
_FIRST_POLL_S: Final = 0.0005
_LONGEST_POLL_S: Final = 0.02
# How often something may be deleted under a writer before that is told as an error.
_MOST_TRIES: Final = 5
# From so many files on, one sync of the whole file system is cheaper than one a file.
_BULK: Final = 16
# Enough for a document with its book; one read takes it.
_SMALL_BYTES: Final = 8 * 2**10
# Whatever is larger is no document; reading it could take all memory.
_MOST_BYTES: Final = 64 * 2**20

_OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Opening must neither follow a link nor wait for the other end of a pipe.
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPEN_LOCK: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What opening a link or a socket gives.
_NO_FILE: Final = (errno.ELOOP, errno.ENXIO)


class ForeignFile(Exception):
    """What lies at a path is none of our files: a link, a folder, a pipe, or too large."""


class RootGone(Exception):
    """The root that was opened is not at its path: its disk is not mounted, or it was moved."""


class Replaced(Exception):
    """Another version of a file lies there than its writer expected; ``path`` says which file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Folder:
    """An open folder of the root; ``path`` is absolute. Use it in ``with``, or close it."""

    __slots__ = ("descriptor", "path")

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.descriptor)


class Disk:
    """Files below ``root``, each whole or not at all, durable when a write returns.

    Paths are relative to the root. The root itself may be a link; a folder below it that leads out
    of it by a link is refused with ``ELOOP``, and files are never opened through links. A file is
    written into a folder that this writer alone uses and then moved into place, which works
    beside other processes that write, and delete, in the same root.

    A root that was opened and is gone is neither empty nor made anew: what was written in its
    place would be hidden by it when it is back. It is known by its folders, of which the place
    where a disk is mounted has none.

    Everything raises ``OSError`` as the system gives it, with the absolute path that it is about,
    and ``RootGone``.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)  # noqa: PTH100  strings are a fifth of the cost of Path
        self._real_root = ""
        self._staging: Staging | None = None
        self._staging_lock = threading.Lock()
        self._locks = [threading.Lock() for _ in range(_LOCK_FILES)]
        self._opened = False
        self._closed = False

    def open(self) -> None:
        """Make the root and remove what killed writers left in it."""
        self._opened = False
        self.make_folder(SERVICE_FOLDER).close()
        self._opened = True
        staging = self.open_folder(_STAGING)
        if staging is not None:
            with staging:
                sweep(staging.path)

    def close(self) -> None:
        """Give up the folder of unfinished files; nothing can be written any more. Idempotent."""
        with self._staging_lock:
            self._closed = True
            if self._staging is not None:
                self._staging.release()
                self._staging = None

    # Reading

    def open_folder(self, path: str) -> Folder | None:
        """A folder, or None when there is none at that path."""
        try:
            return self._open_folder(self._absolute(path))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None

    def names(self, folder: Folder) -> list[str]:
        """The names in a folder, in no order."""
        with _about(folder.path):
            return os.listdir(folder.descriptor)  # noqa: PTH208

    def folders(self, folder: Folder) -> list[str]:
        """The names of the folders in a folder, in no order; no links."""
        with _about(folder.path), os.scandir(folder.descriptor) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def read(self, folder: Folder, name: str) -> tuple[bytes, os.stat_result] | None:
        """The bytes of a file and its status, or None when there is none of that name.

        Raises:
            ForeignFile: it is no regular file, or larger than any of ours.
        """
        try:
            descriptor = os.open(name, _OPEN_FILE, dir_fd=folder.descriptor)
        except FileNotFoundError:
            return None
        except OSError as exc:
            path = f"{folder.path}/{name}"
            if exc.errno in _NO_FILE:
                raise ForeignFile(f"{path}: is no regular file") from exc
            exc.filename = path
            raise
        try:
            status = os.fstat(descriptor)
            size = status.st_size
            if not S_ISREG(status.st_mode):
                raise ForeignFile(f"{folder.path}/{name}: is no regular file")
            if size > _MOST_BYTES:
                raise ForeignFile(f"{folder.path}/{name}: is larger than {_MOST_BYTES} bytes")
            content = os.read(descriptor, size)
            while len(content) < size:
                more = os.read(descriptor, size - len(content))
                if not more:
                    break
                content += more
        except OSError as exc:
            exc.filename = f"{folder.path}/{name}"
            raise
        finally:
            os.close(descriptor)
        return content, status

    def read_small(self, folder: Folder, name: str) -> bytes | None:
        """The bytes of a small file, in a third of the time of ``read``.

        None where it takes a closer look, by ``read``: there is none, or it is empty, large, or
        none of our files.
        """
        try:
            descriptor = os.open(name, _OPEN_FILE, dir_fd=folder.descriptor)
        except OSError:
            return None
        try:
            content = os.read(descriptor, _SMALL_BYTES)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return content if 0 < len(content) < _SMALL_BYTES else None

    # Writing

    def make_folder(self, path: str) -> Folder:
        """A folder, made durably where it is missing."""
        where = self._absolute(path)
        for _ in range(_MOST_TRIES):
            try:
                return self._open_folder(where)
            except (FileNotFoundError, NotADirectoryError):
                # What is in the way may lie further up, and is told from there.
                self._check_root()
            if not path:
                self._make_root()
                continue
            above, _, name = path.rpartition("/")
            with self.make_folder(above) as parent:
                try:
                    os.mkdir(name, dir_fd=parent.descriptor)
                except (FileExistsError, FileNotFoundError):
                    # Made, or deleted with what is above it, by another at this moment.
                    continue
                except OSError as exc:
                    exc.filename = where
                    raise
                self._sync(parent)
        return self._open_folder(where)

    def write(
        self,
        files: Mapping[str, bytes],
        check: Callable[[], None],
        *,
        lock: str | None = None,
        expected: Mapping[str, str | None] | None = None,
    ) -> None:
        """Put files in place, each whole or not at all; durable when it returns.

        ``check`` is called for each file, last right before it appears, and stops that by
        raising. With a name for ``lock``, files are put in place one writer after the other.
        With ``expected``, which needs it, nothing is put in place unless just these versions
        (None: nothing) lie at the paths.

        Raises:
            Replaced: something else lies at one of the paths.
        """
        pending = dict(files)
        for tries_left in reversed(range(_MOST_TRIES)):
            try:
                self._write(pending, check, lock, expected)
            except FileNotFoundError:
                # Another deletes in this root, or cleans up where somebody starts.
                if not tries_left:
                    raise
            else:
                return

    def remove(self, staged: str) -> None:
        """Remove a file that was not put in place; one that is gone is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)  # noqa: PTH108

    def stage(self, path: str, content: bytes, *, durable: bool) -> str:
        """Write a file that is to lie at ``path``, beside the root's files; where it is now."""
        folder = self._staging_path()
        staged = f"{folder}/{secrets.token_hex(8)}"
        try:
            descriptor = os.open(staged, _OPEN_NEW, 0o644)
        except FileNotFoundError:
            self._forget_staging(folder)
            self._check_root()
            raise
        try:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                # The clock of the file system may be too coarse to tell two writes apart.
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException as exc:
            if isinstance(exc, OSError):
                exc.filename = self._absolute(path)
            # What stopped the write matters more than a leftover that cannot be removed either.
            with contextlib.suppress(OSError):
                self.remove(staged)
            raise
        return staged

    def place(self, staged: str, folder: Folder, name: str) -> None:
        """Move a written file into place, over what is there."""
        try:
            os.replace(staged, name, dst_dir_fd=folder.descriptor)
        except OSError as exc:
            exc.filename, exc.filename2 = f"{folder.path}/{name}", None
            raise

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable; one that was deleted meanwhile needs nothing."""
        folder = self.open_folder(path)
        if folder is not None:
            with folder:
                self._sync(folder)

    def sync_all(self, descriptor: int, staged: Iterator[str]) -> None:
        """Make many written files durable; ``descriptor`` was opened before they were written."""
        if _syncfs(descriptor):
            return
        for path in staged:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def space(self) -> os.statvfs_result:
        """What is free where the root is, or is to be."""
        at = self.root
        while True:
            try:
                return os.statvfs(at)
            except FileNotFoundError:
                at = os.path.dirname(at)  # noqa: PTH120

    # Locks

    def try_lock(self, folder: str, name: str) -> tuple[int, bool]:
        """Open the lock file of that name, made if missing, and lock it if it is free.

        Gives the descriptor, to be closed, and whether it is locked; closing unlocks.
        """
        for _ in range(_MOST_TRIES):
            with self.make_folder(folder) as opened:
                path = f"{opened.path}/{name}"
                try:
                    descriptor = os.open(name, _OPEN_LOCK, 0o644, dir_fd=opened.descriptor)
                except FileNotFoundError:
                    continue
                except OSError as exc:
                    exc.filename = path
                    raise
            locked = False
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = self.lies_at(descriptor, path)
            except BlockingIOError:
                return descriptor, False
            except OSError as exc:
                os.close(descriptor)
                exc.filename = path
                raise
            if locked:
                return descriptor, True
            # It was deleted before it was locked; who opens it now gets another.
            os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is deleted again and again", path)

    def lies_at(self, descriptor: int, path: str) -> bool:
        """Whether an open file is the one that lies at an absolute path."""
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            self._check_root()
            return False
        return os.path.samestat(there, os.fstat(descriptor))

    @contextmanager
    def _locked(self, name: str, check: Callable[[], None]) -> Iterator[None]:
        """One writer at a time of what has this name, between threads and processes."""
        number = crc32(name.encode()) % _LOCK_FILES
        file_name = f"{number:02d}"
        until = time.monotonic() + _LOCK_PATIENCE_S
        mine = self._locks[number]
        if not mine.acquire(timeout=_LOCK_PATIENCE_S):
            raise self._too_long(file_name)
        try:
            wait_s = _FIRST_POLL_S
            descriptor, locked = self.try_lock(_LOCKS, file_name)
            while not locked:
                os.close(descriptor)
                if time.monotonic() > until:
                    raise self._too_long(file_name)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_POLL_S)
                check()
                descriptor, locked = self.try_lock(_LOCKS, file_name)
            try:
                yield
            finally:
                os.close(descriptor)
        finally:
            mine.release()

    def _too_long(self, name: str) -> OSError:
        return BlockingIOError(
            errno.EAGAIN, "another writer keeps it locked", self._absolute(f"{_LOCKS}/{name}")
        )

    # Parts

    def _absolute(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _open_folder(self, path: str) -> Folder:
        descriptor = os.open(path, _OPEN_FOLDER)
        try:
            self._check_inside(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return Folder(path, descriptor)

    def _check_inside(self, path: str, descriptor: int) -> None:
        """Refuse an open folder that does not really lie in the root."""
        try:
            real = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except FileNotFoundError:
            # A system without /proc; the folder that was opened is surely known only there.
            real = os.path.realpath(path)
        if _is_inside(real, self._real_root):
            return
        self._real_root = os.path.realpath(self.root)
        if not _is_inside(real, self._real_root):
            raise OSError(errno.ELOOP, "leads out of the storage root through a link", path)

    def _check_root(self) -> None:
        """Say so when what is missing is the whole root."""
        ours = map(self._absolute, (SERVICE_FOLDER, RAW_DATA))
        if self._opened and not any(map(os.path.isdir, ours)):
            raise RootGone

    def _make_root(self) -> None:
        missing = []
        at = Path(self.root)
        while not at.is_dir():
            missing.append(at)
            at = at.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            descriptor = os.open(path.parent, _OPEN_FOLDER)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _sync(self, folder: Folder) -> None:
        with _about(folder.path):
            os.fsync(folder.descriptor)

    def _staging_path(self) -> str:
        with self._staging_lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the storage is closed", self.root)
            if self._staging is None:
                with self.make_folder(_STAGING) as folder:
                    sweep(folder.path)
                    self._staging = Staging.claim(folder.path)
            return self._staging.path

    def _forget_staging(self, path: str) -> None:
        with self._staging_lock:
            if self._staging is not None and self._staging.path == path:
                self._staging.release()
                self._staging = None

    def _write(
        self,
        pending: dict[str, bytes],
        check: Callable[[], None],
        lock: str | None,
        expected: Mapping[str, str | None] | None,
    ) -> None:
        """One try; what is in place is no longer pending."""
        folders: dict[str, list[str]] = {}
        for path in pending:
            folder, _, name = path.rpartition("/")
            folders.setdefault(folder, []).append(name)
        for folder in folders:
            self.make_folder(folder).close()
            check()
        staged: dict[str, str] = {}
        touched: list[str] = []
        try:
            self._stage_all(pending, staged, check)
            with self._locked(lock, check) if lock else contextlib.nullcontext():
                if expected is not None:
                    self._compare(folders, pending, expected)
                for folder, names in folders.items():
                    with self._reopened(folder) as opened:
                        touched.append(folder)
                        for name in names:
                            path = f"{folder}/{name}" if folder else name
                            check()
                            self.place(staged[path], opened, name)
                            del staged[path], pending[path]
        finally:
            for leftover in staged.values():
                with contextlib.suppress(OSError):
                    self.remove(leftover)
            # Files that did appear must last, also when a later one failed.
            for folder in touched:
                self.sync_folder(folder)

    def _stage_all(
        self, pending: Mapping[str, bytes], staged: dict[str, str], check: Callable[[], None]
    ) -> None:
        if len(pending) < _BULK:
            for path, content in pending.items():
                staged[path] = self.stage(path, content, durable=True)
                check()
            return
        # Failures of writing back are told to those who had it open before.
        with self.make_folder(_STAGING) as folder:
            for path, content in pending.items():
                staged[path] = self.stage(path, content, durable=False)
                check()
            with _about(self.root):
                self.sync_all(folder.descriptor, iter(staged.values()))

    def _compare(
        self,
        folders: Mapping[str, list[str]],
        pending: Mapping[str, bytes],
        expected: Mapping[str, str | None],
    ) -> None:
        for folder, names in folders.items():
            with self._reopened(folder) as opened:
                for name in names:
                    path = f"{folder}/{name}" if folder else name
                    if path in pending and _version_at(opened, name) != expected.get(path):
                        raise Replaced(f"{opened.path}/{name}")

    def _reopened(self, folder: str) -> Folder:
        return self._open_folder(self._absolute(folder))


def version_of(status: os.stat_result) -> str:
    """The mark of just the bytes that a file of ours has.

    Files are never changed in place, and each is made with a time of its own, so that a number
    of a deleted file that is used again makes no version of old.
    """
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _version_at(folder: Folder, name: str) -> str | None:
    """The version of a file, or None when there is none: a link there is nobody's file."""
    try:
        status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return version_of(status) if S_ISREG(status.st_mode) else None


def _is_inside(path: str, root: str) -> bool:
    return bool(root) and (path == root or path.startswith(root.rstrip("/") + "/"))


@contextmanager
def _about(path: str) -> Iterator[None]:
    """Name the path in an error of the system that names none, or a descriptor."""
    try:
        yield
    except OSError as exc:
        exc.filename = path
        raise


def _load_syncfs() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:
        return None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function


def _syncfs(descriptor: int) -> bool:
    """Sync a whole file system; False where the system cannot."""
    if _SYNCFS is None:
        return False
    if _SYNCFS(descriptor) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return False
    raise OSError(code, os.strerror(code))


_SYNCFS: Final = _load_syncfs()
