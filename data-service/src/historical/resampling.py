"""Candles of a longer interval from those of a shorter one: a pure function.

A bucket is a period of the longer interval. It has a candle when each of its periods has one or is
proven to have had no trades, and at least one has one; else it is a gap, for a reason of its own:
``no_trades`` when all of it is proven so, and otherwise that of its periods that weighs most. A
bucket that is known in part only is left out: half a bucket looks like a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from domain.gap import Gap, GapReason, joined
from domain.interval import Interval
from domain.time_range import TimeRange
from historical.columns import NOTHING, Candles, Numbers

# What a bucket is called that lacks periods for several reasons: what may still mend comes first.
_WEIGHT: Final = (GapReason.UNREACHABLE, GapReason.PENDING, GapReason.NOT_OFFERED)


@dataclass(frozen=True, slots=True)
class Resampled:
    """Candles of the longer interval, and the buckets that have none."""

    candles: Candles
    gaps: tuple[Gap, ...]


def can_resample(source: Interval, target: Interval) -> bool:
    """Whether every period of ``target`` is a whole number of periods of ``source``."""
    return (
        source < target
        and target.milliseconds % source.milliseconds == 0
        and source.is_aligned(target.anchor)
    )


def aggregated(candles: Candles, firsts: Numbers, opens: Numbers) -> Candles:
    """One candle over each group of neighbours.

    ``firsts`` are where the groups begin, ascending from 0, each of at least one candle; ``opens``
    are the times that the new candles open at.
    """
    if not len(firsts):
        return NOTHING
    ends = np.append(firsts[1:], len(candles))
    # Exact sums, rounded once: how a range was read and cut does not show in them.
    volumes = candles.volume.tolist()
    sums = [math.fsum(volumes[first:end]) for first, end in zip(firsts, ends, strict=True)]
    return Candles(
        opens,
        candles.open[firsts],
        np.maximum.reduceat(candles.high, firsts),
        np.minimum.reduceat(candles.low, firsts),
        candles.close[ends - 1],
        np.array(sums, dtype=np.float64),
    )


def resample(
    candles: Candles,
    gaps: Sequence[Gap],
    wanted: TimeRange,
    *,
    source: Interval,
    target: Interval,
) -> Resampled:
    """The buckets of ``wanted``, whose ends open buckets.

    ``candles`` and ``gaps`` are those of the shorter interval in the same range, ascending: a
    period in neither of them counts as pending.

    Raises:
        ValueError: the intervals do not fit together, or the range cuts a bucket.
    """
    if not can_resample(source, target):
        raise ValueError(f"{target} is no multiple of {source}")
    if not (target.is_aligned(wanted.start) and target.is_aligned(wanted.end)):
        raise ValueError(f"{wanted} cuts a period of {target}")
    opens = np.arange(wanted.start, wanted.end, target.milliseconds, dtype=np.int64)
    edges = np.searchsorted(candles.timestamp, np.append(opens, wanted.end))
    counts = np.diff(edges)
    has_candle = np.zeros(len(opens), dtype=np.bool_)
    left_out: list[Gap] = []
    open_gaps = _Walk(gaps)
    for at, (start, count) in enumerate(zip(opens.tolist(), counts.tolist(), strict=True)):
        bucket = TimeRange(start, start + target.milliseconds)
        reason = _reason(bucket, count, list(open_gaps.within(bucket)), source)
        if reason is None:
            has_candle[at] = True
        else:
            left_out.append(Gap(bucket, reason))
    used = candles[edges[0] : edges[-1]][np.repeat(has_candle, counts)]
    sizes = counts[has_candle]
    made = aggregated(used, np.cumsum(sizes) - sizes, opens[has_candle])
    return Resampled(made, joined(left_out))


class _Walk:
    """Ascending gaps, looked at by ranges that ascend too."""

    def __init__(self, gaps: Sequence[Gap]) -> None:
        self._gaps = gaps
        self._at = 0

    def within(self, part: TimeRange) -> Iterator[Gap]:
        """What of the gaps lies in ``part``."""
        while self._at < len(self._gaps) and self._gaps[self._at].range.end <= part.start:
            self._at += 1
        for at in range(self._at, len(self._gaps)):
            gap = self._gaps[at]
            if gap.range.start >= part.end:
                return
            yield Gap(gap.range.intersect(part), gap.reason)


def _reason(
    bucket: TimeRange, count: int, gaps: Sequence[Gap], source: Interval
) -> GapReason | None:
    """Why a bucket has no candle, or None when it has one."""
    reasons = {gap.reason for gap in gaps}
    for reason in _WEIGHT:
        if reason in reasons:
            return reason
    quiet = sum(gap.count(source) for gap in gaps)
    if count + quiet < bucket.length // source.milliseconds:
        return GapReason.PENDING
    return None if count else GapReason.NO_TRADES
