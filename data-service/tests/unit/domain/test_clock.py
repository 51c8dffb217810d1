"""Market time."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.clock import MarketClock, http_date
from tests.support.clock import ManualClock, settle_loop


def test_real_time_is_the_default() -> None:
    clock = MarketClock.parse(" real ")
    before = time.time_ns() // 1_000_000
    assert before <= clock.now_ms() <= before + 5000
    assert abs(clock.now_ms() - clock.real_ms()) <= 5000


def test_market_time_starts_where_it_is_told_and_passes_at_its_speed() -> None:
    real = time.time_ns() // 1_000_000
    clock = MarketClock(origin=real - 10_000, market=1_000_000, speed=60)
    assert 1_600_000 <= clock.now_ms() <= 1_600_000 + 60 * 5000


@given(st.integers(0, 10**13), st.integers(0, 10**13), st.floats(0.001, 100_000))
def test_a_clock_is_the_same_after_being_written_as_a_setting(
    origin: int, market: int, speed: float
) -> None:
    clock = MarketClock(origin, market, speed)
    assert MarketClock.parse(clock.to_setting()) == clock


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "7",
        "[]",
        "null",
        '{"origin": 1, "market": 2}',
        '{"origin": "x", "market": 2, "speed": 1}',
        '{"origin": 1, "market": 2, "speed": 0}',
        '{"origin": 1, "market": 2, "speed": -1}',
        '{"origin": 1, "market": 2, "speed": NaN}',
        '{"origin": 1, "market": 2, "speed": 100001}',
    ],
)
def test_a_setting_that_is_no_clock_is_refused_with_what_it_takes(text: str) -> None:
    with pytest.raises(ValueError, match="takes 'real' or a JSON object"):
        MarketClock.parse(text)


async def test_waiting_for_a_moment_ends_once_market_time_has_reached_it() -> None:
    clock = MarketClock(origin=time.time_ns() // 1_000_000, market=0, speed=100_000)
    await clock.sleep_until(1000)
    assert clock.now_ms() >= 1000


async def test_waiting_for_the_past_ends_at_once() -> None:
    clock = MarketClock()
    before = clock.monotonic()
    await asyncio.wait_for(clock.sleep_until(0), 1)
    assert clock.monotonic() - before < 1


async def test_waiting_for_real_time_goes_by_real_seconds() -> None:
    clock = MarketClock(speed=0.001)
    before = clock.monotonic()
    await clock.sleep_real(0.01)
    assert clock.monotonic() - before >= 0.009


def test_a_moment_is_written_as_http_does() -> None:
    assert http_date(1_795_348_800_999) == "Sun, 22 Nov 2026 12:00:00 GMT"


async def test_a_manual_clock_wakes_its_sleepers_in_the_order_of_their_moments() -> None:
    clock = ManualClock(1000)
    woken: list[tuple[str, int]] = []

    async def sleeper(name: str, until: int) -> None:
        await clock.sleep_until(until)
        woken.append((name, clock.now_ms()))

    tasks = [
        asyncio.create_task(sleeper(name, until))
        for name, until in (("late", 1500), ("early", 1200), ("past", 900), ("never", 9999))
    ]
    await settle_loop()
    assert woken == [("past", 1000)]
    await clock.advance(1000)
    assert woken[1:] == [("early", 1200), ("late", 1500)]
    assert clock.now_ms() == clock.real_ms() == 2000
    tasks[-1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
