"""What is remembered of a series beside its documents.

Losing a ledger costs requests and reads, never truth: without one, what it proved is asked again.
An older version of one says less and nothing wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from domain.time_range import RangeMap, RangeSet, TimeRange

LEDGER_VERSION: Final = 2


@dataclass(slots=True)
class Ledger:
    """Proofs about the periods of one series.

    Attributes:
        verified: stored periods whose last look was taken late enough to be final.
        empty: periods proven to have no trades, finally.
        suspected: periods proven empty once, and when (market ms) that was.
        booked: stored periods that have an order book.
        bookless: stored periods that have none and will get none. Of stored periods in neither of
            the two it is not known.
    """

    verified: RangeSet = field(default_factory=RangeSet)
    empty: RangeSet = field(default_factory=RangeSet)
    suspected: RangeMap[int] = field(default_factory=RangeMap)
    booked: RangeSet = field(default_factory=RangeSet)
    bookless: RangeSet = field(default_factory=RangeSet)

    def to_bytes(self) -> bytes:
        """The JSON document that is kept."""
        return orjson.dumps(
            {
                "version": LEDGER_VERSION,
                "verified": _pairs(self.verified),
                "empty": _pairs(self.empty),
                "suspected": [(run.start, run.end, when) for run, when in self.suspected],
                "booked": _pairs(self.booked),
                "bookless": _pairs(self.bookless),
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
                suspected=RangeMap(
                    (TimeRange(int(start), int(end)), int(when))
                    for start, end, when in document["suspected"]
                ),
                booked=_ranges(document["booked"]),
                bookless=_ranges(document["bookless"]),
            )
        except (ValueError, TypeError, KeyError):
            return None


def _pairs(ranges: Iterable[TimeRange]) -> list[tuple[int, int]]:
    return [(item.start, item.end) for item in ranges]


def _ranges(pairs: Iterable[tuple[int, int]]) -> RangeSet:
    return RangeSet(TimeRange(int(start), int(end)) for start, end in pairs)
