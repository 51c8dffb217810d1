"""The spool: what waits on the local disk, within its bounds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from domain.interval import Interval
from domain.time_range import TimeRange
from storage.interfaces import SpoolFull, StorageError, StorageUnavailable
from storage.spool import Spool
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_entry

LATER = NOON + FIVE_MINUTES
HOURLY_EUR = dataclasses.replace(BTC, coin="BTC/EUR", interval=Interval.parse("1h"))


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = Spool(tmp_path / "spool")
    await spool.open()
    yield spool
    await spool.close()


def documents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))


async def test_what_was_put_is_read_back_and_survives_the_process(
    spool: Spool, tmp_path: Path
) -> None:
    entries = [make_entry(NOON, book=True), make_entry(LATER, source="stream")]
    await spool.put(BTC, entries)
    await spool.put(HOURLY_EUR, [make_entry(NOON, series=HOURLY_EUR, market="BTC/EUR")])
    size = spool.bytes
    assert size == sum(path.stat().st_size for path in (tmp_path / "spool").rglob("*.json"))

    again = Spool(tmp_path / "spool")
    await again.open()
    assert (again.entries, again.bytes) == (3, size)
    assert again.serieses() == [BTC, HOURLY_EUR]
    assert again.timestamps(BTC) == [NOON, LATER]
    assert again.timestamps(BTC, TimeRange(NOON + 1, LATER + 1)) == [LATER]
    assert await again.read(BTC, [LATER, NOON, LATER + FIVE_MINUTES]) == {
        NOON: entries[0],
        LATER: entries[1],
    }
    assert again.coins("crypto.com") == {"BTC", "BTC/EUR"}
    assert again.coins("binance") == set()
    await again.close()


async def test_a_later_entry_of_a_period_replaces_the_one_that_waits(spool: Spool) -> None:
    await spool.put(BTC, [make_entry(book=True)])
    corrected = make_entry(close=101.0).with_revision(2)
    await spool.put(BTC, [corrected])
    assert spool.entries == 1
    assert await spool.read(BTC, [NOON]) == {NOON: corrected}


async def test_what_was_discarded_is_gone_for_good(spool: Spool, tmp_path: Path) -> None:
    await spool.put(BTC, [make_entry(NOON), make_entry(LATER)])
    await spool.discard(BTC, [NOON])
    await spool.discard(BTC, [NOON])
    assert spool.timestamps(BTC) == [LATER]
    await spool.discard(BTC, [LATER])
    assert not spool.holds(BTC)
    assert (spool.entries, spool.bytes) == (0, 0)
    assert documents(tmp_path) == []


async def test_what_was_set_aside_waits_no_more_and_is_kept_for_people(
    spool: Spool, tmp_path: Path
) -> None:
    await spool.put(BTC, [make_entry(NOON)])
    await spool.set_aside(BTC, [NOON])
    assert not spool.holds(BTC)
    assert documents(tmp_path / "spool") == [
        "refused/raw_data/crypto.com/BTC/2026/11/22/20261122120000.json"
    ]
    await spool.open()
    assert spool.entries == 0


async def test_a_full_spool_refuses_new_periods_and_still_takes_corrections(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, most_entries=2)
    await spool.open()
    await spool.put(BTC, [make_entry(NOON, source="stream")])
    assert not spool.is_full
    await spool.put(BTC, [make_entry(LATER, source="stream")])
    assert spool.is_full
    with pytest.raises(SpoolFull, match=r"no room for 1 more.*2 wait.*bring the storage back"):
        await spool.put(BTC, [make_entry(LATER + FIVE_MINUTES, source="stream")])
    await spool.put(BTC, [make_entry(NOON, source="stream", close=101.0)])
    assert spool.timestamps(BTC) == [NOON, LATER]
    await spool.close()


async def test_what_can_be_fetched_again_leaves_half_of_the_room_to_live_entries(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, most_entries=4)
    await spool.open()
    times = [NOON + step * FIVE_MINUTES for step in range(5)]
    with pytest.raises(SpoolFull):
        await spool.put(BTC, [make_entry(at) for at in times[:3]])
    assert spool.entries == 0
    await spool.put(BTC, [make_entry(at) for at in times[:2]])
    await spool.put(BTC, [make_entry(at, source="stream") for at in times[2:4]])
    with pytest.raises(SpoolFull):
        await spool.put(BTC, [make_entry(times[4], source="stream")])
    await spool.close()


async def test_the_size_of_documents_is_bounded_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path, most_bytes=600)
    await spool.open()
    await spool.put(BTC, [make_entry(NOON, source="stream")])
    with pytest.raises(SpoolFull):
        await spool.put(
            BTC, [make_entry(LATER + step * FIVE_MINUTES, source="stream") for step in range(3)]
        )
    await spool.close()


async def test_foreign_files_are_not_what_waits(spool: Spool, tmp_path: Path) -> None:
    (tmp_path / "spool/raw_data/crypto.com/BTC").mkdir(parents=True)
    (tmp_path / "spool/raw_data/crypto.com/BTC/notes.json").write_bytes(b"{}")
    await spool.open()
    assert spool.entries == 0


async def test_a_document_that_is_torn_is_left_out_when_it_is_read(
    spool: Spool, tmp_path: Path
) -> None:
    await spool.put(BTC, [make_entry(NOON), make_entry(LATER)])
    (tmp_path / "spool/raw_data/crypto.com/BTC/2026/11/22/20261122120000.json").write_bytes(b"{")
    with capture_logs():
        assert await spool.read(BTC, [NOON, LATER]) == {LATER: make_entry(LATER)}


async def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file" / "spool")
    with pytest.raises(StorageError, match=r"STATE_DIR: .*file"):
        await spool.open()
    await spool.close()


async def test_a_disk_that_refuses_to_forget_is_an_error(spool: Spool, tmp_path: Path) -> None:
    await spool.put(BTC, [make_entry(NOON)])
    day = tmp_path / "spool/raw_data/crypto.com/BTC/2026/11/22"
    (day / "20261122120000.json").unlink()
    (day / "20261122120000.json").mkdir()
    with pytest.raises(StorageUnavailable, match="check the spool's folder"):
        await spool.discard(BTC, [NOON])
    assert spool.holds(BTC)
    shutil.rmtree(day)
