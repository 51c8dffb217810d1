"""Files of the local disk that are still there after the power failed. Everything blocks."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(root: Path, path: str, content: bytes) -> None:
    """Write a new file at ``path`` below the folder ``root``, and make its folders.

    Raises:
        OSError: it cannot be written, or is there already.
    """
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # All of them: one that was made by a process that was killed may not be durable yet.
    for folder in target.parents:
        sync(folder)
        if folder == root:
            return


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
