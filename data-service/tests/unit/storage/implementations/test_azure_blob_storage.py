"""Documents as blobs, on the emulator of Azure and on a stub that fails as it is told."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import azure.identity.aio
import orjson
import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    ResourceNotFoundError,
    ServiceRequestError,
)
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from azure.storage.blob.aio import BlobLeaseClient, ContainerClient
from structlog.testing import capture_logs

from errors import ConfigurationError
from storage.implementations.azure_blob_storage import AzureBlobStorage
from storage.implementations.azure_calls import WholeBodyTransport
from storage.interfaces import (
    StaleVersion,
    StorageDenied,
    StorageError,
    StorageThrottled,
    StorageUnavailable,
)
from storage.path_utility import StoragePathUtility
from tests.contract.storage_contract import DAY, RawDataStorageContract
from tests.support.azurite import ACCOUNT, KEY, Azurite, connection_string
from tests.support.blob_stub import Answer, BlobStub, Fault, Hang, Reset, Truncate
from tests.support.entries import FIVE_MINUTES, NOON

PATH: Final = "raw_data/crypto.com/BTC/2026/11/22/20261122120000.json"
MIDNIGHT: Final = NOON - DAY // 2
WRONG_KEY: Final = "d3Jvbmc="

Use = Callable[[AzureBlobStorage], Awaitable[object]]
USES: Final[dict[str, Use]] = {
    "open": lambda storage: storage.open(),
    "read": lambda storage: storage.get_entry("crypto.com", "BTC", NOON),
    "range": lambda storage: storage.get_range("crypto.com", "BTC", NOON, NOON + DAY),
    "list": lambda storage: storage.list_coins("crypto.com"),
    "save": lambda storage: storage.save_entry("crypto.com", "BTC", NOON, {"close": 1}),
    "write": lambda storage: storage.write_blob("ledger/x", b"1"),
    "check": lambda storage: storage.check_writable(),
    "lock": lambda storage: storage.collector_lock().acquire(),
}


def path_at(timestamp: int, coin: str = "BTC", interval: str = "5m") -> str:
    return StoragePathUtility.get_raw_data_path("crypto.com", coin, timestamp, interval=interval)


def documents(start: int, count: int, step: int = FIVE_MINUTES) -> dict[str, bytes]:
    """Blobs of entries, by path."""
    times = range(start, start + count * step, step)
    return {path_at(time): orjson.dumps({"timestamp": time}) for time in times}


def running() -> set[asyncio.Task[Any]]:
    """The tasks that run beside those of the stub: of its connections, and of accepting them."""
    of_the_stub = ("RequestHandler", "_accept_connection")
    return {
        task
        for task in asyncio.all_tasks()
        if not any(name in repr(task.get_coro()) for name in of_the_stub)
    }


class Pauses:
    """Stands for sleeping, which it notes and does not do."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


@asynccontextmanager
async def opened(stub: BlobStub, **options: Any) -> AsyncIterator[AzureBlobStorage]:
    """A storage on the stub, open, with nothing asked yet, and quick to give up."""
    quick: dict[str, Any] = {"request_timeout_s": 5.0, "sleep": Pauses()}
    storage = AzureBlobStorage(
        "stub", connection_string=stub.connection_string, **(quick | options)
    )
    await storage.open()
    stub.requests.clear()
    try:
        yield storage
    finally:
        await storage.close()


@pytest.fixture
async def stub() -> AsyncIterator[BlobStub]:
    async with BlobStub().running() as running:
        yield running


@pytest.fixture
async def raw(azurite: Azurite, container: str) -> AsyncIterator[ContainerClient]:
    """The container, not by the backend."""
    client = ContainerClient.from_connection_string(azurite.connection_string, container)
    async with client:
        yield client


@pytest.fixture
async def storage(azurite: Azurite, container: str) -> AsyncIterator[AzureBlobStorage]:
    storage = AzureBlobStorage(container, connection_string=azurite.connection_string)
    await storage.open()
    yield storage
    await storage.close()


async def test_a_container_that_is_not_there_is_not_made_by_who_only_reads(
    azurite: Azurite, container: str
) -> None:
    storage = AzureBlobStorage(container, connection_string=azurite.connection_string)
    try:
        for _ in range(2):
            with pytest.raises(StorageError, match="there is no such storage root; check"):
                await storage.open(read_only=True)
    finally:
        await storage.close()


