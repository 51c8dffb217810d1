"""Builders of recorded markets."""

from __future__ import annotations

import random
from collections.abc import Iterable

from domain.candle import Candle
from domain.entry import Entry
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.series import Series

MINUTE = 60_000
FIVE = 5 * MINUTE
HOUR = 60 * MINUTE
DAY = 24 * HOUR
# A round moment: the open of a day, and so of every shorter period.
T0 = 1_700_006_400_000
BTC_5M = Series("crypto.com", "BTC", Interval.parse("5m"))
BTC_1M = Series("crypto.com", "BTC", Interval.parse("1m"))


def candle(timestamp: int, *, close: float | None = None, volume: float = 1.5) -> Candle:
    """A candle whose values follow from its timestamp, unless told otherwise."""
    rng = random.Random(timestamp)
    open_, drawn = rng.uniform(90, 110), rng.uniform(90, 110)
    shut = drawn if close is None else close
    return Candle(
        timestamp=timestamp,
        open=open_,
        high=max(open_, shut) + 1,
        low=min(open_, shut) - 1,
        close=shut,
        volume=volume,
    )


def candles(start: int, count: int, *, step: int = FIVE, holes: Iterable[int] = ()) -> list[Candle]:
    """``count`` periods from ``start``, without those whose index is in ``holes``."""
    skipped = set(holes)
    return [candle(start + at * step) for at in range(count) if at not in skipped]


def entry(timestamp: int, *, series: Series = BTC_5M, market: str = "BTC/USD") -> Entry:
    """An entry as settling makes it."""
    return Entry(series=series, market=market, candle=candle(timestamp))


def book(timestamp: int) -> OrderBook:
    """A small book."""
    return OrderBook(timestamp, bids=((99.0, 1.0), (98.0, 2.0)), asks=((101.0, 1.0),))
