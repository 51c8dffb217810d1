"""``cb-trade-data export``: what is stored, as one file, whole or not at all."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

import cli
import export
from config import Settings, load_settings
from domain.entry import Entry
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest, NoData
from export import Wanted, run
from storage.factory import spool_folder
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import StorageError
from storage.root_stamp import write_stamp
from storage.spool import Spool
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_entry

SECRET = "0123456789abcdef0123456789abcdef"
ALL = TimeRange(0, 4_000_000_000_000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "AUTH_SECRET": SECRET,
        "STORAGE_ROOT": str(tmp_path / "data"),
        "STATE_DIR": str(tmp_path / "state"),
    }.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def collect(
    settings: Settings,
    *entries: Entry,
    spooled: tuple[Entry, ...] = (),
    redirected: bool = False,
) -> None:
    """What a service leaves behind."""
    asyncio.run(_collect(settings, entries, spooled, redirected))


async def _collect(
    settings: Settings, entries: Sequence[Entry], spooled: Sequence[Entry], redirected: bool
) -> None:
    storage = LocalFileStorage(Path(settings.storage_root))
    await storage.open()
    await write_stamp(storage, redirected=redirected)
    for entry in entries:
        await storage.save_entry(
            entry.series.exchange,
            entry.series.coin,
            entry.timestamp,
            entry.to_document(),
            interval=entry.series.interval.name,
        )
    await storage.close()
    if spooled:
        spool = Spool(spool_folder(settings, storage))
        await spool.open()
        await spool.put(spooled[0].series, spooled)
        await spool.close()


def entries(count: int) -> list[Entry]:
    return [make_entry(NOON + at * FIVE_MINUTES, close=100.0 + at / 8) for at in range(count)]


def wanted(**changes: object) -> Wanted:
    fields = {
        "coin": "BTC", "exchange": None, "interval": "5m", "range": ALL, "format": "parquet",
        "out": None,
    }  # fmt: skip
    return Wanted(**(fields | changes))  # type: ignore[arg-type]


def read(path: Path) -> pa.Table:
    if path.suffix == ".csv":
        frame = pd.read_csv(path)
        frame["time"] = pd.to_datetime(frame["time"], utc=True)
        return pa.Table.from_pandas(frame, preserve_index=False).cast(export.SCHEMA)
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    return pq.read_table(path).cast(export.SCHEMA)


@pytest.mark.parametrize("kind", cli.EXPORT_FORMATS)
def test_a_file_holds_every_stored_candle_to_the_last_bit(
    settings: Settings, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "BATCH", 7)
    stored = entries(20)
    collect(settings, *stored)
    code = _run(settings, wanted(format=kind))
    assert code == 0
    rows = read(tmp_path / f"crypto.com_BTC_5m.{kind}").to_pylist()
    assert [
        (int(row["time"].timestamp() * 1000), row["open"], row["high"], row["low"], row["close"],
         row["volume"], row["market"], row["revision"], row["source"])
        for row in rows
    ] == [
        (entry.timestamp, entry.candle.open, entry.candle.high, entry.candle.low,
         entry.candle.close, entry.candle.volume, entry.market, entry.revision, entry.source)
        for entry in stored
    ]  # fmt: skip
    assert {(row["exchange"], row["coin"], row["interval"]) for row in rows} == {
        ("crypto.com", "BTC", "5m")
    }


def test_what_waits_in_the_spool_is_exported_too(settings: Settings, tmp_path: Path) -> None:
    first, second, third = entries(3)
    collect(settings, first, third, spooled=(second,))
    _run(settings, wanted(out=tmp_path / "x.parquet"))
    times = read(tmp_path / "x.parquet").column("time").cast(pa.int64()).to_pylist()
    assert times == [first.timestamp, second.timestamp, third.timestamp]


def test_what_was_collected_from_a_sandbox_is_exported_as_well(
    settings: Settings, tmp_path: Path
) -> None:
    collect(settings, *entries(2), redirected=True)
    _run(settings, wanted(out=tmp_path / "x.parquet"))
    assert len(read(tmp_path / "x.parquet")) == 2


def test_a_folder_that_no_service_collected_into_is_told(
    settings: Settings, tmp_path: Path
) -> None:
    Path(settings.storage_root).mkdir()
    with pytest.raises(StorageError, match="no service has collected into it"):
        _run(settings, wanted())


def test_a_range_is_from_its_start_up_to_its_end(settings: Settings, tmp_path: Path) -> None:
    stored = entries(6)
    collect(settings, *stored)
    part = TimeRange(stored[1].timestamp, stored[4].timestamp)
    _run(settings, wanted(range=part, out=tmp_path / "x.parquet"))
    assert len(read(tmp_path / "x.parquet")) == 3


def test_a_coin_of_several_exchanges_takes_a_name(settings: Settings, tmp_path: Path) -> None:
    other = Series("binance", "BTC", BTC.interval)
    collect(settings, *entries(1), make_entry(NOON, series=other, market="BTC/USDT"))
    with pytest.raises(InvalidRequest, match=r"stored of crypto\.com, binance; name one"):
        _run(settings, wanted())
    _run(settings, wanted(exchange="binance", out=tmp_path / "x.parquet"))
    assert read(tmp_path / "x.parquet").column("market").to_pylist() == ["BTC/USDT"]


def test_what_is_not_stored_makes_no_file(settings: Settings, tmp_path: Path) -> None:
    collect(settings, *entries(1))
    for asked in (wanted(coin="ETH"), wanted(interval="1h"), wanted(range=TimeRange(1, 2))):
        with pytest.raises(NoData, match="nothing of"):
            _run(settings, asked)
    assert not list(tmp_path.glob("*.parquet"))


def test_a_file_that_is_there_is_not_replaced(settings: Settings, tmp_path: Path) -> None:
    collect(settings, *entries(1))
    out = tmp_path / "x.parquet"
    out.write_text("mine")
    with pytest.raises(InvalidRequest, match="is there already"):
        _run(settings, wanted(out=out))
    assert out.read_text() == "mine"
    with pytest.raises(InvalidRequest, match="cannot be written"):
        _run(settings, wanted(out=tmp_path / "nowhere/x.parquet"))


def test_documents_that_cannot_be_read_are_counted_and_the_rest_is_there(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(settings, *entries(3))
    broken = sorted(Path(settings.storage_root).rglob("*.json"))[1]
    broken.write_text('{"exchange": ')
    assert _run(settings, wanted(out=tmp_path / "x.parquet")) == 1
    assert len(read(tmp_path / "x.parquet")) == 2
    assert "1 documents could not be read" in capsys.readouterr().err


def test_who_looks_on_sees_a_bar_and_a_pipe_gets_none(settings: Settings, tmp_path: Path) -> None:
    collect(settings, *entries(4))
    terminal, pipe = Terminal(), io.StringIO()
    _run(settings, wanted(out=tmp_path / "a.csv", format="csv"), terminal)
    _run(settings, wanted(out=tmp_path / "b.csv", format="csv"), pipe)
    assert terminal.getvalue() == f"\r[{'#' * 30}] 4 of 4\n"
    assert pipe.getvalue() == ""


def test_the_command_takes_times_as_people_write_them(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "--coin", "btc", "--start", "2025-01-02", "--end", "1000"]) == 2
    assert "--end takes a time after --start" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "--coin", "btc", "--start", "soon"])
    assert "argument --start" in capsys.readouterr().err


def _run(settings: Settings, asked: Wanted, progress: io.StringIO | None = None) -> int:
    return run(settings, asked, progress=progress or io.StringIO())
