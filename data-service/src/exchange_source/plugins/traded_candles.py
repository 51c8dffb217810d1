"""Candles made of trades, for exchanges that stream none: provisional, for REST decides."""

from __future__ import annotations

from collections.abc import Iterable

from domain.candle import Candle
from domain.interval import Interval
from domain.trade import Trade


class TradedCandles:
    """The forming candles of one market and interval, from its trades.

    A period is told once a trade before its open was seen: of one that was joined midway, and of
    those before it, the first trades are not known.
    """

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._joined: int | None = None
        self._candle: Candle | None = None

    def add(self, trades: Iterable[Trade]) -> list[Candle]:
        """Take in trades; the candles that they change, as they stand then, ascending.

        Within one call trades may be in any order. One that comes in a later call is the last of
        its period, or, where another period followed, too late.
        """
        changed: dict[int, Candle] = {}
        for trade in sorted(trades, key=lambda trade: trade.timestamp):
            opened = self._interval.floor(trade.timestamp)
            if self._joined is None:
                self._joined = opened
            if opened <= self._joined or self._is_over(opened):
                continue
            self._candle = changed[opened] = self._with(opened, trade)
        return [changed[opened] for opened in sorted(changed)]

    def _is_over(self, opened: int) -> bool:
        return self._candle is not None and opened < self._candle.timestamp

    def _with(self, opened: int, trade: Trade) -> Candle:
        known = self._candle
        if known is None or known.timestamp != opened:
            price = trade.price
            return Candle(opened, price, price, price, price, trade.amount)
        return Candle(
            timestamp=opened,
            open=known.open,
            high=max(known.high, trade.price),
            low=min(known.low, trade.price),
            close=trade.price,
            volume=known.volume + trade.amount,
        )
