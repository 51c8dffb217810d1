"""Candles as columns, against the same as a list of candles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from domain.interval import Interval
from domain.time_range import RangeSet, TimeRange
from historical.columns import NOTHING, Candles, runs_of
from tests.support.market import FIVE, T0, candle, candles

M5 = Interval.parse("5m")
PERIODS = st.sets(st.integers(0, 60)).map(sorted)
TIMES = st.integers(-3 * FIVE, 63 * FIVE).map(lambda ms: T0 + ms)
PARTS = st.lists(st.tuples(TIMES, TIMES).map(lambda pair: TimeRange(*sorted(pair))), max_size=4)


def made_of(periods: list[int]) -> Candles:
    return Candles.of(candle(T0 + at * FIVE) for at in periods)


def test_candles_come_back_as_they_were() -> None:
    series = candles(T0, 5, holes=[2])
    columns = Candles.of(series)
    assert list(columns) == series
    assert (columns[0], columns[-1], len(columns)) == (series[0], series[-1], 4)
    assert columns.rows()[1] == (
        series[1].timestamp, series[1].open, series[1].high, series[1].low, series[1].close,
        series[1].volume,
    )  # fmt: skip
    assert [type(value) for value in columns.rows()[0]] == [int] + [float] * 5
    assert list(columns[1:3]) == series[1:3]
    assert list(columns[columns.timestamp > T0]) == series[1:]


def test_equal_are_those_whose_every_number_is() -> None:
    columns = Candles.of(candles(T0, 3))
    assert columns == Candles.of(candles(T0, 3))
    assert columns != columns[:2]
    assert columns != Candles.of([*candles(T0, 2), candle(T0 + 2 * FIVE, close=90)])
    assert columns != "candles"
    assert Candles.of([]) == NOTHING


@given(PERIODS, PARTS)
def test_parts_are_those_that_open_in_them(periods: list[int], parts: list[TimeRange]) -> None:
    columns, series = made_of(periods), [candle(T0 + at * FIVE) for at in periods]
    for part in parts:
        assert list(columns.within(part)) == [one for one in series if one.timestamp in part]
    disjoint = list(RangeSet(parts))
    outside = [one for one in series if not any(one.timestamp in part for part in parts)]
    assert list(columns.without(disjoint)) == outside
    assert columns.count_within(disjoint) == len(series) - len(outside)


@given(PERIODS, st.lists(st.integers(0, 2), min_size=61, max_size=61))
def test_what_is_taken_apart_is_joined_in_order(periods: list[int], places: list[int]) -> None:
    columns = made_of(periods)
    parts = [made_of([at for at in periods if places[at] == place]) for place in (2, 0, 1)]
    assert Candles.joined(parts) == columns
    assert Candles.joined([]) == NOTHING


@given(PERIODS, st.sets(st.integers(1, 60)).map(sorted))
def test_cut_at_times_nothing_is_lost(periods: list[int], cuts: list[int]) -> None:
    columns = made_of(periods)
    starts = [T0, *(T0 + at * FIVE for at in cuts)]
    pieces = columns.cut(starts)
    assert Candles.joined(pieces) == columns
    for start, end, piece in zip(starts, [*starts[1:], 2**62], pieces, strict=True):
        assert all(start <= one.timestamp < end for one in piece)


@given(PERIODS)
def test_runs_are_those_of_their_periods(periods: list[int]) -> None:
    times = made_of(periods).timestamp
    expected = RangeSet(TimeRange(at, at + FIVE) for at in times.tolist())
    assert list(runs_of(times, M5)) == list(expected)
