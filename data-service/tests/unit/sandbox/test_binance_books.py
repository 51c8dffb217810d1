"""A client that goes on from a snapshot with changes has the exchange's book."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from domain.order_book import Level, OrderBook
from sandbox.binance_books import BOOK_LEVELS, BookStates, DepthFeed
from sandbox.faults import FaultBoard
from sandbox.prices import GeneratedPrices, Instrument
from sandbox.venue import ExchangeClock, Venue
from tests.unit.sandbox.helpers import MINUTE, NOON_MS, clock_at

STEP = 100


def venue_at(market_ms: int, speed: float = 1.0) -> Venue:
    clock = ExchangeClock(clock_at(market_ms, speed))
    return Venue(GeneratedPrices(seed=7), clock, FaultBoard(clock))


class Restless(GeneratedPrices):
    """Books that jump among five of the same minutes, so that they often change and change back."""

    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        minute = at_ms // STEP * 7 % 5
        return super().book(instrument, NOON_MS + minute * MINUTE, min(depth, 200))


VENUE = venue_at(NOON_MS)
STATES = BookStates(VENUE)
RESTLESS = BookStates(Venue(Restless(seed=7), VENUE.clock, VENUE.faults))
BTC = VENUE.instruments()[0]


def applied(side: Sequence[Level], changes: Sequence[Level]) -> dict[float, float]:
    levels = {**dict(side), **dict(changes)}
    return {price: amount for price, amount in levels.items() if amount}


@settings(max_examples=60, deadline=None)
@given(
    states=st.sampled_from([STATES, RESTLESS]),
    start=st.integers(NOON_MS // STEP - 9_000, NOON_MS // STEP),
    before=st.integers(0, 12),
    after=st.integers(0, 12),
)
def test_changes_lead_from_any_state_among_them_to_the_last_one(
    states: BookStates, start: int, before: int, after: int
) -> None:
    first, last = start * STEP, (start + before + after) * STEP
    snapshot = states.book(BTC, first + before * STEP)
    bids, asks = states.changes(BTC, first, last)
    final = states.book(BTC, last)
    assert applied(snapshot.bids, bids) == dict(final.bids)
    assert applied(snapshot.asks, asks) == dict(final.asks)


def test_a_state_lasts_a_step_and_its_book_is_whole() -> None:
    number = STATES.number(NOON_MS + 57)
    assert number == NOON_MS == STATES.number(NOON_MS + 99)
    assert STATES.number(NOON_MS + 100) == NOON_MS + 100
    book = STATES.book(BTC, number)
    assert (book.timestamp, len(book.bids), len(book.asks)) == (number, BOOK_LEVELS, BOOK_LEVELS)


def test_in_a_fast_market_a_step_is_as_long_as_a_stream_can_follow() -> None:
    states = BookStates(venue_at(NOON_MS, speed=600))
    assert states.number(NOON_MS + 59_999) == NOON_MS
    assert states.number(NOON_MS + 60_000) == NOON_MS + 60_000


def feed_of(venue: Venue) -> DepthFeed:
    def encode(bids: Sequence[Level], asks: Sequence[Level], first: int, last: int, _: int) -> str:
        assert bids or asks
        return f"{first} {last}"

    return DepthFeed(venue, BTC, "key", BookStates(venue), 1_000, encode)


def test_updates_are_chained_without_a_gap() -> None:
    feed = feed_of(venue_at(NOON_MS))
    told = [feed.tick(NOON_MS + at * 1_000 + 30) for at in range(1, 4)]
    assert told == [
        [f"{NOON_MS + 1} {NOON_MS + 1_000}"],
        [f"{NOON_MS + 1_001} {NOON_MS + 2_000}"],
        [f"{NOON_MS + 2_001} {NOON_MS + 3_000}"],
    ]
    assert feed.tick(NOON_MS + 3_060) == []


def test_a_moment_without_change_is_part_of_the_next_update() -> None:
    venue = venue_at(NOON_MS)
    still = venue.prices.book(BTC, NOON_MS, BOOK_LEVELS)
    states = BookStates(venue)
    moved = NOON_MS + 2_000

    class Calm(GeneratedPrices):
        def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
            return still if at_ms < moved else states.book(BTC, moved)

    calm = Venue(Calm(seed=7), venue.clock, venue.faults)
    feed = feed_of(calm)
    assert feed.tick(NOON_MS + 1_000) == []
    assert feed.tick(moved) == [f"{NOON_MS + 1} {moved}"]


def test_after_the_clock_was_set_back_or_forth_the_stream_goes_on_from_there() -> None:
    feed = feed_of(venue_at(NOON_MS))
    assert feed.tick(NOON_MS + 3_600_000) == [f"{NOON_MS + 1} {NOON_MS + 3_600_000}"]
    assert feed.tick(NOON_MS) == []
    assert feed.tick(NOON_MS + 1_000) == [f"{NOON_MS + 1} {NOON_MS + 1_000}"]
