"""What answers prove: for any series and any exchange that tells less than it knows."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange
from exchange_source.interfaces import HistoricalData
from exchange_source.proof import MAX_REQUESTS, PageProof

MINUTE = 60_000
INTERVAL = Interval.parse("1m")
BASE = 1_700_000_040_000
GRACE = 5_000
ROWS = 12


def at(period: int) -> int:
    return BASE + period * MINUTE


def prove(
    existing: Iterable[int], page: tuple[int, int], now: int, *, most: int = ROWS
) -> tuple[HistoricalData, int]:
    """Ask an exchange that has these periods until nothing more can be learned."""
    rows = sorted(at(period) for period in existing)
    proof = PageProof(INTERVAL, TimeRange(at(page[0]), at(page[1])), rows=ROWS, grace_ms=GRACE)
    requests = 0
    while (window := proof.next_window()) is not None:
        requests += 1
        found = [time for time in rows if time in window and time <= now][-most:]
        proof.add(window, [Candle(time, 1, 1, 1, 1, 1) for time in found], now)
    return proof.conclude(), requests


@given(
    existing=st.sets(st.integers(0, 120)),
    first=st.integers(0, 110),
    length=st.integers(1, ROWS - 2),
    now=st.integers(at(0), at(125)),
    most=st.sampled_from([ROWS, ROWS, 5, 3]),
)
def test_nothing_is_claimed_that_is_not_so(
    existing: set[int], first: int, length: int, now: int, most: int
) -> None:
    data, requests = prove(existing, (first, first + length), now, most=most)
    assert requests <= MAX_REQUESTS
    visible = {period for period in existing if at(period) <= now}
    told = [(candle.timestamp - BASE) // MINUTE for candle in data.candles]
    assert told == sorted(set(told))
    for period in told:
        assert period in visible
        assert first <= period < first + length
        assert max(visible) > period or at(period + 1) + GRACE <= now
    for run in data.empty:
        for period in range((run.start - BASE) // MINUTE, (run.end - BASE) // MINUTE):
            assert period not in visible
            assert min(visible) < period < max(visible)
            assert at(period + 1) + GRACE <= now
    if data.not_offered is not None:
        assert data.not_offered.start == at(first)
        assert not any(at(period) < data.not_offered.end for period in visible)


@given(
    existing=st.sets(st.integers(0, 120), min_size=2),
    first=st.integers(0, 110),
    length=st.integers(1, ROWS - 2),
)
def test_every_period_between_two_rows_is_settled(
    existing: set[int], first: int, length: int
) -> None:
    data, _ = prove(existing, (first, first + length), at(130))
    known = {candle.timestamp for candle in data.candles}
    for period in range(first, first + length):
        if min(existing) < period < max(existing):
            empty = any(at(period) in run for run in data.empty)
            assert (period in existing) == (at(period) in known)
            assert empty == (period not in existing)


@pytest.mark.parametrize("oldest", [3, 40, 119])
def test_what_precedes_the_oldest_row_is_not_offered(oldest: int) -> None:
    data, _ = prove(range(oldest, 121), (0, 10), at(121))
    assert data.not_offered == TimeRange(at(0), at(oldest))


def test_an_ordinary_page_costs_one_request() -> None:
    data, requests = prove(range(121), (50, 60), at(121))
    assert requests == 1
    assert len(data.candles) == 10


def test_the_running_period_costs_one_request() -> None:
    _, requests = prove(range(121), (120, 121), at(120) + 10)
    assert requests == 1


def test_an_exchange_without_a_row_is_asked_for_its_newest_and_no_more() -> None:
    data, requests = prove([], (50, 60), at(121))
    assert requests == 3
    assert data == HistoricalData(candles=(), exchange_time=at(121))


def test_a_row_that_a_later_answer_holds_is_not_empty() -> None:
    page = TimeRange(at(1), at(5))
    proof = PageProof(INTERVAL, page, rows=ROWS, grace_ms=GRACE)
    window = TimeRange(at(0), at(6))

    def rows(*periods: int) -> list[Candle]:
        return [Candle(at(period), 1, 1, 1, 1, 1) for period in periods]

    proof.add(window, rows(0, 2, 5), at(50))
    assert proof.conclude().empty == (TimeRange(at(1), at(2)), TimeRange(at(3), at(5)))
    proof.add(window, rows(0, 1, 2, 5), at(50))
    assert proof.conclude().empty == (TimeRange(at(3), at(5)),)
