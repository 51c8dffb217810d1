"""What every storage backend promises, read back behind the backend."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from errors import InvalidEntry, InvalidRequest
from storage.interfaces import Held, IRawDataStorage, StaleVersion, StorageError
from storage.path_utility import StoragePathUtility
from tests.support.entries import FIVE_MINUTES, NOON

DAY = 86_400_000


LATER = NOON + FIVE_MINUTES
DAY_FOLDER = "raw_data/crypto.com/BTC/2026/11/22"
NOON_PATH = f"{DAY_FOLDER}/20261122120000.json"
LATER_PATH = f"{DAY_FOLDER}/20261122120500.json"
EVER = (0, 2**60)

COINS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


def at(text: str) -> int:
    """An ISO time in UTC as ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


class RawDataStorageContract:
    """Subclass it with a fixture ``storage`` and the two methods that go round the backend.

    ``many`` is how many coins the listing of a large exchange is tried with.
    """

    many: ClassVar[int] = 3000

    @abstractmethod
    async def raw_read(self, storage: Any, path: str) -> bytes | None:
        """The bytes at a path of the root, not by the backend."""

    @abstractmethod
    async def raw_write(self, storage: Any, path: str, content: bytes) -> None:
        """Put bytes at a path of the root, not by the backend."""

    async def raw_write_all(self, storage: Any, files: Mapping[str, bytes]) -> None:
        """Put many files into the root, not by the backend."""
        for path, content in files.items():
            await self.raw_write(storage, path, content)

    async def held(self, storage: IRawDataStorage, timestamp: int = NOON) -> Held:
        return (await storage.get_entries("crypto.com", "BTC", [timestamp]))[timestamp]

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

    async def test_a_corrected_entry_takes_the_place_of_the_first(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1, "note": "x" * 5000})
        await self.save(storage, LATER)
        corrected = {"close": 2, "revision": 2}
        await storage.save_entry("crypto.com", "BTC", NOON, corrected)
        assert await storage.get_range("crypto.com", "BTC", NOON, LATER) == [corrected]
        assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == [NOON, LATER]
        content = await self.raw_read(storage, NOON_PATH)
        assert content is not None
        assert orjson.loads(content) == corrected

    async def test_concurrent_saves_of_one_entry_leave_one_whole_document(
        self, storage: IRawDataStorage
    ) -> None:
        documents = [{"writer": writer, "padding": "x" * 20_000} for writer in range(20)]
        await asyncio.gather(
            *(storage.save_entry("crypto.com", "BTC", NOON, document) for document in documents)
        )
        assert await storage.get_entry("crypto.com", "BTC", NOON) in documents
        assert await storage.list_timestamps("crypto.com", "BTC", 0, 2**60) == [NOON]

    async def test_batches_that_overlap_leave_whole_documents_of_either(
        self, storage: IRawDataStorage
    ) -> None:
        times = [NOON + step * FIVE_MINUTES for step in range(30)]
        batches = [
            [(time, {"timestamp": time, "writer": writer}) for time in times[first : first + 20]]
            for writer, first in enumerate((0, 10, 5))
        ]
        await asyncio.gather(
            *(storage.save_entries("crypto.com", "BTC", batch) for batch in batches)
        )
        found = await storage.get_range("crypto.com", "BTC", *EVER)
        assert [document["timestamp"] for document in found] == times
        written = [document for batch in batches for _, document in batch]
        assert all(document in written for document in found)

    async def test_a_document_that_json_cannot_express_is_refused_and_nothing_is_stored(
        self, storage: IRawDataStorage
    ) -> None:
        with pytest.raises(InvalidEntry, match="JSON"):
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": object()})
        mixed: list[tuple[int, dict[str, Any]]] = [
            (NOON, {"close": 1}), (LATER, {"close": object()}),
        ]  # fmt: skip
        with pytest.raises(InvalidEntry, match="JSON"):
            await storage.save_entries("crypto.com", "BTC", mixed)
        assert not await storage.check_coin_exists("crypto.com", "BTC")

    async def test_saving_says_how_many_bytes_it_wrote(self, storage: IRawDataStorage) -> None:
        written = await storage.save_entries(
            "crypto.com", "BTC", [(NOON, {"close": 1}), (LATER, {"close": 23})]
        )
        assert written == len(b'{"close":1}{"close":23}')

    async def test_saving_no_entries_does_nothing(self, storage: IRawDataStorage) -> None:
        assert await storage.save_entries("crypto.com", "BTC", []) == 0
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

    async def test_a_range_of_years_gives_what_lies_in_it_in_order(
        self, storage: IRawDataStorage
    ) -> None:
        stored = [
            at(day)
            for day in (
                "2025-11-30T23:55", "2025-12-01T00:00", "2025-12-31T23:55", "2026-01-01T00:00",
                "2026-02-28T12:00", "2026-03-01T12:00", "2026-10-31T23:55", "2026-11-01T00:00",
                "2027-12-31T23:55", "2028-01-01T00:00", "2028-02-29T23:55", "2028-03-01T00:00",
            )
        ]  # fmt: skip
        await self.save(storage, *stored)
        assert await self.times(storage, *EVER) == stored
        assert await self.times(storage, stored[1], stored[-2]) == stored[1:-2]
        assert await self.times(storage, stored[1] + 1, stored[-2] + 1) == stored[2:-1]
        listed = await storage.list_timestamps("crypto.com", "BTC", stored[3], stored[9])
        assert listed == stored[3:9]

    async def test_the_days_that_have_documents_are_listed_by_interval(
        self, storage: IRawDataStorage
    ) -> None:
        first, last = at("2025-12-31T23:55"), at("2026-02-28T00:00")
        await self.save(storage, first, last, last + 3 * FIVE_MINUTES)
        await self.save(storage, last, interval="1h")
        # Neither another day's name nor a foreign one makes it a day of documents.
        await self.raw_write(storage, "raw_data/crypto.com/BTC/2026/03/01/notes.json", b"{}")
        await self.raw_write(
            storage, "raw_data/crypto.com/BTC/2026/03/02/20260301000000.json", b"{}"
        )
        await self.raw_write(
            storage, "raw_data/crypto.com/BTC/2026/02/31/20260231000000.json", b"{}"
        )
        assert await storage.list_days("crypto.com", "BTC") == {
            "5m": {date(2025, 12, 31): 1, date(2026, 2, 28): 2},
            "1h": {date(2026, 2, 28): 1},
        }
        assert await storage.list_days("crypto.com", "ETH") == {}

    async def test_intervals_lie_side_by_side(self, storage: IRawDataStorage) -> None:
        midnight = at("2026-11-23T00:00")
        intervals = ("1m", "5m", "1h", "1d")
        for interval in intervals:
            await self.save(storage, midnight, interval=interval)
        await self.save(storage, midnight + 60_000, interval="1m")
        for interval in intervals:
            page = await storage.get_range(
                "crypto.com", "BTC", midnight, midnight + DAY, interval=interval
            )
            assert {document["interval"] for document in page} == {interval}
            assert len(page) == (2 if interval == "1m" else 1)
            listed = await storage.list_timestamps("crypto.com", "BTC", *EVER, interval=interval)
            assert listed == [document["timestamp"] for document in page]
            latest = await storage.get_latest_entry("crypto.com", "BTC", interval=interval)
            assert latest == page[-1]

    async def test_limit_and_offset_cut_a_range_like_a_slice(
        self, storage: IRawDataStorage
    ) -> None:
        stored = [NOON, LATER, NOON + DAY]
        await self.save(storage, *stored)
        for limit in (None, 0, 1, 2, 3, 4):
            for offset in range(5):
                page = await self.times(storage, NOON, NOON + 2 * DAY, limit=limit, offset=offset)
                assert page == stored[offset : None if limit is None else offset + limit]

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

    async def test_thousands_of_coins_are_listed(self, storage: IRawDataStorage) -> None:
        coins = [f"COIN{number:05d}" for number in range(self.many)]
        paths = [StoragePathUtility.get_raw_data_path("crypto.com", coin, NOON) for coin in coins]
        await self.raw_write_all(storage, dict.fromkeys(reversed(paths), b"{}"))
        assert await storage.list_coins("crypto.com") == coins
        assert await storage.check_coin_exists("crypto.com", coins[-1])
        assert not await storage.check_coin_exists("crypto.com", "COIN")

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
        content = await self.raw_read(storage, NOON_PATH.replace("crypto.com", "binance"))
        assert content is not None
        assert orjson.loads(content) == {"from": "binance"}

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

    async def test_files_at_every_level_of_the_tree_do_no_harm(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, NOON)
        folders = DAY_FOLDER.split("/")
        levels = ["/".join([*folders[:depth], "notes.txt"]) for depth in range(len(folders) + 1)]
        misplaced = [
            "20261122120500.json",
            "raw_data/20261122120500.json",
            "raw_data/crypto.com/20261122120500.json",
            "raw_data/crypto.com/BTC/20261122120500.json",
            "raw_data/crypto.com/BTC/2026/20261122120500.json",
            "raw_data/crypto.com/BTC/2026/11/20261122120500.json",
            "raw_data/crypto.com/BTC/2026/11/31/20261131120500.json",
            "raw_data/crypto.com/BTC/2026/13/01/20261301120500.json",
            "raw_data/crypto.com/BTC/backup/11/22/20261122120500.json",
            f"{DAY_FOLDER}/old/20261122120500.json",
        ]
        await self.raw_write_all(storage, dict.fromkeys([*levels, *misplaced], b"\xff no json"))
        with capture_logs() as logs:
            assert await self.times(storage, *EVER) == [NOON]
            assert await self.times(storage, NOON, NOON + DAY) == [NOON]
            assert await storage.list_timestamps("crypto.com", "BTC", *EVER) == [NOON]
            assert await storage.get_latest_entry("crypto.com", "BTC") is not None
            assert await storage.list_coins("crypto.com") == ["BTC"]
            assert await storage.list_coins("binance") == []
            assert not await storage.check_coin_exists("crypto.com", "notes.txt")
        assert logs == []

    async def test_a_document_that_cannot_be_read_is_reported_once_with_its_path(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, NOON)
        await self.raw_write(storage, LATER_PATH, b"no json")
        with capture_logs() as logs:
            for _ in range(2):
                assert await self.times(storage, *EVER) == [NOON]
                assert await storage.get_latest_entry("crypto.com", "BTC") is not None
                assert await storage.get_entry("crypto.com", "BTC", LATER) is None
        assert [log["log_level"] for log in logs] == ["warning"]
        assert LATER_PATH in logs[0]["path"]

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

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ],
    )
    @given(coin=COINS)
    @example(coin="BTC/EUR")
    @example(coin="A-B/../C")
    @example(coin="...")
    @example(coin="100%25")
    @example(coin=" \\\0\n")
    @example(coin="\u0130\U0001f680")
    @example(coin="x" * 200)
    async def test_a_coin_of_any_name_is_read_back_and_listed(
        self, storage: IRawDataStorage, coin: str
    ) -> None:
        document = {"timestamp": NOON, "coin": coin}
        await storage.save_entry("crypto.com", coin, NOON, document)
        assert await storage.get_range("crypto.com", coin, NOON, NOON + 1) == [document]
        assert await storage.check_coin_exists("crypto.com", coin)
        assert coin in await storage.list_coins("crypto.com")

    @pytest.mark.parametrize("coin", ["", ".", "..", "x" * 201, "ä" * 34, "\ud800"])
    async def test_a_coin_that_can_stand_in_no_path_is_refused(
        self, storage: IRawDataStorage, coin: str
    ) -> None:
        with pytest.raises(InvalidRequest):
            await storage.save_entry("crypto.com", coin, NOON, {})
        with pytest.raises(InvalidRequest):
            await storage.get_latest_entry("crypto.com", coin)
        with pytest.raises(InvalidRequest):
            await storage.check_coin_exists(coin, "BTC")

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
        assert storage.address.strip()
        assert await storage.list_coins("crypto.com") == []

    async def test_a_root_that_is_there_can_be_opened_for_reading_alone(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.open()
        await self.save(storage, NOON)
        await storage.open(read_only=True)
        assert await self.times(storage, *EVER) == [NOON]

    async def test_warnings_are_sentences(self, storage: IRawDataStorage) -> None:
        await storage.open()
        warnings = await storage.warnings()
        assert isinstance(warnings, list)
        assert all(isinstance(warning, str) and warning for warning in warnings)

    async def test_documents_are_decoded_as_the_caller_says(self, storage: IRawDataStorage) -> None:
        await self.raw_write_all(storage, {NOON_PATH: b"first", LATER_PATH: b"second"})

        def decode(timestamp: int, content: bytes) -> tuple[int, bytes]:
            return timestamp, content

        first, second = (NOON, b"first"), (LATER, b"second")
        everything = await storage.get_range("crypto.com", "BTC", *EVER, decode=decode)
        page = await storage.get_range("crypto.com", "BTC", *EVER, 1, 1, decode=decode)
        latest = await storage.get_latest_entry("crypto.com", "BTC", decode=decode)
        asked = await storage.get_entries("crypto.com", "BTC", [NOON, LATER], decode=decode)
        assert everything == [first, second]
        assert page == [second]
        assert latest == second
        assert {time: held.content for time, held in asked.items()} == {NOON: first, LATER: second}

    async def test_what_the_caller_cannot_decode_is_left_out_and_reported_once(
        self, storage: IRawDataStorage
    ) -> None:
        stored = [NOON, LATER, LATER + FIVE_MINUTES]
        await self.save(storage, *stored)

        def decode(timestamp: int, _: bytes) -> int | None:
            return None if timestamp == stored[2] else timestamp

        series = ("crypto.com", "BTC")
        with capture_logs() as logs:
            for _ in range(2):
                assert await storage.get_range(*series, *EVER, decode=decode) == stored[:2]
                assert await storage.get_latest_entry(*series, decode=decode) == LATER
                asked = await storage.get_entries(*series, stored, decode=decode)
                assert [held.content for held in asked.values()] == [*stored[:2], None]
                assert await storage.list_timestamps(*series, *EVER) == stored[:2]
        assert len(logs) == 1

    async def test_what_decoding_refuses_reaches_the_caller(self, storage: IRawDataStorage) -> None:
        await self.save(storage, NOON)

        def decode(timestamp: int, _: bytes) -> Any:
            raise StorageError(f"schema 9 of {timestamp}")

        with pytest.raises(StorageError, match=f"^schema 9 of {NOON}$"):
            await storage.get_range("crypto.com", "BTC", *EVER, decode=decode)
        with pytest.raises(StorageError, match=f"^schema 9 of {NOON}$"):
            await storage.get_latest_entry("crypto.com", "BTC", decode=decode)
        with pytest.raises(StorageError, match=f"^schema 9 of {NOON}$"):
            await storage.get_entries("crypto.com", "BTC", [NOON], decode=decode)

    async def test_every_write_gives_a_document_another_version(
        self, storage: IRawDataStorage
    ) -> None:
        seen = []
        for close in (1, 2, 2, 1):
            await storage.save_entry("crypto.com", "BTC", NOON, {"close": close})
            held = await self.held(storage)
            assert held.content == {"close": close}
            assert (await self.held(storage)).version == held.version
            seen.append(held.version)
        assert len(set(seen)) == len(seen)

    async def test_a_document_that_cannot_be_read_has_a_version_too(
        self, storage: IRawDataStorage
    ) -> None:
        await self.raw_write(storage, NOON_PATH, b"no json")
        broken = await self.held(storage)
        assert broken.content is None
        await self.raw_write(storage, NOON_PATH, b"no json either")
        still_broken = await self.held(storage)
        assert still_broken.content is None
        assert still_broken.version != broken.version

        mended = [(NOON, {"close": 1})]
        with pytest.raises(StaleVersion):
            await storage.save_entries("crypto.com", "BTC", mended, expected={NOON: broken.version})
        await storage.save_entries(
            "crypto.com", "BTC", mended, expected={NOON: still_broken.version}
        )
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"close": 1}

    async def test_a_save_that_expects_what_lies_there_is_done(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.save_entries("crypto.com", "BTC", [(NOON, {"close": 1})], expected={})
        held = await self.held(storage)
        corrected = [(NOON, {"close": 2}), (LATER, {"close": 3})]
        await storage.save_entries("crypto.com", "BTC", corrected, expected={NOON: held.version})
        assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 2}, {"close": 3}]

    async def test_a_save_that_expects_something_else_is_refused_and_names_the_path(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 1})
        old = (await self.held(storage)).version
        await storage.save_entry("crypto.com", "BTC", NOON, {"close": 2})
        cases: list[tuple[int, dict[int, str]]] = [
            (NOON, {}), (NOON, {NOON: old}), (LATER, {LATER: old}),
        ]  # fmt: skip
        for time, expected in cases:
            path = NOON_PATH if time == NOON else LATER_PATH
            with pytest.raises(StaleVersion, match=path) as refused:
                await storage.save_entries(
                    "crypto.com", "BTC", [(time, {"close": 3})], expected=expected
                )
            assert old not in str(refused.value)
        assert await storage.get_range("crypto.com", "BTC", *EVER) == [{"close": 2}]

    async def test_a_batch_never_replaces_what_it_did_not_expect(
        self, storage: IRawDataStorage
    ) -> None:
        await self.save(storage, NOON, LATER)
        read = await storage.get_entries("crypto.com", "BTC", [NOON, LATER])
        versions = {time: held.version for time, held in read.items()}
        await storage.save_entry("crypto.com", "BTC", LATER, {"by": "another"})
        batch = [(time, {"by": "batch"}) for time in (NOON, LATER)]
        with pytest.raises(StaleVersion, match=LATER_PATH):
            await storage.save_entries("crypto.com", "BTC", batch, expected=versions)
        assert await storage.get_entry("crypto.com", "BTC", LATER) == {"by": "another"}

    @pytest.mark.parametrize("there", [False, True], ids=["nothing", "a version"])
    async def test_of_many_writers_that_expect_the_same_exactly_one_wins(
        self, storage: IRawDataStorage, there: bool
    ) -> None:
        expected = {}
        if there:
            await self.save(storage, NOON)
            expected = {NOON: (await self.held(storage)).version}
        outcomes = await asyncio.gather(
            *(
                storage.save_entries(
                    "crypto.com", "BTC", [(NOON, {"writer": writer})], expected=expected
                )
                for writer in range(12)
            ),
            return_exceptions=True,
        )
        winners = [writer for writer, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        lost = [outcome for outcome in outcomes if not isinstance(outcome, int)]
        assert len(winners) == 1
        assert all(isinstance(outcome, StaleVersion) for outcome in lost)
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"writer": winners[0]}

    async def test_writers_that_read_again_and_try_again_lose_nothing(
        self, storage: IRawDataStorage
    ) -> None:
        async def count_up() -> None:
            while True:
                found = await storage.get_entries("crypto.com", "BTC", [NOON])
                held = found.get(NOON)
                count = 0 if held is None or held.content is None else held.content["count"]
                try:
                    await storage.save_entries(
                        "crypto.com",
                        "BTC",
                        [(NOON, {"count": count + 1})],
                        expected={} if held is None else {NOON: held.version},
                    )
                except StaleVersion:
                    continue
                return

        await asyncio.gather(*(count_up() for _ in range(6)))
        assert await storage.get_entry("crypto.com", "BTC", NOON) == {"count": 6}

    async def test_one_of_two_holds_the_collectors_lock(self, storage: IRawDataStorage) -> None:
        await storage.open()
        first, second = storage.collector_lock(), storage.collector_lock()
        assert (first.is_held, second.is_held) == (False, False)
        assert await first.acquire()
        assert not await second.acquire()
        assert (first.is_held, second.is_held) == (True, False)
        assert second.holder
        assert second.holder == first.holder
        await first.release()
        await second.release()

    async def test_renewing_keeps_the_collectors_lock(self, storage: IRawDataStorage) -> None:
        await storage.open()
        first, second = storage.collector_lock(), storage.collector_lock()
        assert first.renew_every_s > 0
        for _ in range(3):
            assert await first.acquire()
            assert first.is_held
            assert not await second.acquire()
        await first.release()

    async def test_releasing_the_collectors_lock_lets_the_other_in_at_once(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.open()
        first, second = storage.collector_lock(), storage.collector_lock()
        await first.release()
        assert await first.acquire()
        await first.release()
        await first.release()
        assert not first.is_held
        assert await second.acquire()
        await first.release()
        assert second.is_held
        assert not await first.acquire()
        await second.release()

    async def test_of_many_that_try_at_once_one_gets_the_collectors_lock(
        self, storage: IRawDataStorage
    ) -> None:
        await storage.open()
        locks = [storage.collector_lock() for _ in range(8)]
        got = await asyncio.gather(*(lock.acquire() for lock in locks))
        assert sorted(got) == [False] * 7 + [True]
        assert [lock.is_held for lock in locks] == got
        await asyncio.gather(*(lock.release() for lock in locks))
