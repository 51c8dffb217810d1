"""Which order books can be true."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.order_book import BOOK_DEPTH, OrderBook
from errors import InvalidEntry


@given(st.sets(st.integers(1, 10_000), min_size=2, max_size=160), st.data())
def test_a_sorted_book_is_accepted_and_its_top_is_its_best_levels(
    prices: set[int], data: st.DataObject
) -> None:
    ascending = [float(price) for price in sorted(prices)]
    middle = data.draw(st.integers(0, len(ascending)))
    book = OrderBook(
        7,
        bids=tuple((price, 1.0) for price in reversed(ascending[:middle])),
        asks=tuple((price, 1.0) for price in ascending[middle:]),
    )
    top = book.top()
    assert top.timestamp == 7
    assert top.bids == book.bids[:BOOK_DEPTH]
    assert top.asks == book.asks[:BOOK_DEPTH]
    assert book.depth == max(len(book.bids), len(book.asks))


def test_a_side_may_be_empty() -> None:
    assert OrderBook(0, bids=(), asks=()).top(3) == OrderBook(0, (), ())


@pytest.mark.parametrize(
    ("bids", "asks", "reason"),
    [
        (((1.0, 1.0), (2.0, 1.0)), (), "not sorted"),
        (((2.0, 1.0), (2.0, 1.0)), (), "not sorted"),
        ((), ((2.0, 1.0), (1.0, 1.0)), "not sorted"),
        ((), ((1.0, 1.0), (1.0, 1.0)), "not sorted"),
        (((2.0, 1.0),), ((2.0, 1.0),), "crosses"),
        (((3.0, 1.0),), ((2.0, 1.0),), "crosses"),
        (((0.0, 1.0),), (), "level"),
        (((1.0, 0.0),), (), "level"),
        (((math.nan, 1.0),), (), "level"),
        ((), ((1.0, math.inf),), "level"),
    ],
)
def test_a_book_that_cannot_be_is_refused(
    bids: tuple[tuple[float, float], ...], asks: tuple[tuple[float, float], ...], reason: str
) -> None:
    with pytest.raises(InvalidEntry, match=reason):
        OrderBook(0, bids, asks)
