"""Where files are written before they are moved into place, and what killed writers left there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from typing import Final, Self

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_TRIES: Final = 100


class Staging:
    """A folder of unfinished files that belongs to one writer as long as it lives.

    The writer keeps the folder locked, and the system unlocks it when the writer dies, however
    that happens. So a folder that can be locked has no writer any more, whatever its age.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def claim(cls, parent: str) -> Self:
        """Make a folder below ``parent`` and keep it locked.

        Raises:
            OSError: it cannot be made.
        """
        for _ in range(_MOST_TRIES):
            path = f"{parent}/{os.getpid()}-{secrets.token_hex(8)}"
            os.mkdir(path)  # noqa: PTH102  every path here is a string
            descriptor = _lock(path)
            # Somebody who sweeps may take it for abandoned until it is locked.
            if descriptor is not None:
                return cls(path, descriptor)
        raise BlockingIOError(errno.EAGAIN, "every new folder is swept away at once", parent)

    def release(self) -> None:
        """Remove the folder if nothing is left in it, and let others sweep it if not."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)  # noqa: PTH106
        os.close(self._descriptor)


def sweep(parent: str) -> None:
    """Remove what dead writers left below ``parent``.

    What cannot be removed stays: it is another user's, or the disk will not let anybody write
    either, which the next write tells.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):  # noqa: PTH208
            with contextlib.suppress(OSError):
                _remove_abandoned(f"{parent}/{name}")


def _remove_abandoned(path: str) -> None:
    descriptor = _lock(path)
    if descriptor is None:
        return
    try:
        for name in os.listdir(descriptor):  # noqa: PTH208
            os.unlink(name, dir_fd=descriptor)
        os.rmdir(path)  # noqa: PTH106
    finally:
        os.close(descriptor)


def _lock(path: str) -> int | None:
    """The folder at ``path``, open and locked; None when another has it or it is gone."""
    try:
        descriptor = os.open(path, _FOLDER)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            descriptor, kept = -1, descriptor
            return kept
    except (BlockingIOError, FileNotFoundError):
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return None
