"""Entries for tests."""

from __future__ import annotations

from typing import Final

from domain.candle import Candle
from domain.entry import Entry, Source
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.series import Series

NOON: Final = 1_795_348_800_000
"""2026-11-22T12:00:00Z in ms."""
FIVE_MINUTES: Final = 300_000
BTC: Final = Series("crypto.com", "BTC", Interval.parse("5m"))


def make_entry(
    timestamp: int = NOON,
    *,
    close: float = 100.5,
    book: bool = False,
    series: Series = BTC,
    market: str = "BTC/USD",
    source: Source = "rest",
) -> Entry:
    """A sound entry of the period that opens at ``timestamp`` ms."""
    return Entry(
        series=series,
        market=market,
        candle=Candle(timestamp, open=100.0, high=200.0, low=50.0, close=close, volume=3.25),
        order_book=make_book(timestamp + series.interval.milliseconds) if book else None,
        source=source,
    )


def make_book(timestamp: int, *, bid: float = 99.0) -> OrderBook:
    """A book of two levels a side at ``timestamp`` ms."""
    return OrderBook(
        timestamp, bids=((bid, 1.0), (bid - 1, 2.0)), asks=((bid + 2, 1.5), (bid + 3, 2.5))
    )
