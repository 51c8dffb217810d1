"""The top of an order book at one moment."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Final

from errors import InvalidEntry

BOOK_DEPTH: Final = 50
Level = tuple[float, float]
_LEVEL_FORMAT: Final = "dd"
_LEVEL_BYTES: Final = struct.calcsize(_LEVEL_FORMAT)


class OrderBook:
    """Bids (highest first) and asks (lowest first) as ``(price, amount)``, at ``timestamp`` ms.

    Immutable. Both sides are kept packed, 16 bytes a level: as tuples of numbers a year of books
    would take a gigabyte, and the garbage collector's attention all the while.

    Raises:
        InvalidEntry: a level is no pair of positive numbers, a side is out of order, or bids and
            asks cross.
    """

    __slots__ = ("_asks", "_bids", "_timestamp")

    def __init__(self, timestamp: int, bids: Iterable[Level], asks: Iterable[Level]) -> None:
        self._timestamp = timestamp
        bids, asks = tuple(bids), tuple(asks)
        previous = math.inf
        for price, amount in bids:
            if not (0 < price < previous and 0 < amount < math.inf):
                raise _wrong_level(timestamp, price, amount)
            previous = price
        previous = 0.0
        for price, amount in asks:
            if not (previous < price < math.inf and 0 < amount < math.inf):
                raise _wrong_level(timestamp, price, amount)
            previous = price
        if bids and asks and bids[0][0] >= asks[0][0]:
            raise InvalidEntry(
                f"order book {timestamp} crosses: bid {bids[0][0]} is not below ask {asks[0][0]}"
            )
        self._bids = _packed(bids)
        self._asks = _packed(asks)

    @property
    def timestamp(self) -> int:
        """When it was taken, in ms."""
        return self._timestamp

    @property
    def bids(self) -> tuple[Level, ...]:
        """What buyers offer, highest price first."""
        return _unpacked(self._bids)

    @property
    def asks(self) -> tuple[Level, ...]:
        """What sellers ask, lowest price first."""
        return _unpacked(self._asks)

    @property
    def depth(self) -> int:
        """How many levels the longer side has."""
        return max(len(self._bids), len(self._asks)) // _LEVEL_BYTES

    def top(self, depth: int = BOOK_DEPTH) -> OrderBook:
        """The best ``depth`` levels of each side."""
        if self.depth <= depth:
            return self
        return OrderBook(self._timestamp, self.bids[:depth], self.asks[:depth])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OrderBook):
            return NotImplemented
        return (
            self._timestamp == other._timestamp
            and self._bids == other._bids
            and self._asks == other._asks
        )

    def __hash__(self) -> int:
        return hash((self._timestamp, self._bids, self._asks))

    def __repr__(self) -> str:
        return f"OrderBook(timestamp={self._timestamp}, bids={self.bids}, asks={self.asks})"


def _packed(side: tuple[Level, ...]) -> bytes:
    return array("d", chain.from_iterable(side)).tobytes()


def _unpacked(side: bytes) -> tuple[Level, ...]:
    return tuple(struct.iter_unpack(_LEVEL_FORMAT, side))


def _wrong_level(timestamp: int, price: float, amount: float) -> InvalidEntry:
    if math.isfinite(price) and math.isfinite(amount) and price > 0 < amount:
        return InvalidEntry(f"order book {timestamp} is not sorted by price at {price}")
    return InvalidEntry(f"order book {timestamp} has a level {price}, {amount}")
