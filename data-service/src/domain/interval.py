"""Candle intervals: ccxt timeframes of a fixed length, aligned to UTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from errors import InvalidRequest

_UNIT_MS: Final = {
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 7 * 86_400_000,
}
# 1970-01-01 was a Thursday; the first Monday after it is where UTC weeks are counted from.
_FIRST_MONDAY_MS: Final = 4 * 86_400_000
# The lengths that exchanges of this world publish; anything else is a typing error.
KNOWN_INTERVALS: Final = (
    "1s", "1m", "3m", "5m", "10m", "15m", "30m",
    "1h", "2h", "3h", "4h", "6h", "8h", "12h", "1d", "3d", "1w",
)  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """The length of a candle's period, such as ``5m``.

    ``milliseconds`` is its length, ``name`` the ccxt timeframe that users write; ``anchor`` is a
    moment (ms) at which a period opens.
    """

    milliseconds: int
    name: str
    anchor: int = 0

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Read a ccxt timeframe (``1m``, ``5m``, ``1h``, ``1d``, ...).

        Raises:
            InvalidRequest: the text is no interval that this service knows.
        """
        if text not in KNOWN_INTERVALS:
            raise InvalidRequest(
                f"interval {text!r} does not exist; use one of {', '.join(KNOWN_INTERVALS)}"
            )
        return cls(
            milliseconds=int(text[:-1]) * _UNIT_MS[text[-1]],
            name=text,
            anchor=_FIRST_MONDAY_MS if text.endswith("w") else 0,
        )

    def floor(self, timestamp: int) -> int:
        """The open of the period that contains ``timestamp`` (both in ms)."""
        return timestamp - (timestamp - self.anchor) % self.milliseconds

    def ceil(self, timestamp: int) -> int:
        """The first period open at or after ``timestamp`` (both in ms)."""
        return -((self.anchor - timestamp) // self.milliseconds) * self.milliseconds + self.anchor

    def is_aligned(self, timestamp: int) -> bool:
        """Whether a period opens exactly at ``timestamp``."""
        return (timestamp - self.anchor) % self.milliseconds == 0

    def __str__(self) -> str:
        return self.name


DEFAULT_INTERVAL: Final = "5m"
