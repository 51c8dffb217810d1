from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather

from domain.candle import Candle
from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest
from sandbox.app import SandboxConfig, running_sandbox
from sandbox.replay import ReplayError, ReplayPrices, load_replay
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    clock_at,
    http_to,
    recorded_with_holes,
    row_values,
    values_of,
    write_csv,
)

M1, M5 = Interval.parse("1m"), Interval.parse("5m")
HOLES = (range(20, 23), range(40, 58))
RECORDED = recorded_with_holes(NOON_MS, MINUTE, 120, HOLES)
WHOLE = TimeRange(0, 2 * NOON_MS)


# Captured recordings are played where there are any; generated ones always.
SOURCES = ("generated", "captured") if os.environ.get("CB_TRADE_SAMPLE_DATA") else ("generated",)


@pytest.fixture(scope="module", params=SOURCES)
def recordings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings: a minute series and its five minutes, and two more."""
    if request.param == "captured":
        return Path(os.environ["CB_TRADE_SAMPLE_DATA"]) / "candles"
    folder = tmp_path_factory.mktemp("generated")
    write_feather(folder / "XRP_ETH-1m.feather", RECORDED)
    write_feather(folder / "XRP_ETH-5m.feather", five_minutes(RECORDED))
    write_feather(folder / "UNITTEST_BTC-1m.feather", RECORDED)
    whole = recorded_with_holes(NOON_MS, 5 * MINUTE, 700, ())
    write_feather(folder / "ETH_BTC-5m.feather", whole)
    return folder


def five_minutes(minutes: Sequence[Candle]) -> list[Candle]:
    """Five-minute candles by the definition, and not by the code under test."""
    grouped = itertools.groupby(minutes, key=lambda item: M5.floor(item.timestamp))
    return [
        Candle(
            timestamp=opened,
            open=parts[0].open,
            high=max(part.high for part in parts),
            low=min(part.low for part in parts),
            close=parts[-1].close,
            volume=math.fsum(part.volume for part in parts),
        )
        for opened, parts in ((opened, list(group)) for opened, group in grouped)
    ]


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    file = tmp_path / "ETH_BTC-1m.csv"
    write_csv(file, RECORDED)
    return file


def write_feather(path: Path, candles: list[Candle]) -> None:
    dates = pa.array([item.timestamp for item in candles], pa.timestamp("ms", tz="UTC"))
    names = ("open", "high", "low", "close", "volume")
    columns = {name: [getattr(item, name) for item in candles] for name in names}
    feather.write_feather(pa.table({"date": dates, **columns}), path)


async def everything_over_rest(file: Path, name: str, timeframe: str) -> list[tuple[float, ...]]:
    """Every row that REST gives of a recording when it is long over, page by page."""
    prices = load_replay(file)
    market = next(item for item in prices.markets() if f"{item.base}_{item.quote}" == name)
    length = Interval.parse(timeframe).milliseconds
    last = prices.candles(market, Interval.parse(timeframe), WHOLE)[-1].timestamp
    config = SandboxConfig(replay=file, market_clock=clock_at(last + 10 * length))
    found: list[tuple[float, ...]] = []
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        for start in range(prices.history_start(market), last + length, 300 * length):
            rows = await http.candles(
                name, timeframe, count=300, start_ts=start, end_ts=start + 300 * length
            )
            found += [(row["t"], *row_values(row)) for row in rows]
    return found


async def test_rest_tells_exactly_what_was_recorded_and_holes_stay_holes(csv_file: Path) -> None:
    told = await everything_over_rest(csv_file, "ETH_BTC", "1m")
    assert told == [(item.timestamp, *values_of(item)) for item in RECORDED]


async def test_feather_is_read_like_csv(tmp_path: Path) -> None:
    file = tmp_path / "ETH_BTC-1m.feather"
    write_feather(file, RECORDED)
    told = await everything_over_rest(file, "ETH_BTC", "1m")
    assert told == [(item.timestamp, *values_of(item)) for item in RECORDED]


def test_stored_entries_are_read_from_their_documents(tmp_path: Path) -> None:
    series = Series("crypto.com", "ETH", M5)
    candles = recorded_with_holes(NOON_MS, 5 * MINUTE, 30, (range(5, 9),))
    for number, candle in enumerate(candles):
        folder = tmp_path / "raw_data" / "crypto.com" / "ETH" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        document = Entry(series, "ETH/USD", candle).to_document()
        (folder / f"{number}.json").write_bytes(orjson.dumps(document))
    prices = load_replay(tmp_path / "raw_data")
    (market,) = prices.markets()
    assert market.symbol == "ETH/USD"
    assert list(prices.candles(market, M5, WHOLE)) == candles


def test_five_minutes_are_made_of_the_recorded_minutes(csv_file: Path) -> None:
    prices = load_replay(csv_file)
    (market,) = prices.markets()
    expected = five_minutes(RECORDED)
    assert list(prices.candles(market, M5, WHOLE)) == expected
    # 40 to 57 are missing: 40-44, 45-49 and 50-54 have nothing at all.
    assert len(expected) == 24 - 3


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> ReplayPrices:
    file = tmp_path_factory.mktemp("recording") / "ETH_BTC-1m.csv"
    write_csv(file, RECORDED)
    return load_replay(file)


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 120 * MINUTE - 1), interval=st.sampled_from([M1, M5]))
def test_a_forming_candle_never_leaves_the_recorded_one(
    playing: ReplayPrices, offset: int, interval: Interval
) -> None:
    (market,) = playing.markets()
    moment = NOON_MS + offset
    opened = interval.floor(moment)
    final = playing.candle(market, interval, opened)
    assert playing.forming(market, interval, opened + interval.milliseconds - 1) == final
    forming = playing.forming(market, interval, moment)
    if forming is not None:
        assert final is not None
        assert (forming.timestamp, forming.open) == (opened, final.open)
        assert final.low <= forming.low <= forming.high <= final.high
        assert forming.volume <= final.volume


def test_trades_reach_the_extremes_and_add_up_to_the_volume(playing: ReplayPrices) -> None:
    (market,) = playing.markets()
    for candle in RECORDED:
        part = TimeRange(candle.timestamp, candle.timestamp + MINUTE)
        trades = playing.trades(market, part)
        if candle.volume == 0:
            assert not trades
            continue
        prices = [trade.price for trade in trades]
        assert (prices[0], max(prices), min(prices), prices[-1]) == values_of(candle)[:4]
        assert math.fsum(trade.amount for trade in trades) == pytest.approx(candle.volume)


def test_nothing_trades_in_a_hole_and_the_book_stands_still_round_the_last_price(
    playing: ReplayPrices,
) -> None:
    (market,) = playing.markets()
    hole = TimeRange(NOON_MS + 40 * MINUTE, NOON_MS + 58 * MINUTE)
    assert not playing.trades(market, hole)
    assert playing.forming(market, M1, hole.start + 1) is None
    last = next(item for item in RECORDED if item.timestamp == hole.start - MINUTE)
    book = playing.book(market, hole.start + MINUTE, 10)
    assert book.bids[0][0] < last.close * 1.0001
    assert book.asks[0][0] > last.close * 0.9999


async def test_a_finer_interval_than_the_recorded_one_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "ETH_BTC-5m.csv"
    write_csv(file, recorded_with_holes(NOON_MS, 5 * MINUTE, 20, ()))
    prices = load_replay(file)
    with pytest.raises(InvalidRequest):
        prices.candles(prices.markets()[0], M1, WHOLE)
    config = SandboxConfig(replay=file, market_clock=clock_at(NOON_MS + 60 * MINUTE))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        status, answer = await http.get(
            "/exchange/v1/public/get-candlestick", instrument_name="ETH_BTC", timeframe="1m"
        )
    assert status == 400
    assert answer["code"] == 40004


async def test_the_future_of_a_recording_is_not_told(csv_file: Path) -> None:
    now = NOON_MS + 30 * MINUTE + 30_000
    config = SandboxConfig(replay=csv_file, market_clock=clock_at(now))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        rows = await http.candles("ETH_BTC", "1m", count=300)
    assert rows[-1]["t"] == NOON_MS + 30 * MINUTE
    known = {item.timestamp: values_of(item) for item in RECORDED}
    assert all(row_values(row) == known[row["t"]] for row in rows[:-1])
    assert row_values(rows[-1])[4] < known[rows[-1]["t"]][4]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("ETH_BTC-1m.csv", "date,open\n1,2\n", "row 2"),
        ("ETH_BTC-1m.csv", "date,open,high,low,close,volume\n", "no candles"),
        ("ETH_BTC-1m.csv", "date,open,high,low,close,volume\n61000,1,1,1,1,1\n", "does not open"),
        ("ETH_BTC-1m.csv", "date,open,high,low,close,volume\n60000,1,2,3,1,1\n", "row 2"),
        ("ETH_BTC-1m.feather", "no arrow", "ETH_BTC-1m.feather"),
        ("ETH_BTC-9m.csv", "", "does not exist"),
        ("candles.csv", "", "BASE_QUOTE"),
        ("x.json", "[]", "no JSON object"),
    ],
)
def test_a_recording_that_cannot_be_played_is_refused_by_name(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ReplayError, match=complaint):
        load_replay(file)


def test_a_folder_without_candles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no candles are recorded"):
        load_replay(tmp_path)


def test_recorded_five_minutes_are_those_of_their_recorded_minutes(
    recordings: Path, tmp_path: Path
) -> None:
    recorded = load_replay(recordings / "XRP_ETH-5m.feather")
    # In a folder of its own, or the recorded five minutes would be played.
    (tmp_path / "XRP_ETH-1m.feather").symlink_to(recordings / "XRP_ETH-1m.feather")
    minutes = load_replay(tmp_path / "XRP_ETH-1m.feather")
    expected = recorded.candles(recorded.markets()[0], M5, WHOLE)
    assert len(expected) in (21, 706)
    assert minutes.candles(minutes.markets()[0], M5, WHOLE) == expected


@pytest.mark.parametrize("name", ["UNITTEST_BTC-1m", "ETH_BTC-5m"])
async def test_recordings_come_out_of_rest_as_they_are(recordings: Path, name: str) -> None:
    file = recordings / f"{name}.feather"
    market, _, timeframe = name.partition("-")
    told = await everything_over_rest(file, market, timeframe)
    table = feather.read_table(file)
    dates = table.column("date").cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64()).to_pylist()
    columns = [table.column(item).to_pylist() for item in ("open", "high", "low", "close")]
    expected = zip(dates, *columns, table.column("volume").to_pylist(), strict=True)
    assert told == list(expected)
