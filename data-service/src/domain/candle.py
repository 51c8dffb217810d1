"""Candles as exchanges publish them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from errors import InvalidEntry


# A struct, since a year of candles is a hundred thousand of them: made in a tenth of the time.
class Candle(msgspec.Struct, frozen=True, gc=False):
    """Open, high, low, close and volume of one period.

    ``timestamp`` is the open of the period in ms; prices are in the market's quote currency,
    ``volume`` is in its base currency.

    Raises:
        InvalidEntry: a value is not finite, a price is not positive, the volume is negative, or
            open and close do not lie between low and high.
    """

    timestamp: int
    open: float
    high: float
    low: float
    close: float
    volume: float

    def __post_init__(self) -> None:
        # Comparisons with NaN are false, so this one line says it all of a sound candle.
        if (
            0 < self.low <= self.open <= self.high < math.inf
            and self.low <= self.close <= self.high
            and 0 <= self.volume < math.inf
        ):
            return
        self._refuse()

    def _refuse(self) -> None:
        """Raise what says which rule is broken."""
        values = (self.open, self.high, self.low, self.close, self.volume)
        if not all(math.isfinite(value) for value in values):
            raise InvalidEntry(f"candle {self.timestamp} has a value that is no finite number")
        if self.low <= 0 or self.volume < 0:
            raise InvalidEntry(
                f"candle {self.timestamp} needs prices above zero and a volume of zero or more, "
                f"got low {self.low} and volume {self.volume}"
            )
        raise InvalidEntry(
            f"candle {self.timestamp} needs low <= open, close <= high, got "
            f"open {self.open}, high {self.high}, low {self.low}, close {self.close}"
        )


@dataclass(frozen=True, slots=True)
class CandleUpdate:
    """A candle that is still forming, as a stream told it.

    ``market`` is the ccxt unified symbol. Never stored: what is stored is asked from REST.
    """

    exchange: str
    market: str
    interval: str
    candle: Candle
