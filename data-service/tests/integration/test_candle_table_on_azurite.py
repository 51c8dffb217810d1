"""The table of sealed candles in Azure Blob Storage: the emulator, behind a proxy that lists as
Azure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from azure.storage.blob import BlobServiceClient, ContainerClient
from structlog.testing import capture_logs

from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_table import CandleTable
from historical.interfaces import CandleTableUnavailable
from target_management.delta_engine import DeltaEngine
from target_management.place import check_place
from tests.support.azurite import ACCOUNT, KEY, Azurite
from tests.support.entries import BTC
from tests.support.listing_proxy import listing_proxy
from tests.support.sealing import ALL, HOURLY, day, entries_of, range_of, table_at

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def port(azurite: Azurite) -> Iterator[int]:
    with listing_proxy(azurite.port) as port:
        yield port


@pytest.fixture
def blobs(azurite: Azurite, container: str) -> Iterator[ContainerClient]:
    with (
        BlobServiceClient.from_connection_string(azurite.connection_string) as service,
        service.create_container(container) as blobs,
    ):
        yield blobs


@pytest.fixture
def place(blobs: ContainerClient, port: int) -> tuple[str, dict[str, str]]:
    """Where the table lies, with the options that the table of targets takes."""
    uri, options = check_place(
        "azure",
        f"az://{blobs.container_name}/candles_delta",
        {
            "account_name": ACCOUNT,
            "account_key": KEY,
            "allow_http": "true",
            "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}",
        },
    )
    assert options is not None
    return uri, options


@pytest.fixture
def table(place: tuple[str, dict[str, str]]) -> CandleTable:
    return table_at(*place)


def test_days_are_sealed_unsealed_and_read_bit_for_bit(
    table: CandleTable, place: tuple[str, dict[str, str]]
) -> None:
    days = {day(at): entries_of(day(at)) for at in (-1, 0, 1)}
    table.seal(BTC, days)
    table.seal(BTC, {day(3): []})
    table.unseal(BTC, [day(0)])
    for opened in (table, table_at(*place)):
        ranges, entries = opened.read_entries(BTC, ALL)
        assert entries == [*days[day(-1)], *days[day(1)]]
        assert list(ranges) == [range_of(day(-1)), range_of(day(1)), range_of(day(3))]
    entries = days[day(1)]
    wanted = TimeRange(entries[7].timestamp, entries[100].timestamp)
    candles = table.read(BTC, wanted)
    assert candles.candles.close.tolist() == [entry.candle.close for entry in entries[7:100]]
    assert candles.ranges == (wanted,)


@pytest.mark.parametrize("coin", ["BTC/EUR", "币安人生", "A %2F'=~ b"])
def test_series_are_apart_whatever_they_are_called(table: CandleTable, coin: str) -> None:
    other = Series("crypto.com", coin, HOURLY.interval)
    entries = entries_of(day(0), series=other)
    table.seal(other, {day(0): entries, day(1): []})
    table.seal(BTC, {day(0): []})
    table.unseal(other, [day(1)])
    assert table.read_entries(other, ALL) == ((range_of(day(0)),), entries)


def test_one_handle_sees_at_once_what_another_one_commits(
    table: CandleTable, place: tuple[str, dict[str, str]]
) -> None:
    other = table_at(*place)
    table.seal(BTC, {day(0): []})
    assert other.sealed(BTC, ALL) == [range_of(day(0))]
    other.unseal(BTC, [day(0)])
    table.seal(BTC, {day(1): []})
    assert other.sealed(BTC, ALL) == [range_of(day(1))]


def test_small_files_are_merged_and_removed_and_the_log_is_cleared(
    table: CandleTable,
    place: tuple[str, dict[str, str]],
    blobs: ContainerClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("historical.candle_log._RETENTION_HOURS", 0)
    monkeypatch.setattr("historical.candle_log._LEAST_VACUUM", 5)
    days = {day(at): entries_of(day(at), count=3) for at in range(12)}
    for one, entries in days.items():
        table.seal(BTC, {one: entries})
    table.tidy()
    names = [name for name in blobs.list_blob_names() if "exchange=" in name]
    assert len(names) == 1
    assert any("checkpoint" in name for name in blobs.list_blob_names())
    for opened in (table, table_at(*place)):
        assert opened.read_entries(BTC, ALL)[1] == [one for mine in days.values() for one in mine]


def test_a_blob_that_is_gone_leaves_its_days_to_the_documents(
    table: CandleTable, blobs: ContainerClient
) -> None:
    table.seal(BTC, {day(0): entries_of(day(0), count=3)})
    (name,) = (name for name in blobs.list_blob_names() if "exchange=" in name)
    blobs.delete_blob(name)
    with capture_logs() as logs:
        assert table.read_entries(BTC, ALL) == ((), [])
    assert [entry["event"] for entry in logs] == ["candle_file_damaged"]


def test_an_address_where_nobody_answers_is_unavailable(
    place: tuple[str, dict[str, str]], unused_tcp_port: int
) -> None:
    uri, options = place
    endpoint = f"http://127.0.0.1:{unused_tcp_port}/{ACCOUNT}"
    table = CandleTable(DeltaEngine(), uri, options | {"endpoint": endpoint, "max_retries": "0"})
    with pytest.raises(CandleTableUnavailable) as told:
        table.prepare()
    assert KEY not in str(told.value)
