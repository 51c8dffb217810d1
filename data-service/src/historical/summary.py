"""A range of candles in a few numbers: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import stdev

from domain.candle import Candle
from historical.resampling import aggregate


def thinned(candles: Sequence[Candle], step: int, most: int) -> tuple[tuple[Candle, ...], int]:
    """At most ``most`` candles over equal spans of time, and how many periods each spans.

    ``step`` is the length of a period in ms; spans are counted from the first candle, and one
    without a candle gives none.
    """
    if not candles:
        return (), 1
    first = candles[0].timestamp
    periods = (candles[-1].timestamp - first) // step + 1
    span = math.ceil(periods / most)
    groups: dict[int, list[Candle]] = {}
    for candle in candles:
        groups.setdefault((candle.timestamp - first) // (span * step), []).append(candle)
    return (
        tuple(aggregate(group, first + index * span * step) for index, group in groups.items()),
        span,
    )


def typical_price_vwap(candles: Sequence[Candle]) -> float | None:
    """Volume-weighted mean of ``(high + low + close) / 3``; None without volume.

    Approximate: the true VWAP needs the trades.
    """
    volume = math.fsum(candle.volume for candle in candles)
    if volume == 0:
        return None
    return math.fsum((c.high + c.low + c.close) / 3 * c.volume for c in candles) / volume


def volatility(candles: Sequence[Candle]) -> float | None:
    """Sample standard deviation of the logarithmic returns between closes, per period."""
    returns = [math.log(after.close / before.close) for before, after in pairwise(candles)]
    return stdev(returns) if len(returns) > 1 else None


def max_drawdown_percent(candles: Sequence[Candle]) -> float:
    """The deepest fall of a close below an earlier close, in percent (0 or more)."""
    peak, deepest = 0.0, 0.0
    for candle in candles:
        peak = max(peak, candle.close)
        deepest = max(deepest, (peak - candle.close) / peak)
    return deepest * 100
