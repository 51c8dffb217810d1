"""The sandbox as the ``ccxt.pro`` client of Binance sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ccxt.base.errors import (
    BadRequest,
    BadSymbol,
    DDoSProtection,
    ExchangeError,
    ExchangeNotAvailable,
    NetworkError,
    OperationFailed,
)

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.binance_books import BOOK_LEVELS
from sandbox.flat_candles import FlatCandles
from sandbox.prices import Instrument
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    binance_client,
    clock_at,
    http_to,
    within_patience,
)

NOW = NOON_MS + 2 * MINUTE + 20_000
M1 = Interval.parse("1m")


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market a hundred times as fast as the real one, at a little past noon."""
    async with running_sandbox(SandboxConfig(market_clock=clock_at(NOW, speed=100))) as running:
        yield running


@pytest.fixture
async def client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    async with binance_client(sandbox) as asking:
        await asking.load_markets()
        yield asking


def instrument(sandbox: RunningSandbox, symbol: str) -> Instrument:
    return next(item for item in sandbox.venue.instruments() if item.symbol == symbol)


async def test_markets_are_loaded_by_one_request_with_their_steps(
    client: Any, sandbox: RunningSandbox
) -> None:
    btc = client.markets["BTC/USDT"]
    assert (btc["id"], btc["spot"], btc["active"]) == ("BTCUSDT", True, True)
    assert btc["precision"]["price"] == 0.01
    assert btc["precision"]["amount"] == 0.00001
    assert btc["limits"]["cost"]["min"] == 5
    assert client.markets["LUNA/USD"]["active"] is False
    assert all(market["spot"] for market in client.markets.values())
    assert sandbox.log.by_path == {"/api/v3/exchangeInfo": 1}


async def test_pages_of_candles_follow_each_other_from_a_time_on(
    client: Any, sandbox: RunningSandbox
) -> None:
    since = NOON_MS - 2_500 * MINUTE
    rows: list[list[float]] = []
    while True:
        page = await client.fetch_ohlcv("LRC/USDT", "1m", since=since, limit=1_000)
        rows += page
        if len(page) < 1_000:
            break
        since = page[-1][0] + MINUTE
    market = instrument(sandbox, "LRC/USDT")
    part = TimeRange(NOON_MS - 2_500 * MINUTE, NOON_MS)
    told = FlatCandles(sandbox.venue.prices).candles(market, M1, part)
    assert rows[:2_500] == [
        [item.timestamp, item.open, item.high, item.low, item.close, item.volume] for item in told
    ]
    assert any(row[5] == 0 for row in rows)


async def test_candles_up_to_a_time_are_the_newest_before_it(client: Any) -> None:
    rows = await client.fetch_ohlcv("BTC/USDT", "5m", limit=3, params={"until": NOON_MS - 1})
    assert [row[0] for row in rows] == [NOON_MS - at * 5 * MINUTE for at in (3, 2, 1)]
    assert len(await client.fetch_ohlcv("BTC/USDT", "1d")) == 500


async def test_a_book_tickers_and_trades_agree_on_the_price(client: Any) -> None:
    book = await client.fetch_order_book("BTC/USDT", 10)
    ticker = await client.fetch_ticker("BTC/USDT")
    best = (await client.fetch_bids_asks(["BTC/USDT"]))["BTC/USDT"]
    trades = await client.fetch_trades("BTC/USDT", limit=20)
    assert (len(book["bids"]), len(book["asks"]), len(trades)) == (10, 10, 20)
    assert best["bid"] < best["ask"]
    assert ticker["low"] <= ticker["last"] <= ticker["high"]
    assert ticker["baseVolume"] > 0
    assert trades[-1]["price"] == pytest.approx(ticker["last"], rel=0.01)
    assert ticker["last"] == pytest.approx(book["bids"][0][0], rel=0.01)


async def test_trades_are_paged_by_time_and_by_id(client: Any) -> None:
    first = await client.fetch_trades("ETH/USDT", since=NOON_MS - 60 * MINUTE, limit=30)
    assert first[0]["timestamp"] >= NOON_MS - 60 * MINUTE
    further = await client.fetch_trades(
        "ETH/USDT", limit=11, params={"fromId": int(first[-1]["id"])}
    )
    assert further[0] == first[-1]
    both = await client.fetch_trades("ETH/USDT", since=NOON_MS - 60 * MINUTE, limit=40)
    assert first + further[1:] == both


async def test_watched_candles_come_to_the_values_that_rest_tells(client: Any) -> None:
    seen: dict[int, list[float]] = {}

    async def until_two_closed() -> None:
        while len(seen) < 3:
            for row in await client.watch_ohlcv("LRC/USDT", "1m"):
                seen[row[0]] = list(row)

    await within_patience(until_two_closed)
    first, second, _ = sorted(seen)
    rows = await client.fetch_ohlcv("LRC/USDT", "1m", since=first, limit=2)
    assert rows == [seen[first], seen[second]]


