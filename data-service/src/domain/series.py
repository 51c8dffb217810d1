"""Which candles belong together."""

from __future__ import annotations

from dataclasses import dataclass

from domain.interval import Interval


@dataclass(frozen=True, slots=True, order=True)
class Series:
    """The entries of one coin in one interval on one exchange.

    ``exchange`` is the public lower-case name, ``coin`` upper case as users write it (``BTC``, or
    ``BTC/EUR`` when the quote matters).
    """

    exchange: str
    coin: str
    interval: Interval

    def __str__(self) -> str:
        return f"{self.exchange} {self.coin} {self.interval}"