class TestOnAzurite(RawDataStorageContract):
    raw: ContainerClient

    @pytest.fixture(autouse=True)
    def _around(self, raw: ContainerClient) -> None:
        self.raw = raw

    async def raw_read(self, storage: Any, path: str) -> bytes | None:
        try:
            answer = await self.raw.download_blob(path)
        except ResourceNotFoundError:
            return None
        content: bytes = await answer.readall()
        return content

    async def raw_write(self, storage: Any, path: str, content: bytes) -> None:
        await self.raw.upload_blob(path, content, overwrite=True)

    async def test_a_saved_entry_is_a_json_blob_of_the_container(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        (blob,) = [blob async for blob in raw.list_blobs()]
        assert blob.name == PATH
        assert blob.content_settings.content_type == "application/json"
        assert blob.blob_type == "BlockBlob"

    async def test_blobs_beside_the_layout_are_no_coins(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await self.save(storage, NOON)
        for path in ("raw_data/crypto.com/readme.txt", "raw_data/crypto.com/%zz/2026", "other/x"):
            await raw.upload_blob(path, b"{}")
        await raw.upload_blob("raw_data/crypto.com/BTC/2026/13/99/20261399000000.json", b"{}")
        await raw.upload_blob("raw_data/crypto.com/BTC/notes/2026.json", b"{}")
        assert await storage.list_coins("crypto.com") == ["BTC"]
        assert await self.times(storage, 0, 2**60) == [NOON]

    async def test_an_empty_blob_is_read_as_one(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await raw.upload_blob("ledger/empty", b"")
        assert await storage.read_blob("ledger/empty") == b""

    async def test_what_is_not_stale_in_a_batch_is_written_and_the_rest_is_named(
        self, storage: AzureBlobStorage
    ) -> None:
        times = [NOON + step * FIVE_MINUTES for step in range(3)]
        await self.save(storage, times[1])
        entries = [(time, {"new": time}) for time in times]
        with pytest.raises(StaleVersion) as raised:
            await storage.save_entries("crypto.com", "BTC", entries, expected={})
        assert path_at(times[1]) in raised.value.message
        assert path_at(times[0]) not in raised.value.message
        found = await storage.get_entries("crypto.com", "BTC", times)
        assert [held.content for held in found.values()] == [
            {"new": times[0]}, {"timestamp": times[1], "interval": "5m"}, {"new": times[2]},
        ]  # fmt: skip

    async def test_a_batch_that_names_an_entry_twice_keeps_the_last(
        self, storage: AzureBlobStorage
    ) -> None:
        await storage.save_entries("crypto.com", "BTC", [(NOON, {"n": 1}), (NOON, {"n": 2})])
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"n": 2}

    async def test_an_unreadable_document_is_reported_once_with_its_path(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await raw.upload_blob(PATH, b"no json")
        with capture_logs() as logs:
            for _ in range(2):
                assert await storage.get_latest_entry("crypto.com", "BTC") is None
        (said,) = [entry for entry in logs if entry["event"] == "storage_document_unreadable"]
        assert PATH in said["path"]
        await raw.upload_blob(PATH, b"{}", overwrite=True)
        assert await storage.get_latest_entry("crypto.com", "BTC") == {}
        assert await storage.list_timestamps("crypto.com", "BTC", NOON, NOON + 1) == [NOON]

    async def test_an_unreadable_document_that_is_replaced_by_its_version_is_listed_again(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await raw.upload_blob(PATH, b"no json")
        held = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON]
        assert held.content is None
        assert await storage.list_timestamps("crypto.com", "BTC", NOON, NOON + 1) == []
        await storage.save_entries(
            "crypto.com", "BTC", [(NOON, {"close": 1})], expected={NOON: held.version}
        )
        assert await storage.list_timestamps("crypto.com", "BTC", NOON, NOON + 1) == [NOON]

    @pytest.mark.parametrize("path", ["ledger/a b+c#d?e%20é~.json", "ledger/%2e%2e/%", "ledger/&="])
    async def test_a_record_of_any_name_is_read_back_and_lies_at_it(
        self, storage: AzureBlobStorage, raw: ContainerClient, path: str
    ) -> None:
        await storage.write_blob(path, b"1")
        assert await storage.read_blob(path) == b"1"
        assert [name async for name in raw.list_blob_names()] == [path]

    @pytest.mark.parametrize("coin", ["BTC.", "...", "%2F", "a b", "+~#?&", "é/ñ", "x" * 200])
    async def test_coins_of_any_name_come_back_as_they_were_saved(
        self, storage: AzureBlobStorage, coin: str
    ) -> None:
        await storage.save_entry("crypto.com", coin, NOON, {"coin": coin})
        assert await storage.list_coins("crypto.com") == [coin]
        assert await storage.check_coin_exists("crypto.com", coin)
        assert await storage.get_latest_entry("crypto.com", coin) == {"coin": coin}

    async def test_what_decode_makes_is_returned_and_its_failure_raised(
        self, storage: AzureBlobStorage
    ) -> None:
        await self.save(storage, NOON)

        def refuse(timestamp: int, content: bytes) -> None:
            raise StorageError(f"schema of {timestamp} is unknown")

        decoded = await storage.get_range(
            "crypto.com", "BTC", NOON, NOON + 1, decode=lambda time, content: (time, len(content))
        )
        assert decoded == [(NOON, 43)]
        with pytest.raises(StorageError, match="schema"):
            await storage.get_range("crypto.com", "BTC", NOON, NOON + 1, decode=refuse)


class TestOpening:
    async def test_the_container_is_made_and_may_be_there_already(
        self, azurite: Azurite, container: str, raw: ContainerClient
    ) -> None:
        storage = AzureBlobStorage(container, connection_string=azurite.connection_string)
        assert not await raw.exists()
        await storage.open()
        assert await raw.exists()
        await storage.open()
        await storage.close()

    async def test_two_that_make_the_container_at_once_both_open(
        self, azurite: Azurite, container: str
    ) -> None:
        storages = [
            AzureBlobStorage(container, connection_string=azurite.connection_string)
            for _ in range(4)
        ]
        await asyncio.gather(*(storage.open() for storage in storages))
        await storages[0].save_entry("crypto.com", "BTC", NOON, {"close": 1})
        for storage in storages:
            assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
        await asyncio.gather(*(storage.close() for storage in storages))

    async def test_it_opens_once_the_service_is_back(self, stub: BlobStub) -> None:
        storage = AzureBlobStorage("stub", connection_string=stub.connection_string, sleep=Pauses())
        stub.always = Answer(500)
        with pytest.raises(StorageUnavailable):
            await storage.open()
        stub.always = None
        await storage.open()
        await storage.check_writable()
        await storage.close()

    async def test_a_signature_that_may_not_make_containers_opens_one_that_is_there(
        self, azurite: Azurite, storage: AzureBlobStorage, container: str
    ) -> None:
        limited = AzureBlobStorage(container, connection_string=signed(azurite, container))
        await limited.open()
        await limited.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        assert await limited.list_coins("crypto.com") == ["BTC"]
        await limited.close()

    async def test_a_container_that_is_missing_and_may_not_be_made_is_denied(
        self, azurite: Azurite, container: str
    ) -> None:
        limited = AzureBlobStorage(container, connection_string=signed(azurite, container))
        with pytest.raises(StorageDenied, match=container):
            await limited.open()
        await limited.close()

    async def test_a_container_that_was_deleted_is_unavailable_never_empty(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await raw.delete_container()
        for name in ("read", "range", "list", "save", "check", "lock"):
            with pytest.raises(StorageUnavailable, match="create it"):
                await USES[name](storage)

    async def test_before_opening_and_after_closing_it_is_unavailable(self, stub: BlobStub) -> None:
        storage = AzureBlobStorage("stub", connection_string=stub.connection_string)
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match="not open"):
                await storage.list_coins("crypto.com")
            await storage.open()
            await storage.close()

    async def test_closing_leaves_nothing_running(self, stub: BlobStub) -> None:
        before = running()
        async with opened(stub) as storage:
            stub.blobs = documents(MIDNIGHT, 50)
            await storage.get_range("crypto.com", "BTC", 0, 2**60)
        assert running() == before


class TestRequests:
    """What reading costs, in requests."""

    async def test_coins_are_one_listing_however_many_entries_there_are(
        self, stub: BlobStub
    ) -> None:
        for coin in range(100):
            times = range(NOON, NOON + 60 * FIVE_MINUTES, FIVE_MINUTES)
            stub.blobs |= {path_at(time, coin=f"C{coin}"): b"{}" for time in times}
        async with opened(stub) as storage:
            assert len(await storage.list_coins("crypto.com")) == 100
            assert len(stub.requests) == 1

    async def test_thousands_of_coins_are_listed_page_by_page(self, stub: BlobStub) -> None:
        stub.blobs = {path_at(NOON, coin=f"C{coin}"): b"{}" for coin in range(5001)}
        async with opened(stub) as storage:
            assert await storage.list_coins("crypto.com") == sorted(
                f"C{coin}" for coin in range(5001)
            )
            assert len(stub.requests) == 2

    async def test_whether_a_coin_exists_is_one_request(self, stub: BlobStub) -> None:
        stub.blobs = documents(MIDNIGHT, 288)
        async with opened(stub) as storage:
            assert await storage.check_coin_exists("crypto.com", "BTC")
            assert not await storage.check_coin_exists("crypto.com", "BT")
            assert len(stub.requests) == 2

    async def test_the_latest_entry_is_five_requests_whatever_the_history(
        self, stub: BlobStub
    ) -> None:
        stub.blobs = documents(NOON - 800 * DAY, 801, step=DAY)
        async with opened(stub) as storage:
            assert await storage.get_latest_entry("crypto.com", "BTC") == {"timestamp": NOON}
            assert len(stub.requests) == 5

    async def test_the_latest_entry_of_an_interval_that_ended_is_found_further_back(
        self, stub: BlobStub
    ) -> None:
        old = NOON - 40 * DAY
        stub.blobs = documents(old, 41, step=DAY) | {path_at(old, interval="1h"): b'{"old": 1}'}
        async with opened(stub) as storage:
            found = await storage.get_latest_entry("crypto.com", "BTC", interval="1h")
            assert found == {"old": 1}

    async def test_one_day_costs_the_same_whatever_else_is_there(self, stub: BlobStub) -> None:
        async def cost(storage: AzureBlobStorage) -> int:
            stub.requests.clear()
            found = await storage.get_range("crypto.com", "BTC", MIDNIGHT, MIDNIGHT + DAY)
            assert len(found) == 288
            return len(stub.requests)

        stub.blobs = documents(MIDNIGHT, 288)
        async with opened(stub) as storage:
            alone = await cost(storage)
            stub.blobs |= documents(MIDNIGHT - 700 * DAY, 1500, step=DAY)
            stub.blobs |= {path_at(NOON, coin=f"C{coin}"): b"{}" for coin in range(100)}
            assert await cost(storage) == alone == 1 + 288

    async def test_an_open_ended_range_lists_only_what_is_there(self, stub: BlobStub) -> None:
        stub.blobs = documents(NOON - 3 * DAY, 4, step=DAY)
        async with opened(stub) as storage:
            found = await storage.get_range("crypto.com", "BTC", 0, 2**60)
            # The years, the months, the days, four days and their documents.
            assert (len(found), len(stub.requests)) == (4, 3 + 4 + 4)
            assert len(await storage.list_timestamps("crypto.com", "BTC", 0, 2**60)) == 4
            assert len(stub.requests) == 11 + 3 + 4

    async def test_a_page_reads_only_what_it_needs(self, stub: BlobStub) -> None:
        stub.blobs = documents(NOON - 30 * DAY, 31 * 288)
        async with opened(stub) as storage:
            found = await storage.get_range("crypto.com", "BTC", 0, 2**60, limit=10, offset=5)
            assert found[0] == {"timestamp": NOON - 30 * DAY + 5 * FIVE_MINUTES}
            reads = [name for _, name, _ in stub.requests if name]
            assert (len(found), len(reads), len(stub.requests)) == (10, 15, 15 + 3 + 1)

    async def test_entries_of_a_day_that_are_missing_are_one_listing(self, stub: BlobStub) -> None:
        stub.blobs = documents(MIDNIGHT, 2)
        times = [MIDNIGHT + step * FIVE_MINUTES for step in range(288)]
        async with opened(stub) as storage:
            found = await storage.get_entries("crypto.com", "BTC", times)
            assert (list(found), len(stub.requests)) == (times[:2], 1 + 2)

    async def test_few_entries_are_read_without_a_listing(self, stub: BlobStub) -> None:
        stub.blobs = documents(NOON, 2)
        async with opened(stub) as storage:
            found = await storage.get_entries("crypto.com", "BTC", [NOON, NOON + FIVE_MINUTES, 0])
            assert (len(found), len(stub.requests)) == (2, 3)

    async def test_reads_and_writes_are_bounded_for_all_callers_together(
        self, stub: BlobStub
    ) -> None:
        stub.blobs = documents(MIDNIGHT, 100)
        stub.delay_s = 0.002
        async with opened(stub) as storage:
            ranges = (
                storage.get_range("crypto.com", "BTC", MIDNIGHT, MIDNIGHT + DAY) for _ in range(3)
            )
            expected = [orjson.loads(content) for content in stub.blobs.values()]
            assert await asyncio.gather(*ranges) == [expected] * 3
            assert stub.most_at_once == 16
            stub.most_at_once = 0
            entries = [(MIDNIGHT + step * FIVE_MINUTES, {"n": step}) for step in range(100)]
            saves = (storage.save_entries("crypto.com", coin, entries) for coin in ("BTC", "ETH"))
            await asyncio.gather(*saves)
            assert stub.most_at_once == 8

    async def test_no_request_tells_of_the_machine(
        self, stub: BlobStub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        agents = []
        send = WholeBodyTransport.send

        async def note(self: WholeBodyTransport, request: Any, **options: Any) -> Any:
            agents.append(request.headers["User-Agent"])
            return await send(self, request, **options)

        monkeypatch.setattr(WholeBodyTransport, "send", note)
        async with opened(stub) as storage:
            await storage.check_writable()
        assert set(agents) == {"cb-trade-data"}


class TestFailures:
    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize(
        ("fault", "error", "said"),
        [
            (Answer(400, "InvalidHeaderValue"), StorageError, "InvalidHeaderValue"),
            (Answer(401), StorageDenied, "Storage Blob Data Contributor"),
            (Answer(403, "AuthorizationFailure"), StorageDenied, "firewall"),
            (Answer(404), StorageUnavailable, "not Azure"),
            (Answer(404, "ContainerBeingDeleted"), StorageUnavailable, "create it"),
            (Answer(409, "AccountBeingCreated"), StorageError, "AccountBeingCreated"),
            (Answer(412, "LeaseIdMissing"), StorageError, "LeaseIdMissing"),
            (Answer(408), StorageUnavailable, "408"),
            (Answer(429), StorageThrottled, "too much"),
            (Answer(500, "InternalError"), StorageUnavailable, "InternalError"),
            (Answer(502), StorageUnavailable, "502"),
            (Answer(503, "ServerBusy"), StorageThrottled, "ServerBusy"),
            (Answer(504), StorageUnavailable, "504"),
            (Answer(200, body=b"<html>Sign in</html>"), StorageUnavailable, "not Azure"),
            (Answer(302, headers={"Location": "/login"}), StorageUnavailable, "not Azure"),
            (Reset(), StorageUnavailable, "connection"),
            (Truncate(), StorageUnavailable, "connection"),
        ],
        ids=str,
    )
    async def test_every_failure_becomes_the_error_that_fits(
        self, stub: BlobStub, use: str, fault: Fault, error: type[StorageError], said: str
    ) -> None:
        stub.blobs[PATH] = b'{"close": 1}'
        async with opened(stub) as storage:
            stub.always = fault
            with pytest.raises(error, match=said) as raised:
                await USES[use](storage)
        assert type(raised.value) is error
        assert storage.address in raised.value.message
        assert raised.value.__cause__ is not None

    async def test_a_refused_connection_is_unavailable_at_once(self) -> None:
        stopped = Azurite()
        storage = AzureBlobStorage(
            "root", connection_string=stopped.connection_string, sleep=Pauses()
        )
        with pytest.raises(StorageUnavailable, match="no connection"):
            await storage.open()
        await storage.close()

    async def test_an_account_that_does_not_exist_is_said_to(self) -> None:
        storage = AzureBlobStorage(
            "root",
            connection_string=connection_string("http://account.invalid/account"),
            sleep=Pauses(),
        )
        with pytest.raises(StorageUnavailable, match="no such account"):
            await storage.open()
        await storage.close()

    async def test_a_wrong_key_is_denied(self, azurite: Azurite, container: str) -> None:
        storage = AzureBlobStorage(
            container, connection_string=connection_string(azurite.url, WRONG_KEY)
        )
        with pytest.raises(StorageDenied, match="key"):
            await storage.open()
        await storage.close()

    async def test_a_blob_that_holds_a_lease_of_another_is_no_stale_version(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        await BlobLeaseClient(raw.get_blob_client(PATH)).acquire(60)
        with pytest.raises(StorageError, match="LeaseIdMissing") as raised:
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
        assert type(raised.value) is StorageError

    @pytest.mark.parametrize("fault", [Answer(500), Answer(429), Reset(), Truncate()], ids=str)
    async def test_what_passes_is_tried_again_after_the_pauses(
        self, stub: BlobStub, fault: Fault
    ) -> None:
        stub.blobs[PATH] = b'{"close": 1}'
        pauses = Pauses()
        async with opened(stub, sleep=pauses, pauses_s=(0.5, 1.0)) as storage:
            # A broken connection that was used before is replaced once without a word.
            again = 2 if isinstance(fault, Reset) else 1
            stub.faults.extend([fault] * 2 * again)
            assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
        assert pauses.taken == [0.5, 1.0]

    async def test_what_does_not_pass_is_tried_once(self, stub: BlobStub) -> None:
        async with opened(stub) as storage:
            for fault in (Answer(403), Answer(400, "InvalidInput"), Answer(200)):
                stub.requests.clear()
                stub.always = fault
                with pytest.raises(StorageError):
                    await storage.check_writable()
                assert len(stub.requests) == 1

    @pytest.mark.parametrize("status", [429, 503])
    async def test_the_service_says_how_long_to_leave_it_alone(
        self, stub: BlobStub, status: int
    ) -> None:
        pauses = Pauses()
        async with opened(stub, sleep=pauses, pauses_s=(0.5, 1.0)) as storage:
            stub.faults.append(Answer(status, headers={"Retry-After": "3"}))
            stub.faults.append(Answer(status))
            await storage.check_writable()
            assert pauses.taken == [3, 1.0]

    async def test_a_wait_that_does_not_fit_is_the_callers(self, stub: BlobStub) -> None:
        pauses = Pauses()
        async with opened(stub, sleep=pauses) as storage:
            stub.always = Answer(429, headers={"Retry-After": "60"})
            with pytest.raises(StorageThrottled) as raised:
                await storage.check_writable()
            assert (raised.value.retry_after, pauses.taken, len(stub.requests)) == (60, [], 1)

    @pytest.mark.parametrize("use", USES)
    async def test_a_server_that_hangs_ends_in_time(self, stub: BlobStub, use: str) -> None:
        async with opened(
            stub, request_timeout_s=0.3, attempt_timeout_s=0.06, pauses_s=(0, 0)
        ) as storage:
            stub.always = Hang()
            began = time.monotonic()
            with pytest.raises(StorageUnavailable, match="not answered"):
                await USES[use](storage)
            assert time.monotonic() - began < 3

    async def test_the_whole_request_is_bounded_and_its_turn_too(self, stub: BlobStub) -> None:
        async with opened(
            stub, request_timeout_s=0.2, attempt_timeout_s=60, reads_at_once=1
        ) as storage:
            stub.always = Hang()
            reads = (storage.get_entry("crypto.com", "BTC", NOON) for _ in range(5))
            ends = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 10)
            assert {type(end) for end in ends} == {StorageUnavailable}
            # Not five one after the other; a turn that comes as the time runs out may be taken.
            assert len(stub.requests) <= 2

    async def test_a_cancelled_read_leaves_nothing_behind(self, stub: BlobStub) -> None:
        stub.blobs = documents(NOON, 40, step=DAY)
        times = range(NOON, NOON + 40 * DAY, DAY)
        async with opened(stub) as storage:
            before = running()
            stub.always = Hang()
            stub.asked.clear()
            reading = asyncio.create_task(storage.get_entries("crypto.com", "BTC", times))
            await asyncio.wait_for(stub.asked.wait(), 10)
            assert len(running() - before) > 16
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert running() == before
            stub.always = None
            assert len(await storage.get_entries("crypto.com", "BTC", times)) == 40

    async def test_one_failed_read_of_many_ends_the_others(self, stub: BlobStub) -> None:
        times = range(NOON, NOON + 100 * DAY, DAY)
        async with opened(stub) as storage:
            before = running()
            stub.faults.append(Answer(403))
            with pytest.raises(StorageDenied):
                await storage.get_entries("crypto.com", "BTC", times)
            assert running() == before
            assert len(stub.requests) < 100

    async def test_a_conditional_write_whose_answer_was_lost_is_no_stale_version(
        self, stub: BlobStub
    ) -> None:
        async with opened(stub) as storage:
            stub.faults.append(Reset(after=True))
            await storage.save_entries("crypto.com", "BTC", [(NOON, {"n": 1})], expected={})
            held = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON]
            stub.faults.append(Reset(after=True))
            await storage.save_entries(
                "crypto.com", "BTC", [(NOON, {"n": 2})], expected={NOON: held.version}
            )
            assert stub.blobs[PATH] == b'{"n":2}'

    async def test_the_same_bytes_of_another_writer_are_a_stale_version_all_the_same(
        self, stub: BlobStub
    ) -> None:
        async with opened(stub) as storage:
            await storage.save_entries("crypto.com", "BTC", [(NOON, {"n": 1})], expected={})
            stub.faults.append(Answer(500))
            with pytest.raises(StaleVersion):
                await storage.save_entries("crypto.com", "BTC", [(NOON, {"n": 1})], expected={})


class TestSecrets:
    async def test_no_failure_and_no_log_shows_what_signs(
        self, stub: BlobStub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.DEBUG)
        signature = "sv=2024-11-04&sr=c&sp=rwl&sig=s3cretSignature%3D"
        signing = f"BlobEndpoint={stub.url};SharedAccessSignature={signature}"
        faults: list[Fault | None] = [
            Answer(403, "AuthenticationFailed"),
            Answer(500),
            Answer(302),
            Reset(),
            None,
        ]
        shown = []
        for string in (stub.connection_string, signing):
            storage = AzureBlobStorage("stub", connection_string=string, sleep=Pauses())
            shown += [repr(storage), repr(vars(storage)), storage.address]
            await storage.open()
            with capture_logs() as logs:
                for fault in faults:
                    stub.always = fault
                    try:
                        await storage.get_range("crypto.com", "BTC", NOON, NOON + 1)
                    except StorageError as exc:
                        shown += traceback.format_exception(exc)
            stub.always = None
            await storage.close()
            shown += map(str, logs)
        text = "\n".join(shown)
        assert "AuthenticationFailed" in text
        for secret in (KEY, "s3cretSignature", "SharedAccessSignature"):
            assert secret not in text
            assert secret not in caplog.text

    async def test_requests_are_not_logged(
        self, stub: BlobStub, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        async with opened(stub) as storage:
            await storage.check_writable()
        assert [record for record in caplog.records if "azure" in record.name] == []

    @pytest.mark.parametrize(
        "text",
        [
            "nonsense",
            "AccountName=account",
            "AccountKey=c2VjcmV0",
            "AccountName=account;AccountKey=s3cret!",
            "AccountName=account;AccountKey=s3cre",
            "AccountName=account;AccountKey=c2VjcmV0;broken",
            "BlobEndpoint=http://[;AccountName=account;AccountKey=c2VjcmV0",
        ],
    )
    async def test_a_connection_string_that_is_none_stops_the_start_without_repeating_it(
        self, text: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"^AZURE_STORAGE_CONNECTION_STRING") as raised:
            await AzureBlobStorage("root", connection_string=text).open()
        assert "s3cre" not in "".join(traceback.format_exception(raised.value))
        assert "c2VjcmV0" not in "".join(traceback.format_exception(raised.value))

    @pytest.mark.parametrize(
        "url", ["account", "http://account.blob.core.windows.net", "https://account/?sig=s3cret"]
    )
    def test_an_account_url_that_is_none_stops_the_start(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^AZURE_STORAGE_ACCOUNT_URL") as raised:
            AzureBlobStorage("root", account_url=url)
        assert "s3cret" not in raised.value.message

    def test_exactly_one_way_in_is_taken(self) -> None:
        with pytest.raises(ConfigurationError, match="exactly one"):
            AzureBlobStorage("root")
        with pytest.raises(ConfigurationError, match="exactly one"):
            AzureBlobStorage(
                "root", connection_string=connection_string("http://h"), account_url="https://h"
            )

    @pytest.mark.parametrize(
        ("way", "address"),
        [
            ({"connection_string": f"AccountName=acc;AccountKey={KEY}"}, "azure:acc/root"),
            (
                {
                    "connection_string": f"DefaultEndpointsProtocol=https;AccountName=acc;"
                    f"AccountKey={KEY};EndpointSuffix=core.windows.net;"
                },
                "azure:acc/root",
            ),
            ({"account_url": "https://acc.blob.core.windows.net/"}, "azure:acc/root"),
            ({"account_url": "https://blobs.example.org"}, "azure:blobs.example.org/root"),
            (
                {"connection_string": connection_string(f"http://127.0.0.1:10000/{ACCOUNT}")},
                f"azure:127.0.0.1:10000/{ACCOUNT}/root",
            ),
        ],
    )
    def test_the_address_names_account_and_container(
        self, way: dict[str, str], address: str
    ) -> None:
        assert AzureBlobStorage("root", **way).address == address  # type: ignore[arg-type]


class Identity:
    """The machine's own identity, on a machine that has none."""

    def __init__(self) -> None:
        self.closed = False

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        raise ClientAuthenticationError("no identity here")

    async def close(self) -> None:
        self.closed = True


class TestIdentity:
    async def test_a_machine_without_identity_is_denied_and_told_what_to_check(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity = Identity()
        monkeypatch.setattr(azure.identity.aio, "DefaultAzureCredential", lambda: identity)
        storage = AzureBlobStorage("root", account_url="https://acc.blob.core.windows.net")
        with pytest.raises(StorageDenied, match="AZURE_STORAGE_ACCOUNT_URL"):
            await storage.open()
        assert not identity.closed
        await storage.close()
        assert identity.closed

    def test_the_identity_library_is_imported_only_for_an_account_url(self) -> None:
        code = (
            "import asyncio, sys\n"
            "from storage.implementations.azure_blob_storage import AzureBlobStorage\n"
            "async def main(**way):\n"
            "    storage = AzureBlobStorage('root', request_timeout_s=0.01, **way)\n"
            "    try:\n"
            "        await storage.open()\n"
            "    except Exception as exc:\n"
            "        print(type(exc).__name__)\n"
            "    await storage.close()\n"
            "    print('azure.identity' in sys.modules)\n"
            f"asyncio.run(main(connection_string={connection_string('http://127.0.0.1:1/a')!r}))\n"
            "asyncio.run(main(account_url='https://127.0.0.1:1'))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert [line for line in done.stdout.split() if line in ("True", "False")] == [
            "False", "True",
        ]  # fmt: skip


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class TestCollectorLock:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    async def storage(
        self, azurite: Azurite, container: str, clock: Clock
    ) -> AsyncIterator[AzureBlobStorage]:
        storage = AzureBlobStorage(
            container,
            connection_string=azurite.connection_string,
            monotonic=clock,
            sleep=Pauses(),
        )
        await storage.open()
        yield storage
        await storage.close()

    @staticmethod
    async def lapse(raw: ContainerClient) -> None:
        """End the lease, as its minute would."""
        blob = raw.get_blob_client(".cb-trade/collector")
        await BlobLeaseClient(blob).break_lease(0)

    @staticmethod
    def cut(monkeypatch: pytest.MonkeyPatch) -> None:
        """Break the network."""

        async def fail(self: WholeBodyTransport, request: Any, **options: Any) -> None:
            raise ServiceRequestError("cut")

        monkeypatch.setattr(WholeBodyTransport, "send", fail)

    async def test_who_holds_it_is_told_to_the_other(self, storage: AzureBlobStorage) -> None:
        mine, other = storage.collector_lock(), storage.collector_lock()
        assert mine.holder is None
        assert await mine.acquire()
        assert not await other.acquire()
        assert other.holder == mine.holder
        assert str(os.getpid()) in str(other.holder)
        await mine.release()
        assert mine.holder is None

    async def test_it_is_relied_on_for_fifty_seconds_from_before_it_was_asked_for(
        self, storage: AzureBlobStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send = WholeBodyTransport.send

        async def slow(self: WholeBodyTransport, request: Any, **options: Any) -> Any:
            clock.now += 4
            return await send(self, request, **options)

        lock = storage.collector_lock()
        began = clock.now
        monkeypatch.setattr(WholeBodyTransport, "send", slow)
        assert await lock.acquire()
        clock.now = began + 49.9
        assert lock.is_held
        clock.now = began + 50
        assert not lock.is_held
        assert lock.renew_every_s == 15

    async def test_while_it_cannot_be_renewed_it_is_held_until_it_may_lapse(
        self, storage: AzureBlobStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = storage.collector_lock()
        assert await lock.acquire()
        with monkeypatch.context() as patched:
            self.cut(patched)
            clock.now += 45
            with pytest.raises(StorageUnavailable):
                await lock.acquire()
            assert lock.is_held
            clock.now += 5
            assert not lock.is_held
        assert await lock.acquire()
        assert lock.is_held

    async def test_a_lapsed_one_that_nobody_took_is_taken_back(
        self, storage: AzureBlobStorage, raw: ContainerClient, clock: Clock
    ) -> None:
        lock = storage.collector_lock()
        assert await lock.acquire()
        clock.now += 3600
        await self.lapse(raw)
        assert await lock.acquire()
        assert lock.is_held
        assert not await storage.collector_lock().acquire()

    async def test_a_lapsed_one_that_another_took_is_lost(
        self, storage: AzureBlobStorage, raw: ContainerClient
    ) -> None:
        mine, other = storage.collector_lock(), storage.collector_lock()
        assert await mine.acquire()
        await self.lapse(raw)
        assert await other.acquire()
        assert not await mine.acquire()
        assert not mine.is_held
        await mine.release()
        assert other.is_held
        assert await other.acquire()

    async def test_releasing_never_fails_and_what_was_asked_for_in_vain_is_given_back(
        self, storage: AzureBlobStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = storage.collector_lock()
        await lock.release()
        assert await lock.acquire()
        await lock.release()
        send = WholeBodyTransport.send

        async def lose(self: WholeBodyTransport, request: Any, **options: Any) -> Any:
            await send(self, request, **options)
            raise ServiceRequestError("the answer was lost")

        with monkeypatch.context() as patched:
            patched.setattr(WholeBodyTransport, "send", lose)
            with pytest.raises(StorageUnavailable):
                await lock.acquire()
        assert not lock.is_held
        await lock.release()
        assert await storage.collector_lock().acquire()

    async def test_releasing_while_the_network_is_away_is_quiet(
        self, storage: AzureBlobStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = storage.collector_lock()
        assert await lock.acquire()
        self.cut(monkeypatch)
        await lock.release()
        assert not lock.is_held
        await storage.close()
        await lock.release()

    async def test_of_many_that_try_at_once_one_gets_it(self, storage: AzureBlobStorage) -> None:
        locks = [storage.collector_lock() for _ in range(8)]
        assert sorted(await asyncio.gather(*(lock.acquire() for lock in locks))) == [
            *[False] * 7, True,
        ]  # fmt: skip


async def test_what_was_written_lasts_over_a_stop_of_the_emulator(tmp_path: Any) -> None:
    azurite = Azurite(tmp_path)
    await asyncio.to_thread(azurite.start)
    try:
        storage = AzureBlobStorage(
            "root", connection_string=azurite.connection_string, sleep=Pauses()
        )
        await storage.open()
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        await asyncio.to_thread(azurite.stop)
        with pytest.raises(StorageUnavailable):
            await storage.get_entry("crypto.com", "BTC", NOON)
        await asyncio.to_thread(azurite.start)
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}
        await storage.close()
    finally:
        azurite.stop()


def signed(azurite: Azurite, container: str) -> str:
    """A connection string that may read, write and list one container, and make none."""
    signature = generate_container_sas(
        ACCOUNT,
        container,
        account_key=KEY,
        permission=ContainerSasPermissions(read=True, write=True, create=True, list=True),
        expiry=datetime.now(UTC) + timedelta(hours=1),
    )
    return f"BlobEndpoint={azurite.url};SharedAccessSignature={signature}"
