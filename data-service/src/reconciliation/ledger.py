"""What is remembered of a series beside its documents.

Losing a ledger costs requests and reads, never truth: without one, what it proved is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from domain.time_range import RangeSet, TimeRange

LEDGER_VERSION: Final = 1


@dataclass(slots=True)
class Ledger:
    """Proofs about the periods of one series.

    Attributes:
        verified: stored periods whose last look was taken late enough to be final.
        empty: periods proven to have no trades, finally.
        suspected: periods proven empty once, and when (market ms) that was.
        booked: stored periods that have an order book.
    """

    verified: RangeSet = field(default_factory=RangeSet)
    empty: RangeSet = field(default_factory=RangeSet)
    suspected: dict[int, int] = field(default_factory=dict)
    booked: RangeSet = field(default_factory=RangeSet)

    def to_bytes(self) -> bytes:
        """The JSON document that is kept."""
        return orjson.dumps(
            {
                "version": LEDGER_VERSION,
                "verified": _pairs(self.verified),
                "empty": _pairs(self.empty),
                "suspected": sorted(self.suspected.items()),
                "booked": _pairs(self.booked),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Ledger | None:
        """Read a kept document; None when it is none, which is the same as having lost it."""
        try:
            document: dict[str, Any] = orjson.loads(content)
            if document["version"] != LEDGER_VERSION:
                return None
            return cls(
                verified=_ranges(document["verified"]),
                empty=_ranges(document["empty"]),
                suspected={int(period): int(when) for period, when in document["suspected"]},
                booked=_ranges(document["booked"]),
            )
        except (ValueError, TypeError, KeyError):
            return None


def _pairs(ranges: Iterable[TimeRange]) -> list[tuple[int, int]]:
    return [(item.start, item.end) for item in ranges]


def _ranges(pairs: Iterable[tuple[int, int]]) -> RangeSet:
    return RangeSet(TimeRange(int(start), int(end)) for start, end in pairs)
