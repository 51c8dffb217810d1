"""Binance's order books: numbered states, and the streams that tell of them.

An exchange's book changes from update to update. Here it changes in steps of market time, and the
number of a state is the moment (ms) at which its step began. REST and every stream therefore name
the same book by the same number, whether anybody listens or not, and after a restart too. Between
the numbers of two states lie all updates that lead from one to the other, so that a client that
takes a snapshot and goes on with the changes always has a book that the exchange had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from domain.order_book import Level, OrderBook
from sandbox.prices import Instrument
from sandbox.sockets import Feed, changed_levels
from sandbox.venue import Venue

# How many levels of each side there are in all.
BOOK_LEVELS: Final = 1_000
_STEP_MS: Final = 100
# More steps at once are not gone through one by one: the clock was set.
_MOST_STEPS: Final = 100


class BookStates:
    """The states of every book of ``venue``.

    A step takes 100 ms of market time, or longer where the market runs so fast that this would be
    less than 100 ms of real time: no stream could tell each state then.
    """

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._step = max(_STEP_MS, int(_STEP_MS * venue.clock.speed))
        self.book = lru_cache(maxsize=256)(self._make_book)

    def number(self, now: int) -> int:
        """The number of the state that holds at ``now``."""
        return now - now % self._step

    def current(self) -> int:
        """The number of the state that holds at this moment."""
        return self.number(self._venue.clock.now_ms())

    def changes(
        self, instrument: Instrument, after: int, until: int
    ) -> tuple[Sequence[Level], Sequence[Level]]:
        """Each bid and ask that changed in a state later than ``after``, as it is in ``until``.

        An amount of 0 removes a level. Levels that changed and changed back are among them: who
        took a snapshot in between has them as they were then.
        """
        first = after + self._step if until - after <= _MOST_STEPS * self._step else until
        book = self.book(instrument, after)
        bids: set[float] = set()
        asks: set[float] = set()
        for number in range(first, until + 1, self._step):
            before, book = book, self.book(instrument, number)
            bids.update(price for price, _ in changed_levels(before.bids, book.bids))
            asks.update(price for price, _ in changed_levels(before.asks, book.asks))
        last_bids, last_asks = dict(book.bids), dict(book.asks)
        return (
            [(price, last_bids.get(price, 0.0)) for price in sorted(bids, reverse=True)],
            [(price, last_asks.get(price, 0.0)) for price in sorted(asks)],
        )

    def _make_book(self, instrument: Instrument, number: int) -> OrderBook:
        """The whole book in the state ``number``."""
        return self._venue.prices.book(instrument, number, BOOK_LEVELS)


class DepthFeed(Feed):
    """The changes of a book about every ``rhythm_ms``, chained; moments without change are left
    out.

    ``encode`` takes the changed bids and asks, the numbers of the first and the last update that
    they sum up, and the moment. When the exchange's clock is set back, the stream goes on from
    then.
    """

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        states: BookStates,
        rhythm_ms: int,
        encode: Callable[[Sequence[Level], Sequence[Level], int, int, int], str],
    ) -> None:
        super().__init__(venue, instrument, key, "book")
        self.is_chained = True
        self._states = states
        self._rhythm_ms = rhythm_ms
        self._encode = encode
        self._seen = self._told = states.current()

    def first(self) -> Sequence[str]:
        # A client asks REST for the whole book.
        return []

    def next_tick(self, now: int) -> int:
        return _next_multiple(now, self.pace(self._rhythm_ms))

    def tick(self, now: int) -> Sequence[str]:
        number, seen = self._states.number(now), self._seen
        self._seen = number
        if number < seen:
            self._told = number
        if number <= seen:
            return []
        bids, asks = self._states.changes(self.instrument, seen, number)
        if not bids and not asks:
            return []
        first, self._told = self._told + 1, number
        return [self._encode(bids, asks, first, number, now)]


class TopFeed(Feed):
    """The best ``depth`` levels about every ``rhythm_ms``, when they changed or ``always``."""

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        states: BookStates,
        depth: int,
        rhythm_ms: int,
        encode: Callable[[OrderBook, int], str],
        *,
        always: bool,
    ) -> None:
        super().__init__(venue, instrument, key, "book")
        self._states = states
        self._depth = depth
        self._rhythm_ms = rhythm_ms
        self._encode = encode
        self._always = always
        self._told: tuple[Sequence[Level], Sequence[Level]] | None = None

    def first(self) -> Sequence[str]:
        number = self._states.current()
        return [self._encode(self._top(number), number)]

    def next_tick(self, now: int) -> int:
        return _next_multiple(now, self.pace(self._rhythm_ms))

    def tick(self, now: int) -> Sequence[str]:
        number = self._states.number(now)
        top = self._top(number)
        before, self._told = self._told, (top.bids, top.asks)
        if before == self._told and not self._always:
            return []
        return [self._encode(top, number)]

    def _top(self, number: int) -> OrderBook:
        return self._states.book(self.instrument, number).top(self._depth)


def _next_multiple(now: int, length: int) -> int:
    return now - now % length + length
