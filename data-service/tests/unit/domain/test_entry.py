"""Entries and their documents."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from domain.candle import Candle
from domain.entry import BOOK_TOLERANCE_MS, Entry
from domain.interval import KNOWN_INTERVALS, Interval
from domain.series import Series
from errors import InvalidEntry, UnknownSchema
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_book, make_entry

amounts = st.floats(1e-9, 1e9)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    interval = Interval.parse(draw(st.sampled_from(KNOWN_INTERVALS)))
    opened = interval.floor(draw(st.integers(10**12, 4 * 10**12)))
    low, first, last, high = sorted(draw(st.lists(amounts, min_size=4, max_size=4)))
    end = opened + interval.milliseconds
    taken = end + draw(st.integers(-BOOK_TOLERANCE_MS, BOOK_TOLERANCE_MS))
    return Entry(
        series=Series(draw(st.sampled_from(["crypto.com", "binance"])), draw(st.text(min_size=1)),
                      interval),
        market=draw(st.text(min_size=1)),
        candle=Candle(opened, first, high, low, last, draw(st.floats(0, 1e9))),
        order_book=draw(st.none() | st.builds(make_book, st.just(taken))),
        source=draw(st.sampled_from(["stream", "rest"])),
        revision=draw(st.integers(1, 2**40)),
    )  # fmt: skip


@given(entries())
def test_an_entry_is_the_same_after_being_stored_as_json(entry: Entry) -> None:
    content = json.dumps(entry.to_document())
    assert Entry.from_document(json.loads(content)) == entry
    assert Entry.from_json(content.encode(), entry.series) == entry


def test_a_document_has_its_published_keys_in_order() -> None:
    assert make_entry(book=True).to_document() == {
        "exchange": "crypto.com",
        "coin": "BTC",
        "market": "BTC/USD",
        "interval": "5m",
        "timestamp": NOON,
        "open": 100.0,
        "high": 200.0,
        "low": 50.0,
        "close": 100.5,
        "volume": 3.25,
        "order_book": {
            "timestamp": NOON + FIVE_MINUTES,
            "bids": [[99.0, 1.0], [98.0, 2.0]],
            "asks": [[101.0, 1.5], [102.0, 2.5]],
        },
        "source": "rest",
        "revision": 1,
        "schema": 1,
    }
    assert list(make_entry().to_document()) == [
        "exchange", "coin", "market", "interval", "timestamp", "open", "high", "low", "close",
        "volume", "order_book", "source", "revision", "schema",
    ]  # fmt: skip


@pytest.mark.parametrize("field", [key for key in make_entry().to_document() if key != "schema"])
def test_a_document_without_one_of_its_fields_is_refused(field: str) -> None:
    document = make_entry().to_document()
    del document[field]
    with pytest.raises(InvalidEntry, match=field):
        Entry.from_document(document)
    with pytest.raises(InvalidEntry, match=field):
        Entry.from_json(json.dumps(document).encode(), BTC)


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange": ""},
        {"coin": None},
        {"market": 7},
        {"interval": "7m"},
        {"timestamp": str(NOON)},
        {"timestamp": True},
        {"timestamp": float(NOON)},
        {"close": "100.5"},
        {"close": None},
        {"volume": True},
        {"source": "guess"},
        {"revision": 0},
        {"revision": 1.0},
        {"order_book": {}},
        {"order_book": []},
        {"order_book": {"timestamp": NOON + FIVE_MINUTES, "bids": [[1]], "asks": []}},
        {"order_book": {"timestamp": NOON + FIVE_MINUTES, "bids": [["a", 1]], "asks": []}},
        {"order_book": {"timestamp": NOON + FIVE_MINUTES, "bids": None, "asks": []}},
    ],
)
def test_a_document_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    document = make_entry().to_document() | changes
    with pytest.raises(InvalidEntry):
        Entry.from_document(document)
    with pytest.raises(InvalidEntry):
        Entry.from_json(json.dumps(document).encode(), BTC)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"close": NaN}'])
def test_bytes_that_are_no_document_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidEntry):
        Entry.from_json(content, BTC)


def test_a_document_of_another_series_is_refused() -> None:
    with pytest.raises(InvalidEntry, match=r"crypto\.com BTC 5m is none of"):
        Entry.from_json(
            json.dumps(make_entry().to_document()).encode(), dataclasses.replace(BTC, coin="ETH")
        )


@pytest.mark.parametrize("changes", [{"schema": 0}, {"schema": 2}, {"schema": 2, "close": "new"}])
def test_a_document_of_another_schema_is_refused_with_what_to_do(changes: dict[str, Any]) -> None:
    document = make_entry().to_document() | changes
    with pytest.raises(UnknownSchema, match="upgrade the service"):
        Entry.from_document(document)
    with pytest.raises(UnknownSchema, match="upgrade the service"):
        Entry.from_json(json.dumps(document).encode(), BTC)


@pytest.mark.parametrize("schema", [None, "1", True, 1.5])
def test_a_document_whose_schema_is_no_number_is_no_document(schema: object) -> None:
    with pytest.raises(InvalidEntry, match="schema") as refused:
        Entry.from_document(make_entry().to_document() | {"schema": schema})
    assert not isinstance(refused.value, UnknownSchema)


def test_a_time_that_opens_no_period_is_refused_with_the_one_that_does() -> None:
    with pytest.raises(InvalidEntry, match=f"use {NOON}"):
        make_entry(NOON + 1)


def test_a_revision_below_one_is_refused() -> None:
    with pytest.raises(InvalidEntry, match="below 1"):
        make_entry().with_revision(0)


@pytest.mark.parametrize("distance", [-BOOK_TOLERANCE_MS - 1, BOOK_TOLERANCE_MS + 1])
def test_a_book_far_from_the_end_of_the_period_is_refused(distance: int) -> None:
    with pytest.raises(InvalidEntry, match="10 s"):
        make_entry().with_order_book(make_book(NOON + FIVE_MINUTES + distance))


def test_an_entry_knows_its_period() -> None:
    entry = make_entry()
    assert (entry.timestamp, entry.end) == (NOON, NOON + FIVE_MINUTES)


def test_a_changed_copy_leaves_the_entry_as_it_is() -> None:
    entry = make_entry(book=True)
    assert entry.with_revision(2) == replace(entry, revision=2)
    assert entry.with_order_book(None) == make_entry()
    assert entry == make_entry(book=True)
