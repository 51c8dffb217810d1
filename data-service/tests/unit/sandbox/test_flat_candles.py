from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.flat_candles import FlatCandles
from sandbox.prices import GeneratedPrices, Instrument
from tests.unit.sandbox.helpers import MINUTE, NOON_MS, values_of

DAY = 86_400_000
M1 = Interval.parse("1m")
M5 = Interval.parse("5m")
INNER = GeneratedPrices(seed=7)
PRICES = FlatCandles(INNER)
MARKETS = {item.symbol: item for item in PRICES.markets()}
QUIET = MARKETS["LRC/USD"]

markets = st.sampled_from([MARKETS["BTC/USD"], MARKETS["CRO/USD"], QUIET])
moments = st.integers(NOON_MS - 3 * DAY, NOON_MS)
intervals = st.sampled_from(["1m", "3m", "5m", "15m", "1h", "4h", "1d"]).map(Interval.parse)


def added_up(parts: list[Candle], decimals: int) -> tuple[float, ...]:
    return (
        parts[0].open,
        max(part.high for part in parts),
        min(part.low for part in parts),
        parts[-1].close,
        round(sum(part.volume for part in parts), decimals),
    )


@settings(max_examples=60, deadline=None)
@given(market=markets, moment=moments, interval=intervals)
def test_a_candle_is_its_minutes_added_up_the_flat_ones_included(
    market: Instrument, moment: int, interval: Interval
) -> None:
    opened = interval.floor(moment)
    part = TimeRange(opened, opened + interval.milliseconds)
    minutes = list(PRICES.candles(market, M1, part))
    assert [item.timestamp for item in minutes] == list(range(part.start, part.end, MINUTE))
    candle = PRICES.candle(market, interval, opened)
    assert candle is not None
    assert values_of(candle) == added_up(minutes, market.quantity_decimals)


@settings(max_examples=40, deadline=None)
@given(market=markets, moment=moments)
def test_a_minute_is_as_it_was_traded_or_flat_at_the_close_before_it(
    market: Instrument, moment: int
) -> None:
    opened = M1.floor(moment)
    part = TimeRange(opened, opened + 60 * MINUTE)
    traded = {item.timestamp: item for item in INNER.candles(market, M1, part)}
    for before, minute in itertools.pairwise(PRICES.candles(market, M1, part)):
        if minute.timestamp in traded:
            assert minute == traded[minute.timestamp]
        else:
            assert set(values_of(minute)[:4]) == {before.close}
            assert minute.volume == 0


@settings(max_examples=60, deadline=None)
@given(market=markets, moment=moments, interval=intervals)
def test_a_forming_candle_is_the_minutes_that_closed_and_the_one_that_forms(
    market: Instrument, moment: int, interval: Interval
) -> None:
    opened, minute = interval.floor(moment), M1.floor(moment)
    last = PRICES.forming(market, M1, moment)
    assert last is not None
    parts = [*PRICES.candles(market, M1, TimeRange(opened, minute)), last]
    forming = PRICES.forming(market, interval, moment)
    assert forming is not None
    assert values_of(forming) == added_up(parts, market.quantity_decimals)
    end = opened + interval.milliseconds
    assert PRICES.forming(market, interval, end - 1) == PRICES.candle(market, interval, opened)


@settings(max_examples=30, deadline=None)
@given(market=markets, start=moments, length=st.integers(1, 90 * MINUTE), interval=intervals)
def test_candles_of_a_range_are_those_of_its_halves(
    market: Instrument, start: int, length: int, interval: Interval
) -> None:
    middle, end = start + length // 3, start + length
    halves = [
        *PRICES.candles(market, interval, TimeRange(start, middle)),
        *PRICES.candles(market, interval, TimeRange(middle, end)),
    ]
    assert PRICES.candles(market, interval, TimeRange(start, end)) == halves


def test_a_quiet_market_has_as_many_candles_as_a_busy_one() -> None:
    day = TimeRange(NOON_MS - DAY, NOON_MS)
    assert len(PRICES.candles(QUIET, M1, day)) == 1440
    assert len(PRICES.candles(QUIET, M5, day)) == 288
    assert len(INNER.candles(QUIET, M5, day)) < 288


@pytest.mark.parametrize("interval", [M1, M5], ids=str)
def test_nothing_is_told_before_the_first_trade(interval: Interval) -> None:
    inner = GeneratedPrices(seed=7, history_start_ms=NOON_MS)
    prices = FlatCandles(inner)
    first = inner.trades(QUIET, TimeRange(NOON_MS, NOON_MS + DAY))[0].timestamp
    assert first > NOON_MS + MINUTE
    part = TimeRange(NOON_MS - DAY, first + 60 * MINUTE)
    assert prices.candles(QUIET, interval, part)[0].timestamp == interval.floor(first)
    assert prices.forming(QUIET, interval, first - 1) is None
    assert prices.forming(QUIET, interval, NOON_MS - 1) is None
    forming = prices.forming(QUIET, interval, first)
    assert forming is not None
    assert forming.open == forming.close


def test_trades_books_and_markets_are_those_of_the_prices_below() -> None:
    hour = TimeRange(NOON_MS - 60 * MINUTE, NOON_MS)
    assert PRICES.markets() == INNER.markets()
    assert PRICES.trades(QUIET, hour) == INNER.trades(QUIET, hour)
    assert PRICES.book(QUIET, NOON_MS, 10) == INNER.book(QUIET, NOON_MS, 10)
    assert PRICES.offers(QUIET, M5)
    assert not PRICES.offers(QUIET, Interval.parse("1s"))
