"""Prices as an exchange tells them that has a candle for every period, traded in or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.time_range import TimeRange
from sandbox.prices import MINUTE_MS, Instrument, IPriceSource, Trade

_MINUTE: Final = Interval.parse("1m")
_FIRST_LOOK_MS: Final = 60 * MINUTE_MS


class FlatCandles(IPriceSource):
    """``prices`` with a flat candle where nobody traded: at the close before it, volume 0.

    ``prices`` offers minutes and has no outages: each of its holes is a quiet period. From a
    market's first trade on no period is missing. A longer candle is its minutes added up, the flat
    ones included: after a quiet first minute it opens at the close before it, not at its first
    trade. A forming candle is flat until somebody trades.
    """

    def __init__(self, prices: IPriceSource) -> None:
        self._prices = prices
        self._close_before = lru_cache(maxsize=65_536)(self._find_close_before)
        self._opens_quietly = lru_cache(maxsize=65_536)(self._is_quiet_minute)

    def markets(self) -> Sequence[Instrument]:
        return self._prices.markets()

    def offers(self, instrument: Instrument, interval: Interval) -> bool:
        return self._prices.offers(instrument, interval)

    def history_start(self, instrument: Instrument) -> int:
        return self._prices.history_start(instrument)

    def candles(
        self, instrument: Instrument, interval: Interval, part: TimeRange
    ) -> Sequence[Candle]:
        first = interval.ceil(max(part.start, self.history_start(instrument)))
        traded = {
            candle.timestamp: candle
            for candle in self._prices.candles(instrument, interval, TimeRange(first, part.end))
        }
        close = self._close_before(instrument, first) if first < part.end else None
        found: list[Candle] = []
        for opened in range(first, part.end, interval.milliseconds):
            candle = traded.get(opened)
            if close is not None:
                if candle is None:
                    candle = _flat(opened, close)
                elif self._opens_quietly(instrument, opened):
                    candle = _after_quiet_minute(candle, close)
            if candle is not None:
                found.append(candle)
                close = candle.close
        return found

    def forming(self, instrument: Instrument, interval: Interval, at_ms: int) -> Candle | None:
        candle = self._prices.forming(instrument, interval, at_ms)
        opened = interval.floor(at_ms)
        if opened < self.history_start(instrument):
            return candle
        close = self._close_before(instrument, opened)
        if close is None:
            return candle
        if candle is None:
            return _flat(opened, close)
        # A candle that has traded in its first minute cannot become one that was quiet in it.
        if self._opens_quietly(instrument, opened):
            return _after_quiet_minute(candle, close)
        return candle

    def trades(self, instrument: Instrument, part: TimeRange) -> Sequence[Trade]:
        return self._prices.trades(instrument, part)

    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        return self._prices.book(instrument, at_ms, depth)

    def _find_close_before(self, instrument: Instrument, moment: int) -> float | None:
        """The price of the last trade in the minutes before ``moment``; None before the first."""
        start = self.history_start(instrument)
        end, width = moment, _FIRST_LOOK_MS
        while end > start:
            earlier = max(start, end - width)
            minutes = self._prices.candles(instrument, _MINUTE, TimeRange(earlier, end))
            if minutes:
                return minutes[-1].close
            end, width = earlier, 2 * width
        return None

    def _is_quiet_minute(self, instrument: Instrument, opened: int) -> bool:
        return self._prices.candle(instrument, _MINUTE, opened) is None


def _flat(opened: int, price: float) -> Candle:
    return Candle(timestamp=opened, open=price, high=price, low=price, close=price, volume=0.0)


def _after_quiet_minute(candle: Candle, before: float) -> Candle:
    """``candle`` with a flat minute at ``before`` in front of its first trade."""
    return Candle(
        timestamp=candle.timestamp,
        open=before,
        high=max(candle.high, before),
        low=min(candle.low, before),
        close=candle.close,
        volume=candle.volume,
    )
