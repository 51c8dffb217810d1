"""The storage that the settings ask for."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from config import Settings
from errors import InvalidRequest
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import IRawDataStorage
from storage.path_utility import StoragePathUtility


def create_storage(settings: Settings) -> IRawDataStorage:
    """The backend that ``STORAGE_TYPE`` names, on ``STORAGE_ROOT``; nothing is opened yet.

    Raises:
        ConfigurationError: the connection string is none.
    """
    if settings.storage_type == "azure":
        # Imported here: a local service should not pay for Azure's libraries.
        from storage.implementations.azure_blob_storage import AzureBlobStorage  # noqa: PLC0415

        secret = settings.azure_storage_connection_string
        return AzureBlobStorage(
            settings.storage_root,
            connection_string=None if secret is None else secret.get_secret_value(),
            account_url=settings.azure_storage_account_url,
        )
    return LocalFileStorage(Path(settings.storage_root))


def spool_folder(settings: Settings, storage: IRawDataStorage) -> Path:
    """Where entries wait for ``storage``; one folder a root, so that none gets another's."""
    try:
        name = StoragePathUtility.encode_name(storage.address)
    except InvalidRequest:  # longer than a name may be
        name = sha256(storage.address.encode()).hexdigest()
    return settings.state_dir / "spool" / name
