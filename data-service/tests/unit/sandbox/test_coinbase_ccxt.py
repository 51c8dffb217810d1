"""The sandbox as an unmodified ``ccxt.pro`` client of Coinbase sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ccxt.base.errors import BadRequest, ExchangeError, RateLimitExceeded

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    clock_at,
    coinbase_client,
    http_to,
    values_of,
    within_patience,
)

NOW = NOON_MS + 2 * MINUTE + 20_000


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market a hundred times as fast as the real one, at a little past noon."""
    async with running_sandbox(SandboxConfig(market_clock=clock_at(NOW, speed=100))) as running:
        yield running


@pytest.fixture
async def client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    async with coinbase_client(sandbox) as connected:
        await connected.load_markets()
        yield connected


async def test_markets_are_loaded_with_two_requests_and_their_steps(
    client: Any, sandbox: RunningSandbox
) -> None:
    btc = client.markets["BTC/USD"]
    assert (btc["id"], btc["spot"], btc["active"]) == ("BTC-USD", True, True)
    assert btc["precision"] == {"price": 0.01, "amount": 0.00001}
    assert client.markets["LUNA/USD"]["active"] is False
    assert {market["type"] for market in client.markets.values()} == {"spot"}
    assert {"ETH/USD", "BTC/USDT", "ETH/BTC", "BTC/EUR", "BTC/USDC"} <= set(client.markets)
    assert sandbox.log.by_path == {"/api/v3/brokerage/market/products": 2}


async def test_currencies_are_loaded_where_they_are_asked_for(client: Any) -> None:
    currencies = await client.fetch_currencies()
    assert (currencies["BTC"]["type"], currencies["EUR"]["type"]) == ("crypto", "fiat")
    assert "LRC" in currencies


async def test_pages_of_three_hundred_candles_follow_each_other_without_a_gap(
    client: Any, sandbox: RunningSandbox
) -> None:
    since = NOON_MS - 900 * 5 * MINUTE
    rows: list[list[float]] = []
    for page in range(3):
        start = since + page * 300 * 5 * MINUTE
        rows += await client.fetch_ohlcv("BTC/USD", "5m", since=start, limit=300)
    market = sandbox.venue.instruments()[0]
    told = sandbox.venue.prices.candles(market, Interval.parse("5m"), TimeRange(since, NOON_MS))
    assert rows == [[item.timestamp, *values_of(item)] for item in told]
    assert len(rows) == 900


async def test_a_range_of_more_candles_than_the_cap_is_a_bad_request(client: Any) -> None:
    end = {"until": NOON_MS}
    since = NOON_MS - 301 * MINUTE
    with pytest.raises(BadRequest, match=r"number of candles requested"):
        await client.fetch_ohlcv("BTC/USD", "1m", since=since, params=end)
    rows = await client.fetch_ohlcv("BTC/USD", "1m", since=since + MINUTE, params=end)
    assert [rows[0][0], rows[-1][0]] == [since + MINUTE, NOON_MS - MINUTE]


async def test_a_market_that_nobody_trades_in_for_a_while_has_fewer_candles(client: Any) -> None:
    since = NOON_MS - 300 * MINUTE
    rows = await client.fetch_ohlcv("LRC/USD", "1m", since=since, limit=300)
    assert 0 < len(rows) < 200


async def test_a_book_a_ticker_and_trades_agree_on_the_price(client: Any) -> None:
    book = await client.fetch_order_book("BTC/USD", 10)
    ticker = await client.fetch_ticker("BTC/USD")
    (of_day,) = (await client.fetch_tickers(["BTC/USD"])).values()
    trades = await client.fetch_trades("BTC/USD", limit=20)
    assert (len(book["bids"]), len(book["asks"]), len(trades)) == (10, 10, 20)
    assert book["bids"][0][0] < book["asks"][0][0]
    assert trades == sorted(trades, key=lambda trade: trade["timestamp"])
    assert ticker["last"] == pytest.approx(book["bids"][0][0], rel=0.01)
    assert ticker["bid"] < ticker["ask"]
    assert trades[-1]["price"] == pytest.approx(of_day["last"], rel=0.01)
    assert of_day["baseVolume"] > 0


async def test_the_exchange_tells_its_time(client: Any) -> None:
    assert NOW - 1_000 <= await client.fetch_time() < NOW + 3_600_000


async def test_watched_trades_are_those_that_rest_tells(client: Any) -> None:
    seen: dict[str, dict[str, Any]] = {}

    async def until_some() -> None:
        while len(seen) < 25:
            for trade in await client.watch_trades("BTC/USD"):
                seen[trade["id"]] = trade

    await within_patience(until_some)
    told = {trade["id"]: trade for trade in await client.fetch_trades("BTC/USD", limit=1000)}
    for number, trade in seen.items():
        for name in ("price", "amount", "side", "timestamp"):
            assert trade[name] == told[number][name]


async def test_a_watched_ticker_has_bid_and_ask(client: Any) -> None:
    first = await within_patience(lambda: client.watch_ticker("ETH/USD"))
    second = await within_patience(lambda: client.watch_ticker("ETH/USD"))
    assert first["bid"] < first["ask"]
    assert first["low"] <= first["last"] <= first["high"]
    assert second["timestamp"] > first["timestamp"]


async def test_what_is_quoted_in_usdc_is_watched_by_its_own_name(client: Any) -> None:
    ticker = await within_patience(lambda: client.watch_ticker("ETH/USDC"))
    assert ticker["symbol"] == "ETH/USD"
    book = await within_patience(lambda: client.watch_order_book("ETH/USDC"))
    assert book["bids"][0][0] < book["asks"][0][0]


async def test_a_watched_book_is_the_market_s_at_each_of_its_times(
    client: Any, sandbox: RunningSandbox
) -> None:
    times = []
    for _ in range(10):
        book = await within_patience(lambda: client.watch_order_book("BTC/USD"))
        told = sandbox.venue.prices.book(sandbox.venue.instruments()[0], book["timestamp"], 200)
        assert [tuple(level) for level in book["bids"]] == list(told.bids)
        assert [tuple(level) for level in book["asks"]] == list(told.asks)
        times.append(book["timestamp"])
    assert times == sorted(set(times))


async def test_a_client_that_stops_watching_stops_the_feed(
    client: Any, sandbox: RunningSandbox
) -> None:
    await within_patience(lambda: client.watch_ticker("ETH/USD"))
    assert sandbox.hub.running_feeds == {"ticker ETH-USD": 1}
    await within_patience(lambda: client.un_watch_ticker("ETH/USD"))
    assert sandbox.hub.running_feeds == {}


async def test_errors_are_of_the_kinds_that_the_client_makes_of_them(
    client: Any, sandbox: RunningSandbox
) -> None:
    async with http_to(sandbox) as http:
        for status, kind in ((429, RateLimitExceeded), (503, ExchangeError)):
            await http.fault(kind="rest_status", status=status, path="candles", count=1)
            with pytest.raises(kind):
                await client.fetch_ohlcv("BTC/USD", "5m")
        number = await http.fault(kind="delisted", instrument="ETH/USD")
        with pytest.raises(ExchangeError, match=r"valid product_id is required"):
            await client.fetch_ohlcv("ETH/USD", "5m")
        assert await http.hits(number) == 1
    with pytest.raises(BadRequest, match=r"granularity"):
        await client.fetch_ohlcv("BTC/USD", "4h")
