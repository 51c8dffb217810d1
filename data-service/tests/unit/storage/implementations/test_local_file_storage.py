"""Documents as local files."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from errors import InvalidRequest
from storage.implementations.disk import Disk
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import StorageError, StorageUnavailable
from tests.contract.storage_contract import RawDataStorageContract
from tests.support.entries import FIVE_MINUTES, NOON

DAY_FOLDER = "raw_data/crypto.com/BTC/2026/11/22"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class FailingDisk(Disk):
    """A disk that answers everything with one error while ``code`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.code: int | None = None

    def _fail(self) -> None:
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code))

    def read(self, path: Path) -> tuple[bytes, str] | None:
        self._fail()
        return super().read(path)

    def names(self, folder: Path) -> list[str]:
        self._fail()
        return super().names(folder)

    def write(self, path: Path, content: bytes, check: Callable[[], None]) -> None:
        self._fail()
        super().write(path, content, check)


class HangingDisk(Disk):
    """A disk whose writes stop right before the file appears, until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.go = threading.Event()

    def write(self, path: Path, content: bytes, check: Callable[[], None]) -> None:
        def wait_then_check() -> None:
            self.reached.set()
            self.go.wait(10)
            check()

        super().write(path, content, wait_then_check)


class CountingDisk(Disk):
    """A disk that notes which folders were listed and what was made durable."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []
        self.synced: list[str] = []

    def names(self, folder: Path) -> list[str]:
        self.listed.append(folder.as_posix())
        return super().names(folder)

    def sync_folder(self, folder: Path) -> None:
        self.synced.append(folder.as_posix())
        super().sync_folder(folder)


class TestLocalFileStorageKeepsTheContract(RawDataStorageContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[LocalFileStorage]:
        storage = LocalFileStorage(tmp_path / "root")
        yield storage
        await storage.close()

    async def raw_read(self, storage: LocalFileStorage, path: str) -> bytes | None:
        file = storage._root / path
        return file.read_bytes() if file.exists() else None

    async def raw_write(self, storage: LocalFileStorage, path: str, content: bytes) -> None:
        file = storage._root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.fixture
async def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
async def storage(tmp_path: Path, disk: FailingDisk) -> AsyncIterator[LocalFileStorage]:
    storage = LocalFileStorage(tmp_path, disk=disk)
    yield storage
    await storage.close()


async def test_saving_for_a_new_coin_makes_its_folders_and_its_file(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    assert (tmp_path / DAY_FOLDER / "20261122120000.json").read_bytes() == b'{"close":1}'


async def test_saving_for_a_known_coin_puts_the_file_beside_the_others(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    await storage.save_entry("crypto.com", "BTC", NOON + FIVE_MINUTES, {})
    assert names_in(tmp_path / DAY_FOLDER) == [
        "20261122120000.json",
        "20261122120500.json",
    ]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "not permitted"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "fault"),
    ],
)
async def test_a_failure_that_can_pass_says_the_path_and_what_to_do(
    storage: LocalFileStorage, disk: FailingDisk, code: int, advice: str
) -> None:
    disk.code = code
    with pytest.raises(StorageUnavailable, match=f"20261122120000.json.*{advice}") as saving:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    with pytest.raises(StorageUnavailable, match=f"raw_data/crypto.com/BTC.*{advice}"):
        await storage.get_range("crypto.com", "BTC", 0, 2**60)
    with pytest.raises(StorageUnavailable, match=advice):
        await storage.check_writable()
    assert saving.value.retryable
    disk.code = None
    await storage.save_entry("crypto.com", "BTC", NOON, {})


async def test_a_file_where_a_folder_belongs_is_a_lasting_error(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    (tmp_path / "raw_data").write_bytes(b"")
    with pytest.raises(StorageError, match="raw_data") as saving:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert not saving.value.retryable
    assert await storage.list_coins("crypto.com") == []


async def test_a_write_that_fails_half_way_leaves_the_old_document_and_no_rubbish(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageUnavailable, match="the disk is full"):
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
    assert names_in(tmp_path / DAY_FOLDER) == ["20261122120000.json"]


async def test_what_a_killed_writer_left_is_skipped_and_swept_once_it_is_old(
    tmp_path: Path,
) -> None:
    folder = tmp_path / DAY_FOLDER
    folder.mkdir(parents=True)
    old, young = folder / ".tmp-1-old", folder / ".tmp-1-young"
    old.write_bytes(b'{"half')
    young.write_bytes(b'{"half')
    os.utime(old, (0, 0))
    storage = LocalFileStorage(tmp_path)
    assert await storage.get_range("crypto.com", "BTC", 0, 2**60) == []
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert names_in(folder) == [".tmp-1-young", "20261122120000.json"]
    await storage.close()


async def test_a_range_lists_only_the_days_in_it(tmp_path: Path) -> None:
    disk = CountingDisk()
    storage = LocalFileStorage(tmp_path, disk=disk)
    day = 86_400_000
    for step in (-400, -40, -2, -1, 0, 1, 2, 40, 400):
        await storage.save_entry("crypto.com", "BTC", NOON + step * day, {"step": step})
    disk.listed.clear()
    assert await storage.get_range("crypto.com", "BTC", NOON, NOON + day + 1) == [
        {"step": 0},
        {"step": 1},
    ]
    coin = f"{tmp_path}/raw_data/crypto.com/BTC"
    assert disk.listed == [
        coin, f"{coin}/2026", f"{coin}/2026/11", f"{coin}/2026/11/22", f"{coin}/2026/11/23",
    ]  # fmt: skip
    disk.listed.clear()
    assert await storage.get_latest_entry("crypto.com", "BTC") == {"step": 400}
    assert len(disk.listed) == 4
    await storage.close()


async def test_many_documents_make_each_folder_durable_once(tmp_path: Path) -> None:
    disk = CountingDisk()
    storage = LocalFileStorage(tmp_path, disk=disk)
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    disk.synced.clear()
    times = [NOON + step * FIVE_MINUTES for step in range(100)]
    await storage.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    assert disk.synced.count(f"{tmp_path}/{DAY_FOLDER}") == 1
    assert await storage.list_timestamps("crypto.com", "BTC", 0, 2**60) == times
    await storage.close()


async def test_an_unreadable_document_is_reported_once(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    file = tmp_path / DAY_FOLDER / "20261122120000.json"
    file.write_bytes(b"no json")
    with capture_logs() as logs:
        await storage.get_range("crypto.com", "BTC", 0, 2**60)
        await storage.get_latest_entry("crypto.com", "BTC")
    assert [(log["event"], log["path"]) for log in logs] == [
        ("storage_document_unreadable", str(file))
    ]


async def test_a_document_mended_from_outside_is_listed_again_after_it_was_read(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    file = tmp_path / DAY_FOLDER / "20261122120000.json"
    file.write_bytes(b"no json")
    await storage.get_entry("crypto.com", "BTC", NOON)
    file.write_bytes(b"{}")
    await storage.get_entry("crypto.com", "BTC", NOON)
    assert await storage.list_timestamps("crypto.com", "BTC", 0, 2**60) == [NOON]


async def test_folders_that_are_no_coins_and_files_among_them_are_not_listed(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    exchange = tmp_path / "raw_data/crypto.com"
    for name in ("BTC-EUR", "%2d", "A B", "lost+found"):
        (exchange / name).mkdir(parents=True)
    (exchange / "FILE").write_bytes(b"")
    assert await storage.list_coins("crypto.com") == ["BTC/EUR"]
    assert await storage.check_coin_exists("crypto.com", "BTC/EUR")


async def test_folders_that_are_no_dates_are_passed_over(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    coin = tmp_path / "raw_data/crypto.com/BTC"
    for name in (
        "backup",
        "2026/99/01",
        "2026/11/99",
        "2026/11/31",
        "\u0662\u0660\u0662\u0666/11/22",
    ):
        (coin / name).mkdir(parents=True)
    assert await storage.get_latest_entry("crypto.com", "BTC") == {"close": 1}
    assert await storage.get_range("crypto.com", "BTC", 0, 2**60) == [{"close": 1}]


async def test_a_link_out_of_the_root_is_refused_for_blobs(
    storage: LocalFileStorage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_bytes(b"x")
    (tmp_path / "ledger").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="link"):
        await storage.read_blob("ledger/secret")
    with pytest.raises(InvalidRequest, match="link"):
        await storage.write_blob("ledger/new", b"x")
    assert names_in(outside) == ["secret"]


async def test_a_disk_that_stands_still_is_given_up_and_changes_nothing_later(
    tmp_path: Path,
) -> None:
    disk = HangingDisk()
    storage = LocalFileStorage(tmp_path, disk=disk, timeout_s=0.05)
    with pytest.raises(StorageUnavailable, match="not answered"):
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    disk.go.set()
    storage._threads.shutdown(wait=True)
    assert names_in(tmp_path / DAY_FOLDER) == []


async def test_a_cancelled_save_ends_with_the_file_system_at_rest(tmp_path: Path) -> None:
    disk = HangingDisk()
    storage = LocalFileStorage(tmp_path, disk=disk)
    saving = asyncio.create_task(storage.save_entry("crypto.com", "BTC", NOON, {}))
    await asyncio.to_thread(disk.reached.wait, 10)
    saving.cancel()
    await asyncio.sleep(0)
    assert not saving.done()
    disk.go.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert names_in(tmp_path / DAY_FOLDER) == []
    await storage.close()


async def test_the_event_loop_runs_on_while_the_disk_hangs(tmp_path: Path) -> None:
    disk = HangingDisk()
    storage = LocalFileStorage(tmp_path, disk=disk)
    saving = asyncio.create_task(storage.save_entry("crypto.com", "BTC", NOON, {}))
    await asyncio.to_thread(disk.reached.wait, 10)
    assert await storage.get_entry("crypto.com", "BTC", NOON) is None
    disk.go.set()
    await saving
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {}
    await storage.close()


async def test_a_closed_storage_says_so(tmp_path: Path) -> None:
    storage = LocalFileStorage(tmp_path)
    await storage.close()
    with pytest.raises(StorageUnavailable, match="closed"):
        await storage.list_coins("crypto.com")