async def test_a_watched_book_is_the_exchanges_book_at_each_update(
    client: Any, sandbox: RunningSandbox
) -> None:
    market = instrument(sandbox, "BTC/USDT")
    nonces = []
    for _ in range(12):
        book = await within_patience(lambda: client.watch_order_book("BTC/USDT"))
        told = sandbox.venue.prices.book(market, book["nonce"], BOOK_LEVELS)
        assert [tuple(level) for level in book["bids"]] == list(told.bids)
        assert [tuple(level) for level in book["asks"]] == list(told.asks)
        nonces.append(book["nonce"])
    assert nonces == sorted(set(nonces))


async def test_watched_trades_are_those_that_rest_tells(client: Any) -> None:
    seen: dict[str, dict[str, Any]] = {}

    async def until_some() -> None:
        while len(seen) < 15:
            for trade in await client.watch_trades("BTC/USDT"):
                seen[trade["id"]] = trade

    await within_patience(until_some)
    told = {trade["id"]: trade for trade in await client.fetch_trades("BTC/USDT", limit=1_000)}
    names = ("price", "amount", "timestamp", "side")
    for number, trade in seen.items():
        assert [trade[name] for name in names] == [told[number][name] for name in names]


@pytest.mark.parametrize(("name", "has_bid"), [("ticker", True), ("miniTicker", False)])
async def test_a_watched_ticker_is_told_again_and_again(
    client: Any, name: str, has_bid: bool
) -> None:
    first = await within_patience(lambda: client.watch_ticker("ETH/USDT", {"name": name}))
    second = await within_patience(lambda: client.watch_ticker("ETH/USDT", {"name": name}))
    assert second["timestamp"] > first["timestamp"]
    assert first["low"] <= first["last"] <= first["high"]
    assert (first["bid"] is not None) is has_bid


async def test_watched_best_prices_do_not_cross(client: Any) -> None:
    best = (await within_patience(lambda: client.watch_bids_asks(["BTC/USDT"])))["BTC/USDT"]
    assert best["bid"] < best["ask"]


async def test_a_client_that_stops_watching_stops_the_feed(
    client: Any, sandbox: RunningSandbox
) -> None:
    await within_patience(lambda: client.watch_ticker("ETH/USDT"))
    assert sandbox.hub.running_feeds == {"/ws ethusdt@miniTicker": 1}
    await within_patience(lambda: client.un_watch_ticker("ETH/USDT"))
    assert sandbox.hub.running_feeds == {}


async def test_an_unknown_interval_is_a_bad_request_and_a_delisted_market_a_bad_symbol(
    client: Any, sandbox: RunningSandbox
) -> None:
    with pytest.raises(BadRequest, match="-1120"):
        await client.fetch_ohlcv("BTC/USDT", "1s")
    async with http_to(sandbox) as http:
        await http.fault(kind="delisted", instrument="BTC/USDT")
        with pytest.raises(BadSymbol, match="-1121"):
            await client.fetch_ohlcv("BTC/USDT", "1m")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (418, DDoSProtection),
        (429, DDoSProtection),
        (500, OperationFailed),
        # On loopback ccxt does not look into its table of spot errors, which has this one's code.
        (503, ExchangeError),
        (504, OperationFailed),
    ],
)
async def test_a_status_is_the_error_that_it_means(
    client: Any, sandbox: RunningSandbox, status: int, error: type[Exception]
) -> None:
    async with http_to(sandbox) as http:
        await http.fault(kind="rest_status", status=status, count=1)
        with pytest.raises(error):
            await client.fetch_ohlcv("BTC/USDT", "1m")
        await http.fault(kind="rest_status", status=503, body="html", count=1)
        with pytest.raises(ExchangeNotAvailable):
            await client.fetch_ohlcv("BTC/USDT", "1m")


async def test_a_dropped_socket_fails_the_watch_and_the_next_one_connects_again(
    client: Any, sandbox: RunningSandbox
) -> None:
    await within_patience(lambda: client.watch_order_book("BTC/USDT"))
    async with http_to(sandbox) as http:
        await http.fault(kind="drop_sockets")

        async def until_it_fails() -> None:
            while True:
                await client.watch_order_book("BTC/USDT")

        with pytest.raises(NetworkError):
            await within_patience(until_it_fails)
    book = await within_patience(lambda: client.watch_order_book("BTC/USDT"))
    assert book["bids"][0][0] < book["asks"][0][0]
