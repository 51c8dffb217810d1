"""The sealed UTC days of one year as the bits of one number: pure functions.

Bit 0 is the first of January. Times are ms since the epoch, UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date
from typing import Final

from domain.interval import Interval
from domain.time_range import TimeRange
from storage.path_utility import day_start

DAY_MS: Final = 86_400_000
MOST_DAYS: Final = 366


def is_sealable(interval: Interval) -> bool:
    """Whether days of an interval are sealed: of periods longer than a day there are few, and they
    stay in their documents."""
    return interval.milliseconds <= DAY_MS


def bits_of(days: Iterable[date]) -> int:
    """The bits of days of one year."""
    bits = 0
    for day in days:
        bits |= 1 << (day.timetuple().tm_yday - 1)
    return bits


def bits_within(wanted: TimeRange, year: int) -> int:
    """The bits of the days of ``year`` that ``wanted`` covers in part at least."""
    start = day_start(date(year, 1, 1))
    first = max(0, (wanted.start - start) // DAY_MS)
    end = min(MOST_DAYS, -((start - wanted.end) // DAY_MS))
    return ((1 << (end - first)) - 1) << first if wanted and end > first else 0


def ranges_of(bits: int, year: int) -> Iterator[TimeRange]:
    """The runs of days of ``year`` whose bits are set, ascending."""
    start = day_start(date(year, 1, 1))
    at = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        length = (bits + 1 & ~bits).bit_length() - 1
        bits >>= length
        first = start + (at + skipped) * DAY_MS
        yield TimeRange(first, first + length * DAY_MS)
        at += skipped + length
