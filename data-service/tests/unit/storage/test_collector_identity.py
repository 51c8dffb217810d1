"""Who a collector is stays the same while nobody else goes by it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from storage.collector_identity import CollectorIdentity
from storage.interfaces import StorageUnavailable


async def test_a_collector_that_comes_back_is_who_it_was(tmp_path: Path) -> None:
    first = CollectorIdentity(tmp_path / "state")
    name = await first.claim()
    assert str(uuid.UUID(name)) == name
    first.release()
    first.release()
    again = CollectorIdentity(tmp_path / "state")
    assert await again.claim() == name
    again.release()


async def test_a_second_one_beside_it_is_somebody_else(tmp_path: Path) -> None:
    first, second = CollectorIdentity(tmp_path), CollectorIdentity(tmp_path)
    name = await first.claim()
    assert await second.claim() != name
    second.release()
    first.release()
    third = CollectorIdentity(tmp_path)
    assert await third.claim() == name
    third.release()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 36])
async def test_an_id_that_is_none_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "collector-id").write_bytes(content)
    first = CollectorIdentity(tmp_path)
    name = await first.claim()
    first.release()
    again = CollectorIdentity(tmp_path)
    assert await again.claim() == name
    again.release()


async def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable, match=r"STATE_DIR: .*file"):
        await CollectorIdentity(tmp_path / "file").claim()
