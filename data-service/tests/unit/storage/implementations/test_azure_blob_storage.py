"""Documents as blobs, on the emulator of Azure and on a stub that fails as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob.aio import ContainerClient

from storage.implementations.azure_blob_storage import AzureBlobStorage
from tests.contract.storage_contract import RawDataStorageContract
from tests.support.azurite import Azurite


class TestContract(RawDataStorageContract):
    @pytest.fixture
    async def raw(self, azurite: Azurite, container: str) -> AsyncIterator[ContainerClient]:
        async with ContainerClient.from_connection_string(
            azurite.connection_string, container
        ) as client:
            yield client

    @pytest.fixture
    async def storage(
        self, azurite: Azurite, container: str, raw: ContainerClient
    ) -> AsyncIterator[AzureBlobStorage]:
        storage = AzureBlobStorage(container, connection_string=azurite.connection_string)
        storage.raw = raw
        await storage.open()
        yield storage
        await storage.close()

    async def raw_read(self, storage: AzureBlobStorage, path: str) -> bytes | None:
        try:
            return await (await storage.raw.download_blob(path)).readall()
        except ResourceNotFoundError:
            return None

    async def raw_write(self, storage: AzureBlobStorage, path: str, content: bytes) -> None:
        await storage.raw.upload_blob(path, content, overwrite=True)
