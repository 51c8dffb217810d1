"""The storage backends of a real service: where documents lie, and how they go away."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from azure.storage.blob import ContainerClient

from tests.support.azurite import Azurite

Document = dict[str, Any]


class Backend(ABC):
    """A storage root that a test reads behind the service's back, and takes away from it.

    ``settings`` are those of a service that keeps everything in it and its spool elsewhere.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings

    async def documents(self, exchange: str, coin: str) -> dict[int, Document]:
        """Every document of a coin, by time; a period that is stored twice fails."""
        found: dict[int, Document] = {}
        for content in await asyncio.to_thread(self._contents, f"raw_data/{exchange}/{coin}/"):
            document: Document = json.loads(content)
            assert document["timestamp"] not in found
            found[document["timestamp"]] = document
        return found

    @abstractmethod
    def _contents(self, prefix: str) -> list[bytes]:
        """What lies below a path."""

    @abstractmethod
    async def go_away(self) -> None:
        """Be out of reach from now on."""

    @abstractmethod
    async def come_back(self) -> None:
        """Be there again, with all that it held."""


class LocalFolder(Backend):
    """A folder on a disk. Away, its disk is not mounted: an empty folder lies in its place."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "data"
        self._unmounted = folder / "unmounted"
        super().__init__({"STORAGE_TYPE": "local", "STORAGE_ROOT": str(self._root)})

    def _contents(self, prefix: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self._root / prefix).rglob("*.json"))]

    async def go_away(self) -> None:
        self._root.rename(self._unmounted)
        self._root.mkdir()

    async def come_back(self) -> None:
        # It is not empty any more where something was written that the disk would hide.
        self._root.rmdir()
        self._unmounted.rename(self._root)


class AzureContainer(Backend):
    """A container of an emulator that keeps what it holds over its stop; a service has it by
    ``connection_string``."""

    def __init__(self, azurite: Azurite, container: str, connection_string: str) -> None:
        self._azurite = azurite
        self._container = container
        super().__init__(
            {
                "STORAGE_TYPE": "azure",
                "STORAGE_ROOT": container,
                "AZURE_STORAGE_CONNECTION_STRING": connection_string,
            }
        )

    def _contents(self, prefix: str) -> list[bytes]:
        container = ContainerClient.from_connection_string(
            self._azurite.connection_string, self._container
        )
        with container:
            return [
                container.download_blob(name).readall()
                for name in container.list_blob_names(name_starts_with=prefix)
            ]

    async def go_away(self) -> None:
        await asyncio.to_thread(self._azurite.stop)

    async def come_back(self) -> None:
        await asyncio.to_thread(self._azurite.start)
