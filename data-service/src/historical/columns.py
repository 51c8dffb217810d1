"""Candles as columns of numbers: what ranges are read, resampled and summed up in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Self, overload

import numpy as np
import numpy.typing as npt

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange

Numbers = npt.NDArray[np.int64]
Prices = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Candles:
    """Candles of one series, a column each, ascending by time, each period once.

    ``timestamp`` (int64) is the open of a period in ms, prices are in the market's quote currency
    and ``volume`` in its base currency (float64). The columns are of one length and must not be
    written to. Two are equal when every number is.
    """

    timestamp: Numbers
    open: Prices
    high: Prices
    low: Prices
    close: Prices
    volume: Prices

    @classmethod
    def of(cls, candles: Iterable[Candle]) -> Self:
        """The columns of candles that ascend."""
        rows = list(candles)
        return cls(
            np.array([row.timestamp for row in rows], dtype=np.int64),
            np.array([row.open for row in rows], dtype=np.float64),
            np.array([row.high for row in rows], dtype=np.float64),
            np.array([row.low for row in rows], dtype=np.float64),
            np.array([row.close for row in rows], dtype=np.float64),
            np.array([row.volume for row in rows], dtype=np.float64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Candles]) -> Candles:
        """Several of disjoint times as one, in whatever order they are given."""
        filled = sorted((part for part in parts if len(part)), key=lambda part: part.timestamp[0])
        if len(filled) <= 1:
            return filled[0] if filled else NOTHING
        together = cls(
            *(np.concatenate(columns) for columns in zip(*map(_columns, filled), strict=True))
        )
        times = together.timestamp
        if bool(np.all(times[1:] > times[:-1])):
            return together
        return together[np.argsort(times)]

    def __len__(self) -> int:
        return len(self.timestamp)

    def __iter__(self) -> Iterator[Candle]:
        return (Candle(*row) for row in self.rows())

    @overload
    def __getitem__(self, chosen: int) -> Candle: ...

    @overload
    def __getitem__(self, chosen: slice | Numbers | npt.NDArray[np.bool_]) -> Candles: ...

    def __getitem__(
        self, chosen: int | slice | Numbers | npt.NDArray[np.bool_]
    ) -> Candle | Candles:
        """One of them, or some: a slice, or those that numpy chooses by an array."""
        if isinstance(chosen, int):
            return Candle(*(column[chosen].item() for column in _columns(self)))
        return Candles(*(column[chosen] for column in _columns(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Candles):
            return NotImplemented
        pairs = zip(_columns(self), _columns(other), strict=True)
        return all(bool(np.array_equal(mine, theirs)) for mine, theirs in pairs)

    __hash__ = None  # type: ignore[assignment]  # its columns are mutable

    def rows(self) -> list[tuple[int, float, float, float, float, float]]:
        """A row a candle, in the order of the columns, of Python's own numbers."""
        return list(zip(*(column.tolist() for column in _columns(self)), strict=True))

    def within(self, part: TimeRange) -> Candles:
        """Those that open in ``part``."""
        first, end = np.searchsorted(self.timestamp, (part.start, part.end))
        return self[first : max(first, end)]

    def cut(self, starts: Sequence[int]) -> list[Candles]:
        """Those from each of these times on, up to the next of them; the last has the rest."""
        firsts = np.searchsorted(self.timestamp, np.array(starts, dtype=np.int64)).tolist()
        ends = [*firsts[1:], len(self)]
        return [self[first:end] for first, end in zip(firsts, ends, strict=True)]

    def without(self, parts: Iterable[TimeRange]) -> Candles:
        """Those that open in none of the parts."""
        kept = np.ones(len(self), dtype=np.bool_)
        for part in parts:
            first, end = np.searchsorted(self.timestamp, (part.start, part.end))
            kept[first:end] = False
        return self[kept]

    def count_within(self, parts: Iterable[TimeRange]) -> int:
        """How many open in one of the parts, which are disjoint."""
        return sum(len(self.within(part)) for part in parts)


def runs_of(times: Numbers, interval: Interval) -> Iterator[TimeRange]:
    """The runs of periods that open at these times, which ascend."""
    if not len(times):
        return
    step = interval.milliseconds
    ends = np.flatnonzero(np.diff(times) != step)
    firsts = np.concatenate(([0], ends + 1))
    lasts = np.concatenate((ends, [len(times) - 1]))
    for first, last in zip(times[firsts].tolist(), times[lasts].tolist(), strict=True):
        yield TimeRange(first, last + step)


def _columns(candles: Candles) -> tuple[npt.NDArray[Any], ...]:
    return tuple(getattr(candles, field.name) for field in fields(candles))


NOTHING: Final = Candles.of(())
"""No candle."""
