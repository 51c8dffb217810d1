"""Sealed days for tests."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Final

from domain.candle import Candle
from domain.entry import Entry, Source
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_table import CandleTable
from storage.path_utility import day_start
from target_management.delta_engine import DeltaEngine
from tests.support.entries import BTC

DAY_MS: Final = 86_400_000
ALL: Final = TimeRange(0, 2**62)
HOURLY: Final = Series("crypto.com", "BTC/EUR", Interval.parse("1h"))


def day(number: int) -> date:
    """A day of 2026, counted from zero; of the years around it for others."""
    return date(2026, 1, 1) + timedelta(days=number)


def range_of(first: date, days: int = 1) -> TimeRange:
    """So many days from that one on."""
    return TimeRange(day_start(first), day_start(first) + days * DAY_MS)


def entries_of(
    when: date, *, series: Series = BTC, seed: int = 0, count: int | None = None
) -> list[Entry]:
    """Entries of a day, all of its periods or so many, whose values take every bit."""
    rng = Random(f"{when} {series} {seed}")
    step = series.interval.milliseconds
    periods = max(1, DAY_MS // step)
    sources: tuple[Source, ...] = ("rest", "stream")
    entries = []
    for at in range(periods if count is None else min(count, periods)):
        low, first, last, high = sorted(rng.uniform(0.0001, 90_000) for _ in range(4))
        candle = Candle(day_start(when) + at * step, first, high, low, last, rng.expovariate(1))
        entries.append(
            Entry(series, "BTC/USD", candle, None, rng.choice(sources), rng.randint(1, 3))
        )
    return entries


def table_at(path: Path | str, options: dict[str, str] | None = None) -> CandleTable:
    """The table that lies there, made if it is missing."""
    table = CandleTable(DeltaEngine(), str(path), options)
    table.prepare()
    return table
