"""The numbers of a summary, against their definitions."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.candle import Candle
from historical.columns import NOTHING, Candles
from historical.summary import (
    max_drawdown_percent,
    thinned,
    typical_price_vwap,
    volatility,
)
from tests.support.market import FIVE, T0, candle, candles


def flat(timestamp: int, close: float, volume: float = 1.0) -> Candle:
    return Candle(timestamp, close, close, close, close, volume)


def test_the_drawdown_is_the_deepest_fall_below_an_earlier_close() -> None:
    closes = [100, 120, 90, 110, 60, 200]
    series = Candles.of(flat(T0 + at * FIVE, close) for at, close in enumerate(closes))
    assert max_drawdown_percent(series) == pytest.approx(50)


def test_the_vwap_weights_typical_prices_by_volume() -> None:
    series = Candles.of([flat(T0, 10, 1), flat(T0 + FIVE, 20, 3)])
    assert typical_price_vwap(series) == pytest.approx(17.5)
    assert typical_price_vwap(Candles.of([flat(T0, 10, 0)])) is None


def test_volatility_is_the_sample_deviation_of_logarithmic_returns() -> None:
    series = Candles.of(flat(T0 + at * FIVE, close) for at, close in enumerate([100, 110, 105]))
    expected = statistics.stdev([math.log(110 / 100), math.log(105 / 110)])
    assert volatility(series) == pytest.approx(expected)
    assert volatility(series[:2]) is None


@given(count=st.integers(1, 400), most=st.integers(1, 60), holes=st.sets(st.integers(1, 399)))
def test_thinned_candles_keep_extremes_and_volume(count: int, most: int, holes: set[int]) -> None:
    series = candles(T0, count, holes=holes)
    shown, periods = thinned(Candles.of(series), FIVE, most)
    assert 1 <= len(shown) <= most
    assert max(item.high for item in shown) == max(item.high for item in series)
    assert min(item.low for item in shown) == min(item.low for item in series)
    assert sum(item.volume for item in shown) == pytest.approx(sum(item.volume for item in series))
    assert all((item.timestamp - T0) % (periods * FIVE) == 0 for item in shown)
    assert (shown[0].open, shown[-1].close) == (series[0].open, series[-1].close)


def test_nothing_thins_to_nothing() -> None:
    assert thinned(NOTHING, FIVE, 50) == (NOTHING, 1)
    one = Candles.of([candle(T0)])
    assert thinned(one, FIVE, 50) == (one, 1)
