"""Resampling against its definition, an independent computation, and what exchanges recorded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.candle import Candle
from domain.gap import Gap, GapReason, joined
from domain.interval import KNOWN_INTERVALS, Interval
from domain.time_range import TimeRange
from historical.columns import NOTHING, Candles
from historical.resampling import can_resample, resample
from tests.support.market import DAY, FIVE, HOUR, MINUTE, T0, candle, candles

M1, M5, H1, H4, D1, W1 = map(Interval.parse, ("1m", "5m", "1h", "4h", "1d", "1w"))
SAMPLES = os.environ.get("CB_TRADE_SAMPLE_DATA") or None
OPEN_REASONS = (GapReason.UNREACHABLE, GapReason.PENDING, GapReason.NOT_OFFERED)


def read(name: str) -> list[Candle]:
    assert SAMPLES is not None
    frame = pd.read_feather(Path(SAMPLES) / "candles" / name)
    times = frame["date"].astype("datetime64[ms, UTC]").astype("int64")
    columns = ("open", "high", "low", "close", "volume")
    return [
        Candle(int(time), *map(float, row))
        for time, row in zip(times, frame[list(columns)].to_numpy(), strict=True)
    ]


def holes(found: Sequence[Candle], part: TimeRange, step: int) -> list[Gap]:
    """What is not there, as proven to have had no trades."""
    known = {item.timestamp for item in found}
    return list(
        joined(
            Gap(TimeRange(at, at + step), GapReason.NO_TRADES)
            for at in range(part.start, part.end, step)
            if at not in known
        )
    )


def by_pandas(found: Sequence[Candle], rule: str) -> list[Candle]:
    """The same by another hand."""
    frame = pd.DataFrame(
        [(c.open, c.high, c.low, c.close, c.volume) for c in found],
        index=pd.to_datetime([c.timestamp for c in found], unit="ms", utc=True),
        columns=["open", "high", "low", "close", "volume"],
    )
    how = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    grouped = frame.resample(rule, origin="epoch").agg(how).dropna()
    times = grouped.index.astype("datetime64[ms, UTC]").astype("int64")
    return [
        Candle(int(time), *map(float, row))
        for time, row in zip(times, grouped.to_numpy(), strict=True)
    ]


def assert_equal(ours: Sequence[Candle], theirs: Sequence[Candle]) -> None:
    """Prices to the last bit; volumes, which they add up otherwise, to a few ulps."""
    assert [c.timestamp for c in ours] == [c.timestamp for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.open, one.high, one.low, one.close) == (
            other.open, other.high, other.low, other.close,
        )  # fmt: skip
        assert math.isclose(one.volume, other.volume, rel_tol=1e-12, abs_tol=1e-12)


def test_which_intervals_fit_into_which() -> None:
    fitting = {
        name: [
            other
            for other in KNOWN_INTERVALS
            if can_resample(Interval.parse(other), Interval.parse(name))
        ]
        for name in ("1m", "5m", "4h", "1w")
    }
    assert fitting["1m"] == ["1s"]
    assert fitting["5m"] == ["1s", "1m"]
    assert "3h" not in fitting["4h"]
    assert fitting["4h"][-2:] == ["1h", "2h"]
    assert fitting["1w"][-2:] == ["12h", "1d"]
    assert "3d" not in fitting["1w"]


@pytest.mark.parametrize(("target", "rule"), [(H1, "1h"), (H4, "4h"), (D1, "24h")])
def test_a_series_is_what_another_computation_makes_of_it(target: Interval, rule: str) -> None:
    series = (
        candles(T0, 3 * 288, holes=range(100, 130))
        if SAMPLES is None
        else read("ETH_BTC-5m.feather")
    )
    part = TimeRange(target.floor(series[0].timestamp), target.floor(series[-1].timestamp))
    inside = [item for item in series if item.timestamp in part]
    result = resample(Candles.of(inside), holes(inside, part, FIVE), part, source=M5, target=target)
    assert_equal(list(result.candles), by_pandas(inside, rule))
    assert all(gap.reason is GapReason.NO_TRADES for gap in result.gaps)


def test_minutes_make_the_exchanges_own_five_minutes() -> None:
    if SAMPLES is None:
        minutes = candles(T0, 600, step=MINUTE, holes=[7, 100, 101, 102, 103, 104, 301])
        fives = by_pandas(minutes, "5min")
    else:
        minutes, fives = read("XRP_ETH-1m.feather"), read("XRP_ETH-5m.feather")
        assert len(fives) == 706
    part = TimeRange(M5.floor(minutes[0].timestamp), M5.floor(minutes[-1].timestamp) + FIVE)
    quiet = holes(minutes, part, MINUTE)
    result = resample(Candles.of(minutes), quiet, part, source=M1, target=M5)
    assert_equal(list(result.candles), fives)
    assert sum(gap.count(M5) for gap in result.gaps) + len(fives) == part.length // FIVE


def test_a_week_opens_on_monday() -> None:
    monday = W1.ceil(T0)
    days = candles(monday, 14, step=DAY)
    result = resample(
        Candles.of(days), [], TimeRange(monday, monday + 14 * DAY), source=D1, target=W1
    )
    assert [item.timestamp for item in result.candles] == [monday, monday + 7 * DAY]
    assert pd.Timestamp(monday, unit="ms").day_name() == "Monday"


@pytest.mark.parametrize("reason", OPEN_REASONS)
def test_a_bucket_that_is_known_in_part_is_left_out_for_its_reason(reason: GapReason) -> None:
    series = candles(T0, 24, holes=[3])
    gap = Gap(TimeRange(T0 + 3 * FIVE, T0 + 4 * FIVE), reason)
    result = resample(Candles.of(series), [gap], TimeRange(T0, T0 + 2 * HOUR), source=M5, target=H1)
    assert [item.timestamp for item in result.candles] == [T0 + HOUR]
    assert result.gaps == (Gap(TimeRange(T0, T0 + HOUR), reason),)


def test_of_several_reasons_what_may_still_mend_is_told() -> None:
    series = candles(T0, 12, holes=[0, 1, 2])
    gaps = [
        Gap(TimeRange(T0 + at * FIVE, T0 + (at + 1) * FIVE), reason)
        for at, reason in enumerate((GapReason.NOT_OFFERED, GapReason.PENDING, GapReason.NO_TRADES))
    ]
    hour = TimeRange(T0, T0 + HOUR)
    assert resample(Candles.of(series), gaps, hour, source=M5, target=H1).gaps == (
        Gap(hour, GapReason.PENDING),
    )


def test_what_is_neither_told_nor_explained_is_pending() -> None:
    hour = TimeRange(T0, T0 + HOUR)
    result = resample(Candles.of(candles(T0, 11)), [], hour, source=M5, target=H1)
    assert result == resample(NOTHING, [], hour, source=M5, target=H1)
    assert result.gaps == (Gap(hour, GapReason.PENDING),)


def test_quiet_periods_count_as_covered_and_nothing_but_them_makes_no_candle() -> None:
    part = TimeRange(T0, T0 + 2 * HOUR)
    series = [candle(T0 + 4 * FIVE)]
    result = resample(Candles.of(series), holes(series, part, FIVE), part, source=M5, target=H1)
    assert [item.timestamp for item in result.candles] == [T0]
    assert result.candles[0].volume == series[0].volume
    assert result.gaps == (Gap(TimeRange(T0 + HOUR, T0 + 2 * HOUR), GapReason.NO_TRADES),)


@pytest.mark.parametrize(
    ("source", "target", "part"),
    [
        (M5, M5, TimeRange(T0, T0 + FIVE)),
        (H1, M5, TimeRange(T0, T0 + HOUR)),
        (Interval.parse("3h"), H4, TimeRange(T0, T0 + 4 * HOUR)),
        (M5, H1, TimeRange(T0 + FIVE, T0 + HOUR)),
    ],
)
def test_intervals_that_do_not_fit_and_ranges_that_cut_a_bucket_are_refused(
    source: Interval, target: Interval, part: TimeRange
) -> None:
    with pytest.raises(ValueError, match=r"no multiple|cuts a period"):
        resample(NOTHING, [], part, source=source, target=target)


@given(
    st.lists(st.sampled_from(["candle", *GapReason]), min_size=24, max_size=96),
    st.sampled_from([Interval.parse("15m"), H1]),
)
def test_each_bucket_by_its_definition(kinds: list[str], target: Interval) -> None:
    per_bucket = target.milliseconds // FIVE
    kinds = kinds[: len(kinds) // per_bucket * per_bucket]
    part = TimeRange(T0, T0 + len(kinds) * FIVE)
    periods = list(enumerate(kinds))
    series = [candle(T0 + at * FIVE) for at, kind in periods if kind == "candle"]
    gaps = joined(
        Gap(TimeRange(T0 + at * FIVE, T0 + (at + 1) * FIVE), GapReason(kind))
        for at, kind in periods
        if kind != "candle"
    )
    result = resample(Candles.of(series), gaps, part, source=M5, target=target)
    told = {item.timestamp: item for item in result.candles}
    reasons = {
        at: gap.reason
        for gap in result.gaps
        for at in range(gap.range.start, gap.range.end, target.milliseconds)
    }
    assert sorted([*told, *reasons]) == list(range(part.start, part.end, target.milliseconds))
    for first in range(0, len(kinds), per_bucket):
        inside, start = kinds[first : first + per_bucket], T0 + first * FIVE
        open_ones = [reason for reason in OPEN_REASONS if reason in inside]
        if open_ones:
            assert reasons[start] is open_ones[0]
        elif "candle" not in inside:
            assert reasons[start] is GapReason.NO_TRADES
        else:
            members = [
                item for item in series if start <= item.timestamp < start + target.milliseconds
            ]
            whole = told[start]
            assert (whole.open, whole.close) == (members[0].open, members[-1].close)
            assert whole.high == max(item.high for item in members)
            assert whole.low == min(item.low for item in members)
            assert whole.volume == math.fsum(item.volume for item in members)
