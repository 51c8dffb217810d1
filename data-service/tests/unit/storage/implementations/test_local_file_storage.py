"""Documents as local files."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from storage.implementations import disk as disk_module
from storage.implementations.disk import Disk, Folder
from storage.implementations.local_file_storage import LocalFileStorage
from storage.implementations.staging import sweep
from storage.interfaces import (
    StaleVersion,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from tests.contract.storage_contract import RawDataStorageContract
from tests.support.entries import FIVE_MINUTES, NOON
from tests.support.storage_processes import storage_process

DAY = 86_400_000
DAY_FOLDER = "raw_data/crypto.com/BTC/2026/11/22"
NOON_FILE = f"{DAY_FOLDER}/20261122120000.json"
LATER_FILE = f"{DAY_FOLDER}/20261122120500.json"
EVER = (0, 2**60)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def staging_of(root: Path) -> Path:
    return root / ".cb-trade" / "staging"


def staged_in(root: Path) -> list[Path]:
    return [path for path in staging_of(root).rglob("*") if path.is_file()]


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class FailingDisk(Disk):
    """A disk that answers everything with one error while ``code`` is set."""

    code: int | None = None

    def _fail(self) -> None:
        if self.code is not None:
            raise os_error(self.code)

    def open_folder(self, path: str) -> Folder | None:
        try:
            self._fail()
        except OSError as exc:
            exc.filename = f"{self.root}/{path}"
            raise
        return super().open_folder(path)

    def stage(self, path: str, content: bytes, *, durable: bool) -> str:
        try:
            self._fail()
        except OSError as exc:
            exc.filename = f"{self.root}/{path}"
            raise
        return super().stage(path, content, durable=durable)


class HangingDisk(Disk):
    """A disk that stops right before a file appears, until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached = threading.Event()
        self.go = threading.Event()

    def stage(self, path: str, content: bytes, *, durable: bool) -> str:
        staged = super().stage(path, content, durable=durable)
        self.reached.set()
        self.go.wait(10)
        return staged


