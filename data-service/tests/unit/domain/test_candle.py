"""Which candles can be true."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.candle import Candle
from errors import InvalidEntry

prices = st.floats(1e-12, 1e12)


@given(st.lists(prices, min_size=4, max_size=4), st.floats(0, 1e15))
def test_open_and_close_between_low_and_high_make_a_candle(
    values: list[float], volume: float
) -> None:
    low, first, last, high = sorted(values)
    for opened, closed in ((first, last), (last, first)):
        candle = Candle(0, opened, high, low, closed, volume)
        assert candle.low <= candle.open <= candle.high


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["open", "high", "low", "close", "volume"])
def test_a_value_that_is_no_finite_number_is_refused(field: str, bad: float) -> None:
    values = {"open": 2.0, "high": 3.0, "low": 1.0, "close": 2.0, "volume": 1.0}
    with pytest.raises(InvalidEntry, match="finite"):
        Candle(0, **(values | {field: bad}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((2.0, 3.0, 0.0, 2.0, 1.0), "above zero"),
        ((2.0, 3.0, -1.0, 2.0, 1.0), "above zero"),
        ((2.0, 3.0, 1.0, 2.0, -0.1), "volume of zero or more"),
        ((4.0, 3.0, 1.0, 2.0, 1.0), "low <= open, close <= high"),
        ((2.0, 3.0, 1.0, 0.5, 1.0), "low <= open, close <= high"),
        ((2.0, 1.0, 3.0, 2.0, 1.0), "low <= open, close <= high"),
    ],
)
def test_a_candle_that_cannot_be_is_refused_with_the_reason(
    values: tuple[float, float, float, float, float], reason: str
) -> None:
    with pytest.raises(InvalidEntry, match=reason):
        Candle(0, *values)


def test_a_period_without_volume_may_be_a_candle() -> None:
    assert Candle(0, 1.0, 1.0, 1.0, 1.0, 0.0).volume == 0
