"""The sandbox as an unmodified ``ccxt.pro`` client of Crypto.com sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ccxt.base.errors import BadRequest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from tests.unit.sandbox.helpers import MINUTE, NOON_MS, ccxt_client, clock_at, within_patience

NOW = NOON_MS + 2 * MINUTE + 20_000


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market a hundred times as fast as the real one, at a little past noon."""
    async with running_sandbox(SandboxConfig(market_clock=clock_at(NOW, speed=100))) as running:
        yield running


@pytest.fixture
async def client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    async with ccxt_client(sandbox) as connected:
        await connected.load_markets()
        yield connected


async def test_markets_are_loaded_with_their_kinds_and_steps(client: Any) -> None:
    btc = client.markets["BTC/USD"]
    assert (btc["id"], btc["spot"], btc["active"]) == ("BTC_USD", True, True)
    assert btc["precision"] == {"price": 0.01, "amount": 0.00001}
    assert client.markets["LUNA/USD"]["active"] is False
    assert client.markets["BTC/USD:USD"]["swap"] is True
    assert {"ETH/USD", "SOL/USD", "BTC/USDT", "ETH/BTC", "BTC/EUR"} <= set(client.markets)


async def test_candles_since_a_time_are_the_first_ones_from_then_on(
    client: Any, sandbox: RunningSandbox
) -> None:
    since = NOON_MS - 100 * 5 * MINUTE
    rows = await client.fetch_ohlcv("BTC/USD", "5m", since=since, limit=7)
    market = sandbox.venue.instruments()[0]
    part = TimeRange(since, since + 7 * 5 * MINUTE)
    candles = sandbox.venue.prices.candles(market, Interval.parse("5m"), part)
    assert rows == [
        [item.timestamp, item.open, item.high, item.low, item.close, item.volume]
        for item in candles
    ]


async def test_the_newest_candles_end_with_the_forming_one(client: Any) -> None:
    rows = await client.fetch_ohlcv("BTC/USD", "5m")
    assert [row[0] for row in rows] == [NOON_MS - at * 5 * MINUTE for at in range(24, -1, -1)]
    closed = await client.fetch_ohlcv("BTC/USD", "1m", since=NOON_MS, limit=2)
    assert rows[-1][1] == closed[0][1]


async def test_a_page_holds_three_hundred_candles_and_days_are_told_too(client: Any) -> None:
    assert len(await client.fetch_ohlcv("ETH/USD", "5m", limit=300)) == 300
    days = await client.fetch_ohlcv("ETH/USD", "1d", since=NOON_MS - 60 * 86_400_000, limit=50)
    assert len(days) == 50


async def test_a_book_a_ticker_and_trades_agree_on_the_price(client: Any) -> None:
    book = await client.fetch_order_book("BTC/USD", 10)
    ticker = await client.fetch_ticker("BTC/USD")
    trades = await client.fetch_trades("BTC/USD", limit=20)
    assert (len(book["bids"]), len(book["asks"]), len(trades)) == (10, 10, 20)
    assert book["bids"][0][0] < book["asks"][0][0]
    assert ticker["low"] <= ticker["last"] <= ticker["high"]
    assert trades == sorted(trades, key=lambda trade: trade["timestamp"])
    assert ticker["last"] == pytest.approx(book["bids"][0][0], rel=0.01)
    assert trades[-1]["price"] == pytest.approx(ticker["last"], rel=0.01)
    assert ticker["baseVolume"] > 0


async def test_an_unknown_timeframe_is_a_bad_request(client: Any) -> None:
    with pytest.raises(BadRequest):
        await client.fetch_ohlcv("BTC/USD", "3m")


async def test_watched_candles_come_to_the_values_that_rest_tells(client: Any) -> None:
    seen: dict[int, list[float]] = {}

    async def until_two_closed() -> None:
        while len(seen) < 3:
            for row in await client.watch_ohlcv("BTC/USD", "1m"):
                seen[row[0]] = list(row)

    await within_patience(until_two_closed)
    first, second, _ = sorted(seen)
    rows = await client.fetch_ohlcv("BTC/USD", "1m", since=first, limit=2)
    assert rows == [seen[first], seen[second]]


async def test_a_watched_book_follows_its_updates_and_never_crosses(
    client: Any, sandbox: RunningSandbox
) -> None:
    client.options["watchOrderBook"]["checksum"] = True
    nonces = []
    for _ in range(12):
        # ccxt writes into the default of this argument, so each call needs its own.
        book = await within_patience(lambda: client.watch_order_book("BTC/USD", params={}))
        assert book["bids"][0][0] < book["asks"][0][0]
        assert (len(book["bids"]), len(book["asks"])) == (50, 50)
        nonces.append(book["nonce"])
        if len(nonces) < 3:
            continue
        told = sandbox.venue.prices.book(sandbox.venue.instruments()[0], book["timestamp"], 50)
        if book["timestamp"] == book["nonce"]:
            assert [level[:2] for level in book["bids"]] == [list(level) for level in told.bids]
    assert nonces == sorted(set(nonces))


async def test_watched_trades_are_those_that_rest_tells(client: Any) -> None:
    seen: dict[str, dict[str, Any]] = {}

    async def until_some() -> None:
        while len(seen) < 15:
            for trade in await client.watch_trades("BTC/USD"):
                seen[trade["id"]] = trade

    await within_patience(until_some)
    told = {trade["id"]: trade for trade in await client.fetch_trades("BTC/USD", limit=150)}
    for number, trade in seen.items():
        assert (trade["price"], trade["amount"]) == (
            told[number]["price"],
            told[number]["amount"],
        )


async def test_a_watched_ticker_has_bid_and_ask(client: Any) -> None:
    first = await within_patience(lambda: client.watch_ticker("ETH/USD"))
    second = await within_patience(lambda: client.watch_ticker("ETH/USD"))
    assert first["bid"] < first["ask"]
    assert second["timestamp"] > first["timestamp"]


async def test_a_client_that_stops_watching_stops_the_feed(
    client: Any, sandbox: RunningSandbox
) -> None:
    await within_patience(lambda: client.watch_ticker("ETH/USD"))
    assert sandbox.hub.running_feeds == {"ticker.ETH_USD": 1}
    await within_patience(lambda: client.un_watch_ticker("ETH/USD"))
    assert sandbox.hub.running_feeds == {}


async def test_a_restarted_sandbox_tells_the_same_past() -> None:
    told = []
    for _ in range(2):
        config = SandboxConfig(seed=3, market_clock=clock_at(NOW))
        async with running_sandbox(config) as running, ccxt_client(running) as asking:
            since = NOON_MS - 3 * 86_400_000
            told.append(
                [
                    await asking.fetch_ohlcv("BTC/USD", "1m", since=since, limit=300),
                    await asking.fetch_ohlcv("LRC/USD", "5m", since=since, limit=300),
                    await asking.fetch_trades("ETH/BTC", since=NOON_MS, limit=5),
                ]
            )
    assert told[0] == told[1]
    assert len(told[0][0]) == 300
    assert len(told[0][1]) < 300
