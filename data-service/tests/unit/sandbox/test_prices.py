from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.prices import GeneratedPrices, Instrument
from tests.unit.sandbox.helpers import MINUTE, NOON_MS

DAY = 86_400_000
M1 = Interval.parse("1m")
M5 = Interval.parse("5m")
PRICES = GeneratedPrices(seed=7)
MARKETS = {item.symbol: item for item in PRICES.markets()}
BTC, QUIET = MARKETS["BTC/USD"], MARKETS["LRC/USD"]

markets = st.sampled_from([BTC, MARKETS["ETH/BTC"], MARKETS["CRO/USD"], QUIET])
moments = st.integers(NOON_MS - 3 * DAY, NOON_MS)
intervals = st.sampled_from(["5m", "15m", "1h", "4h", "1d"]).map(Interval.parse)


def exact(value: float) -> Decimal:
    return Decimal(repr(value))


def added_up(parts: list[Candle], timestamp: int) -> Candle | None:
    if not parts:
        return None
    return Candle(
        timestamp=timestamp,
        open=parts[0].open,
        high=max(part.high for part in parts),
        low=min(part.low for part in parts),
        close=parts[-1].close,
        volume=float(sum(exact(part.volume) for part in parts)),
    )


@settings(max_examples=40, deadline=None)
@given(market=markets, moment=moments, interval=intervals)
def test_a_candle_is_exactly_its_minutes(
    market: Instrument, moment: int, interval: Interval
) -> None:
    opened = interval.floor(moment)
    minutes = PRICES.candles(market, M1, TimeRange(opened, opened + interval.milliseconds))
    assert PRICES.candle(market, interval, opened) == added_up(list(minutes), opened)


@settings(max_examples=40, deadline=None)
@given(market=markets, moment=moments, interval=st.sampled_from([M1, M5]))
def test_a_candle_is_exactly_its_trades(
    market: Instrument, moment: int, interval: Interval
) -> None:
    opened = interval.floor(moment)
    trades = PRICES.trades(market, TimeRange(opened, opened + interval.milliseconds))
    ticks = [
        Candle(trade.timestamp, trade.price, trade.price, trade.price, trade.price, trade.amount)
        for trade in trades
    ]
    assert PRICES.candle(market, interval, opened) == added_up(ticks, opened)


@settings(max_examples=40, deadline=None)
@given(market=markets, moment=moments, interval=intervals)
def test_a_forming_candle_grows_into_the_final_one(
    market: Instrument, moment: int, interval: Interval
) -> None:
    opened = interval.floor(moment)
    final = PRICES.candle(market, interval, opened)
    forming = PRICES.forming(market, interval, moment)
    assert PRICES.forming(market, interval, opened + interval.milliseconds - 1) == final
    if forming is not None:
        assert final is not None
        assert forming.open == final.open
        assert final.low <= forming.low <= forming.high <= final.high
        assert forming.volume <= final.volume


@settings(max_examples=30, deadline=None)
@given(market=markets, moment=moments, depth=st.sampled_from([1, 10, 50, 150]))
def test_a_book_is_full_and_never_crosses(market: Instrument, moment: int, depth: int) -> None:
    # The book's own type refuses sides that cross or are out of order.
    book = PRICES.book(market, moment, depth)
    assert (len(book.bids), len(book.asks)) == (depth, depth)


@settings(max_examples=20, deadline=None)
@given(market=markets, start=moments, length=st.integers(1, 90 * MINUTE))
def test_trades_of_a_range_are_those_of_its_halves(
    market: Instrument, start: int, length: int
) -> None:
    middle, end = start + length // 3, start + length
    halves = [
        *PRICES.trades(market, TimeRange(start, middle)),
        *PRICES.trades(market, TimeRange(middle, end)),
    ]
    assert PRICES.trades(market, TimeRange(start, end)) == halves
    ids = [trade.id for trade in halves]
    assert ids == sorted(set(ids))


def test_the_same_seed_tells_the_same_past_whatever_is_asked_first() -> None:
    again = GeneratedPrices(seed=7)
    again.candles(QUIET, Interval.parse("1d"), TimeRange(NOON_MS - 9 * DAY, NOON_MS))
    for market in PRICES.markets():
        hour = TimeRange(NOON_MS - 60 * MINUTE, NOON_MS)
        assert again.trades(market, hour) == PRICES.trades(market, hour)
        assert again.candles(market, M5, hour) == PRICES.candles(market, M5, hour)
        assert again.book(market, NOON_MS, 50) == PRICES.book(market, NOON_MS, 50)


def test_another_seed_tells_of_another_market() -> None:
    hour = TimeRange(NOON_MS - 60 * MINUTE, NOON_MS)
    assert GeneratedPrices(seed=8).candles(BTC, M1, hour) != PRICES.candles(BTC, M1, hour)


def test_prices_are_near_those_of_the_real_world_and_on_the_tick() -> None:
    for symbol, typical in (("BTC/USD", 90_000), ("ETH/USD", 3_000), ("ETH/BTC", 1 / 30)):
        market = MARKETS[symbol]
        for candle in PRICES.candles(market, M5, TimeRange(NOON_MS - DAY, NOON_MS)):
            assert 0.5 * typical < candle.low <= candle.high < 2 * typical
            assert round(candle.close, market.price_decimals) == candle.close
            assert round(candle.volume, market.quantity_decimals) == candle.volume


def test_a_busy_market_trades_every_minute_and_a_quiet_one_does_not() -> None:
    day = TimeRange(NOON_MS - DAY, NOON_MS)
    assert len(PRICES.candles(BTC, M1, day)) == 1440
    assert 0 < len(PRICES.candles(QUIET, M1, day)) < 700
    assert 100 < len(PRICES.candles(QUIET, M5, day)) < 288


def test_nothing_is_known_from_before_the_history_begins() -> None:
    prices = GeneratedPrices(seed=7, history_start_ms=NOON_MS)
    before = TimeRange(NOON_MS - DAY, NOON_MS + 5 * MINUTE)
    assert [item.timestamp for item in prices.candles(BTC, M5, before)] == [NOON_MS]
    assert prices.trades(BTC, before)[0].timestamp >= NOON_MS
    assert prices.forming(BTC, M5, NOON_MS - 1) is None


def test_seconds_are_not_offered() -> None:
    assert not PRICES.offers(BTC, Interval.parse("1s"))


@pytest.mark.parametrize("name", ["1d", "1w"])
def test_long_candles_add_up_too(name: str) -> None:
    interval = Interval.parse(name)
    opened = interval.floor(NOON_MS)
    days = PRICES.candles(
        BTC, Interval.parse("1h"), TimeRange(opened, opened + interval.milliseconds)
    )
    assert PRICES.candle(BTC, interval, opened) == added_up(list(days), opened)
