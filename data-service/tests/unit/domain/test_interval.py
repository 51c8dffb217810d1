"""Intervals and the periods that they cut time into."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.gap import Gap, GapReason
from domain.interval import DEFAULT_INTERVAL, KNOWN_INTERVALS, Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest

intervals = st.sampled_from(KNOWN_INTERVALS).map(Interval.parse)
moments = st.integers(-(10**13), 10**14)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1s", 1_000), ("5m", 300_000), ("4h", 14_400_000), ("1d", 86_400_000), ("1w", 604_800_000)],
)
def test_a_timeframe_has_a_length(text: str, milliseconds: int) -> None:
    interval = Interval.parse(text)
    assert interval.milliseconds == milliseconds
    assert str(interval) == text


@pytest.mark.parametrize("text", ["", "5", "m", "7m", "05m", "5M", " 5m", "5m\n", "-5m", "\u0665m"])
def test_a_text_that_is_no_interval_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"use one of .*{DEFAULT_INTERVAL}"):
        Interval.parse(text)


@given(intervals, moments)
def test_every_moment_lies_in_the_period_that_floor_opens(interval: Interval, at: int) -> None:
    opened = interval.floor(at)
    assert opened <= at < opened + interval.milliseconds
    assert interval.is_aligned(opened)
    assert interval.is_aligned(at) == (opened == at)


@given(intervals, moments)
def test_ceil_is_the_first_open_at_or_after_a_moment(interval: Interval, at: int) -> None:
    following = interval.ceil(at)
    assert at <= following < at + interval.milliseconds
    assert interval.is_aligned(following)


def test_weeks_open_on_monday_at_midnight() -> None:
    opened = Interval.parse("1w").floor(1_795_348_800_000)
    moment = datetime.fromtimestamp(opened / 1000, UTC)
    assert (moment.weekday(), moment.hour, moment.minute) == (0, 0, 0)


def test_days_open_at_midnight() -> None:
    opened = Interval.parse("1d").floor(1_795_348_800_000)
    assert datetime.fromtimestamp(opened / 1000, UTC) == datetime(2026, 11, 22, tzinfo=UTC)


def test_intervals_sort_by_length() -> None:
    texts = ["1d", "5m", "1h"]
    assert [str(interval) for interval in sorted(map(Interval.parse, texts))] == ["5m", "1h", "1d"]


def test_a_gap_counts_the_periods_it_spans() -> None:
    gap = Gap(TimeRange(0, 900_000), GapReason.PENDING)
    assert gap.count(Interval.parse("5m")) == 3
    assert gap.reason == "pending"


def test_a_series_reads_as_its_three_parts() -> None:
    assert str(Series("crypto.com", "BTC", Interval.parse("5m"))) == "crypto.com BTC 5m"
