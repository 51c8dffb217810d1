"""The fake that other tests stand on keeps the promises of a real backend."""

from __future__ import annotations

import pytest

from storage.interfaces import StorageError, StorageUnavailable
from tests.contract.storage_contract import RawDataStorageContract
from tests.support.entries import NOON
from tests.support.storage import InMemoryStorage


class TestInMemoryStorage(RawDataStorageContract):
    @pytest.fixture
    def storage(self) -> InMemoryStorage:
        return InMemoryStorage()

    async def raw_read(self, storage: InMemoryStorage, path: str) -> bytes | None:
        return storage.blobs.get(path)

    async def raw_write(self, storage: InMemoryStorage, path: str, content: bytes) -> None:
        storage.blobs[path] = content

    async def test_a_root_that_is_not_there_is_not_made_by_who_only_reads(
        self, storage: InMemoryStorage
    ) -> None:
        with pytest.raises(StorageError, match="no such storage root"):
            await storage.open(read_only=True)

    async def test_every_method_fails_while_it_is_told_to(self, storage: InMemoryStorage) -> None:
        storage.fail_with = StorageUnavailable("away")
        with pytest.raises(StorageUnavailable):
            await storage.save_entry("crypto.com", "BTC", NOON, {})
        with pytest.raises(StorageUnavailable):
            await storage.check_writable()
        storage.fail_with = None
        await storage.check_writable()
