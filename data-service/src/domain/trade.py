"""Trades as exchanges publish them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from errors import InvalidEntry

Side = Literal["buy", "sell"]


# A struct, since a busy market has thousands a second.
class Trade(msgspec.Struct, frozen=True, gc=False):
    """One trade.

    ``id`` is the exchange's, unique within its market; ``timestamp`` is in ms; ``price`` is in the
    market's quote currency, ``amount`` in its base currency; ``side`` is what the taker did.

    Raises:
        InvalidEntry: a value cannot be.
    """

    id: str
    timestamp: int
    price: float
    amount: float
    side: Side

    def __post_init__(self) -> None:
        # Comparisons with NaN are false, so this says it all of a sound trade.
        if (
            0 < self.price < math.inf
            and 0 < self.amount < math.inf
            and self.side in _SIDES
            and self.id
        ):
            return
        raise InvalidEntry(
            f"trade {self.id!r} needs an id, a finite price and amount above zero and a side, got "
            f"price {self.price}, amount {self.amount}, side {self.side!r}"
        )


_SIDES = frozenset(get_args(Side))
