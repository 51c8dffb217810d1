"""CurrentDataFetcher: the newest entry of a series."""

from __future__ import annotations

import pytest

from historical.current_fetcher import CurrentDataFetcher
from storage.interfaces import StorageUnavailable
from storage.manager import StorageManagerImpl
from tests.support.market import BTC_1M, BTC_5M, FIVE, T0, entry
from tests.support.storage import InMemoryStorage


async def test_the_newest_entry_of_the_series_is_read_from_storage() -> None:
    storage = StorageManagerImpl(InMemoryStorage())
    await storage.store_batch([entry(T0), entry(T0 + FIVE)])
    await storage.store_raw_data(entry(T0 + 2 * FIVE, series=BTC_1M))
    assert await CurrentDataFetcher(storage).get_latest_entry(BTC_5M) == entry(T0 + FIVE)


async def test_nothing_stored_is_none() -> None:
    storage = StorageManagerImpl(InMemoryStorage())
    assert await CurrentDataFetcher(storage).get_latest_entry(BTC_5M) is None


async def test_storage_that_cannot_be_read_is_an_error() -> None:
    raw = InMemoryStorage()
    raw.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await CurrentDataFetcher(StorageManagerImpl(raw)).get_latest_entry(BTC_5M)
