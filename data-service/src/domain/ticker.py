"""Tickers as exchanges publish them."""

from __future__ import annotations

import math

import msgspec

from errors import InvalidEntry


class Ticker(msgspec.Struct, frozen=True, gc=False):
    """The last 24 hours of a market at ``timestamp`` (ms).

    Prices are in its quote currency, ``base_volume`` in its base currency; ``change_percent`` is
    against the price 24 hours before. What an exchange does not tell is None.

    Raises:
        InvalidEntry: a price is not positive, a volume is negative, or a value is not finite.
    """

    timestamp: int
    last: float | None = None
    bid: float | None = None
    ask: float | None = None
    high: float | None = None
    low: float | None = None
    base_volume: float | None = None
    change_percent: float | None = None

    def __post_init__(self) -> None:
        for name in ("last", "bid", "ask", "high", "low"):
            price = getattr(self, name)
            if price is not None and not 0 < price < math.inf:
                raise InvalidEntry(f"ticker {self.timestamp} needs {name} above zero, got {price}")
        if self.base_volume is not None and not 0 <= self.base_volume < math.inf:
            raise InvalidEntry(f"ticker {self.timestamp} has a volume of {self.base_volume}")
        if self.change_percent is not None and not math.isfinite(self.change_percent):
            raise InvalidEntry(f"ticker {self.timestamp} has a change of {self.change_percent}")
