"""The storage that the settings ask for."""

from __future__ import annotations

from pathlib import Path

from config import load_settings
from storage.factory import create_storage
from storage.implementations.local_file_storage import LocalFileStorage


async def test_local_storage_writes_below_the_root_of_the_settings(tmp_path: Path) -> None:
    storage = create_storage(load_settings(storage_root=str(tmp_path / "root")))
    assert isinstance(storage, LocalFileStorage)
    assert not (tmp_path / "root").exists()
    await storage.write_blob("ledger/x", b"1")
    assert (tmp_path / "root/ledger/x").read_bytes() == b"1"
    await storage.close()


async def test_azure_storage_lies_in_the_container_that_the_settings_name() -> None:
    settings = load_settings(
        storage_type="azure",
        storage_root="candles",
        azure_storage_connection_string="AccountName=acc;AccountKey=a2V5",
    )
    storage = create_storage(settings)
    assert storage.address == "azure:acc/candles"
    await storage.close()
