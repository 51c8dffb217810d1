"""The storage that the settings ask for."""

from __future__ import annotations

from pathlib import Path

from config import Settings
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import IRawDataStorage


def create_storage(settings: Settings) -> IRawDataStorage:
    """The backend that ``STORAGE_TYPE`` names, on ``STORAGE_ROOT``; nothing is opened yet."""
    # The settings admit no other type.
    return LocalFileStorage(Path(settings.storage_root))