class CountingDisk(Disk):
    """A disk that notes what it does; folders are told below the root."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []
        self.listed: list[str] = []
        self.read_files: list[str] = []
        self.written: list[tuple[str, str]] = []

    def _below(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/")

    def forget(self) -> None:
        for noted in (self.opened, self.listed, self.read_files, self.written):
            noted.clear()

    def open_folder(self, path: str) -> Folder | None:
        self.opened.append(path)
        return super().open_folder(path)

    def names(self, folder: Folder) -> list[str]:
        self.listed.append(self._below(folder.path))
        return super().names(folder)

    def read(self, folder: Folder, name: str) -> tuple[bytes, os.stat_result] | None:
        self.read_files.append(f"{self._below(folder.path)}/{name}")
        return super().read(folder, name)

    def read_small(self, folder: Folder, name: str) -> bytes | None:
        self.read_files.append(f"{self._below(folder.path)}/{name}")
        return super().read_small(folder, name)

    def stage(self, path: str, content: bytes, *, durable: bool) -> str:
        self.written.append(("synced" if durable else "written", path))
        return super().stage(path, content, durable=durable)

    def sync_all(self, descriptor: int, staged: Iterator[str]) -> None:
        self.written.append(("all synced", ""))
        super().sync_all(descriptor, staged)

    def place(self, staged: str, folder: Folder, name: str) -> None:
        self.written.append(("placed", f"{self._below(folder.path)}/{name}"))
        super().place(staged, folder, name)

    def sync_folder(self, path: str) -> None:
        self.written.append(("folder synced", path))
        super().sync_folder(path)


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
def disk(tmp_path: Path) -> FailingDisk:
    return FailingDisk(tmp_path)


async def test_a_root_that_is_not_there_is_not_made_by_who_only_reads(tmp_path: Path) -> None:
    storage = LocalFileStorage(tmp_path / "root")
    try:
        with pytest.raises(StorageError, match=r"root: there is no such storage root; check"):
            await storage.open(read_only=True)
        assert await storage.get_entries("crypto.com", "BTC", [NOON]) == {}
    finally:
        await storage.close()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("in_its_place", ["nothing", "an empty folder"])
async def test_a_root_that_is_gone_is_unavailable_never_empty_and_not_made_anew(
    tmp_path: Path, in_its_place: str
) -> None:
    root, unmounted = tmp_path / "root", tmp_path / "unmounted"
    storage = LocalFileStorage(root)
    await storage.open()
    lock = storage.collector_lock()
    assert await lock.acquire()
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    root.rename(unmounted)
    if in_its_place == "an empty folder":
        root.mkdir()
    things: list[Callable[[], Awaitable[Any]]] = [
        storage.check_writable,
        lambda: storage.get_entry("crypto.com", "BTC", NOON),
        lambda: storage.get_range("crypto.com", "BTC", NOON, NOON + DAY),
        lambda: storage.get_latest_entry("crypto.com", "BTC"),
        lambda: storage.list_timestamps("crypto.com", "BTC", *EVER),
        lambda: storage.list_coins("crypto.com"),
        lambda: storage.save_entry("crypto.com", "BTC", NOON + DAY, {"close": 2}),
        lambda: storage.read_blob("ledger/crypto.com/BTC/5m.json"),
        lambda: storage.write_blob("ledger/crypto.com/BTC/5m.json", b"{}"),
        lock.acquire,
    ]
    for thing in things:
        with pytest.raises(StorageUnavailable, match=f"^{root}: the storage root is gone: mount"):
            await thing()
    if in_its_place == "an empty folder":
        root.rmdir()
    assert names_in(tmp_path) == ["unmounted"]

    unmounted.rename(root)
    assert lock.is_held
    assert await lock.acquire()
    await storage.save_entry("crypto.com", "BTC", NOON + DAY, {"close": 2})
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}, {"close": 2}]
    await lock.release()
    await storage.close()


async def test_a_root_whose_service_folder_alone_was_deleted_is_still_that_root(
    tmp_path: Path,
) -> None:
    storage = LocalFileStorage(tmp_path)
    await storage.open()
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    shutil.rmtree(tmp_path / ".cb-trade")
    await storage.save_entry("crypto.com", "BTC", NOON + DAY, {"close": 2})
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}, {"close": 2}]
    await storage.close()


@pytest.fixture
async def storage(tmp_path: Path, disk: FailingDisk) -> AsyncIterator[LocalFileStorage]:
    storage = LocalFileStorage(tmp_path, disk=disk)
    yield storage
    await storage.close()


@pytest.fixture
def counting(tmp_path: Path) -> CountingDisk:
    return CountingDisk(tmp_path)


@pytest.fixture
async def counted(tmp_path: Path, counting: CountingDisk) -> AsyncIterator[LocalFileStorage]:
    storage = LocalFileStorage(tmp_path, disk=counting)
    yield storage
    await storage.close()


# -- where files lie --------------------------------------------------------------------------


async def test_saving_for_a_new_coin_makes_its_folders_and_its_file(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    assert (tmp_path / NOON_FILE).read_bytes() == b'{"close":1}'


async def test_saving_for_a_known_coin_puts_the_file_beside_the_others(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    await storage.save_entry("crypto.com", "BTC", NOON + FIVE_MINUTES, {})
    assert names_in(tmp_path / DAY_FOLDER) == ["20261122120000.json", "20261122120500.json"]


async def test_opening_makes_the_root_and_what_is_above_it(tmp_path: Path) -> None:
    root = tmp_path / "some" / "where"
    storage = LocalFileStorage(root)
    await storage.open()
    assert root.is_dir()
    assert storage.address == f"local:{root}"
    await storage.close()


async def test_the_address_of_a_relative_root_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalFileStorage(Path("data"))
    assert storage.address == f"local:{tmp_path}/data"
    await storage.close()


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only: mount it writable"),
        (errno.EIO, "fault: check it"),
        (errno.ENODEV, "gone: attach it"),
        (errno.ESTALE, "stale: mount it again"),
        (errno.ENOTCONN, "not connected: mount it again"),
        (errno.EHOSTDOWN, "does not answer: check it"),
        (errno.ETIMEDOUT, "does not answer: check it"),
        (errno.EMFILE, "open files: raise its limit"),
        (errno.ENFILE, "open files: raise its limit"),
        (errno.ENOMEM, "out of memory"),
        (errno.EACCES, "permission denied: let the service's user"),
        (errno.EPERM, "not permitted: let the service's user"),
    ],
)
async def test_a_failure_that_can_pass_says_the_path_and_what_to_do(
    storage: LocalFileStorage, disk: FailingDisk, tmp_path: Path, code: int, advice: str
) -> None:
    kind = StorageDenied if code in (errno.EACCES, errno.EPERM) else StorageUnavailable
    coin = f"^{tmp_path}/raw_data/crypto.com/BTC"
    disk.code = code
    with pytest.raises(StorageUnavailable, match=f"^{tmp_path}/{NOON_FILE}: .*{advice}") as saving:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    with pytest.raises(kind, match=f"{coin}.*: .*{advice}"):
        await storage.get_range("crypto.com", "BTC", *EVER)
    with pytest.raises(kind, match=f"{coin}.*: .*{advice}"):
        await storage.get_latest_entry("crypto.com", "BTC")
    with pytest.raises(kind, match=advice):
        await storage.list_coins("crypto.com")
    with pytest.raises(kind, match=advice):
        await storage.write_blob("ledger/BTC.json", b"")
    with pytest.raises(kind, match=advice):
        await storage.check_writable()
    with pytest.raises(kind, match=advice):
        await storage.open()
    assert type(saving.value) is kind
    assert saving.value.retryable
    disk.code = None
    await storage.save_entry("crypto.com", "BTC", NOON, {})


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EXDEV, "the root must be on one"),
        (errno.EISDIR, "a folder lies where a file belongs"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EINVAL, "check what lies at this path"),
    ],
)
async def test_a_failure_that_stays_says_the_path_and_what_to_do(
    storage: LocalFileStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    advice: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise os_error(code)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match=f"^{tmp_path}/{NOON_FILE}: .*{advice}") as saving:
            await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert not saving.value.retryable
    assert staged_in(tmp_path) == []
    assert names_in(tmp_path / DAY_FOLDER) == []


@pytest.mark.parametrize("call", ["open", "read", "fstat"])
async def test_a_document_that_the_disk_fails_to_read_is_unknown_and_not_missing(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    real = getattr(os, call)

    def fail(what: Any, *rest: Any, **options: Any) -> Any:
        if call != "open" or str(what).endswith(".json"):
            raise os_error(errno.EIO)
        return real(what, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        for reading in (
            storage.get_latest_entry("crypto.com", "BTC"),
            storage.get_entry("crypto.com", "BTC", NOON),
            # A range is read without asking for what it does not need.
            *([storage.get_range("crypto.com", "BTC", NOON, NOON + 1)] if call != "fstat" else []),
        ):
            with pytest.raises(StorageUnavailable, match=f"^{tmp_path}/{NOON_FILE}: .*fault"):
                await reading
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {}


@pytest.mark.parametrize(
    ("call", "count"),
    [
        *((call, 1) for call in ("write", "utime", "replace", "fsync")),
        *((call, 40) for call in ("write", "utime", "replace", "fsync", "mkdir")),
    ],
)
async def test_a_write_that_fails_half_way_leaves_the_old_document_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int
) -> None:
    storage = LocalFileStorage(tmp_path)
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    times = [NOON + step * DAY for step in range(count)]

    def full(*_: Any, **__: Any) -> None:
        raise os_error(errno.ENOSPC)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(StorageUnavailable, match="the disk is full"):
            await storage.save_entries("crypto.com", "BTC", [(at, {}) for at in times])
    assert staged_in(tmp_path) == []
    # When folders cannot be synced, whole documents may have appeared.
    if call != "fsync":
        found = await storage.get_range("crypto.com", "BTC", *EVER)
        assert found == [{"close": 1}]
    assert all(json.loads(path.read_bytes()) in ({}, {"close": 1}) for path in documents(tmp_path))
    await storage.close()


def documents(root: Path) -> list[Path]:
    return sorted((root / "raw_data").rglob("*.json"))


async def test_a_file_where_a_folder_belongs_is_a_lasting_error(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    (tmp_path / "raw_data").write_bytes(b"")
    with pytest.raises(StorageError, match=f"^{tmp_path}/raw_data: .*move it away") as saving:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert not saving.value.retryable
    assert await storage.list_coins("crypto.com") == []


async def test_a_folder_where_a_document_belongs_is_a_lasting_error(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    (tmp_path / NOON_FILE).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"^{tmp_path}/{NOON_FILE}: .*move it away") as saving:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert not saving.value.retryable


async def test_a_root_that_is_a_file_is_told_when_opening(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    storage = LocalFileStorage(tmp_path / "root")
    with pytest.raises(StorageError, match=f"^{tmp_path}/root: "):
        await storage.open()
    (tmp_path / "root").unlink()
    await storage.open()
    await storage.close()


def test_a_user_without_rights_is_told_each_path_and_what_to_do() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        asyncio.run(fill(root))
        for path in (root / "raw_data/crypto.com/LOCKED", root / NOON_FILE):
            path.chmod(0)
        for folder in (root / DAY_FOLDER, root / "locked"):
            folder.chmod(0o555)
        for folder in (root / ".cb-trade", *(root / ".cb-trade").rglob("*")):
            folder.chmod(0o777)
        with storage_process("try_without_rights", str(root)) as user:
            said = user.hear()
    finally:
        (root / "raw_data/crypto.com/LOCKED").chmod(0o755)
        for folder in (root / DAY_FOLDER, root / "locked"):
            folder.chmod(0o755)
        shutil.rmtree(root)
    assert isinstance(said, dict)
    where = {
        "open": "locked/new",
        "read": NOON_FILE,
        "range": "raw_data/crypto.com/LOCKED/2026/11/22",
        "save": NOON_FILE,
        "check": "locked/new",
        "lock": "locked/new",
        "blob": "locked/5m.json",
    }
    assert said.keys() == where.keys()
    for what, below in where.items():
        told = said[what]
        assert told is not None, what
        assert told.startswith(f"{root}/{below}: permission denied: let the"), told


async def fill(root: Path) -> None:
    storage = LocalFileStorage(root)
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    await storage.save_entry("crypto.com", "LOCKED", NOON, {})
    await storage.write_blob("locked/1h.json", b"")
    await storage.close()


# -- foreign files and links ------------------------------------------------------------------


async def test_an_unreadable_document_is_reported_once(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    file = tmp_path / NOON_FILE
    file.write_bytes(b"no json")
    with capture_logs() as logs:
        await storage.get_range("crypto.com", "BTC", *EVER)
        await storage.get_latest_entry("crypto.com", "BTC")
    assert [(log["event"], log["path"]) for log in logs] == [
        ("storage_document_unreadable", str(file))
    ]


async def test_a_document_mended_from_outside_is_listed_again_after_it_was_read(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {})
    file = tmp_path / NOON_FILE
    file.write_bytes(b"no json")
    await storage.get_entry("crypto.com", "BTC", NOON)
    file.write_bytes(b"{}")
    await storage.get_entry("crypto.com", "BTC", NOON)
    assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == [NOON]


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
    (coin / "2027").write_bytes(b"")
    assert await storage.get_latest_entry("crypto.com", "BTC") == {"close": 1}
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}]


def make_link(path: Path) -> None:
    path.symlink_to(path.parent / "20261122120000.json")


def make_socket(path: Path) -> None:
    # The name of a socket may be short only.
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [make_link, os.mkfifo, os.mkdir, make_socket, make_large])
async def test_what_is_named_like_a_document_and_is_none_is_reported_once_and_skipped(
    storage: LocalFileStorage, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    later = NOON + FIVE_MINUTES
    make(tmp_path / LATER_FILE)
    with capture_logs() as logs:
        for _ in range(2):
            assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}]
            assert await storage.get_latest_entry("crypto.com", "BTC") == {"close": 1}
            assert await storage.get_entry("crypto.com", "BTC", later) is None
            assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == [NOON]
    assert [log["path"] for log in logs] == [f"{tmp_path}/{LATER_FILE}"]


@pytest.mark.parametrize("conditional", [False, True])
async def test_a_save_replaces_a_link_and_does_not_follow_it(
    storage: LocalFileStorage,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    conditional: bool,
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "file.json"
    outside.write_bytes(b'{"of": "another"}')
    (tmp_path / DAY_FOLDER).mkdir(parents=True)
    (tmp_path / NOON_FILE).symlink_to(outside)
    assert await storage.get_entry("crypto.com", "BTC", NOON) is None
    await storage.save_entries(
        "crypto.com", "BTC", [(NOON, {"close": 1})], expected={} if conditional else None
    )
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
    assert not (tmp_path / NOON_FILE).is_symlink()
    assert outside.read_bytes() == b'{"of": "another"}'


@pytest.mark.parametrize("depth", range(2, 7))
async def test_a_folder_that_leads_out_of_the_root_is_refused(
    storage: LocalFileStorage,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    depth: int,
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    folders = DAY_FOLDER.split("/")
    link = tmp_path.joinpath(*folders[:depth])
    link.parent.mkdir(parents=True)
    inner = outside.joinpath(*folders[depth:])
    inner.mkdir(parents=True, exist_ok=True)
    (inner / "20261122120000.json").write_bytes(b'{"secret": 1}')
    link.symlink_to(outside)
    series = ("crypto.com", "BTC")
    for refused in (
        storage.save_entry(*series, NOON, {}),
        storage.save_entry(*series, NOON + FIVE_MINUTES, {}),
        storage.get_entry(*series, NOON),
        storage.get_range(*series, NOON, NOON + DAY),
        storage.get_range(*series, *EVER),
        storage.get_latest_entry(*series),
    ):
        with pytest.raises(StorageError, match=f"^{link}.*leads out .* link") as refusal:
            await refused
        assert not refusal.value.retryable
    assert [path.read_bytes() for path in outside.rglob("*.json")] == [b'{"secret": 1}']


async def test_a_folder_that_is_linked_to_another_in_the_root_is_used(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    (tmp_path / "raw_data/exchange").symlink_to(tmp_path / "raw_data/crypto.com")
    assert await storage.get_range("exchange", "BTC", *EVER) == [{"close": 1}]
    assert await storage.list_coins("exchange") == ["BTC"]


async def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    link = tmp_path / "root"
    link.symlink_to("first")
    storage = LocalFileStorage(link)
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    assert (tmp_path / "first" / NOON_FILE).exists()
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}]
    link.unlink()
    link.symlink_to("second")
    assert await storage.get_range("crypto.com", "BTC", *EVER) == []
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
    assert (tmp_path / "second" / NOON_FILE).exists()
    await storage.close()


async def test_a_link_out_of_the_root_is_refused_for_blobs(
    storage: LocalFileStorage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_bytes(b"x")
    (tmp_path / "ledger").symlink_to(outside)
    (tmp_path / "records").mkdir()
    (tmp_path / "records/one").symlink_to(outside / "secret")
    with pytest.raises(StorageError, match=f"^{tmp_path}/ledger: .*link"):
        await storage.read_blob("ledger/secret")
    with pytest.raises(StorageError, match=f"^{tmp_path}/ledger: .*link"):
        await storage.write_blob("ledger/new", b"x")
    with pytest.raises(StorageError, match=f"^{tmp_path}/records/one: is no regular file"):
        await storage.read_blob("records/one")
    await storage.write_blob("records/one", b"mine")
    assert await storage.read_blob("records/one") == b"mine"
    assert names_in(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"x"


async def test_unfinished_files_are_not_written_outside_of_the_root_either(
    storage: LocalFileStorage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (tmp_path / ".cb-trade").symlink_to(outside)
    with pytest.raises(StorageError, match=r"^.*\.cb-trade.*link"):
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    with pytest.raises(StorageError, match=r"^.*\.cb-trade.*link"):
        await storage.collector_lock().acquire()
    assert names_in(outside) == []


# -- what a write does, and what is left of one ------------------------------------------------


async def test_a_single_save_syncs_the_file_before_it_appears_and_its_folder_after(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    await counted.save_entry("crypto.com", "BTC", NOON, {})
    assert counting.written == [
        ("synced", NOON_FILE),
        ("placed", NOON_FILE),
        ("folder synced", DAY_FOLDER),
    ]


async def test_a_bulk_save_syncs_all_files_at_once_and_each_folder_once(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    times = [NOON + step * FIVE_MINUTES for step in range(300)]
    await counted.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    steps = [step for step, _ in counting.written]
    assert steps == ["written"] * 300 + ["all synced"] + ["placed"] * 300 + ["folder synced"] * 2
    assert await counted.list_timestamps("crypto.com", "BTC", *EVER) == times


async def test_a_bulk_save_syncs_each_file_where_a_whole_file_system_cannot_be_synced(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def sync(file: int) -> None:
        synced.append(file)
        real(file)

    monkeypatch.setattr(disk_module, "_SYNCFS", None)
    monkeypatch.setattr(os, "fsync", sync)
    times = [NOON + step * FIVE_MINUTES for step in range(20)]
    await storage.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    assert len(synced) >= len(times)
    assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == times


async def test_a_bulk_save_whose_sync_fails_puts_nothing_in_place(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> bool:
        raise os_error(errno.EIO)

    monkeypatch.setattr(disk_module, "_syncfs", fail)
    entries = [(NOON + step * FIVE_MINUTES, {"step": step}) for step in range(20)]
    with pytest.raises(StorageUnavailable, match=f"^{tmp_path}.*fault"):
        await storage.save_entries("crypto.com", "BTC", entries)
    assert documents(tmp_path) == []
    assert staged_in(tmp_path) == []


async def test_a_long_batch_is_written_in_parts(
    counted: LocalFileStorage, counting: CountingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.implementations.local_file_storage._MOST_DOCUMENTS_AT_ONCE", 50)
    times = [NOON + step * FIVE_MINUTES for step in range(120)]
    await counted.save_entries("crypto.com", "BTC", [(time, {}) for time in times], expected={})
    assert [step for step, _ in counting.written].count("all synced") == 3
    assert await counted.list_timestamps("crypto.com", "BTC", *EVER) == times


async def test_names_of_unfinished_files_in_day_folders_are_skipped(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    (tmp_path / DAY_FOLDER).mkdir(parents=True)
    (tmp_path / DAY_FOLDER / ".tmp-1-20261122120000.json").write_bytes(b'{"half')
    assert await storage.get_range("crypto.com", "BTC", *EVER) == []


@pytest.mark.parametrize("how", ["open", "first write"])
async def test_what_a_killed_writer_left_is_swept_at_once(tmp_path: Path, how: str) -> None:
    with storage_process("leave_unfinished", str(tmp_path)) as writer:
        left = writer.hear()
        assert isinstance(left, list)
        storage = LocalFileStorage(tmp_path)
        await storage.open()
        assert sorted(map(str, staged_in(tmp_path))) == sorted(left), "its writer lives"
        writer.kill()
    assert sorted(map(str, staged_in(tmp_path))) == sorted(left)
    if how == "open":
        await storage.open()
    else:
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    assert staged_in(tmp_path) == []
    assert len(names_in(staging_of(tmp_path))) == (0 if how == "open" else 1)
    await storage.close()
    assert names_in(staging_of(tmp_path)) == []


async def test_what_cannot_be_swept_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = staging_of(tmp_path) / "dead"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"")

    def fail(*_: Any, **__: Any) -> None:
        raise os_error(errno.EACCES)

    storage = LocalFileStorage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", fail)
        await storage.open()
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    await storage.open()
    assert not left.exists()
    await storage.close()


async def test_a_new_writer_that_is_swept_before_it_locked_its_folder_makes_another(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir
    sweeps: list[str] = []

    def make_then_sweep(path: str, *rest: Any, **options: Any) -> None:
        real(path, *rest, **options)
        if str(path).startswith(str(staging_of(tmp_path))) and len(sweeps) < 3:
            sweeps.append(path)
            sweep(str(staging_of(tmp_path)))

    monkeypatch.setattr(os, "mkdir", make_then_sweep)
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    assert len(sweeps) == 3
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
    assert len(names_in(staging_of(tmp_path))) == 1


async def test_a_writer_whose_unfinished_files_are_taken_away_writes_again(
    tmp_path: Path,
) -> None:
    class SweptDisk(Disk):
        sweeps = 2

        def place(self, staged: str, folder: Folder, name: str) -> None:
            if self.sweeps:
                self.sweeps -= 1
                shutil.rmtree(Path(self.root) / ".cb-trade")
            super().place(staged, folder, name)

    storage = LocalFileStorage(tmp_path, disk=SweptDisk(tmp_path))
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    times = [NOON + step * FIVE_MINUTES for step in range(40)]
    await storage.save_entries("crypto.com", "BTC", [(time, {}) for time in times], expected=None)
    assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == times
    assert staged_in(tmp_path) == []
    await storage.close()


async def test_a_writer_whose_day_is_deleted_meanwhile_makes_it_again(tmp_path: Path) -> None:
    class DeletingDisk(Disk):
        deletions = 2

        def stage(self, path: str, content: bytes, *, durable: bool) -> str:
            if self.deletions:
                self.deletions -= 1
                shutil.rmtree(Path(self.root) / "raw_data/crypto.com")
            return super().stage(path, content, durable=durable)

    storage = LocalFileStorage(tmp_path, disk=DeletingDisk(tmp_path))
    await storage.save_entries(
        "crypto.com", "BTC", [(NOON, {"close": 1}), (NOON + DAY, {"close": 2})], expected={}
    )
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 1}, {"close": 2}]
    await storage.close()


async def test_a_document_deleted_between_listing_and_reading_is_passed_over(
    tmp_path: Path,
) -> None:
    class VanishingDisk(Disk):
        def names(self, folder: Folder) -> list[str]:
            found = super().names(folder)
            (Path(self.root) / NOON_FILE).unlink(missing_ok=True)
            return found

    storage = LocalFileStorage(tmp_path, disk=VanishingDisk(tmp_path))
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    await storage.save_entry("crypto.com", "BTC", NOON + FIVE_MINUTES, {"close": 2})
    assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 2}]
    await storage.close()


# -- other processes --------------------------------------------------------------------------


async def test_processes_that_write_the_same_tree_leave_whole_documents(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    count = 120
    with (
        storage_process("save", str(tmp_path), 1, count) as first,
        storage_process("save", str(tmp_path), 2, count) as second,
    ):
        said = [asyncio.create_task(asyncio.to_thread(child.hear)) for child in (first, second)]
        while not all(task.done() for task in said):
            found = await storage.get_range("crypto.com", "BTC", *EVER)
            assert all(document["writer"] in (1, 2) for document in found)
        assert [await task for task in said] == ["saved", "saved"]
    times = [NOON + step * FIVE_MINUTES for step in range(count)]
    assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == times
    assert staged_in(tmp_path) == []


async def test_conditional_saves_hold_between_processes(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    times = 40
    with (
        storage_process("count_up", str(tmp_path), times) as first,
        storage_process("count_up", str(tmp_path), times) as second,
    ):
        said = [await asyncio.to_thread(child.hear) for child in (first, second)]
    assert said == ["counted", "counted"]
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {"number": 2 * times}


async def test_a_conditional_save_sees_what_an_unconditional_one_of_another_root_object_wrote(
    tmp_path: Path,
) -> None:
    first, second = LocalFileStorage(tmp_path), LocalFileStorage(tmp_path)
    await first.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    version = (await first.get_entries("crypto.com", "BTC", [NOON]))[NOON].version
    await second.save_entry("crypto.com", "BTC", NOON, {"close": 2})
    with pytest.raises(StaleVersion):
        await first.save_entries(
            "crypto.com", "BTC", [(NOON, {"close": 3})], expected={NOON: version}
        )
    assert await first.get_entry("crypto.com", "BTC", NOON) == {"close": 2}
    await first.close()
    await second.close()


async def test_a_number_of_a_deleted_file_that_is_used_again_makes_no_old_version(
    storage: LocalFileStorage,
) -> None:
    versions = []
    for _ in range(50):
        await storage.save_entry("crypto.com", "BTC", NOON, {})
        held = await storage.get_entries("crypto.com", "BTC", [NOON])
        versions.append(held[NOON].version)
    assert len(set(versions)) == len(versions)


async def test_a_writer_that_keeps_the_lock_is_not_waited_for_for_ever(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_LOCK_PATIENCE_S", 0.05)
    await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
    (name,) = names_in(tmp_path / ".cb-trade/locks")
    descriptor, locked = Disk(tmp_path).try_lock(".cb-trade/locks", name)
    assert locked
    with pytest.raises(StorageUnavailable, match=f"locks/{name}: another process keeps it locked"):
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
    os.close(descriptor)
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
    assert staged_in(tmp_path) == []


# -- the collector's lock ---------------------------------------------------------------------


async def test_the_collectors_lock_of_another_process_is_respected_until_it_dies(
    storage: LocalFileStorage, tmp_path: Path
) -> None:
    lock = storage.collector_lock()
    with storage_process("hold", str(tmp_path)) as other:
        assert other.hear() is True
        assert not await lock.acquire()
        assert lock.holder == f"pid {other.pid} on {socket.gethostname()}"
        other.kill()
        assert await lock.acquire()
    assert lock.is_held
    assert lock.holder == f"pid {os.getpid()} on {socket.gethostname()}"
    assert (tmp_path / ".cb-trade/collector.lock").read_text() == lock.holder
    await lock.release()
    assert lock.holder is None


async def test_two_objects_of_one_process_exclude_one_another(tmp_path: Path) -> None:
    storages = [LocalFileStorage(tmp_path) for _ in range(2)]
    first, second = (storage.collector_lock() for storage in storages)
    assert await first.acquire()
    assert not await second.acquire()
    await first.release()
    assert await second.acquire()
    for storage in storages:
        await storage.close()
    await second.release()


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved away"])
async def test_a_lock_file_that_is_taken_away_is_noticed(
    storage: LocalFileStorage, tmp_path: Path, how: str
) -> None:
    first, second = storage.collector_lock(), storage.collector_lock()
    assert await first.acquire()
    file = tmp_path / ".cb-trade/collector.lock"
    if how == "deleted":
        file.unlink()
        assert not first.is_held
    elif how == "replaced":
        (tmp_path / "new").write_bytes(b"")
        (tmp_path / "new").replace(file)
        assert not first.is_held
    else:
        file.rename(tmp_path / "old")
    assert await second.acquire()
    assert not await first.acquire()
    assert not first.is_held
    await second.release()
    assert await first.acquire()
    await first.release()


async def test_a_lock_file_that_is_deleted_while_it_is_taken_is_not_the_lock(
    storage: LocalFileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = storage.collector_lock(), storage.collector_lock()
    file = tmp_path / ".cb-trade/collector.lock"
    real = fcntl.flock
    deletions = 2

    def delete_then_lock(descriptor: int, operation: int) -> None:
        nonlocal deletions
        if deletions:
            deletions -= 1
            file.unlink()
        real(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", delete_then_lock)
        assert await first.acquire()
    assert deletions == 0
    assert first.is_held
    assert not await second.acquire()
    await first.release()


async def test_calls_of_one_lock_at_once_do_not_lose_it(storage: LocalFileStorage) -> None:
    lock = storage.collector_lock()
    assert await asyncio.gather(*(lock.acquire() for _ in range(5))) == [True] * 5
    assert lock.is_held
    await lock.release()


async def test_a_lock_is_let_go_also_when_the_storage_is_closed(tmp_path: Path) -> None:
    storage = LocalFileStorage(tmp_path)
    lock = storage.collector_lock()
    assert await lock.acquire()
    await storage.close()
    with pytest.raises(StorageUnavailable, match="closed"):
        await lock.acquire()
    assert lock.is_held
    await lock.release()
    assert not lock.is_held


# -- how much is read -------------------------------------------------------------------------


async def test_a_range_opens_only_what_lies_in_it(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    steps = (-400, -40, -2, -1, 0, 1, 2, 40, 400)
    await counted.save_entries(
        "crypto.com", "BTC", [(NOON + step * DAY, {"step": step}) for step in steps]
    )
    counting.forget()
    found = await counted.get_range("crypto.com", "BTC", NOON, NOON + DAY + 1)
    days = [DAY_FOLDER, DAY_FOLDER[:-2] + "23"]
    assert found == [{"step": 0}, {"step": 1}]
    assert counting.opened == counting.listed == days
    assert [path.rpartition("/")[0] for path in counting.read_files] == days


async def test_one_day_costs_the_same_whatever_else_is_there(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    day = [NOON + step * FIVE_MINUTES for step in range(-144, 144)]
    costs = []
    for others in ((), range(-400, 400, 3)):
        for step in others:
            await counted.save_entry("crypto.com", "BTC", NOON + step * DAY, {})
        await counted.save_entries("crypto.com", "BTC", [(time, {}) for time in day])
        await counted.save_entries("crypto.com", "BTC", [(NOON, {})], interval="1h")
        counting.forget()
        assert len(await counted.get_range("crypto.com", "BTC", day[0], day[0] + DAY)) == 288
        costs.append((len(counting.opened), len(counting.listed), len(counting.read_files)))
    assert costs == [(1, 1, 288), (1, 1, 288)]


async def test_the_latest_entry_costs_four_directory_reads_whatever_the_history(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    for step in range(-800, 1, 7):
        await counted.save_entry("crypto.com", "BTC", NOON + step * DAY, {"step": step})
    counting.forget()
    assert await counted.get_latest_entry("crypto.com", "BTC") == {"step": -800 + 7 * 114}
    assert (len(counting.opened), len(counting.listed), len(counting.read_files)) == (4, 4, 1)


async def test_an_open_range_lists_only_folders_that_are_there(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    for step in (-400, 0, 1):
        await counted.save_entry("crypto.com", "BTC", NOON + step * DAY, {"step": step})
    counting.forget()
    found = await counted.get_range("crypto.com", "BTC", *EVER)
    assert found == [{"step": -400}, {"step": 0}, {"step": 1}]
    coin = "raw_data/crypto.com/BTC"
    assert counting.opened == counting.listed
    assert counting.listed == [
        coin,
        f"{coin}/2025", f"{coin}/2025/10", f"{coin}/2025/10/18",
        f"{coin}/2026", f"{coin}/2026/11", f"{coin}/2026/11/22", f"{coin}/2026/11/23",
    ]  # fmt: skip


async def test_a_page_reads_no_further_than_its_end(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    times = [NOON + step * DAY for step in range(40)]
    await counted.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    counting.forget()
    assert len(await counted.get_range("crypto.com", "BTC", *EVER, limit=2, offset=1)) == 3 - 1
    assert len(counting.read_files) == 3
    counting.forget()
    assert await counted.get_range("crypto.com", "BTC", *EVER, limit=0, offset=0) == []
    assert counting.opened == []


async def test_documents_are_decoded_one_by_one_as_they_are_read(
    counted: LocalFileStorage, counting: CountingDisk
) -> None:
    times = [NOON + step * FIVE_MINUTES for step in range(3)]
    await counted.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    counting.forget()
    seen = []

    def decode(timestamp: int, _: bytes) -> int:
        seen.append((timestamp, len(counting.read_files)))
        return timestamp

    assert await counted.get_range("crypto.com", "BTC", *EVER, decode=decode) == times
    assert seen == [(time, number + 1) for number, time in enumerate(times)]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_file_stays_open(storage: LocalFileStorage, tmp_path: Path) -> None:
    def refuse(timestamp: int, _: bytes) -> Any:
        raise StorageError("refused")

    await storage.open()
    times = [NOON + step * DAY for step in range(40)]
    await storage.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
    await storage.get_range("crypto.com", "BTC", *EVER)
    before = open_files()
    for _ in range(3):
        await storage.save_entries("crypto.com", "BTC", [(time, {}) for time in times])
        await storage.get_range("crypto.com", "BTC", *EVER, limit=1)
        await storage.get_latest_entry("crypto.com", "BTC")
        await storage.list_timestamps("crypto.com", "BTC", *EVER)
        await storage.check_coin_exists("crypto.com", "BTC")
        with pytest.raises(StorageError, match="refused"):
            await storage.get_range("crypto.com", "BTC", *EVER, decode=refuse)
        with pytest.raises(StaleVersion):
            await storage.save_entries("crypto.com", "BTC", [(NOON, {})], expected={})
    assert open_files() == before


# -- room -------------------------------------------------------------------------------------


class SmallDisk(Disk):
    """A disk with so much room: bytes and inodes, free and in all."""

    room = (500 * 2**30, 1000 * 2**30, 50_000_000, 60_000_000)

    def space(self) -> os.statvfs_result:
        free, size, inodes, all_inodes = self.room
        block = 4096
        blocks = size // block
        return os.statvfs_result(
            (block, block, blocks, free // block, free // block, all_inodes, inodes, inodes, 0, 255)
        )


@pytest.mark.parametrize(
    ("room", "told"),
    [
        ((500 * 2**30, 1000 * 2**30, 50_000_000, 60_000_000), []),
        ((49 * 2**30, 1000 * 2**30, 50_000_000, 60_000_000), ["49.0 GiB of 1000.0 GiB are free"]),
        ((2**29, 4 * 2**30, 50_000_000, 60_000_000), ["0.5 GiB of 4.0 GiB are free"]),
        ((500 * 2**30, 1000 * 2**30, 2_000_000, 60_000_000), ["2000000 of 60000000 inodes"]),
        ((500 * 2**30, 1000 * 2**30, 150_000, 600_000), ["150000 of 600000 inodes"]),
        ((2**29, 4 * 2**30, 10, 60_000_000), ["0.5 GiB of 4.0 GiB", "10 of 60000000 inodes"]),
        ((500 * 2**30, 1000 * 2**30, 0, 0), []),
    ],
    ids=["plenty", "a share", "little", "share of inodes", "few inodes", "both", "no inodes"],
)
async def test_a_root_that_runs_short_warns(
    tmp_path: Path, room: tuple[int, int, int, int], told: list[str]
) -> None:
    disk = SmallDisk(tmp_path)
    disk.room = room
    storage = LocalFileStorage(tmp_path, disk=disk)
    warnings = await storage.warnings()
    assert len(warnings) == len(told)
    for warning, text in zip(warnings, told, strict=True):
        assert warning.startswith(f"{tmp_path}: ")
        assert text in warning
        assert "move the root" in warning
    await storage.close()


async def test_the_room_of_a_root_that_is_not_there_yet_is_that_of_its_place(
    tmp_path: Path,
) -> None:
    storage = LocalFileStorage(tmp_path / "not" / "yet")
    assert isinstance(await storage.warnings(), list)
    assert not (tmp_path / "not").exists()
    await storage.close()


# -- threads ----------------------------------------------------------------------------------


async def test_a_disk_that_stands_still_is_given_up_and_changes_nothing_later(
    tmp_path: Path,
) -> None:
    disk = HangingDisk(tmp_path)
    storage = LocalFileStorage(tmp_path, disk=disk, timeout_s=0.05)
    with pytest.raises(StorageUnavailable, match="not answered"):
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    disk.go.set()
    storage._threads.shutdown(wait=True)
    assert names_in(tmp_path / DAY_FOLDER) == []
    assert staged_in(tmp_path) == []


async def test_a_cancelled_save_ends_with_the_file_system_at_rest(tmp_path: Path) -> None:
    disk = HangingDisk(tmp_path)
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
    assert staged_in(tmp_path) == []
    await storage.close()


async def test_the_event_loop_runs_on_while_the_disk_hangs(tmp_path: Path) -> None:
    disk = HangingDisk(tmp_path)
    storage = LocalFileStorage(tmp_path, disk=disk)
    saving = asyncio.create_task(storage.save_entry("crypto.com", "BTC", NOON, {}))
    await asyncio.to_thread(disk.reached.wait, 10)
    assert await storage.get_entry("crypto.com", "BTC", NOON) is None
    disk.go.set()
    await saving
    assert await storage.get_entry("crypto.com", "BTC", NOON) == {}
    await storage.close()


async def test_a_disk_that_hangs_does_not_keep_the_storage_from_closing(tmp_path: Path) -> None:
    disk = HangingDisk(tmp_path)
    storage = LocalFileStorage(tmp_path, disk=disk, timeout_s=0.05)
    saving = asyncio.create_task(storage.save_entry("crypto.com", "BTC", NOON, {}))
    await asyncio.to_thread(disk.reached.wait, 10)
    started = time.monotonic()
    await storage.close()
    assert time.monotonic() - started < 5
    with pytest.raises(StorageUnavailable):
        await saving
    disk.go.set()
    storage._threads.shutdown(wait=True)
    assert documents(tmp_path) == []


async def test_the_lock_is_not_released_while_a_write_may_still_land(tmp_path: Path) -> None:
    disk = HangingDisk(tmp_path)
    storage = LocalFileStorage(tmp_path, disk=disk, timeout_s=0.05)
    lock, other = storage.collector_lock(), LocalFileStorage(tmp_path).collector_lock()
    assert await lock.acquire()
    with pytest.raises(StorageUnavailable, match="not answered"):
        await storage.save_entry("crypto.com", "BTC", NOON, {})
    await lock.release()
    assert lock.is_held
    assert not await other.acquire()
    disk.go.set()
    storage._threads.shutdown(wait=True)
    await lock.release()
    assert await other.acquire()
    await other.release()


async def test_a_closed_storage_says_so(tmp_path: Path) -> None:
    storage = LocalFileStorage(tmp_path)
    await storage.close()
    with pytest.raises(StorageUnavailable, match="closed"):
        await storage.list_coins("crypto.com")
