"""Paths of raw data."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from domain.interval import KNOWN_INTERVALS
from domain.time_range import TimeRange
from errors import InvalidRequest
from storage.path_utility import (
    RawDataPath,
    StoragePathUtility,
    day_of,
    to_milliseconds,
    to_range,
)

path_of = StoragePathUtility.get_raw_data_path
names = st.text(min_size=1, max_size=16).filter(lambda name: name not in (".", ".."))


def test_a_path_names_exchange_coin_day_and_second() -> None:
    moment = datetime(2026, 11, 22, 12, 5, tzinfo=UTC)
    assert path_of("crypto.com", "BTC", moment) == (
        "raw_data/crypto.com/BTC/2026/11/22/20261122120500.json"
    )


def test_an_interval_other_than_five_minutes_stands_before_the_ending() -> None:
    moment = datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert path_of("binance", "ETH", moment, interval="1h").endswith("/20261122120000_1h.json")
    assert path_of("binance", "ETH", moment, interval="5m").endswith("/20261122120000.json")


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("2026-01-01T00:00:00", "2026/01/01/20260101000000"),
        ("2026-12-31T23:59:59", "2026/12/31/20261231235959"),
        ("2026-01-31T23:55:00", "2026/01/31/20260131235500"),
        ("2026-02-01T00:00:00", "2026/02/01/20260201000000"),
        ("2028-02-29T12:00:00", "2028/02/29/20280229120000"),
        ("1970-01-01T00:00:00", "1970/01/01/19700101000000"),
        ("9999-12-31T23:59:59", "9999/12/31/99991231235959"),
    ],
)
def test_the_ends_of_days_months_and_years_lie_in_their_own_folders(text: str, folder: str) -> None:
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    assert path_of("crypto.com", "BTC", moment) == f"raw_data/crypto.com/BTC/{folder}.json"


def test_milliseconds_and_datetimes_of_any_zone_give_one_path() -> None:
    utc = datetime(2026, 1, 1, 0, 5, tzinfo=UTC)
    zones = [utc.astimezone(timezone(timedelta(hours=hours))) for hours in (-11, 0, 9)]
    paths = {path_of("crypto.com", "BTC", moment) for moment in zones}
    assert paths == {path_of("crypto.com", "BTC", int(utc.timestamp()) * 1000)}


@pytest.mark.parametrize(
    ("timestamp", "advice"),
    [
        (datetime(2026, 1, 1), "aware"),  # noqa: DTZ001  that is the point
        (True, "integer of milliseconds"),
        (1_795_348_800.0, "integer of milliseconds"),
        ("2026-01-01", "integer of milliseconds"),
        (None, "integer of milliseconds"),
        (1_795_348_800_001, "whole second"),
        (datetime(2026, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC), "whole second"),
        (-1000, "1970 to 9999"),
        (253_402_300_800_000, "1970 to 9999"),
    ],
)
def test_a_time_that_no_name_can_carry_is_refused_with_what_would_be_right(
    timestamp: Any, advice: str
) -> None:
    with pytest.raises(InvalidRequest, match=advice):
        path_of("crypto.com", "BTC", timestamp)


def test_paths_of_many_entries_are_those_of_each_in_the_same_order() -> None:
    moments: list[int | datetime] = [1_700_006_400_000, 0, datetime(2026, 1, 1, tzinfo=UTC)]
    assert StoragePathUtility.get_raw_data_paths(
        "crypto.com", "BTC/EUR", moments, interval="1m"
    ) == [
        StoragePathUtility.get_raw_data_path("crypto.com", "BTC/EUR", moment, interval="1m")
        for moment in moments
    ]


def test_an_interval_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="use one of"):
        path_of("crypto.com", "BTC", 0, interval="7m")


@pytest.mark.parametrize(
    ("coin", "folder"),
    [
        ("BTC", "BTC"),
        ("BTC/EUR", "BTC-EUR"),
        ("A-B", "A%2DB"),
        ("100%", "100%25"),
        ("A B", "A%20B"),
        ("A\\B", "A%5CB"),
        ("../..", "..-.."),
        ("Ä", "%C3%84"),
        ("x_1.S", "x_1.S"),
    ],
)
def test_a_coin_is_encoded_so_that_it_is_one_safe_name(coin: str, folder: str) -> None:
    assert StoragePathUtility.encode_name(coin) == folder
    assert StoragePathUtility.decode_name(folder) == coin


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 201, "Ä" * 34, "\ud800", 7, None])
def test_a_name_that_can_stand_in_no_path_is_refused_for_coins_and_exchanges(name: Any) -> None:
    with pytest.raises(InvalidRequest):
        path_of("crypto.com", name, 0)
    with pytest.raises(InvalidRequest):
        path_of(name, "BTC", 0)


def test_a_name_of_two_hundred_encoded_bytes_is_the_longest() -> None:
    assert StoragePathUtility.encode_name("x" * 200) == "x" * 200


@given(names)
def test_every_coin_comes_back_from_its_folder(coin: str) -> None:
    encoded = StoragePathUtility.encode_name(coin)
    assert StoragePathUtility.decode_name(encoded) == coin
    assert encoded not in (".", "..")
    assert all(c.isascii() and (c.isalnum() or c in "._-%") for c in encoded)


@given(st.text(max_size=12))
@example("%2d")
@example("%41")
@example("A/B")
@example("%2E%2E")
@example("%FF")
@example("..")
@example("")
def test_a_folder_is_read_only_if_it_is_how_its_coin_is_written(folder: str) -> None:
    coin = StoragePathUtility.decode_name(folder)
    assert coin is None or StoragePathUtility.encode_name(coin) == folder


@given(names, names, st.integers(0, 253_402_300_799), st.sampled_from(KNOWN_INTERVALS))
def test_a_path_says_what_it_was_made_of(
    exchange: str, coin: str, seconds: int, interval: str
) -> None:
    path = path_of(exchange, coin, seconds * 1000, interval=interval)
    assert StoragePathUtility.parse_raw_data_path(path) == RawDataPath(
        exchange, coin, interval, seconds * 1000
    )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "raw_data/crypto.com/BTC",
        "ledger/crypto.com/BTC/2026/11/22/20261122120000.json",
        "raw_data/crypto.com/BTC/2026/11/23/20261122120000.json",
        "raw_data/crypto.com/BTC/2026/11/22/20261122120000_5m.json",
        "raw_data/crypto.com/BTC/2026/11/22/20261122120000_7m.json",
        "raw_data/crypto.com/BTC/2026/02/30/20260230120000.json",
        "raw_data/crypto.com/BTC/2026/11/22/20261122240000.json",
        "raw_data/crypto.com/BTC/2026/11/22/20261122120000.json.tmp",
        "raw_data/crypto.com/%2d/2026/11/22/20261122120000.json",
        "raw_data/../BTC/2026/11/22/20261122120000.json",
        "raw_data/crypto.com/BTC/1969/11/22/19691122120000.json",
        "raw_data/crypto.com/BTC/2026/11/22/\u0662\u0660\u0662\u06661122120000.json",
    ],
)
def test_a_path_that_is_never_made_says_nothing(path: str) -> None:
    assert StoragePathUtility.parse_raw_data_path(path) is None


@given(st.integers(0, 253_402_300_799), st.sampled_from(KNOWN_INTERVALS))
def test_a_file_name_tells_its_time_within_the_folder_of_its_day(
    seconds: int, interval: str
) -> None:
    name = path_of("crypto.com", "BTC", seconds * 1000, interval=interval).rsplit("/", 1)[1]
    day = day_of(seconds * 1000)
    ending = StoragePathUtility.file_ending(interval)
    assert StoragePathUtility.timestamp_of(name, day, ending) == seconds * 1000
    assert StoragePathUtility.timestamp_of(name, day, ".txt") is None
    other = date(2000, 1, 1) if day != date(2000, 1, 1) else date(2000, 1, 2)
    assert StoragePathUtility.timestamp_of(name, other, ending) is None


def test_the_folder_of_a_day_is_where_its_documents_lie() -> None:
    path = path_of("crypto.com", "BTC/EUR", 0)
    assert path.startswith(StoragePathUtility.day_path("crypto.com", "BTC/EUR", date(1970, 1, 1)))


def test_a_range_is_cut_to_the_times_that_names_carry() -> None:
    assert to_range(-5, 2**62) == TimeRange(0, 253_402_300_800_000)


def test_a_moment_between_milliseconds_belongs_to_the_next_one() -> None:
    assert to_milliseconds(datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)) == 1001
    assert to_milliseconds(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)) == 1000


def test_folders_of_dates_are_those_whose_names_are_numbers_in_bounds() -> None:
    names = ["12", "01", "13", "1", "001", "1a", "\u0661\u0662", "03"]
    numbers = StoragePathUtility.numbers_of
    assert numbers(names, 2, 1, 12, newest_first=False) == [1, 3, 12]
    assert numbers(names, 2, 2, 12, newest_first=True) == [12, 3]
