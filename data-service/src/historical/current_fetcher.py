"""The newest entry of a series."""

from __future__ import annotations

from domain.entry import Entry
from domain.series import Series
from storage.interfaces import IStorageManager


class CurrentDataFetcher:
    """Reads the newest entry from storage."""

    def __init__(self, storage: IStorageManager) -> None:
        self._storage = storage

    async def get_latest_entry(self, series: Series) -> Entry | None:
        """The newest stored entry, or None when nothing is stored.

        Raises:
            StorageError: storage cannot be read.
        """
        return await self._storage.get_latest_entry(
            series.exchange, series.coin, interval=series.interval.name
        )
