"""A range of candles in a few numbers: pure functions of its columns."""

from __future__ import annotations

import math

import numpy as np

from historical.columns import NOTHING, Candles, Prices
from historical.resampling import aggregated


def thinned(candles: Candles, step: int, most: int) -> tuple[Candles, int]:
    """At most ``most`` candles over equal spans of time, and how many periods each spans.

    ``step`` is the length of a period in ms; spans are counted from the first candle, and one
    without a candle gives none.
    """
    if not len(candles):
        return NOTHING, 1
    first = int(candles.timestamp[0])
    periods = (int(candles.timestamp[-1]) - first) // step + 1
    span = math.ceil(periods / most)
    spans, firsts = np.unique((candles.timestamp - first) // (span * step), return_index=True)
    return aggregated(candles, firsts, first + spans * span * step), span


def typical_price_vwap(candles: Candles) -> float | None:
    """Volume-weighted mean of ``(high + low + close) / 3``; None without volume.

    Approximate: the true VWAP needs the trades.
    """
    volume = total(candles.volume)
    if volume == 0:
        return None
    typical = (candles.high + candles.low + candles.close) / 3
    return total(typical * candles.volume) / volume


def volatility(candles: Candles) -> float | None:
    """Sample standard deviation of the logarithmic returns between closes, per period."""
    if len(candles) < 3:
        return None
    return float(np.std(np.diff(np.log(candles.close)), ddof=1))


def max_drawdown_percent(candles: Candles) -> float:
    """The deepest fall of a close below an earlier close, in percent (0 or more)."""
    if not len(candles):
        return 0.0
    peaks = np.maximum.accumulate(candles.close)
    return float(np.max((peaks - candles.close) / peaks)) * 100


def total(values: Prices) -> float:
    """The exact sum, rounded once, so that it does not depend on how a range was read."""
    return math.fsum(values.tolist())
