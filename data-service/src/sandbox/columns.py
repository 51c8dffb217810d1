"""Candles by the thousand, as arrays, and the one rule by which short ones make long ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Columns:
    """Candles of one market and one interval as columns of equal length, ascending by time.

    ``timestamp`` is the open of each period in ms; only periods that have a candle stand here.
    """

    timestamp: Integers
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats

    def __len__(self) -> int:
        return len(self.timestamp)

    def within(self, part: TimeRange) -> Columns:
        """The candles whose period opens in ``part``."""
        first, last = np.searchsorted(self.timestamp, (part.start, part.end))
        rows = slice(int(first), int(last))
        return Columns(
            self.timestamp[rows],
            self.open[rows],
            self.high[rows],
            self.low[rows],
            self.close[rows],
            self.volume[rows],
        )

    def candle(self, row: int) -> Candle:
        return Candle(
            timestamp=int(self.timestamp[row]),
            open=float(self.open[row]),
            high=float(self.high[row]),
            low=float(self.low[row]),
            close=float(self.close[row]),
            volume=float(self.volume[row]),
        )

    def candles(self) -> list[Candle]:
        return [self.candle(row) for row in range(len(self))]

    def aggregate(self, interval: Interval, decimals: int | None) -> Columns:
        """These candles as candles of the longer ``interval``.

        A volume is the exact sum of its parts, rounded to ``decimals`` where the market has a
        smallest amount, so that it is the very number that adding up its trades gives.
        """
        if not len(self):
            return self
        anchor = interval.floor(0)
        opens = self.timestamp - (self.timestamp - anchor) % interval.milliseconds
        starts = np.flatnonzero(np.concatenate(([True], opens[1:] != opens[:-1])))
        ends = np.append(starts[1:], len(self))
        if decimals is None:
            volume = np.array(
                [math.fsum(self.volume[start:end]) for start, end in zip(starts, ends, strict=True)]
            )
        else:
            volume = np.round(np.add.reduceat(self.volume, starts), decimals)
        return Columns(
            timestamp=opens[starts],
            open=self.open[starts],
            high=np.maximum.reduceat(self.high, starts),
            low=np.minimum.reduceat(self.low, starts),
            close=self.close[ends - 1],
            volume=volume,
        )


def empty_columns() -> Columns:
    none = np.empty(0)
    return Columns(np.empty(0, dtype=np.int64), none, none, none, none, none)


def concatenate(parts: Sequence[Columns]) -> Columns:
    """``parts``, which follow each other in time, as one."""
    if not parts:
        return empty_columns()
    return Columns(
        np.concatenate([part.timestamp for part in parts]),
        np.concatenate([part.open for part in parts]),
        np.concatenate([part.high for part in parts]),
        np.concatenate([part.low for part in parts]),
        np.concatenate([part.close for part in parts]),
        np.concatenate([part.volume for part in parts]),
    )


def from_candles(candles: Sequence[Candle]) -> Columns:
    """``candles``, ascending, as columns."""
    return Columns(
        np.array([candle.timestamp for candle in candles], dtype=np.int64),
        np.array([candle.open for candle in candles], dtype=np.float64),
        np.array([candle.high for candle in candles], dtype=np.float64),
        np.array([candle.low for candle in candles], dtype=np.float64),
        np.array([candle.close for candle in candles], dtype=np.float64),
        np.array([candle.volume for candle in candles], dtype=np.float64),
    )
