"""The top of an order book at one moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from errors import InvalidEntry

BOOK_DEPTH: Final = 50
Level = tuple[float, float]


@dataclass(frozen=True, slots=True)
class OrderBook:
    """Bids (highest first) and asks (lowest first) as ``(price, amount)``, at ``timestamp`` ms.

    Raises:
        InvalidEntry: a level is no pair of positive numbers, a side is out of order, or bids and
            asks cross.
    """

    timestamp: int
    bids: tuple[Level, ...]
    asks: tuple[Level, ...]

    def __post_init__(self) -> None:
        for side in (self.bids, self.asks):
            for price, amount in side:
                if not (math.isfinite(price) and math.isfinite(amount) and price > 0 < amount):
                    raise InvalidEntry(f"order book {self.timestamp} has a level {price}, {amount}")
        bids = [price for price, _ in self.bids]
        asks = [price for price, _ in self.asks]
        if any(better <= worse for better, worse in pairwise(bids)) or any(
            better >= worse for better, worse in pairwise(asks)
        ):
            raise InvalidEntry(f"order book {self.timestamp} is not sorted by price")
        if bids and asks and bids[0] >= asks[0]:
            raise InvalidEntry(
                f"order book {self.timestamp} crosses: bid {bids[0]} is not below ask {asks[0]}"
            )

    def top(self, depth: int = BOOK_DEPTH) -> OrderBook:
        """The best ``depth`` levels of each side."""
        return OrderBook(self.timestamp, self.bids[:depth], self.asks[:depth])
