"""Candles made of trades, against candles by the definition; and, where trades were captured,
against those that were captured with them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.candle import Candle
from domain.interval import Interval
from domain.trade import Trade
from exchange_source.plugins.traded_candles import TradedCandles
from tests.support.records import Record, from_sample

MINUTE = 60_000
M1 = Interval.parse("1m")
# Captured trades are counted where there are any; generated ones always.
SOURCES = ("generated", "captured") if os.environ.get("CB_TRADE_SAMPLE_DATA") else ("generated",)


def trade(at: int, price: float = 100.0, amount: float = 1.0) -> Trade:
    return Trade(id=str(at), timestamp=at, price=price, amount=amount, side="buy")


def by_definition(trades: Sequence[Trade], interval: Interval) -> dict[int, Candle]:
    """The candles of ascending trades, and not by the code under test."""
    grouped = itertools.groupby(trades, key=lambda item: interval.floor(item.timestamp))
    found: dict[int, Candle] = {}
    for opened, group in grouped:
        members = list(group)
        prices = [member.price for member in members]
        # One after the other, as every trade adds to what there is: a sum of floats has an order.
        volume = sum(member.amount for member in members)
        found[opened] = Candle(opened, prices[0], max(prices), min(prices), prices[-1], volume)
    return found


def told(candles: TradedCandles, chunks: Iterable[Sequence[Trade]]) -> dict[int, Candle]:
    """What was last told of each period."""
    return {candle.timestamp: candle for chunk in chunks for candle in candles.add(chunk)}


# Few periods and few prices, so that trades meet, and equal times, so that their order counts.
trades = st.lists(
    st.builds(
        trade,
        st.integers(0, 5 * MINUTE - 1),
        st.sampled_from([99.0, 100.0, 101.5, 250.0]),
        st.sampled_from([0.1, 0.25, 3.0]),
    ),
    min_size=1,
    max_size=40,
).map(lambda found: sorted(found, key=lambda item: item.timestamp))


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[Trade], list[list[Trade]]]:
    """Ascending trades, and the same in chunks; some chunks are empty."""
    found = draw(trades)
    cuts = draw(st.lists(st.integers(0, len(found)), max_size=12).map(sorted))
    edges = [0, *cuts, len(found)]
    return found, [found[start:end] for start, end in itertools.pairwise(edges)]


@given(chunked())
def test_however_trades_come_the_last_word_on_each_period_is_its_candle(
    case: tuple[list[Trade], list[list[Trade]]],
) -> None:
    found, chunks = case
    wanted = by_definition(found, M1)
    del wanted[M1.floor(found[0].timestamp)]  # it was joined midway
    assert told(TradedCandles(M1), chunks) == wanted


@given(chunked())
def test_each_chunk_tells_the_periods_that_it_changes_once_and_ascending(
    case: tuple[list[Trade], list[list[Trade]]],
) -> None:
    found, chunks = case
    candles = TradedCandles(M1)
    joined = M1.floor(found[0].timestamp)
    for chunk in chunks:
        changed = {M1.floor(member.timestamp) for member in chunk} - {joined}
        assert [candle.timestamp for candle in candles.add(chunk)] == sorted(changed)


@given(chunked(), st.randoms(use_true_random=False))
def test_the_order_within_a_chunk_does_not_matter(
    case: tuple[list[Trade], list[list[Trade]]], rng: random.Random
) -> None:
    _, chunks = case
    # At one time the order of arrival is all there is: such trades stay in theirs.
    mixed = []
    for chunk in chunks:
        at_once = [list(group) for _, group in itertools.groupby(chunk, lambda it: it.timestamp)]
        rng.shuffle(at_once)
        mixed.append(list(itertools.chain.from_iterable(at_once)))
    assert told(TradedCandles(M1), mixed) == told(TradedCandles(M1), chunks)


def test_a_period_that_was_joined_midway_is_not_told_and_the_next_is() -> None:
    candles = TradedCandles(M1)
    assert candles.add([trade(30_000)]) == []
    assert candles.add([trade(59_999)]) == []
    assert candles.add([trade(MINUTE, 101.0, 2.0)]) == [
        Candle(MINUTE, 101.0, 101.0, 101.0, 101.0, 2.0)
    ]


def test_trades_that_come_late_from_before_the_first_one_make_no_candle() -> None:
    candles = TradedCandles(M1)
    assert candles.add([trade(2 * MINUTE)]) == []
    assert candles.add([trade(1 * MINUTE)]) == []
    assert candles.add([trade(2 * MINUTE + 1)]) == []
    assert candles.add([trade(3 * MINUTE)]) == [Candle(3 * MINUTE, 100, 100, 100, 100, 1.0)]


def test_a_trade_that_comes_late_does_not_bring_back_a_period_that_another_followed() -> None:
    candles = TradedCandles(M1)
    candles.add([trade(0), trade(MINUTE, 101.0), trade(2 * MINUTE, 102.0)])
    assert candles.add([trade(MINUTE + 1, 500.0)]) == []
    assert candles.add([trade(2 * MINUTE + 1, 103.0)]) == [
        Candle(2 * MINUTE, 102.0, 103.0, 102.0, 103.0, 2.0)
    ]


def test_what_was_told_does_not_change_afterwards() -> None:
    candles = TradedCandles(M1)
    (first,) = candles.add([trade(0), trade(MINUTE)])
    candles.add([trade(MINUTE + 1, 200.0)])
    assert first == Candle(MINUTE, 100.0, 100.0, 100.0, 100.0, 1.0)


# -- two days of a market --------------------------------------------------------------------------


def recorded_trades(source: str) -> list[Trade]:
    """Two days of trades in whole amounts, so that their sums are exact in any order."""
    if source == "captured":
        folder = Path(os.environ["CB_TRADE_SAMPLE_DATA"]) / "candles"
        frame = pd.read_feather(folder / "XRP_ETH-trades.feather")
        return [
            Trade(id=number, timestamp=int(at), price=price, amount=amount, side=side)
            for number, at, price, amount, side in zip(
                frame["id"], frame["timestamp"], frame["price"], frame["amount"], frame["side"],
                strict=True,
            )
        ]  # fmt: skip
    rng = random.Random(19)
    at, price, found = 1_570_752_000_000, 1_400, []
    for number in range(12_000):
        at += int(rng.expovariate(1 / 14_000))
        price = max(1_000, price + rng.choice((-1, 0, 0, 1)))
        amount = float(rng.randint(1, 2_000))
        found.append(Trade(str(number), at, price / 1e6, amount, rng.choice(("buy", "sell"))))
    return found


def recorded_candles(source: str, trades: Sequence[Trade], interval: Interval) -> dict[int, Candle]:
    """The candles of those trades, as whoever captured them had them from the exchange."""
    if source == "generated":
        return by_definition(trades, interval)
    record: Record = from_sample(f"XRP_ETH-{interval}", days=1)
    return {at: Candle(at, *row) for at, row in record.rows.items()}


def in_chunks(trades: Sequence[Trade], seed: int) -> list[list[Trade]]:
    """Now one, now hundreds at once, as a stream has them after a pause."""
    rng, rest, chunks = random.Random(seed), list(trades), []
    while rest:
        size = rng.choice((1, 1, 2, 5, 40, 300))
        chunks.append(rest[:size])
        rest = rest[size:]
    return chunks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["1m", "5m"])
@pytest.mark.parametrize("source", SOURCES)
def test_two_days_of_trades_give_the_candles_of_the_exchange(
    source: str, name: str, seed: int
) -> None:
    interval = Interval.parse(name)
    recorded = recorded_trades(source)
    wanted = recorded_candles(source, recorded, interval)
    del wanted[min(wanted)]  # it was joined midway
    assert len(wanted) > 500
    assert told(TradedCandles(interval), in_chunks(recorded, seed)) == wanted
