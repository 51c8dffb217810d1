"""Market time and real time.

Market time rules periods, graces and the rhythm of feeds; tests and demonstrations may shift it
and run it fast. Real time rules network timeouts, back-off, rate limits and tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from email.utils import formatdate

# One wait of the event loop at most: a suspended machine or a changed clock is noticed after it.
_LONGEST_WAIT_S = 30.0


class IClock(ABC):
    """Tells the time and waits for it.

    Guarantees: ``now_ms`` never goes back within a process by more than the system clock does;
    ``sleep_until`` returns at once for a moment that has passed, and never returns early.
    """

    @property
    @abstractmethod
    def speed(self) -> float:
        """How many seconds of market time pass in a real one."""

    @abstractmethod
    def now_ms(self) -> int:
        """Market time in ms since the epoch, UTC."""

    @abstractmethod
    def real_ms(self) -> int:
        """Real time in ms since the epoch, UTC."""

    @abstractmethod
    def monotonic(self) -> float:
        """Real seconds from an arbitrary start, never going back."""

    @abstractmethod
    async def sleep_until(self, market_ms: int) -> None:
        """Wait until market time has reached ``market_ms``."""

    @abstractmethod
    async def sleep_real(self, seconds: float) -> None:
        """Wait ``seconds`` of real time."""


@dataclass(frozen=True, slots=True)
class MarketClock(IClock):
    """Market time as a linear function of real time.

    Market time is ``market`` ms when real time is ``origin`` ms, and passes ``speed`` times as
    fast. The default is real time itself.
    """

    origin: int = 0
    market: int = 0
    speed: float = 1.0

    @classmethod
    def parse(cls, text: str) -> MarketClock:
        """Read the setting ``MARKET_CLOCK``: ``real`` or a JSON object.

        Raises:
            ValueError: the text is neither; the message says what it takes.
        """
        if text.strip() == "real":
            return cls()
        takes = (
            "'real' or a JSON object "
            '{"origin": real ms, "market": market ms at that moment, "speed": factor}'
        )
        try:
            fields = json.loads(text)
            clock = cls(
                origin=int(fields["origin"]),
                market=int(fields["market"]),
                speed=float(fields["speed"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError) as exc:
            raise ValueError(f"takes {takes}") from exc
        if not 0 < clock.speed <= 100_000:
            raise ValueError(f"takes {takes} with a speed above 0 and up to 100000")
        return clock

    def to_setting(self) -> str:
        """The text that ``parse`` reads back."""
        return json.dumps({"origin": self.origin, "market": self.market, "speed": self.speed})

    def now_ms(self) -> int:
        return int(self.market + (time.time_ns() / 1e6 - self.origin) * self.speed)

    def real_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep_until(self, market_ms: int) -> None:
        while (wait := (market_ms - self.now_ms()) / self.speed / 1000) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(wait, _LONGEST_WAIT_S))

    async def sleep_real(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def http_date(market_ms: int) -> str:
    """``market_ms`` as an HTTP ``Date`` header (RFC 9110, section 5.6.7)."""
    return formatdate(market_ms / 1000, usegmt=True)
