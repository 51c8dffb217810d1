"""A root holds one kind of market for ever."""

from __future__ import annotations

import pytest

from storage.interfaces import StorageConflict, StorageUnavailable
from storage.root_stamp import STAMP_PATH, check_stamp, write_stamp
from tests.support.storage import InMemoryStorage


@pytest.mark.parametrize("redirected", [False, True])
async def test_a_stamped_root_takes_its_own_kind_and_refuses_the_other(redirected: bool) -> None:
    storage = InMemoryStorage()
    assert not await check_stamp(storage, redirected=redirected)
    await write_stamp(storage, redirected=redirected)
    assert await check_stamp(storage, redirected=redirected)
    with pytest.raises(StorageConflict, match=r"memory:root holds candles of .*STORAGE_ROOT"):
        await check_stamp(storage, redirected=not redirected)


async def test_a_root_of_a_newer_layout_is_refused_with_what_to_do() -> None:
    storage = InMemoryStorage()
    storage.blobs[STAMP_PATH] = b'{"exchanges": "real", "layout": 2}'
    with pytest.raises(StorageConflict, match=r"layout 2.*upgrade the service"):
        await check_stamp(storage, redirected=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"exchanges": "real"}', b"\xff"])
async def test_a_stamp_that_says_nothing_is_refused_with_what_to_write(content: bytes) -> None:
    storage = InMemoryStorage()
    storage.blobs[STAMP_PATH] = content
    with pytest.raises(StorageConflict, match=r"write .*exchanges"):
        await check_stamp(storage, redirected=False)


async def test_a_root_that_is_away_is_not_an_unstamped_one() -> None:
    storage = InMemoryStorage()
    storage.fail_with = StorageUnavailable("away")
    with pytest.raises(StorageUnavailable):
        await check_stamp(storage, redirected=False)
