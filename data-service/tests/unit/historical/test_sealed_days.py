"""Days of a year as bits."""

from __future__ import annotations

from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from domain.time_range import RangeSet, TimeRange
from historical.sealed_days import DAY_MS, bits_of, bits_within, ranges_of
from storage.path_utility import day_start

YEARS = st.integers(1970, 2100)


def days_of(year: int, numbers: set[int]) -> list[date]:
    return [date(year, 1, 1) + timedelta(days=number) for number in sorted(numbers)]


@given(YEARS, st.sets(st.integers(0, 364)))
def test_days_become_bits_and_bits_the_runs_of_those_days(year: int, numbers: set[int]) -> None:
    starts = [day_start(day) for day in days_of(year, numbers)]
    expected = RangeSet(TimeRange(start, start + DAY_MS) for start in starts)
    assert list(ranges_of(bits_of(days_of(year, numbers)), year)) == list(expected)


@given(YEARS, st.integers(-800, 800), st.integers(0, 800), st.integers(0, DAY_MS - 1))
def test_a_range_has_the_bits_of_the_days_that_it_touches(
    year: int, first: int, days: int, into: int
) -> None:
    start = day_start(date(year, 1, 1)) + first * DAY_MS + into
    wanted = TimeRange(start, start + days * DAY_MS)
    every = [date(year, 1, 1) + timedelta(days=number) for number in range(365)]
    touched = [
        day for day in every if wanted.intersect(TimeRange(day_start(day), day_start(day) + DAY_MS))
    ]
    in_every_year = (1 << 365) - 1
    assert bits_within(wanted, year) & in_every_year == bits_of(touched)


def test_the_last_day_of_a_leap_year_has_a_bit_of_its_own() -> None:
    last = date(2028, 12, 31)
    assert list(ranges_of(bits_of([last]), 2028)) == [
        TimeRange(day_start(last), day_start(last) + DAY_MS)
    ]
