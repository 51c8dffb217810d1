"""What every storage backend promises, read back behind the backend."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from errors import InvalidEntry, InvalidRequest
from storage.interfaces import IRawDataStorage, StaleVersion
from storage.path_utility import StoragePathUtility
from tests.support.entries import FIVE_MINUTES, NOON

DAY = 86_400_000


def at(text: str) -> int:
    """An ISO time in UTC as ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


class RawDataStorageContract:
    """Subclass it with a fixture ``storage`` and the two methods that go round the backend."""

    @abstractmethod
    async def raw_read(self, storage: Any, path: str) -> bytes | None:
        """The bytes at a path of the root, not by the backend."""

    @abstractmethod
    async def raw_write(self, storage: Any, path: str, content: bytes) -> None:
        """Put bytes at a path of the root, not by the backend."""

    async def save(
        self, storage: IRawDataStorage, *times: int, interval: str = "5m", coin: str = "BTC"
    ) -> None:
        await storage.save_entries(
            "crypto.com",
            coin,
            [(time, {"timestamp": time, "interval": interval}) for time in times],
            interval=interval,
        )

    async def times(
        self, storage: IRawDataStorage, start: int, end: int, **options: Any
    ) -> list[int]:
        documents = await storage.get_range("crypto.com", "BTC", start, end, **options)
        return [document["timestamp"] for document in documents]

    async def test_a_saved_entry_lies_at_its_path_as_json(self, storage: IRawDataStorage) -> None:
        document = {"timestamp": NOON, "close": 92781.8, "order_book": None}
        await storage.save_entry("crypto.com", "BTC/EUR", NOON, document)
        content = await self.raw_read(
            storage, "raw_data/crypto.com/BTC-EUR/2026/11/22/20261122120000.json"
        )
        assert content is not None
        assert orjson.loads(content) == document

    async def test_entries_of_another_interval_have_it_in_their_name(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, NOON, interval="1h")
        path = "raw_data/crypto.com/BTC/2026/11/22/20261122120000_1h.json"
        assert await self.raw_read(storage, path) is not None
        assert await storage.get_entry("crypto.com", "BTC", NOON) is None

    async def test_an_aware_datetime_of_any_zone_names_the_same_entry(
        self, storage: IRawDataStorage
    ) -> None:
        tokyo = datetime.fromtimestamp(NOON / 1000, timezone(timedelta(hours=9)))
        await storage.save_entry("crypto.com", "BTC", tokyo, {"timestamp": NOON})
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"timestamp": NOON}

    async def test_the_last_save_of_an_entry_wins(self, storage: IRawDataStorage) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 2}

    async def test_concurrent_saves_of_one_entry_leave_one_whole_document(
        self, storage: IRawDataStorage
    ) -> None:
        documents = [{"writer": writer, "padding": "x" * 20_000} for writer in range(20)]
        await asyncio.gather(
            *(storage.save_entry("crypto.com", "BTC", NOON, document) for document in documents)
        )
        assert await storage.get_entry("crypto.com", "BTC", NOON) in documents
        assert await storage.list_timestamps("crypto.com", "BTC", 0, 2**60) == [NOON]

    async def test_a_document_that_json_cannot_express_is_refused_and_nothing_is_stored(
        self, storage: IRawDataStorage
    ) -> None:
        with pytest.raises(InvalidEntry, match="JSON"):
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": object()})
        assert not await storage.check_coin_exists("crypto.com", "BTC")

    async def test_saving_no_entries_does_nothing(self, storage: IRawDataStorage) -> None:
        await storage.save_entries("crypto.com", "BTC", [])
        assert await storage.list_coins("crypto.com") == []

    async def test_entries_asked_by_time_come_by_time_and_missing_ones_are_left_out(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, NOON, NOON + FIVE_MINUTES)
        asked = [NOON + FIVE_MINUTES, NOON + 2 * FIVE_MINUTES]
        found = await storage.get_entries("crypto.com", "BTC", asked)
        assert list(found) == [NOON + FIVE_MINUTES]
        held = found[NOON + FIVE_MINUTES].content
        assert held == {"timestamp": NOON + FIVE_MINUTES, "interval": "5m"}
        assert await storage.get_entries("crypto.com", "BTC", []) == {}

    async def test_a_range_includes_its_start_and_excludes_its_end(
        self, storage: IRawDataStorage
    ) -> None:
        stored = [NOON + step * FIVE_MINUTES for step in range(4)]
        await self.save(storage, *reversed(stored))
        assert await self.times(storage, stored[1], stored[3]) == stored[1:3]
        assert await self.times(storage, stored[1] - 1, stored[3] + 1) == stored[1:]

    @pytest.mark.parametrize("bounds", [(NOON, NOON), (NOON + 1, NOON)])
    async def test_an_empty_range_gives_nothing(
        self, storage: IRawDataStorage, bounds: tuple[int, int]
    ) -> None:
        await self.save(storage, NOON)
        assert await self.times(storage, *bounds) == []

    async def test_a_range_without_data_gives_nothing(self, storage: IRawDataStorage) -> None:
        await self.save(storage, NOON)
        assert await self.times(storage, NOON + FIVE_MINUTES, NOON + DAY) == []
        assert await storage.get_range("crypto.com", "ETH", 0, 2**60) == []

    @pytest.mark.parametrize(
        "end",
        ["2026-01-31T00:00", "2026-02-28T00:00", "2027-12-31T00:00", "2028-02-29T00:00"],
        ids=["month", "February", "year", "leap day"],
    )
    async def test_a_range_goes_over_the_end_of_a_day_in_order(
        self, storage: IRawDataStorage, end: str
    ) -> None:
        midnight = at(end) + DAY
        stored = [midnight + step * FIVE_MINUTES for step in range(-2, 2)]
        await self.save(storage, *stored)
        await self.save(storage, midnight - 2 * DAY, midnight + 2 * DAY)
        assert await self.times(storage, stored[0], stored[-1] + 1) == stored
        listed = await storage.list_timestamps("crypto.com", "BTC", stored[1], stored[3])
        assert listed == stored[1:3]

    async def test_limit_and_offset_page_through_a_range(self, storage: IRawDataStorage) -> None:
        stored = [NOON + step * FIVE_MINUTES for step in range(5)]
        await self.save(storage, *stored)
        everything = (NOON, NOON + DAY)
        assert await self.times(storage, *everything, limit=2) == stored[:2]
        assert await self.times(storage, *everything, limit=2, offset=2) == stored[2:4]
        assert await self.times(storage, *everything, limit=2, offset=4) == stored[4:]
        assert await self.times(storage, *everything, limit=2, offset=5) == []
        assert await self.times(storage, *everything, limit=0) == []
        assert await self.times(storage, *everything, offset=3) == stored[3:]

    @pytest.mark.parametrize("page", [{"limit": -1}, {"offset": -1}])
    async def test_a_negative_limit_or_offset_is_refused(
        self, storage: IRawDataStorage, page: dict[str, int]
    ) -> None:
        with pytest.raises(InvalidRequest, match="zero or more"):
            await self.times(storage, 0, 1, **page)

    async def test_the_latest_entry_is_the_newest_of_its_interval(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, at("2025-12-31T23:55"), NOON, at("2026-02-01T00:00"))
        await self.save(storage, NOON + DAY, interval="1h")
        latest = await storage.get_latest_entry("crypto.com", "BTC")
        hourly = await storage.get_latest_entry("crypto.com", "BTC", interval="1h")
        assert latest is not None
        assert hourly is not None
        assert latest["timestamp"] == NOON
        assert hourly["timestamp"] == NOON + DAY

    async def test_a_coin_without_data_has_no_latest_entry(self, storage: IRawDataStorage) -> None:
        assert await storage.get_latest_entry("crypto.com", "BTC") is None

    async def test_coins_are_listed_sorted_and_as_they_were_saved(
        self, storage: IRawDataStorage
    ) -> None:
        for coin in ("SOL", "BTC/EUR", "1INCH", "A-B", "ÄÖ", "BTC"):
            await self.save(storage, NOON, coin=coin)
        assert await storage.list_coins("crypto.com") == [
            "1INCH", "A-B", "BTC", "BTC/EUR", "SOL", "ÄÖ",
        ]  # fmt: skip

    async def test_an_exchange_without_coins_lists_none(self, storage: IRawDataStorage) -> None:
        assert await storage.list_coins("crypto.com") == []

    async def test_a_coin_exists_on_the_exchange_where_it_was_saved_and_nowhere_else(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.save_entry("binance", "BTC", NOON, {"timestamp": NOON})
        assert await storage.check_coin_exists("binance", "BTC")
        assert not await storage.check_coin_exists("binance", "BTC/EUR")
        assert not await storage.check_coin_exists("crypto.com", "BTC")
        assert await storage.list_coins("crypto.com") == []

    async def test_exchanges_keep_their_entries_apart(self, storage: IRawDataStorage) -> None:
        await storage.save_entry("binance", "BTC", NOON, {"from": "binance"})
        await storage.save_entry("crypto.com", "BTC", NOON, {"from": "crypto.com"})
        assert await storage.get_entry("binance", "BTC", NOON) == {"from": "binance"}
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"from": "crypto.com"}

    async def test_files_that_are_no_documents_are_skipped(self, storage: IRawDataStorage) -> None:
        await self.save(storage, NOON)
        day = "raw_data/crypto.com/BTC/2026/11/22"
        for name in (
            ".tmp-17-abc",
            ".tmp-17-20261122120500.json",
            "notes.txt",
            "20261122.json",
            "20261122250000.json",
            "20261121120000.json",
            "20261122120500_7m.json",
            "20261122120500.json.tmp",
        ):
            await self.raw_write(storage, f"{day}/{name}", b"{}")
        assert await self.times(storage, 0, 2**60) == [NOON]
        assert await storage.list_timestamps("crypto.com", "BTC", 0, 2**60) == [NOON]
        latest = await storage.get_latest_entry("crypto.com", "BTC")
        assert latest is not None
        assert latest["timestamp"] == NOON

    @pytest.mark.parametrize("content", [b"", b'{"timestamp": 17', b"[]", b"null", b"\xff"])
    async def test_a_document_that_is_no_json_object_is_left_out_until_it_is_saved_anew(
        self, storage: IRawDataStorage, content: bytes
    ) -> None:
        later = NOON + FIVE_MINUTES
        await self.save(storage, NOON, later)
        path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", later)
        await self.raw_write(storage, path, content)

        latest = await storage.get_latest_entry("crypto.com", "BTC")
        assert latest is not None
        assert latest["timestamp"] == NOON
        assert await self.times(storage, NOON, NOON + DAY) == [NOON]
        assert await storage.get_entry("crypto.com", "BTC", later) is None
        assert await storage.list_timestamps("crypto.com", "BTC", NOON, NOON + DAY) == [NOON]

        await self.save(storage, later)
        listed = await storage.list_timestamps("crypto.com", "BTC", NOON, NOON + DAY)
        assert listed == [NOON, later]

    async def test_a_page_is_filled_past_documents_that_cannot_be_read(
        self, storage: IRawDataStorage
    ) -> None:
        stored = [NOON + step * FIVE_MINUTES for step in range(4)]
        await self.save(storage, *stored)
        path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", stored[1])
        await self.raw_write(storage, path, b"no json")
        with capture_logs():
            assert await self.times(storage, NOON, NOON + DAY, limit=2) == [stored[0], stored[2]]
            assert await self.times(storage, NOON, NOON + DAY, limit=2, offset=2) == [stored[3]]

    async def test_a_naive_datetime_is_refused_everywhere(self, storage: IRawDataStorage) -> None:
        naive = datetime(2026, 11, 22)  # noqa: DTZ001  that is the point
        with pytest.raises(InvalidRequest, match="aware"):
            await storage.save_entry("crypto.com", "BTC", naive, {})
        with pytest.raises(InvalidRequest, match="aware"):
            await storage.get_range("crypto.com", "BTC", naive, NOON)

    @pytest.mark.parametrize("coin", ["", ".", "..", "x" * 201])
    async def test_a_coin_that_can_stand_in_no_path_is_refused(
        self, storage: IRawDataStorage, coin: str
    ) -> None:
        with pytest.raises(InvalidRequest):
            await storage.save_entry("crypto.com", coin, NOON, {})
        with pytest.raises(InvalidRequest):
            await storage.get_latest_entry("crypto.com", coin)

    async def test_an_interval_that_does_not_exist_is_refused(
        self, storage: IRawDataStorage
    ) -> None:
        with pytest.raises(InvalidRequest, match="7m"):
            await storage.list_timestamps("crypto.com", "BTC", 0, 1, interval="7m")

    async def test_a_blob_is_read_back_and_replaced(self, storage: IRawDataStorage) -> None:
        path = "ledger/crypto.com/BTC/5m.json"
        assert await storage.read_blob(path) is None
        await storage.write_blob(path, b"first, and longer")
        await storage.write_blob(path, b"second")
        assert await storage.read_blob(path) == b"second"
        assert await self.raw_read(storage, path) == b"second"

    @pytest.mark.parametrize(
        "path", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "a\\b", "a\0b", "a/"]
    )
    async def test_a_blob_outside_the_root_is_refused(
        self, storage: IRawDataStorage, path: str
    ) -> None:
        with pytest.raises(InvalidRequest, match="root"):
            await storage.read_blob(path)
        with pytest.raises(InvalidRequest, match="root"):
            await storage.write_blob(path, b"x")

    async def test_a_check_of_writing_leaves_nothing_behind(self, storage: IRawDataStorage) -> None:
        await storage.check_writable()
        await storage.check_writable()
        assert await storage.list_coins("crypto.com") == []

    async def test_closing_twice_is_fine(self, storage: IRawDataStorage) -> None:
        await storage.close()
        await storage.close()

    async def test_opening_twice_is_fine_and_the_root_has_an_address(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.open()
        await storage.open()
        assert storage.address
        assert storage.address == storage.address.strip()
        assert isinstance(await storage.warnings(), list)

    async def test_every_write_gives_a_document_another_version(
        self, storage: IRawDataStorage
    ) -> None:
        seen = []
        for close in (1, 2, 2, 1):
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": close})
            held = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON]
            assert held.content == {"close": close}
            again = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON]
            assert again.version == held.version
            seen.append(held.version)
        assert len(set(seen)) == 4

    async def test_a_save_that_expects_what_lies_there_is_done(
        self, storage: IRawDataStorage
    ) -> None:
        new = [(NOON, {"close": 1})]
        await storage.save_entries("crypto.com", "BTC", new, expected={})
        held = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON]
        corrected = [(NOON, {"close": 2})]
        await storage.save_entries("crypto.com", "BTC", corrected, expected={NOON: held.version})
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 2}

    async def test_a_save_that_expects_something_else_is_refused(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        old = (await storage.get_entries("crypto.com", "BTC", [NOON]))[NOON].version
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
        for time, expected in ((NOON, {}), (NOON, {NOON: old}), (NOON + DAY, {NOON + DAY: old})):
            with pytest.raises(StaleVersion, match="json"):
                await storage.save_entries(
                    "crypto.com", "BTC", [(time, {"close": 3})], expected=expected
                )
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 2}
        assert await storage.get_entry("crypto.com", "BTC", NOON + DAY) is None

    async def test_one_of_two_holds_the_collectors_lock(self, storage: IRawDataStorage) -> None:
        first, second = storage.collector_lock(), storage.collector_lock()
        assert not first.is_held
        assert await first.acquire()
        assert await first.acquire()
        assert not await second.acquire()
        assert (first.is_held, second.is_held) == (True, False)
        assert second.holder
        assert first.renew_every_s > 0
        await first.release()
        await first.release()
        assert not first.is_held
        assert await second.acquire()
        assert not await first.acquire()
        await second.release()
